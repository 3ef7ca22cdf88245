"""From an image of any size to the square that an evaluation sees: our own way, and those of other laboratories.

Published numbers are made with different crops and filters, which move them (docs/evaluation.md). Each function gives
what its authors' code gives, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize, ten_crop, to_tensor

from vqgan_accel.data.protocols import Crop
from vqgan_accel.data.transforms import central_square, to_uint8_tensor

VIEWS = {  # what may be taken of an image without drawing anything -> the names of the views
    "center": ("center",),
    "flip": ("center", "center_mirrored"),
    "10crop": tuple(
        place + mirrored
        for mirrored in ("", "_mirrored")
        for place in ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    ),
}
TEN_CROP_SCALE = 1.1
CV_BITS = 11  # of a weight in OpenCV's resize, INTER_RESIZE_COEF_BITS


def square(image: Image.Image, size: int) -> Tensor:
    """Ours: the central square of the short side, resized once.

    Resizing the short side and cropping then (torchvision's habit) resamples pixels that are thrown away and rounds the
    long side; the two differ by less than a pixel's shift.
    """
    left, top, side = central_square(*image.size)
    # cropped, then resized: resize(box=...) would let the filter reach pixels outside of the crop
    cropped = image.crop((left, top, left + side, top + side))
    return to_uint8_tensor(cropped.resize((size, size), Image.Resampling.BILINEAR))


def adm(image: Image.Image, size: int) -> Tensor:
    """Halved by BOX while both sides are at least twice as long, then the short side by BICUBIC, then the centre
    (guided-diffusion's center_crop_arr: Dhariwal & Nichol 2021; LlamaGen, MAR, RAE)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return to_uint8_tensor(image.crop((left, top, left + size, top + size)))


def bicubic(image: Image.Image, size: int) -> Tensor:
    """torchvision's Resize and CenterCrop, bicubic (TiTok: Yu et al. 2024)."""
    return pil_to_tensor(center_crop(resize(image, [size], InterpolationMode.BICUBIC), [size]))


def bilinear(image: Image.Image, size: int) -> Tensor:
    """The same, bilinear (MaskBit: Weber et al. 2024)."""
    return pil_to_tensor(center_crop(resize(image, [size], InterpolationMode.BILINEAR), [size]))


def opencv(image: Image.Image, size: int) -> Tensor:
    """albumentations' SmallestMaxSize and CenterCrop: OpenCV's linear resize, not antialiased (Esser et al. 2021;
    SEED-Voken: Luo et al. 2024)."""
    scale = size / min(image.size)
    resized = opencv_linear(np.asarray(image), round(image.width * scale), round(image.height * scale))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return torch.from_numpy(resized[top : top + size, left : left + size].copy()).permute(2, 0, 1)


def tensor(image: Image.Image, size: int) -> Tensor:
    """torchvision's Resize of the image as a float tensor, antialiased, and CenterCrop (LightningDiT: Yao et al. 2025).
    Its pixels are no 8-bit numbers: float32 (3, S, S) in [-1, 1]."""
    return center_crop(resize(to_tensor(image), [size], antialias=True), [size]).sub(0.5).div(0.5)


class CropRule(NamedTuple):
    """How an image becomes a square, and the words for it in a protocol."""

    crop: str
    resize_filter: str
    make: Callable[[Image.Image, int], Tensor]  # an RGB image, S -> (3, S, S), uint8 but where it says otherwise


_CENTRE = "the short side resized, then the central square"
CROPS: dict[Crop, CropRule] = {
    "square": CropRule(
        "central square of the short side, cropped before one resize", "PIL bilinear, antialiased, uint8", square
    ),
    "adm": CropRule(
        "halved while the short side is at least twice the size, resized, then the central square",
        "PIL box, then PIL bicubic, antialiased, uint8",
        adm,
    ),
    "bicubic": CropRule(_CENTRE, "PIL bicubic, antialiased, uint8", bicubic),
    "bilinear": CropRule(_CENTRE, "PIL bilinear, antialiased, uint8", bilinear),
    "opencv": CropRule(_CENTRE, "OpenCV linear, not antialiased, uint8", opencv),
    "tensor": CropRule(_CENTRE, "torch bilinear, antialiased, float32", tensor),
}


def evaluation_view(image: Image.Image, image_size: int, crop: Crop = "square") -> Tensor:
    """An RGB image as (3, S, S): uint8 in [0, 255], or float32 in [-1, 1] where the crop does not round."""
    return CROPS[crop].make(image, image_size)


def views_of(image: Image.Image, image_size: int, crop: Crop = "square", kind: str = "center") -> list[Tensor]:
    """An RGB image as the views of VIEWS[kind], each (3, S, S). 10crop: corners and centre of the evaluation view of
    1.1 S, and the same mirrored (LlamaGen: Sun et al. 2024, arXiv 2406.06525)."""
    if kind == "10crop":
        return list(ten_crop(evaluation_view(image, int(TEN_CROP_SCALE * image_size), crop), [image_size]))
    center = evaluation_view(image, image_size, crop)
    return [center, center.flip(-1)] if kind == "flip" else [center]


# ---- OpenCV's arithmetic


def opencv_linear(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR) of (H, W, 3), to the last bit: weights of 11
    bits, along rows, then along columns, where four bits of a row's sums are dropped first."""
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    values = image.astype(np.int64)
    if (rows, columns) == (2 * height, 2 * width):  # it takes the mean of four
        sums = values[::2, ::2] + values[::2, 1::2] + values[1::2, ::2] + values[1::2, 1::2]
        return ((sums + 2) >> 2).astype(np.uint8)
    left, right, left_weights, right_weights = _taps(columns, width)
    across = values[:, left] * left_weights[None, :, None] + values[:, right] * right_weights[None, :, None]
    above, below, above_weights, below_weights = _taps(rows, height)
    upper, lower = across[above] >> 4, across[below] >> 4
    sums = (upper * above_weights[:, None, None] >> 16) + (lower * below_weights[:, None, None] >> 16)
    return ((sums + 2) >> 2).astype(np.uint8)


def _taps(length: int, wanted: int) -> tuple[NDArray[np.int64], ...]:
    """(wanted,) of each new pixel the two old ones that it lies between, the border's own twice, and their weights."""
    places = ((np.arange(wanted) + 0.5) * (length / wanted) - 0.5).astype(np.float32)
    before = np.floor(places).astype(np.int64)
    shares = places - np.floor(places)
    weights = (np.rint(part * np.float32(2**CV_BITS)).astype(np.int64) for part in (1 - shares, shares))
    return before.clip(0, length - 1), (before + 1).clip(0, length - 1), *weights
