"""What the images of a split are, to the last byte: so that two machines can be sure that they train on the same.

A fingerprint (ImageSource.fingerprint) costs nothing and knows numbers and names; this reads everything once.
"""

from __future__ import annotations

import hashlib
import socket
from concurrent.futures import ThreadPoolExecutor

from vqgan_accel.data.source import ImageSource
from vqgan_accel.distributed import gathered, process_index

DIGITS = 64  # of the hash: 256 bits, in base 16
READ_AT_ONCE = 1024  # images that are handed to the threads together


def content_sum(source: ImageSource, threads: int, first: int = 0, every: int = 1) -> int:
    """The sum of the images' hashes over the indices first, first + every, ...: shares of several processes add up.

    An image's hash is sha256 of its name and of its bytes as they are stored. ValueError, naming it, where one cannot
    be read.
    """
    indices = range(first, len(source), every)
    total = 0
    with ThreadPoolExecutor(max(1, threads)) as pool:  # hashing and reading leave the interpreter's lock alone
        for start in range(0, len(indices), READ_AT_ONCE):
            total += sum(pool.map(lambda index: _image_hash(source, index), indices[start : start + READ_AT_ONCE]))
    return total


def content_hash(total: int) -> str:
    """The split's hash from the sum over all of its images: 64 hex digits."""
    return f"{total % 16**DIGITS:0{DIGITS}x}"


def require_content(source: ImageSource, threads: int, expected: str) -> None:
    """ValueError where the images are not those of data.expected_hash, on whichever machine. Every process calls it;
    those of one machine share its images."""
    machine, rank = socket.gethostname(), process_index()
    machines = gathered({str(rank): machine})
    here = sorted(int(number) for number, name in machines.items() if name == machine)
    shares = gathered({str(rank): content_sum(source, threads, here.index(rank), len(here))})
    for name in sorted(set(machines.values())):
        found = content_hash(sum(share for number, share in shares.items() if machines[number] == name))
        if found != expected:
            raise ValueError(
                f"the training images on {name} are not those of data.expected_hash: they have {found}; copy the data "
                "set again, or give what `vqgan-accel data-info CONFIG --hash` prints of the images that you mean"
            )


def _image_hash(source: ImageSource, index: int) -> int:
    try:
        stored = source.stored(index)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read image {source.name(index)}: {error}") from None
    name = source.file_name(index).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(hashlib.sha256(name).digest() + stored).digest(), "big")
