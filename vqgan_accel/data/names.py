"""Many names, as one array of bytes that all processes share."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 10_000  # names that an iteration reads together


class Names(Sequence[str]):
    """A sequence of strings, each as text or as the bytes that a file system has (surrogateescape).

    A worker that is forked shares it with its parent. Of a list it would get a copy, page by page, as the strings'
    counters of references change: more than 100 MB of a million names.
    """

    def __init__(self, lines: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.lines = lines  # each name and a line feed
        self.ends = ends  # (N,) of these, in `lines`

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        lines, ends = bytearray(), array("q")
        for name in names:
            lines += name.encode(errors="surrogateescape") + b"\n"
            ends.append(len(lines))
        return cls(np.frombuffer(lines, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        start = self.ends[place - 1] if place else 0
        return self.lines[start : self.ends[place] - 1].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), AT_ONCE):
            ends = self.ends[first : first + AT_ONCE].tolist()
            content, offset = self.lines[start : ends[-1]].tobytes(), start
            for end in ends:
                yield content[start - offset : end - offset - 1].decode(errors="surrogateescape")
                start = end

    def joined(self) -> memoryview:
        """The bytes of all, with a line feed between two."""
        return self.lines.data[:-1]
