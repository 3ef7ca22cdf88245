"""Images of a Hugging Face data set that is read in order and never held as a whole (data.streaming).

Training reads it by lanes.py; an evaluation reads each of its files (shards) once.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from vqgan_accel.config import DataConfig
from vqgan_accel.data.background import ahead
from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.data.hub import image_rows, load_rows, open_cell
from vqgan_accel.data.protocols import Crop
from vqgan_accel.data.views import REMEDY, Failure, Item, augmented, reason_of, rgb_or_failure

MAX_ROWS = 2**32  # in a shard


class Row(NamedTuple):
    """An image not yet decoded, with what its view depends on."""

    epoch: int  # how many times its lane has given all of its images before
    number: int  # of the image: shard * MAX_ROWS + row
    cell: dict[str, Any] | None  # {bytes, path}


class StreamSource:
    """The image column of one split of `config.path`, shard by shard.

    Errors are those of HubSource, but for a split without rows, which only reading shows.
    """

    def __init__(self, config: DataConfig, split: str, key: str = "data.train_split") -> None:
        self.title = f"{config.path}[{split}]"
        self.column = config.image_column
        rows = load_rows(config, split, key, streaming=True)
        if rows.column_names is None:
            raise ValueError(f"the columns of {self.title} are not known before it is read; set data.streaming=false")
        self.rows = image_rows(rows, self.column, self.title)
        self.num_shards: int = self.rows.num_shards
        splits = self.rows.info.splits or {}
        self.num_images: int | None = splits[split].num_examples if split in splits else None

    def name(self, index: int) -> str:
        return f"{self.title} shard {index // MAX_ROWS} row {index % MAX_ROWS}"

    def fingerprint(self) -> str:
        return f"a stream of {self.num_shards} shards" + (f", {self.num_images} images" if self.num_images else "")

    def shard(self, number: int) -> Any:
        """A datasets.IterableDataset of one file's rows."""
        return self.rows.shard(num_shards=self.num_shards, index=number)

    def cells(self, number: int, shard: Any) -> Iterator[dict[str, Any] | None]:
        """The images of `shard(number)`, not yet decoded. ValueError where the file cannot be read on."""
        try:
            for row in shard:
                yield row[self.column]
        except Exception as error:  # of pyarrow, tarfile, fsspec or a network
            raise ValueError(f"{self.title} shard {number} cannot be read: {reason_of(error)}; repair it") from error


class StreamShare:
    """A batch sampler: the rows of the shards process_index, process_index + num_processes, ..., each exactly once."""

    def __init__(self, source: StreamSource, batch_size: int, process_index: int, num_processes: int) -> None:
        self.source = source
        self.batch_size = batch_size
        self.shards = range(process_index, source.num_shards, num_processes)

    def __iter__(self) -> Generator[list[Row], None, None]:
        with closing(ahead(self._batches(), 2)) as batches:
            yield from batches

    def _batches(self) -> Iterator[list[Row]]:
        rows = (
            Row(0, shard * MAX_ROWS + row, cell)
            for shard in self.shards
            for row, cell in enumerate(self.source.cells(shard, self.source.shard(shard)))
        )
        while batch := list(islice(rows, self.batch_size)):
            yield batch


class _StreamViews(Dataset[Any]):
    """What the workers compute: a whole micro-batch, for a broken image has no neighbour outside of it."""

    def __init__(self, source: StreamSource, config: DataConfig, seed: int = 0) -> None:
        self.source = source
        self.config = config
        self.seed = seed

    def __getitems__(self, rows: list[Row]) -> list[Item] | list[Failure]:
        images = [rgb_or_failure(partial(open_cell, row.cell), self.source.name(row.number)) for row in rows]
        broken = [image.sentence for image in images if isinstance(image, Failure)]
        if broken and self.config.on_error == "raise":
            return [Failure(f"cannot read image {broken[0]}; {REMEDY}")]
        for sentence in broken:
            print(f"skipping image {sentence}", file=sys.stderr, flush=True)
        readable = [(row, image) for row, image in zip(rows, images, strict=True) if not isinstance(image, Failure)]
        return self.items(rows, readable)

    def items(self, rows: list[Row], readable: list[tuple[Row, Image.Image]]) -> list[Item] | list[Failure]:
        raise NotImplementedError


class StreamTrainingViews(_StreamViews):
    def items(self, rows: list[Row], readable: list[tuple[Row, Image.Image]]) -> list[Item] | list[Failure]:
        if not readable:
            return [Failure(f"none of {len(rows)} images in a row can be read, as {self.source.name(rows[-1].number)}")]
        views = {row.number: augmented(image, self.config, self.seed, row.epoch, row.number) for row, image in readable}
        items, taken = [], readable[0][0].number  # what comes after the last one
        for row in reversed(rows):
            taken = row.number if row.number in views else taken
            items.append(Item(taken, views[taken], skipped=int(taken != row.number)))
        return items[::-1]


class StreamEvaluationViews(_StreamViews):
    def __init__(self, source: StreamSource, config: DataConfig, crop: Crop) -> None:
        super().__init__(source, config)
        self.crop = crop

    def items(self, rows: list[Row], readable: list[tuple[Row, Image.Image]]) -> list[Item] | list[Failure]:
        size = self.config.image_size
        found = {row.number: evaluation_view(image, size, self.crop) for row, image in readable}
        return [Item(row.number, found.get(row.number), skipped=int(row.number not in found)) for row in rows]
