"""The names of the metrics, and which way each is better."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Metric = Literal["l2", "psnr", "ssim", "lpips", "mobilenet_distance", "rfid", "fd_mobilenet", "codebook"]
MetricNames = Annotated[tuple[Metric, ...], Field(strict=False)]
# metric in `metrics` -> the names it adds to the results; those in LOWER_IS_BETTER improve downwards
METRIC_RESULTS: dict[str, tuple[str, ...]] = {
    "l2": ("l2",),
    "psnr": ("psnr", "psnr_per_image"),
    "ssim": ("ssim",),
    "lpips": ("lpips",),
    "mobilenet_distance": ("mobilenet_distance",),
    "rfid": ("rfid",),
    "fd_mobilenet": ("fd_mobilenet",),
    "codebook": ("perplexity", "codebook_usage"),
}
LOWER_IS_BETTER = frozenset({"l2", "lpips", "mobilenet_distance", "rfid", "fd_mobilenet"})


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a result is better than another one of the same metric. Nothing is better than a nan, nor is a nan."""
    return value < than if metric in LOWER_IS_BETTER else value > than
