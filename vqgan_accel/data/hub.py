"""Images from Hugging Face `datasets`: on disk (save_to_disk, parquet, arrow, webdataset's tars, an image folder), by
name from the hub, or (parquet, arrow, tars) by URL from object storage.

The library stores and finds the rows; decoding stays with us, so that a broken row can be named and images are
treated alike wherever they come from.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data.names import Names
from vqgan_accel.data.parquet import read_by_row_groups
from vqgan_accel.data.remote import remote_files
from vqgan_accel.data.source import (
    DEFAULT_LABEL,
    STORES,
    Labels,
    MissingSplitError,
    decode_image,
    in_utf8,
    is_stored_dataset,
    is_url,
    listed,
    nearest_name,
    stores,
)
from vqgan_accel.distributed import process_index

SAVED_SHARDS = 64  # in which what save_to_disk wrote is streamed


def open_split(config: DataConfig, split: str, key: str) -> HubSource:
    """See data/sources.py."""
    return HubSource(config, split, key)


class HubSource:
    """The image column of one split of `config.path`.

    A slice such as 'train[:90%]' is a split too, except of what save_to_disk wrote. `key` is the config key that named
    the split, for error sentences.
    Raises FileNotFoundError or ValueError for an unknown data set, split or column, naming those that there are.
    """

    def __init__(self, config: DataConfig, split: str, key: str = "data.train_split") -> None:
        dataset = load_rows(config, split, key, streaming=False)
        self.label_column = config.label_column
        self.all_columns = dataset
        self.title = f"{config.path}[{split}]"
        root = Path(str(config.path)).expanduser()
        own = root / _base_and_slice(split)[0]
        self.folder = own if own.is_dir() else root  # that paths are relative to, where it is an image folder
        self.column = config.image_column
        self.rows = image_rows(dataset, self.column, self.title)
        if not len(self.rows):
            raise ValueError(f"{self.title} has no rows; give a split that has some")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.title} {self.file_name(index)}"

    def file_name(self, index: int) -> str:
        return f"row {index}"

    def stored_names(self) -> Names:
        """(N,) The path that is stored with each image, or 'row i'. What this machine's folders are called is left out
        of it."""
        roots = (
            os.path.abspath(self.folder),
            datasets.config.HF_DATASETS_CACHE,
            huggingface_hub.constants.HF_HUB_CACHE,
        )
        paths = pc.struct_field(self.rows.with_format("arrow")[:][self.column], "path")
        stored = (path for chunk in paths.chunks for path in chunk.to_pylist())

        def own(path: str | None) -> str | None:
            for root in roots:
                path = path and path.removeprefix(f"{root}/")
            return path

        return Names.of(own(path) or f"row {index}" for index, path in enumerate(stored))

    def labels(self) -> Labels | None:
        column = self.label_column or DEFAULT_LABEL
        features = self.all_columns.features
        feature = features.get(column)
        usable = isinstance(feature, datasets.ClassLabel) or (
            isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
        )
        stored = self.all_columns.with_format("arrow")[:][column] if usable else None
        if stored is None or stored.null_count:
            if self.label_column is None:
                return None
            if feature is None:
                reason = "is not there"
            elif stored is None:
                reason = f"holds {feature}, not class numbers"
            else:
                reason = f"holds {stored.null_count} empty values"
            raise ValueError(
                f"data.label_column '{column}' of {self.title} {reason}; its columns are {listed([*features])}"
            )
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        return Labels(stored.to_numpy().astype(np.int64), names)

    def fingerprint(self) -> str:
        return f"{len(self.rows)} images"

    def stored(self, index: int) -> bytes:
        return stored_bytes(self.rows[index][self.column])

    def open(self, index: int) -> Image.Image:
        return open_cell(self.rows[index][self.column])


def open_cell(cell: dict[str, Any] | None) -> Image.Image:
    return decode_image(BytesIO(stored_bytes(cell)))


def stored_bytes(cell: dict[str, Any] | None) -> bytes:
    """Of a row's image: {bytes, path}, of which one may be None."""
    cell = cell or {"bytes": None, "path": None}
    if cell["bytes"] is not None:
        return cell["bytes"]
    if cell["path"] is not None:
        if "://" in cell["path"]:  # a file on the hub, of a data set that is streamed
            with fsspec.open(cell["path"], "rb") as file:
                return file.read()
        return Path(cell["path"]).read_bytes()
    raise ValueError("the row holds no image")


def load_rows(config: DataConfig, split: str, key: str, streaming: bool) -> Any:
    """The data set `config.path`: a datasets.Dataset, or an IterableDataset where streaming."""
    path = Path(str(config.path)).expanduser()
    remote = is_url(str(config.path))
    if not remote and not path.exists():
        return _load_from_hub(config, split, key, streaming)
    if config.subset or config.revision:
        where = f"{config.path} is a URL" if remote else f"{path} is local"
        raise ValueError(f"data.path {where}; unset data.subset and data.revision, which are the hub's")
    if remote:
        return _load_files(*remote_files(str(config.path)), str(config.path), split, key, streaming)
    as_files = path.is_dir() and not is_stored_dataset(path) and process_index() == 0
    if as_files:
        print(
            f"NOTE: data.path {path} is a folder of image files, of which `datasets` looks at each before it begins: "
            "minutes for a million, and nearly as long the next time; data.backend=folder (or auto) lists them at once",
            file=sys.stderr,
        )
    with _locally(bars=as_files):
        return _load_local(path, split, key, streaming)


def _load_local(path: Path, split: str, key: str, streaming: bool) -> Any:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        with _one_sentence(path):
            saved = datasets.load_from_disk(str(path))
        splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or path.name): saved}
        _require_split(split, split, splits, path, key)
        rows = splits[split]
        return rows.to_iterable_dataset(min(SAVED_SHARDS, max(1, len(rows)))) if streaming else rows
    if path.is_file() and path.suffix not in STORES:
        raise ValueError(f"data.path {path} is neither a file that ends in {listed([*STORES])} nor a folder")
    files = [path] if path.is_file() else stores(path)
    base, slice_ = _base_and_slice(split)
    if not files:
        # Named by us where we can: `datasets` itself takes a class folder named "test" for the split.
        if not (path / base).is_dir():
            return _built(path, split, key, streaming, "imagefolder", data_dir=glob.escape(str(path)))
        name = base if re.fullmatch(r"\w+(\.\w+)*", base) else "rows"  # it has no splits named "." or "my album"
        own = {name: f"{glob.escape(str(path / base))}/**"}
        return _built(path, name + slice_, key, streaming, "imagefolder", data_files=own)
    return _load_files(path, {file: str(file) for file in files}, path, split, key, streaming)


def _load_files(
    root: PurePath, files: Mapping[PurePath, str], path: Path | str, split: str, key: str, streaming: bool
) -> Any:
    """Of the files of many images at `root`, each with what `datasets` opens, those of the split."""
    base, slice_ = _base_and_slice(split)
    folders = {file: file.parent.name for file in files if file.parent not in (root, root.parent)}
    chosen = [
        glob.escape(name)
        for file, name in files.items()
        if re.match(rf"{re.escape(base)}(?![a-zA-Z])", file.stem) or folders.get(file) == base
    ]
    if not chosen:
        names = {re.split("[-_.]", file.stem)[0] for file in files} | set(folders.values())
        _require_split(split, base, names, path, key)
    kind = STORES[next(iter(files)).suffix]
    return _built(path, "rows" + slice_, key, streaming, kind, data_files={"rows": chosen})


def _load_from_hub(config: DataConfig, split: str, key: str, streaming: bool) -> Any:
    path = str(config.path)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise FileNotFoundError(f"no file or folder at data.path {path}; give one, or a name on the Hugging Face hub")
    return _built(path, split, key, streaming, path, config.subset, revision=config.revision)


def _built(path: Path | str, split: str, key: str, streaming: bool, *arguments: Any, **options: Any) -> Any:
    """What datasets.load_dataset(*arguments, **options) gives, but a wrong split is found before a long download."""
    with _one_sentence(path):
        builder = datasets.load_dataset_builder(*arguments, **options)
    _require_split(split, _base_and_slice(split)[0], builder.info.splits or builder.config.data_files, path, key)
    with _one_sentence(path):
        if streaming:
            read_by_row_groups(builder)
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def _base_and_slice(split: str) -> tuple[str, str]:
    """'train[:90%]' -> 'train', '[:90%]'."""
    base, bracket, rest = split.partition("[")
    return base, bracket + rest


def _require_split(split: str, base: str, known: Iterable[str], path: Path | str, key: str) -> None:
    known = sorted(map(str, known))  # `datasets` has a type for splits
    if base not in known:
        near = nearest_name(base, known)
        hint = f"it has {listed(known)}; set {key}={near}" if near else f"set {key} to one of {listed(known)}"
        raise MissingSplitError(f"no split '{split}' in data.path {path}; {hint}", known)


def image_rows(dataset: Any, column: str, title: str) -> Any:
    """The one column, each row {bytes, path} or None."""
    columns = dataset.column_names
    if column not in columns:
        images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        near = images[0] if len(images) == 1 else nearest_name(column, images or columns)
        hint = f"did you mean data.image_column={near}?" if near else "set data.image_column to one of them"
        raise ValueError(f"no column '{column}' in {title}, which has {listed(columns)}; {hint}")
    dataset = dataset.select_columns([column])
    try:
        return dataset.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # the last is Arrow's
        raise ValueError(
            f"column '{column}' of {title} holds {dataset.features[column]}, not images; set another data.image_column"
        ) from error


@contextmanager
def _one_sentence(path: Path | str) -> Iterator[None]:
    """Turns what `datasets` raises into sentences for users."""
    try:
        yield
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"data.path {path} is no local file or folder, nor a data set that the Hugging Face hub shows you; correct "
            "it (and data.revision, if set), or log in with `hf auth login` if the data set is private"
        ) from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"data.path {path} is no local file or folder, and the Hugging Face hub cannot be reached to look for it "
            "there; give a folder, or connect to the network"
        ) from error
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        if isinstance(unicode := error.__cause__ or error, UnicodeEncodeError):
            raise ValueError(
                f"{in_utf8(unicode.object)} in data.path {path} has a name that is not UTF-8, which the `datasets` "
                "library cannot keep; rename it, or set data.backend=folder, which reads files of any name"
            ) from error
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data.path {path} cannot be read by the `datasets` library: {reason}") from error


@contextmanager
def _locally(bars: bool) -> Iterator[None]:
    """For data on disk: no progress `bars` where they would flash by, once per process, and no word to the hub, which
    `datasets` asks to count even these; without a network that takes 5 s."""
    were_off, counted = datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    if not bars:
        datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted
        if not were_off:
            datasets.enable_progress_bars()
