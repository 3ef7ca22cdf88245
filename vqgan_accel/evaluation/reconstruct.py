"""What a tokenizer makes of single images, of any size: pictures side by side and a table, for people to look at.

The numbers are of whole images as they are, so they compare with evaluate.py's, which are of square crops of one size,
in kind only.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.compat import accelerator_device
from vqgan_accel.config import EvaluationConfig, Metric, WeightFiles
from vqgan_accel.config.metrics import METRICS
from vqgan_accel.data.folder import require_outside
from vqgan_accel.data.listing import EXTENSIONS, image_files
from vqgan_accel.data.source import decode_image
from vqgan_accel.data.transforms import to_rgb
from vqgan_accel.data.views import reason_of, to_float
from vqgan_accel.evaluation.figures import to_uint8
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.files import written_as_a_whole
from vqgan_accel.models.opening import open_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer

TABLE = "reconstructions.csv"
OVERLAP = 64  # pixels that neighbouring tiles share, faded from one to the other
LPIPS_SIDE = 32  # pixels of the shorter side that its backbones can pool
GAP = 4  # white pixels between original and reconstruction


class Reconstruction(NamedTuple):
    image: Tensor  # (1, 3, H, W) in [-1, 1]
    num_codes: int  # that it takes, those of padding and of overlapping tiles included


def reconstruct(
    model: str | Path,
    *,
    inputs: Sequence[str | Path],
    output: str | Path,
    tile: int = 1024,
    metrics: Sequence[Metric] = ("psnr", "ssim"),
    weights: WeightFiles | None = None,
) -> list[dict[str, Any]]:
    """Write output/NAME.png (the original, its reconstruction at its right) for every image, and
    output/reconstructions.csv.

    model: what `load_tokenizer` takes; inputs: image files of any size, or folders, which are read recursively. Images
    with a side above `tile` pixels are done in tiles. Returns the table's rows, of each image its file, width and
    height (pixels), codes, bits_per_pixel and the metrics (psnr in dB), of which one that the image is too small for is
    None. FileNotFoundError or ValueError names what is wrong; the folder appears when it is complete.

    >>> rows = reconstruct("runs/first", inputs=["photographs/validation"], output="reconstructions")
    >>> rows[0]["width"], rows[0]["codes"], rows[0]["bits_per_pixel"]
    (20, 25, 0.25)
    """
    output, paths = Path(output), [Path(path) for path in inputs]
    for path in paths:
        require_outside(output, path, "--output")
    files = named_images(paths)
    opened = open_tokenizer(model)
    device = accelerator_device() or torch.device("cpu")
    tokenizer = opened.tokenizer
    tokenizer.to(device)  # type: ignore[arg-type]  # diffusers wraps the method, and mypy loses self
    sizes = tokenizer.quantizer.codebook_sizes
    bits = sum(math.log2(size) for size in sizes) / len(sizes)  # of a code
    measures = {  # before anything is made, for they may lack their networks' weights
        able: Metrics(able, sizes, EvaluationConfig(), weights or WeightFiles(), device)
        for able in {able_at(side, metrics) for side in (1, *map(smallest, metrics))}
    }
    rows: list[dict[str, Any]] = []
    with written_as_a_whole(output) as partial:
        for name, file in files.items():
            image = read(file).to(device)
            made = reconstruct_image(tokenizer, image, tile)
            height, width = image.shape[2:]
            figures = figures_of(measures[able_at(min(height, width), metrics)], image, made.image)
            rows.append(
                {"file": str(file), "width": width, "height": height, "codes": made.num_codes}
                | {"bits_per_pixel": made.num_codes * bits / (height * width)}
                | {metric: figures.get(metric) for metric in metrics}
            )
            picture = partial / name
            picture.parent.mkdir(parents=True, exist_ok=True)
            side_by_side(image, made.image).save(picture)
        with (partial / TABLE).open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return rows


def able_at(side: int, metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Those that can be formed of an image whose shorter side has `side` pixels."""
    return tuple(metric for metric in metrics if side >= smallest(metric))


def smallest(metric: Metric) -> int:
    """Pixels of the shorter side."""
    return LPIPS_SIDE if metric.startswith("lpips") else METRICS[metric].smallest


def named_images(inputs: Sequence[Path]) -> dict[str, Path]:
    """The picture's name in the output folder -> the image file, in the order of the inputs."""
    found: dict[str, Path] = {}
    for path in inputs:
        if path.is_dir():
            below = {name: path / name for name in image_files(path)}
            if not below:
                raise ValueError(f"no images below {path}; they end in {', '.join(EXTENSIONS)} (any letter case)")
        elif path.is_file():
            below = {path.name: path}
        else:
            raise FileNotFoundError(f"there is no image or folder of images at {path}")
        for name, file in below.items():
            picture = str(Path(name).with_suffix(".png"))
            if picture in found:
                raise ValueError(f"{found[picture]} and {file} would both become {picture}; reconstruct them apart")
            found[picture] = file
    return found


def read(file: Path) -> Tensor:
    """(1, 3, H, W) in [-1, 1]"""
    try:
        image = to_rgb(decode_image(file))
    except Exception as error:  # Pillow raises nearly any type for a broken file
        raise ValueError(f"{file} cannot be read as an image ({reason_of(error)})") from None
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


def reconstruct_image(tokenizer: ImageTokenizer, image: Tensor, tile: int) -> Reconstruction:
    """image (1, 3, H, W) in [-1, 1], of any size. Above `tile` pixels a side it is cut into tiles that overlap by
    OVERLAP pixels, in which one fades into the other: memory is then that of a tile, and no seam is seen.

    ValueError for tiles that are smaller than two overlaps.
    """
    height, width = image.shape[2:]
    if max(height, width) <= tile:
        return reconstruct_whole(tokenizer, image)
    if tile < 2 * OVERLAP:
        raise ValueError(f"tiles of {tile} px are too small: they overlap by {OVERLAP}; give at least {2 * OVERLAP}")
    total, weights, num_codes = torch.zeros_like(image), image.new_zeros(1, 1, height, width), 0
    for top in tile_starts(height, tile):
        for left in tile_starts(width, tile):
            rows, columns = slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
            made = reconstruct_whole(tokenizer, image[..., rows, columns])
            weight = torch.outer(fade(rows, height), fade(columns, width)).to(image)
            total[..., rows, columns] += weight * made.image
            weights[..., rows, columns] += weight
            num_codes += made.num_codes
    return Reconstruction(total / weights, num_codes)


def reconstruct_whole(tokenizer: ImageTokenizer, image: Tensor) -> Reconstruction:
    """image (1, 3, H, W), whose last row and column are repeated up to a multiple of the stride, and cut off again."""
    height, width = image.shape[2:]
    stride = tokenizer.stride
    padded = F.pad(image, (0, -width % stride, 0, -height % stride), mode="replicate")
    codes = tokenizer.encode(padded)
    return Reconstruction(tokenizer.decode(codes)[..., :height, :width], codes.numel())


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side; the last one ends with it."""
    return [*range(0, max(length - tile, 0), tile - OVERLAP), max(length - tile, 0)]


def fade(part: slice, length: int) -> Tensor:
    """(n,) weights of a tile along one side: rising where a tile comes before it, falling where one comes after."""
    n = part.stop - part.start
    rising, falling = torch.arange(1.0, n + 1) / (OVERLAP + 1), torch.arange(float(n), 0, -1) / (OVERLAP + 1)
    weights = torch.ones(n)
    if part.start > 0:
        weights = weights.minimum(rising)
    if part.stop < length:
        weights = weights.minimum(falling)
    return weights


def figures_of(metrics: Metrics, image: Tensor, reconstruction: Tensor) -> dict[str, float]:
    metrics.reset()
    places = len(metrics.setting.codebook_sizes)
    no_codes = torch.empty(1, places, 0, dtype=torch.int64, device=image.device)  # their use is not asked for
    metrics.update(image, reconstruction, no_codes, torch.zeros(1, dtype=torch.int64))
    return metrics.compute()


def side_by_side(image: Tensor, reconstruction: Tensor) -> Image.Image:
    """Both (1, 3, H, W) in [-1, 1]"""
    left, right = to_uint8(image)[0], to_uint8(reconstruction)[0]
    return Image.fromarray(np.concatenate([left, np.full((len(left), GAP, 3), 255, np.uint8), right], axis=1))
