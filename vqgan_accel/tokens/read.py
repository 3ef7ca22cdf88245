"""Data sets of codes, as `vqgan-accel tokenize` writes them: what the second stage is trained on.

DIR/data/train-00000-of-00012.parquet   one row for every view of an image
DIR/manifest.json                       of which images and by which tokenizer; whether it is complete

The layout is that of Hugging Face data sets: `datasets.load_dataset(DIR)` reads it too, but without a look at the
manifest, and not where a shard has no rows, because none of its images could be read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "manifest.json"
REQUIRED = {"split": str, "shards": int, "shard_images": int, "complete": bool, "views": list, "code_grid": list}
LARGEST_UINT16 = 2**16  # codes; above they are int32


def shard_file(folder: Path, split: str, number: int, count: int) -> Path:
    """`split` as `datasets` may call one: of letters, digits and underscores."""
    name = re.sub(r"\W+", "_", split).strip("_") or "rows"
    return folder / "data" / f"{name}-{number:05d}-of-{count:05d}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    """FileNotFoundError or ValueError where there is none that can be read."""
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no tokens: it has no {MANIFEST}; `vqgan-accel tokenize` makes some")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        kinds = REQUIRED | ({"rows": int} if manifest.get("complete") else {})
        wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the manifest of a folder of tokens ({error})") from None
    if wrong:
        raise ValueError(f"{file} is not the manifest of a folder of tokens: it has no {wrong[0]}")
    return manifest


def rows_in(file: Path) -> int | None:
    """How many rows a shard has; None where it is missing or damaged."""
    try:
        return parquet.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return None


def shard_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """All that there will be, in the order of the images."""
    count = manifest["shards"]
    return [shard_file(folder, manifest["split"], number, count) for number in range(count)]


def load_tokens(folder: str | Path) -> Dataset:
    """The codes as a `datasets.Dataset`, in the order of the images and, of one image, of its views.

    Columns: codes (h*w numbers, row by row; uint16, or int32 from 65537 codes on), label (where the images have
    classes), file_name, index (of the image in its split), view. The manifest has h and w as `code_grid`; where a
    position has q codes that is q, h and w, codes are q*h*w numbers, and `codebook_sizes` says how many each can be.
    FileNotFoundError or ValueError where the folder is not complete.

    >>> rows = load_tokens("tokens")
    >>> len(rows), len(rows[0]["codes"]), rows[1]["view"]
    (16, 16, 'center_mirrored')
    """
    import datasets

    folder = Path(folder)
    manifest = read_manifest(folder)
    files = shard_files(folder, manifest)
    counts = {file: count for file in files if (count := rows_in(file)) is not None}
    if len(counts) < len(files) or not manifest["complete"]:
        raise ValueError(
            f"{folder} is not complete: {len(files) - len(counts)} of {len(files)} shards are missing or damaged; give "
            "the same `vqgan-accel tokenize` again, which goes on"
        )
    if (found := sum(counts.values())) != manifest["rows"]:
        raise ValueError(f"{folder} has {found} rows and its manifest says {manifest['rows']}: copy it again")
    # `datasets` cannot read a file without rows, which is one of whose images none could be read
    rows = datasets.Dataset.from_parquet([str(file) for file, count in counts.items() if count])
    assert isinstance(rows, datasets.Dataset)
    return rows
