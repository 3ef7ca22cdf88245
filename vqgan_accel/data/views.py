"""What a worker makes of one image: it is read, cropped and handed over as uint8; or it is broken, and that is said.

A batch of such views stays uint8 until `to_float` on the device. (One crop of data/crops.py gives numbers in between.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vqgan_accel.config import DataConfig
from vqgan_accel.data.order import Key
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.transforms import to_rgb, training_view

REMEDY = "remove or repair it, or set data.on_error=skip"


class Batch(TypedDict):
    image: Tensor  # (B, 3, S, S) uint8, or float32 of an evaluation's crop that does not round; in memory (B, S, S, 3)
    index: Tensor  # int64 (B,), which image of the source each one is
    skipped: int  # broken images that were replaced (training) or left out (evaluation)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in [0, 255] -> float32 in [-1, 1], on the device where the images are; floats are there."""
    if images.is_floating_point():
        return images.contiguous()
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


def reason_of(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own sentence names a BytesIO at some address
        return "it is not an image that Pillow can identify"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


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


class FixedViews(_Views):
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
