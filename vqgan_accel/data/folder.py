"""Images as plain files below PATH/SPLIT, in an order that is the same on every machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data.listing import EXTENSIONS, image_files
from vqgan_accel.data.names import Names
from vqgan_accel.data.source import Labels, MissingSplitError, decode_image, is_url, listed, nearest_name


def open_split(config: DataConfig, split: str, key: str) -> FolderSource:
    """See data/sources.py."""
    if is_url(str(config.path)):
        raise ValueError(
            f"data.path {config.path} is a URL; set data.backend=hub, which reads parquet files and tars there, or "
            "give a folder of images"
        )
    return FolderSource(Path(str(config.path)).expanduser(), split, key, config.label_column)


class FolderSource:
    """Every image file below `root/split`, sorted by its relative path.

    Letter case of the extension does not matter, links are followed, and names that begin with a dot are left out
    (.ipynb_checkpoints, macOS's ._photo.jpg). `key` is the config key that named the split, for error sentences.
    Raises FileNotFoundError for a missing folder and ValueError where there is no image in it.
    """

    def __init__(self, root: Path, split: str, key: str = "data.train_split", label_column: str | None = None) -> None:
        self.label_column = label_column
        self.folder = _split_folder(root, split, key)
        self.title = str(self.folder)
        self.files = image_files(self.folder)
        if not self.files:
            raise ValueError(
                f"no images below {self.folder}; put files there that end in {', '.join(EXTENSIONS)} (any letter case)"
            )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        # (Not as a Path: Python keeps a table of all parts of paths that there were, in each worker.)
        return os.path.join(self.title, self.files[index])

    def file_name(self, index: int) -> str:
        return self.files[index]

    def stored_names(self) -> Names:
        """(N,) As file_name has them."""
        return self.files

    def labels(self) -> Labels | None:
        """Classes are the folders below the split's, where no image lies outside of them."""
        if self.label_column is not None:
            raise ValueError(
                f"data.label_column {self.label_column} is for data sets and betons; the classes of a folder of images "
                "are its folders: set it to null"
            )
        found: dict[str, int] = {}  # class -> the how manieth that was met
        met = np.empty(len(self), np.int64)
        for index, file in enumerate(self.files):
            folder, slash, _ = file.partition("/")
            if not slash:
                return None
            met[index] = found.setdefault(folder, len(found))
        names = sorted(found)
        return Labels(np.argsort([found[name] for name in names])[met], names)

    def fingerprint(self) -> str:
        names = hashlib.sha256(self.files.joined()).hexdigest()
        return f"{len(self.files)} images, names {names[:16]}"

    def stored(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()

    def open(self, index: int) -> Image.Image:
        return decode_image(self.name(index))


def _split_folder(root: Path, split: str, key: str) -> Path:
    if root.is_file():
        raise ValueError(f"data.path {root} is a file, not a folder of images; for a parquet file set data.backend=hub")
    if not root.is_dir():
        near = nearest_name(root.name, _folders(root.parent)) if root.parent.is_dir() else None
        hint = f"did you mean {root.parent / near}?" if near else f"give a folder that holds the folder '{split}'"
        raise FileNotFoundError(f"no folder at data.path {root}; {hint}")
    if not (root / split).is_dir():
        folders = _folders(root)
        near = nearest_name(split, folders)
        if folders:
            hint = f"it has {listed(folders)}; set {key}={near}" if near else f"set {key} to one of {listed(folders)}"
        else:
            hint = f"it has no folders; move the images there, or set {key}=. to use {root} itself"
        raise MissingSplitError(f"no folder '{split}' in data.path {root}; {hint}", folders)
    return root / split


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def require_outside(output: Path, folder: Path, key: str) -> None:
    """ValueError where `output`, which `key` named, lies in a folder of images: what is written there would be read as
    images the next time."""
    if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{key} {output} lies among the images of {folder}, and the pictures written there would be taken for some "
            "of them; give a folder elsewhere"
        )
