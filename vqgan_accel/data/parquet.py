"""Parquet in a stream: of each open file one row group is in memory.

Left to itself Arrow reads on while nobody asks, up to 1 GiB of each file (its scanner's queue), which no option of
`datasets` bounds; and a stream has up to 64 files open.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
from datasets import DownloadConfig
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.file_utils import xopen
from pyarrow.parquet import ParquetFile


def read_by_row_groups(builder: Any) -> None:
    """Of a builder of `datasets` whose data set will be streamed; any other than parquet's is left alone."""
    if isinstance(builder, Parquet) and not (builder.config.columns or getattr(builder.config, "filters", None)):
        builder._generate_tables = partial(_row_groups, builder)


def _row_groups(builder: Any, files: list[Any], **_: Any) -> Iterator[tuple[Any, pa.Table]]:
    """What the builder's own method gives, table by table: where a run stands in a file is told in their rows.

    files: names, or as `datasets` before 4 has it iterables of names.
    """
    access = DownloadConfig(storage_options=builder.storage_options, token=builder.token)
    names = chain.from_iterable([file] if isinstance(file, str) else file for file in files)
    for number, name in enumerate(names):
        with xopen(name, "rb", download_config=access) as opened, ParquetFile(opened, pre_buffer=True) as file:
            largest = file.metadata.row_group(0).num_rows if file.num_row_groups else 1
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(largest or 1, row_groups=[group]):
                    yield (number, group), builder._cast_table(pa.Table.from_batches([batch]))
