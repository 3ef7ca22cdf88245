"""Small test images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image in which every pixel differs, so that any shift, flip or other filter shows."""
    pixels = np.random.default_rng((width, height, seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SIZES = ((20, 16), (16, 23), (31, 31))  # width, height


def write_images(folder: Path, count: int) -> list[Path]:
    """`count` lossless images 000.png, 001.png, ... of cycling SIZES; all their contents differ."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        noise(*SIZES[i % len(SIZES)], seed=i).save(path)
    return paths


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
