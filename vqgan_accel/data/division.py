"""A validation split that is cut off the training split (data.validation_fraction): by a hash of each image's name, so
that it is the same on every machine, and that images which come later move none of those that were there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqgan_accel.data.names import Names
from vqgan_accel.data.source import ImageSource, Labels

Group = Literal["file", "folder"]


def divided(
    whole: ImageSource, names: Sequence[str], fraction: float, group: Group, side: Literal["train", "validation"]
) -> Part:
    """One side of `whole`, whose images have these `names`, in its order.

    ValueError where either side would be empty.
    """
    places = np.fromiter((place_of(name, group) for name in names), np.float64, len(names))
    if not (places < fraction).any():
        raise ValueError(_too_far(whole, fraction, group, "validation", f"more than {places.min():.6f}"))
    if not (places >= fraction).any():
        raise ValueError(_too_far(whole, fraction, group, "training", f"less than {places.max():.6f}"))
    chosen = places < fraction if side == "validation" else places >= fraction
    return Part(whole, np.flatnonzero(chosen), f"validation_fraction {fraction:g} by {group}")


def place_of(name: str, group: Group) -> float:
    """In [0, 1): the image is for validation where that is less than data.validation_fraction.

    By folder all images of one folder have the same; those that lie in none, each its own.
    """
    hashed = name.rpartition("/")[0] or name if group == "folder" else name
    return int.from_bytes(hashlib.sha256(hashed.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


class Part:
    """Some images of a source, each called what it is called there. An ImageSource."""

    def __init__(self, whole: ImageSource, indices: NDArray[np.int64], rule: str) -> None:
        self.whole = whole
        self.indices = indices  # (N,) into `whole`
        self.rule = rule

    @property
    def title(self) -> str:
        return self.whole.title

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def file_name(self, index: int) -> str:
        return self.whole.file_name(int(self.indices[index]))

    def stored_names(self) -> Names | None:
        names = self.whole.stored_names()
        return None if names is None else Names.of(names[index] for index in self.indices)

    def labels(self) -> Labels | None:
        labels = self.whole.labels()
        return labels and Labels(labels.numbers[self.indices], labels.names)

    def fingerprint(self) -> str:
        return f"{len(self)} of {self.whole.fingerprint()}; {self.rule}"

    def stored(self, index: int) -> bytes:
        return self.whole.stored(int(self.indices[index]))

    def open(self, index: int) -> Image.Image:
        return self.whole.open(int(self.indices[index]))


def _too_far(whole: ImageSource, fraction: float, group: Group, side: str, right: str) -> str:
    return (
        f"data.validation_fraction {fraction:g} by {group} leaves none of the {len(whole)} images for {side}; give "
        f"{right}, or more images"
    )
