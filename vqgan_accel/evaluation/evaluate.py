"""Evaluate a tokenizer on a whole split: the validation inside training and `evaluate.py` are this one function.

What is measured is what a user gets: images to codes, codes to images, in float32 (`ieee_float32`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import UNITS, Config, Metric
from vqgan_accel.data.opening import count_images, open_source, require_apart
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.views import Batch, to_float
from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.comparable import fingerprint, pixel_hash, protocol
from vqgan_accel.evaluation.figures import codebook_histogram, reconstruction_grid
from vqgan_accel.evaluation.keeping import Kept, keeping
from vqgan_accel.evaluation.measures.codes import codebook_usage, perplexity
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.evaluation.reference import open_reference, share_of
from vqgan_accel.files import write_json
from vqgan_accel.models.opening import Opened, open_tokenizer
from vqgan_accel.models.precision import ieee_float32
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.models.weights import state_hash
from vqgan_accel.run_folder import CODEBOOK_PICTURE, EVALUATION, EVALUATION_RESULTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vqgan_accel.data.stream import StreamSource


class Evaluation(NamedTuple):
    results: dict[str, float]
    num_images: int  # over all processes
    skipped_images: int
    code_counts: Tensor  # (sum of K,), one codebook after another
    originals: Tensor  # (G, 3, H, W) the split's first images, and what became of them, on the CPU
    reconstructions: Tensor
    pixels_hash: str  # of every evaluated image after crop and resize, in no order


@torch.no_grad()
@ieee_float32()
def evaluate_tokenizer(
    tokenizer: ImageTokenizer,
    batches: Iterable[Batch],
    metrics: Metrics,
    device: torch.device,
    image_size: int,
    grid_images: int,
    hash_pixels: bool = False,
    same_images: bool = False,
    kept: Kept | None = None,
) -> Evaluation:
    """`batches`: this process's share, see data.opening.evaluation_loader. Every rank calls it; all get the same
    results.

    same_images: as those of the evaluation before with these metrics, whose feature networks need not see them again;
    kept: where reconstructions are written.

    The shares need not be equal: sums are kept per process and reduced once, so nothing is padded or counted twice.
    """
    was_training = tokenizer.training
    tokenizer.eval()
    metrics.reset(same_images)
    shown = torch.zeros(2, grid_images, 3, image_size, image_size)  # filled by whichever process holds the image
    held = torch.zeros(grid_images)  # 1 where one does: an unreadable image leaves no hole
    counted = torch.zeros(3, dtype=torch.int64)  # images, skipped images, sum of pixel hashes
    for batch in batches:
        images = to_float(batch["image"].to(device, non_blocking=True))  # (B, 3, H, W); B may be 0
        counted += torch.tensor([len(images), batch["skipped"], 0])
        if not len(images):
            continue
        latents = tokenizer.latents(images)
        codes = tokenizer.quantizer.choose(latents)  # as `encode` does
        reconstructions = tokenizer.decode_own(codes)
        metrics.update(images, reconstructions, codes, batch["index"], tokenizer, latents)
        if kept is not None:
            kept.add(reconstructions, batch["index"])
        for row, position in enumerate(batch["index"].tolist()):
            if position < grid_images:
                shown[0, position], shown[1, position] = images[row].cpu(), reconstructions[row].cpu()
                held[position] = 1
        if hash_pixels:
            counted[2] += sum(pixel_hash(image) for image in batch["image"])
    tokenizer.train(was_training)
    num_images, skipped, pixels = sum_over_processes(counted.to(device)).tolist()
    if num_images == 0:
        raise ValueError("not one image of the split could be read: there is nothing to evaluate")
    metrics.require(num_images)
    shown = sum_over_processes(shown.to(device)).cpu()[:, sum_over_processes(held.to(device)).cpu() > 0]
    return Evaluation(
        metrics.compute(), num_images, skipped, metrics.code_counts(), shown[0], shown[1], f"{pixels:016x}"
    )


def evaluate(
    model: str | Path,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a tokenizer on every image of `evaluation.split` of `data.path`; on many processes every one calls it.

    model: what `load_tokenizer` takes; data: images in place of the run's own, whatever data.path may be; overrides:
    `section.key=value`, of the run's config or, where there is none, of the defaults. Writes metrics.json,
    reconstructions.png and codebook.png into `output` (default: evaluation/SPLIT, or evaluation/DATA_SPLIT of other
    images, beside the run's config or in the tokenizer's folder), prints a table, and returns what metrics.json holds:
    `results`, metric -> value (psnr in dB, codebook_usage in %, l2 of pixels in [0, 1]), `protocol`, all that decides
    them besides the tokenizer, and its `fingerprint`: numbers compare if and only if theirs are equal. ValueError or
    FileNotFoundError where the tokenizer, the images or a feature network's weights cannot be had.

    >>> report = evaluate("runs/first", overrides=["evaluation.metrics=[psnr, codebook]"])
    runs/first/checkpoints/... on 3 images
    ...
    >>> sorted(report["results"])
    ['bits_per_pixel', 'bits_per_token', 'codebook_usage', 'perplexity', 'psnr', 'psnr_per_image', 'quantization_error']
    """
    opened = open_tokenizer(model)
    tokenizer, config = opened.tokenizer, opened.config(overrides, data)
    accelerator = start_accelerator("no", config.training.timeout_minutes)
    settings, device = config.evaluation, accelerator.device
    source = open_source(config.data, settings.split)
    name = settings.split if data is None else f"{Path(data).resolve().name}_{settings.split}"
    output = Path(output or results_folder(model, opened) / name)
    require_apart(output, config.data, "--output")
    sizes = tokenizer.quantizer.codebook_sizes
    metrics, batches = open_measurement(config, settings.metrics, sizes, source, accelerator)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(batches, desc=settings.split, unit="batch", disable=not accelerator.is_main_process, dynamic_ncols=True)
    size, grid = config.data.image_size, settings.grid_images
    with keeping(settings, output, size, accelerator) as kept:
        evaluation = evaluate_tokenizer(
            tokenizer.to(device), bar, metrics, device, size, grid, hash_pixels=True, kept=kept
        )
    rules = protocol(config, evaluation.num_images, evaluation.pixels_hash, metrics)
    report = report_of(evaluation, opened, rules)
    if accelerator.is_main_process:
        write_json(output / EVALUATION_RESULTS, report)
        save_pictures(evaluation, output, grid=grid > 0)
        print(table(report, output, metrics.too_few(evaluation.num_images)), flush=True)
    accelerator.wait_for_everyone()
    return report


def open_measurement(
    config: Config,
    names: Iterable[Metric],
    codebook_sizes: tuple[int, ...],
    source: ImageSource | StreamSource,
    accelerator: Accelerator,
) -> tuple[Metrics, Iterable[Batch]]:
    """What `evaluate_tokenizer` takes: the metrics, and this process's share of the images. ValueError or
    FileNotFoundError where a metric's network or the reference is missing, or there are too few images for one."""
    metrics = Metrics(names, codebook_sizes, config.evaluation, config.weights, accelerator.device)
    if (number := count_images(source)) is not None:
        metrics.require(number)
    open_reference(config, metrics, accelerator)
    return metrics, share_of(source, config, accelerator)


def results_folder(model: str | Path, opened: Opened) -> Path:
    """Beside the tokenizer; of a name on the hub one here, not among its cached files."""
    return opened.home / EVALUATION if Path(model).is_dir() else Path(EVALUATION, model)


def save_pictures(evaluation: Evaluation, output: Path, grid: bool) -> None:
    """codebook.png and, with `grid`, reconstructions.png."""
    if grid:
        reconstruction_grid(evaluation.originals, evaluation.reconstructions).save(output / "reconstructions.png")
    usage_histogram(evaluation.code_counts).savefig(output / CODEBOOK_PICTURE, dpi=120)


def usage_histogram(counts: Tensor) -> Figure:
    """counts (K,) of all codes"""
    return codebook_histogram(counts, perplexity(counts), codebook_usage(counts))


def report_of(evaluation: Evaluation, opened: Opened, protocol: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json holds. ValueError where a result is not finite."""
    bad = [name for name, value in evaluation.results.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"{', '.join(bad)} came out as nan or infinite: {opened.folder} does not give finite reconstructions"
        )
    return {
        "results": evaluation.results,
        "checkpoint": str(opened.folder),
        "tokenizer_sha256": state_hash(opened.tokenizer),
        "skipped_images": evaluation.skipped_images,
        "protocol": protocol,
        "fingerprint": fingerprint(protocol),
    }


def table(report: dict[str, Any], output: Path, notes: Sequence[str] = ()) -> str:
    lines = [f"{report['checkpoint']} on {report['protocol']['num_images']:,} images"]
    lines += [f"  {name:<22}{value:>10.5g} {UNITS.get(name, '')}" for name, value in report["results"].items()]
    if report["skipped_images"]:
        lines.append(f"  {report['skipped_images']} unreadable images were left out")
    lines += [f"  {note}" for note in notes]
    lines += [f"  protocol            {report['fingerprint']}", f"written to {output}"]
    return "\n".join(lines)
