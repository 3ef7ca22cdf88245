"""From a PIL image of any kind to the square of pixels that a network sees; pure functions, no global random state."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn.functional import interpolate

from vqgan_accel.randomness import AUGMENTATION, generator

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright, in 8-bit RGB: transparency on white, 16-bit grey divided by 257, animations' first frame.

    Raises ValueError for floating-point pixels, whose range nothing tells, and for modes that Pillow cannot convert.
    """
    image = _upright(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        stored = np.asarray(image).astype(np.int64)
        grey = ((stored + 128) // 257).clip(0, 255).astype(np.uint8)
        opaque = np.where(stored == image.info.get("transparency"), 0, 255).astype(np.uint8)
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opaque)])
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


class View(NamedTuple):
    """A square of an image (left, top, side in pixels), and whether it is mirrored after the resize."""

    left: int
    top: int
    side: int
    mirrored: bool


def draw_view(
    width: int,
    height: int,
    crop_scale: tuple[float, float] | None,
    horizontal_flip: bool,
    seed: int,
    epoch: int,
    index: int,
) -> View:
    """What training sees of image `index` in an epoch: `training_crop` (the central square where crop_scale is None),
    and a flip with probability 1/2.

    Everything random comes from (seed, epoch, index): it does not matter which worker asks, when, or after what.
    """
    rng = generator(AUGMENTATION, seed, epoch, index)
    square = training_crop(width, height, crop_scale, rng) if crop_scale else central_square(width, height)
    return View(*square, mirrored=horizontal_flip and rng.random() < 0.5)


def training_view(
    image: Image.Image,
    image_size: int,
    crop_scale: tuple[float, float] | None,
    horizontal_flip: bool,
    seed: int,
    epoch: int,
    index: int,
) -> Tensor:
    """An RGB image as uint8 (3, S, S): the square of `draw_view`, resized once, mirrored or not.

    The resize is torch's, which takes a third of Pillow's time and differs from it by at most one level.
    """
    view = draw_view(*image.size, crop_scale, horizontal_flip, seed, epoch, index)
    # cropped, then resized: resize(box=...) would let the filter reach pixels outside of the crop
    square = to_uint8_tensor(image.crop((view.left, view.top, view.left + view.side, view.top + view.side)))
    if view.side != image_size:
        size = (image_size, image_size)
        square = interpolate(square[None], size, mode="bilinear", antialias=True)[0]
    return square.flip(-1) if view.mirrored else square


def training_crop(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int]:
    """(left, top, side) of a random square, drawn as torchvision's RandomResizedCrop does with ratio (1, 1).

    The square's area is uniform in scale times the image's; after 10 draws that do not fit, the central square.
    """
    for _ in range(10):
        side = round(math.sqrt(width * height * rng.uniform(*scale)))
        if 0 < side <= min(width, height):
            top = int(rng.integers(height - side + 1))
            left = int(rng.integers(width - side + 1))
            return left, top, side
    return central_square(width, height)


def central_square(width: int, height: int) -> tuple[int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """(3, H, W), in memory (H, W, 3)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says. (ImageOps.exif_transpose rewrites the tags too, and fails at damaged ones.)"""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unreadable tags raise nearly anything, and say nothing about the pixels
        return image
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image
