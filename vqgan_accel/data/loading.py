"""From a source to batches: torch loaders whose batches depend on position alone.

Accelerate does not prepare these loaders: the order already knows about processes, and images stay uint8 until
`to_float` on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from vqgan_accel.config import DataConfig
from vqgan_accel.data.opening import backend_of
from vqgan_accel.data.order import Key, TrainingOrder
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.transforms import to_rgb, training_view, views_of
from vqgan_accel.interruption import worker_options

if TYPE_CHECKING:
    from vqgan_accel.data.ffcv import FfcvLoader
    from vqgan_accel.data.stream import StreamOrder, StreamSource

REMEDY = "remove or repair it, or set data.on_error=skip"


class Batch(TypedDict):
    image: Tensor  # uint8 (B, 3, S, S); in memory (B, S, S, 3)
    index: Tensor  # int64 (B,), which image of the source each one is
    skipped: int  # broken images that were replaced (training) or left out (evaluation)


def training_order(
    source: ImageSource | StreamSource,
    config: DataConfig,
    stream_states: dict[str, dict[str, Any]] | None = None,
    **position: int,
) -> TrainingOrder | StreamOrder:
    """Which images this process sees, and when. `position`: what TrainingOrder takes beside the number of images.
    `stream_states`: where a stream stood at start_step, of all processes.

    ValueError where there are too few images, or too few shards of a stream.
    """
    if isinstance(source, ImageSource):
        return TrainingOrder(num_images=len(source), **position)
    from vqgan_accel.data.stream import StreamOrder

    return StreamOrder(source, shuffle_buffer=config.shuffle_buffer, states=stream_states, **position)


def training_loader(
    source: ImageSource | StreamSource, config: DataConfig, order: TrainingOrder | StreamOrder, pin_memory: bool
) -> ImageLoader | FfcvLoader:
    """Micro-batches in `order`, each image cropped and flipped by its key (order.seed, epoch, index).

    With data.on_error=skip a broken image's place is taken by the next readable one, under that one's own key; in a
    stream by the next readable one of the micro-batch.
    Iterating raises ValueError, one sentence, at a broken image otherwise, and where no image at all is readable.
    `require_reader` has been asked before.
    """
    if not isinstance(source, ImageSource):
        from vqgan_accel.data.stream import StreamTrainingViews

        rows = StreamTrainingViews(source, config, order.seed)
        return ImageLoader(rows, batch_sampler=order, **_loader_options(config, pin_memory))
    assert isinstance(order, TrainingOrder) and order.num_images == len(source)
    views = TrainingViews(source, config, order.seed)
    if backend_of(config) == "ffcv":
        from vqgan_accel.data.ffcv import FfcvLoader

        return FfcvLoader(views, order, pin_memory)
    return ImageLoader(views, batch_sampler=order, **_loader_options(config, pin_memory))


def evaluation_loader(
    source: ImageSource | StreamSource,
    config: DataConfig,
    batch_size: int,
    process_index: int,
    num_processes: int,
    pin_memory: bool,
) -> ImageLoader:
    """The images (of a stream the shards) process_index, process_index + num_processes, ...: over all processes each
    image exactly once.

    Nothing is padded: the last batch may be small, and processes may have different numbers of batches. With
    data.on_error=skip broken images are left out, so that a batch may even be (0, 3, S, S). Errors as in training.
    """
    if not isinstance(source, ImageSource):
        from vqgan_accel.data.stream import StreamEvaluationViews, StreamShare

        rows, share = (
            StreamEvaluationViews(source, config),
            StreamShare(source, batch_size, process_index, num_processes),
        )
        return ImageLoader(rows, batch_sampler=share, **_loader_options(config, pin_memory))
    shard = range(process_index, len(source), num_processes)
    views = _FixedViews(source, config, views_of)
    return ImageLoader(views, sampler=shard, batch_size=batch_size, **_loader_options(config, pin_memory))


def views_loader(
    source: ImageSource,
    config: DataConfig,
    batches: Sequence[list[int]],
    views: Callable[[Image.Image, int], list[Tensor]],
    pin_memory: bool,
) -> ImageLoader:
    """For every list of indices a batch with all `views` of these images, those of one image in a row.

    Errors and broken images as in evaluation_loader.
    """
    rows = _FixedViews(source, config, views)
    return ImageLoader(rows, batch_sampler=batches, **_loader_options(config, pin_memory))


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in [0, 255] -> float32 in [-1, 1], on the device where the images are."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


@dataclass(frozen=True)
class Item:
    index: int
    image: Tensor | None  # None: broken and left out
    skipped: int


@dataclass(frozen=True)
class Failure:
    """A sentence for the user. It travels as a value: what a worker raises arrives wrapped in its whole traceback."""

    sentence: str


def read_image(source: ImageSource, index: int) -> Image.Image | Failure:
    """An image in RGB, upright, or 'NAME: why' it is broken."""
    return rgb_or_failure(lambda: source.open(index), source.name(index))


def rgb_or_failure(open_image: Callable[[], Image.Image], name: str) -> Image.Image | Failure:
    try:
        return to_rgb(open_image())
    except Exception as error:  # on damaged files Pillow's decoders raise nearly every type there is
        return Failure(f"{name}: {reason_of(error)}")


class _Views(Dataset[Item | Failure]):
    """What the workers compute. A subclass says which view of an image a key stands for."""

    def __init__(self, source: ImageSource, config: DataConfig) -> None:
        self.source = source
        self.config = config
        self.reported: set[int] = set()  # per worker: each has its own copy

    def first_readable(self, start: int) -> tuple[int, Image.Image] | Failure:
        """The image at `start` or, with on_error=skip, at the first readable index after it (cyclic)."""
        for distance in range(len(self.source)):
            index = (start + distance) % len(self.source)
            image = read_image(self.source, index)
            if isinstance(image, Image.Image):
                return index, image
            last = image.sentence
            if self.config.on_error == "raise":
                return Failure(f"cannot read image {last}; {REMEDY}")
            if index not in self.reported:
                self.reported.add(index)
                print(f"skipping image {last}", file=sys.stderr, flush=True)
        return Failure(f"none of the {len(self.source)} images can be read; the last tried was {last}")


def augmented(image: Image.Image, config: DataConfig, seed: int, epoch: int, index: int) -> Tensor:
    """uint8 (3, S, S): what training sees of an image."""
    return training_view(image, config.image_size, config.crop_scale, config.horizontal_flip, seed, epoch, index)


class TrainingViews(_Views):
    def __init__(self, source: ImageSource, config: DataConfig, seed: int) -> None:
        super().__init__(source, config)
        self.seed = seed

    def __getitem__(self, key: Key) -> Item | Failure:
        epoch, wanted = key
        found = self.first_readable(wanted)
        if isinstance(found, Failure):
            return found
        index, image = found
        return Item(index, augmented(image, self.config, self.seed, epoch, index), skipped=int(index != wanted))


class _FixedViews(_Views):
    def __init__(
        self, source: ImageSource, config: DataConfig, views: Callable[[Image.Image, int], list[Tensor]]
    ) -> None:
        super().__init__(source, config)
        self.views = views

    def __getitems__(self, indices: Sequence[int]) -> list[Item | Failure]:
        return [item for index in indices for item in self.items(index)]

    def items(self, wanted: int) -> list[Item | Failure]:
        found = self.first_readable(wanted)
        if isinstance(found, Failure):
            return [found]
        index, image = found
        if index != wanted:
            return [Item(wanted, None, skipped=1)]
        return [Item(index, view, skipped=0) for view in self.views(image, self.config.image_size)]


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises, in the main process, the failures that workers return.

    Closing its iterator ends the workers.
    """

    def __iter__(self) -> Generator[Batch, None, None]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, Failure):
                    raise ValueError(batch.sentence)
                yield batch
        except BaseException:  # a failure, or GeneratorExit: closed before its end
            _pass_over_killed_workers(self._iterator)
            self._iterator = None  # ends the workers here and now; as garbage in a traceback each would take 5 s
            raise


def _pass_over_killed_workers(iterator: Any) -> None:
    """A worker that was killed may hold a lock that the iterator's usual end waits for, for ever (pytorch issue 39570):
    where one was, all are ended by force."""
    if any(worker.exitcode for worker in getattr(iterator, "_workers", ())):
        iterator._shutdown = True  # the usual end is over
        signal_handling._remove_worker_pids(id(iterator))  # or each death would be raised as an error of its own
        for worker in iterator._workers:
            worker.kill()
            worker.join()


def _loader_options(config: DataConfig, pin_memory: bool) -> dict[str, Any]:
    return {
        **worker_options(config.workers),
        "persistent_workers": config.workers > 0,
        "pin_memory": pin_memory,
        "collate_fn": partial(_collate, config.image_size),
        "generator": torch.Generator(),  # else each iteration would draw a seed from torch's global state
    }


def _collate(image_size: int, items: list[Item | Failure]) -> Batch | Failure:
    indices: list[int] = []
    images: list[Tensor] = []  # (S, S, 3), as they lie in memory
    skipped = 0
    for item in items:
        if isinstance(item, Failure):
            return item
        skipped += item.skipped
        if item.image is not None:
            indices.append(item.index)
            images.append(item.image.permute(1, 2, 0))
    stacked = default_collate(images) if images else torch.empty(0, image_size, image_size, 3, dtype=torch.uint8)
    return {
        "image": stacked.permute(0, 3, 1, 2),
        "index": torch.tensor(indices, dtype=torch.int64),
        "skipped": skipped,
    }


def reason_of(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own sentence names a BytesIO at some address
        return "it is not an image that Pillow can identify"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
