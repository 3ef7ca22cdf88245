"""Small test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image in which every pixel differs, so that any shift, flip or other filter shows."""
    pixels = np.random.default_rng((width, height, seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((20, 16), (16, 23), (31, 31))) -> list[Path]:
    """`count` lossless images 000.png, 001.png, ... of cycling sizes; all their contents differ."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        noise(*sizes[i % len(sizes)], seed=i).save(path)
    return paths


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
