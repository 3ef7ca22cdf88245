"""Data sets of codes, as `vqgan-accel tokenize` writes them: what the second stage is trained on.

DIR/data/train-00000-of-00012.parquet   one row for every view of an image
DIR/manifest.json                       of which images and by which tokenizer; whether it is complete

The layout is that of Hugging Face data sets: `datasets.load_dataset(DIR)` reads it too, but without a look at the
manifest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "manifest.json"
LARGEST_UINT16 = 2**16  # codes; above they are int32


def shard_file(folder: Path, split: str, number: int, count: int) -> Path:
    return folder / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    """FileNotFoundError or ValueError where there is none that can be read."""
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no tokens: it has no {MANIFEST}; `vqgan-accel tokenize` makes some")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return {**manifest}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not the manifest of a folder of tokens ({error})") from None


def shard_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """All that there will be, in the order of the images."""
    count = manifest["shards"]
    return [shard_file(folder, manifest["split"], number, count) for number in range(count)]


def load_tokens(folder: str | Path) -> Dataset:
    """The codes as a `datasets.Dataset`, in the order of the images and, of one image, of its views.

    Columns: codes (h*w numbers, row by row; uint16, or int32 from 65537 codes on), label (where the images have
    classes), file_name, index (of the image in its split), view. The manifest has h and w as `code_grid`.
    FileNotFoundError or ValueError where the folder is not complete.
    """
    import datasets

    folder = Path(folder)
    manifest = read_manifest(folder)
    files = shard_files(folder, manifest)
    missing = [file for file in files if not file.is_file()]
    if missing or not manifest["complete"]:
        raise ValueError(
            f"{folder} is not complete: {len(missing)} of {len(files)} shards are missing; give the same `vqgan-accel "
            "tokenize` again, which goes on"
        )
    rows = datasets.Dataset.from_parquet([str(file) for file in files])
    assert isinstance(rows, datasets.Dataset)
    if len(rows) != manifest["rows"]:
        raise ValueError(f"{folder} has {len(rows)} rows and its manifest says {manifest['rows']}: copy it again")
    return rows
