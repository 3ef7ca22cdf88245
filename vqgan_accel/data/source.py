"""What a source of images offers to the loaders, and the few lines that all sources share."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Files of many images: ending -> the `datasets` builder that reads them.
STORES = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
DEFAULT_LABEL = "label"  # the column or field of class numbers, where data.label_column does not say another
SplitName = Literal["train", "validation", "test"]


class Labels(NamedTuple):
    """The class of each image."""

    numbers: NDArray[np.int64]  # (N,)
    names: list[str] | None  # of the classes, where the data set has some

    def fingerprint(self) -> str:
        """16 hex digits of sha256."""
        content = self.numbers.astype("<i8").tobytes() + "\n".join(self.names or []).encode(errors="surrogateescape")
        return hashlib.sha256(content).hexdigest()[:16]


class MissingSplitError(FileNotFoundError, ValueError):
    """The data set is there, and has no split of that name: these are `known`."""

    def __init__(self, sentence: str, known: Sequence[str]) -> None:
        super().__init__(sentence)
        self.known = list(known)


@runtime_checkable
class ImageSource(Protocol):
    """The images of one split. An index means the same image for ever and on every machine."""

    @property
    def title(self) -> str:
        """What an error sentence calls them all: a folder, a file, or 'DATASET[split]'."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an error sentence calls the image: a file's path, or 'DATASET[split] row i'."""

    def file_name(self, index: int) -> str:
        """What tells the image from others of its split: a relative path, or 'row i'."""

    def stored_names(self) -> Sequence[str] | None:
        """(N,) What data.validation_fraction goes by; None where the data set keeps no names."""

    def labels(self) -> Labels | None:
        """None where the data set has no classes. ValueError where data.label_column names something else."""

    def fingerprint(self) -> str:
        """Tells one set of images from another: their number and, where they have some, a hash of their names."""

    def stored(self, index: int) -> bytes:
        """The image's bytes as they are stored, not decoded. OSError or ValueError where they cannot be read."""

    def open(self, index: int) -> Image.Image:
        """The image as stored (any mode), fully loaded. What it raises on a broken image is up to Pillow."""


def decode_image(file: str | Path | BytesIO) -> Image.Image:
    """The first frame of an image file, in memory; the file is closed again."""
    with Image.open(file) as image:
        image.load()
        return image


def is_stored_dataset(folder: Path) -> bool:
    """Whether the `datasets` library wrote it (save_to_disk), or it holds files of many images."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) or bool(stores(folder))


def is_url(path: str) -> bool:
    return "://" in path


def stores(folder: Path) -> list[Path]:
    """The files of many images in a folder, all of one kind, sorted.

    Two levels: a look into every class folder of an image folder would take minutes.
    """
    for ending in STORES:
        if files := sorted([*folder.glob(f"*{ending}"), *folder.glob(f"*/*{ending}")]):
            return files
    return []


def nearest_name(wanted: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: it begins alike (val, validation) or is spelt alike; None if none is."""
    names = list(known)
    alike = [name for name in names if name.lower()[:3] == wanted.lower()[:3]]
    near = difflib.get_close_matches(wanted, alike, n=1, cutoff=0) or difflib.get_close_matches(wanted, names, n=1)
    return near[0] if near else None


def listed(names: Sequence[str]) -> str:
    """Names for an error sentence, shortened where there are many."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def in_utf8(name: str) -> str:
    """A file's name may be any bytes; what is no UTF-8 is shown as question marks."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
