"""Images per second of every data backend, beside what people write by hand, on the same photographs.

    python benchmarks/loading.py [--workers 2] [--repeats 5] [--short-side 256]

Every loader ends in float32 batches (32, 3, 256, 256) in [-1, 1] in the main process, from a random square of 70 to
100 % of the area and a random flip. The photographs are those that scikit-image and scikit-learn ship, cut into
patches and written as JPEG of quality 90, as a parquet file, and as betons of quality 90 and of raw pixels. Competitors
take turns; the table shows medians over the turns, and ratios to the first line.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from vqgan_accel.config import DataConfig
from vqgan_accel.data.make_beton import BetonOptions, make_betons
from vqgan_accel.data.opening import open_source, require_reader, training_loader
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.views import to_float

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
from demo_photographs import TRAIN, photograph

SIZE, BATCH, IMAGES = 256, 32, 512


def write_photographs(folder: Path, short_side: int) -> None:
    """IMAGES patches with 4:3 sides, of all photographs, as folder/train/patches/*.jpg."""
    target = folder / "train" / "patches"
    target.mkdir(parents=True)
    long_side = round(short_side * 4 / 3) if short_side > SIZE else short_side
    images = [photograph(name) for name in TRAIN]
    for index in range(IMAGES):
        image = images[index % len(images)]
        scale = max(short_side / image.height, long_side / image.width) * (1 + index / IMAGES)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (index * 37) % (image.width - long_side + 1), (index * 53) % (image.height - short_side + 1)
        image.crop((left, top, left + long_side, top + short_side)).save(target / f"{index:04}.jpg", quality=90)


def plain_views() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.7, 1.0), ratio=(1.0, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


def plain(root: Path, workers: int) -> Iterator[Tensor]:
    """What a tutorial shows: ImageFolder, Pillow, float32 from the workers."""
    loader = DataLoader(
        ImageFolder(str(root / "photographs" / "train"), plain_views()),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    while True:
        for images, _ in loader:
            yield images


def recipe(root: Path, workers: int) -> Iterator[Tensor]:
    """What diffusers' training examples do: `datasets` with a transform, stacked by a collate function."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(root / "photographs"), split="train")
    views = plain_views()
    rows = rows.with_transform(
        lambda batch: {"pixel_values": [views(image.convert("RGB")) for image in batch["image"]]}
    )
    loader = DataLoader(
        rows,
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
        collate_fn=lambda items: torch.stack([item["pixel_values"] for item in items]).contiguous().float(),
    )
    while True:
        yield from loader


def ours(backend: str, path: str) -> Callable[[Path, int], Iterator[Tensor]]:
    def batches(root: Path, workers: int) -> Iterator[Tensor]:
        config = DataConfig.model_validate(
            {"backend": backend, "path": str(root / path), "image_size": SIZE, "workers": workers}
        )
        require_reader(config)
        source = open_source(config, "train")
        order = TrainingOrder(0, len(source), BATCH, 1, 0, 1, 0, 10**6)
        with closing(iter(training_loader(source, config, order, pin_memory=False))) as loaded:
            for batch in loaded:
                yield to_float(batch["image"])

    return batches


COMPETITORS: dict[str, Callable[[Path, int], Iterator[Tensor]]] = {
    "torchvision ImageFolder, Pillow": plain,
    "`datasets` as in diffusers' examples": recipe,
    "folder": ours("folder", "photographs"),
    "hub, parquet": ours("hub", "parquet"),
    "beton, jpg": ours("beton", "jpg"),
    "beton, raw": ours("beton", "raw"),
    "ffcv, jpg": ours("ffcv", "jpg"),
    "ffcv, raw": ours("ffcv", "raw"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=24, help="a repetition")
    parser.add_argument("--short-side", type=int, default=SIZE, help="pixels; above 256 the images are 4:3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(root: Path, options: argparse.Namespace) -> None:
    write_photographs(root / "photographs", options.short_side)
    rows = datasets.load_dataset("imagefolder", data_dir=str(root / "photographs"), split="train")
    (root / "parquet").mkdir()
    rows.to_parquet(root / "parquet" / "train.parquet")
    source = DataConfig(path=str(root / "photographs"), workers=options.workers)
    for mode in ("jpg", "raw"):
        make_betons(source, root / mode, BetonOptions(2048, mode, 90))

    rates: dict[str, list[float]] = {}
    running: dict[str, Iterator[Tensor]] = {}
    for name, competitor in COMPETITORS.items():
        batches = competitor(root, options.workers)
        try:
            warm = next(batches)
        except ValueError as error:
            print(f"{name}: left out, {error}")
            continue
        assert warm.shape == (BATCH, 3, SIZE, SIZE) and warm.dtype == torch.float32 and warm.min() >= -1
        running[name], rates[name] = batches, []
    for _ in range(options.repeats):
        for name, batches in running.items():
            for _ in range(8):  # what was made while the others had their turn
                next(batches)
            start = time.perf_counter()
            for _ in range(options.batches):
                next(batches)
            rates[name].append(options.batches * BATCH / (time.perf_counter() - start))

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "pillow", "datasets"))
    print(f"\n{platform.machine()}, {options.workers} workers, Python {platform.python_version()}, {versions}")
    print(f"{IMAGES} JPEG files, short side {options.short_side} px, views of {SIZE} px, batch {BATCH}\n")
    first = statistics.median(next(iter(rates.values())))
    for name, measured in rates.items():
        median = statistics.median(measured)
        print(f"{name:<40}{median:8.0f} images/s  {median / first:5.2f}x  ({min(measured):.0f} to {max(measured):.0f})")


if __name__ == "__main__":
    main()
