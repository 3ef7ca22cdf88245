"""What a data set holds, before a month is spent on it: counts, sizes, broken images, a contact sheet, decode rates."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vqgan_accel.config import DataConfig
from vqgan_accel.data.content import content_hash, content_sum
from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.data.opening import backend_of, open_indexed, require_apart, require_reader, training_loader
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.source import ImageSource, SplitName
from vqgan_accel.data.sources import SOURCES
from vqgan_accel.data.transforms import to_rgb
from vqgan_accel.data.views import Failure, TrainingViews, reason_of
from vqgan_accel.interruption import worker_options

SHEET_COLUMNS, SHEET_ROWS, THUMBNAIL, GAP = 10, 6, 96, 2  # images, pixels
RATE_SECONDS = 2.0  # of decoding for each backend
RATE_BATCH = 32  # images, where a backend makes batches
SHOWN_BROKEN = 20  # by name


class Facts(NamedTuple):
    """Of one image, as stored."""

    width: int  # pixels
    height: int
    mode: str  # Pillow's: RGB, L, RGBA, P, CMYK, ...
    broken: str  # why it cannot be read; "" where it can


@dataclass
class SplitInfo:
    images: int = 0
    modes: Counter[str] = field(default_factory=Counter)  # of the readable images
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # "NAME: why"

    def lines(self, image_size: int) -> list[str]:
        lines = [f"{self.images:,} images, {len(self.broken):,} of them broken"]
        if self.widths:
            small = sum(min(size) < image_size for size in zip(self.widths, self.heights, strict=True))
            lines += [f"width {_range(self.widths)}, height {_range(self.heights)}"]
            lines += ["modes " + ", ".join(f"{mode} {number:,}" for mode, number in self.modes.most_common())]
            lines += [f"{small:,} have a side below {image_size} px and are enlarged"]
        lines += [f"broken {name}" for name in self.broken[:SHOWN_BROKEN]]
        if len(self.broken) > SHOWN_BROKEN:
            lines.append(f"and {len(self.broken) - SHOWN_BROKEN:,} more")
        return lines


def data_info(config: DataConfig, output: Path, with_hash: bool = False) -> list[str]:
    """Every image of every split is decoded once; `with_hash`: their bytes are hashed, too (data.expected_hash). Writes
    output/SPLIT.png and returns lines for the user.

    Errors are those of open_indexed for the training split; another split that is not there is said so.
    """
    open_indexed(config, "train")
    require_apart(output, config, "--output")
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for split in get_args(SplitName):
        try:
            source = open_indexed(config, split)
        except (ValueError, OSError) as error:
            lines.append(f"{split:<12}{error}")
            continue
        first, *rest = split_info(source, config.workers, split).lines(config.image_size)
        sheet = output / f"{split}.png"
        contact_sheet(source).save(sheet)
        rest += [f"contact sheet {sheet}"]
        if with_hash:
            rest += [f"hash {content_hash(content_sum(source, config.workers))}"]
        lines += [f"{split:<12}{first}", *(f"{'':<12}{line}" for line in rest)]
    lines.append(f"training views of {config.image_size} px on one process")
    as_files = backend_of(config.model_copy(update={"backend": "auto"})) == "folder"
    for backend in SOURCES:
        if as_files and backend == "hub" != config.backend:
            rate = "these are image files, for backend folder: `datasets` would first look at each and keep a list"
        else:
            rate = decode_rate(config.model_copy(update={"backend": backend}))
        lines.append(f"  {backend:<10}{rate}")
    return lines


def split_info(source: ImageSource, workers: int, title: str) -> SplitInfo:
    facts: DataLoader[Facts] = DataLoader(_Facts(source), batch_size=None, **worker_options(workers))
    info = SplitInfo()
    for index, (width, height, mode, broken) in enumerate(tqdm(facts, desc=title, unit="image", dynamic_ncols=True)):
        info.images += 1
        if broken:
            info.broken.append(f"{source.name(index)}: {broken}")
        else:
            info.modes[mode] += 1
            info.widths.append(width)
            info.heights.append(height)
    return info


class _Facts(Dataset[Facts]):
    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Facts:
        try:
            image = self.source.open(index)
            to_rgb(image)
        except Exception as error:  # on damaged files Pillow's decoders raise nearly every type there is
            return Facts(0, 0, "", reason_of(error))
        return Facts(*image.size, image.mode, "")


def contact_sheet(source: ImageSource) -> Image.Image:
    """Images from all over the split as an evaluation sees them, in reading order; broken ones leave a grey square."""
    number = min(len(source), SHEET_COLUMNS * SHEET_ROWS)
    rows, columns = -(-number // SHEET_COLUMNS), min(number, SHEET_COLUMNS)
    step = THUMBNAIL + GAP
    canvas = np.full((rows * step - GAP, columns * step - GAP, 3), 255, np.uint8)
    for place in range(number):
        top, left = place // SHEET_COLUMNS * step, place % SHEET_COLUMNS * step
        try:
            view = evaluation_view(to_rgb(source.open(place * len(source) // number)), THUMBNAIL)
            canvas[top : top + THUMBNAIL, left : left + THUMBNAIL] = view.permute(1, 2, 0).numpy()
        except Exception:  # named by split_info
            canvas[top : top + THUMBNAIL, left : left + THUMBNAIL] = 128
    return Image.fromarray(canvas)


def decode_rate(config: DataConfig) -> str:
    """How many training views a second one process makes, or why the backend makes none."""
    try:
        source = open_indexed(config, "train")
        require_reader(config)
    except (ValueError, OSError) as error:
        return f"cannot read it: {error}"
    if config.backend == "ffcv":
        return _rate_of_loader(source, config)
    views = TrainingViews(source, config.model_copy(update={"on_error": "skip"}), seed=0)
    first = views[0, 0]  # beside the clock, for what it alone costs: imports, caches
    if isinstance(first, Failure):
        return first.sentence
    start, number = time.perf_counter(), 0
    while time.perf_counter() < start + RATE_SECONDS:
        views[0, number % len(source)]
        number += 1
    return f"{number / (time.perf_counter() - start):,.0f} images/s"


def _rate_of_loader(source: ImageSource, config: DataConfig) -> str:
    """FFCV makes batches, not single views."""
    size = min(len(source), RATE_BATCH)
    order = TrainingOrder(
        0, len(source), size, num_rounds=1, process_index=0, num_processes=1, start_step=0, total_steps=10**6
    )
    config = config.model_copy(update={"on_error": "skip", "workers": 1})
    with closing(iter(training_loader(source, config, order, pin_memory=False))) as batches:
        next(batches)  # beside the clock: it waits for the compiler
        start, number = time.perf_counter(), 0
        while time.perf_counter() < start + RATE_SECONDS:
            number += len(next(batches)["image"])
        return f"{number / (time.perf_counter() - start):,.0f} images/s"


def _range(sizes: list[int]) -> str:
    return f"{min(sizes)} to {max(sizes)} px (median {statistics.median(sizes):.0f})"
