"""The metrics: what each is called, what it adds to the results, and where it is computed. A new one is an entry here.

Plain names, for the config: the class of a metric is imported where it is measured.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from vqgan_accel.sections import OneOf


class Result(NamedTuple):
    lower_is_better: bool
    unit: str = ""


class MetricEntry(NamedTuple):
    measure: str  # the subclass of evaluation.measures.base.Measure
    results: dict[str, Result]
    smallest: int = 1  # pixels of the shorter side that it can be formed of


HIGHER, LOWER = Result(lower_is_better=False), Result(lower_is_better=True)
DECIBEL, PERCENT = Result(False, "dB"), Result(False, "%")
_MEASURES = "vqgan_accel.evaluation.measures"


def _with_std(name: str, result: Result) -> dict[str, Result]:
    return {name: result, f"{name}_std": LOWER}


METRICS: dict[str, MetricEntry] = {  # docs/evaluation.md defines each
    "l2": MetricEntry(f"{_MEASURES}.pixels.L2", {"l2": LOWER}),
    "psnr": MetricEntry(f"{_MEASURES}.pixels.PSNR", {"psnr": DECIBEL, "psnr_per_image": DECIBEL}),
    "ssim": MetricEntry(f"{_MEASURES}.pixels.SSIM", {"ssim": HIGHER}, smallest=11),  # window
    # of images that are halved four times its window is left
    "ms_ssim": MetricEntry(f"{_MEASURES}.pixels.MSSSIM", {"ms_ssim": HIGHER}, smallest=176),
    "lpips": MetricEntry(f"{_MEASURES}.pairs.LPIPS", {"lpips": LOWER}),
    "lpips_vgg": MetricEntry(f"{_MEASURES}.pairs.LPIPSVGG", {"lpips_vgg": LOWER}),
    "lpips_alex": MetricEntry(f"{_MEASURES}.pairs.LPIPSAlex", {"lpips_alex": LOWER}),
    "lpips_squeeze": MetricEntry(f"{_MEASURES}.pairs.LPIPSSqueeze", {"lpips_squeeze": LOWER}),
    "mobilenet_distance": MetricEntry(f"{_MEASURES}.pairs.MobileNet", {"mobilenet_distance": LOWER}),
    "efficientnet_distance": MetricEntry(f"{_MEASURES}.pairs.EfficientNet", {"efficientnet_distance": LOWER}),
    "rfid": MetricEntry(f"{_MEASURES}.frechet.RFID", _with_std("rfid", LOWER)),
    "fd_mobilenet": MetricEntry(f"{_MEASURES}.frechet.FDMobileNet", _with_std("fd_mobilenet", LOWER)),
    "fd_efficientnet": MetricEntry(f"{_MEASURES}.frechet.FDEfficientNet", _with_std("fd_efficientnet", LOWER)),
    "fd_dinov2": MetricEntry(f"{_MEASURES}.frechet.FDDINOv2", _with_std("fd_dinov2", LOWER)),
    "pfid": MetricEntry(f"{_MEASURES}.perturbed.PFID", _with_std("pfid", LOWER)),
    "kid": MetricEntry(f"{_MEASURES}.samples.KID", _with_std("kid", LOWER)),
    "precision_recall": MetricEntry(f"{_MEASURES}.samples.PrecisionRecall", {"precision": HIGHER, "recall": HIGHER}),
    "inception_score": MetricEntry(f"{_MEASURES}.samples.InceptionScore", _with_std("inception_score", HIGHER)),
    "codebook": MetricEntry(
        f"{_MEASURES}.codes.Codebook",
        {
            "perplexity": HIGHER,
            "codebook_usage": PERCENT,
            "bits_per_token": HIGHER,
            "bits_per_pixel": HIGHER,
            "quantization_error": LOWER,
        },
    ),
}

Metric = Annotated[str, OneOf(METRICS)]
MetricNames = Annotated[tuple[Metric, ...], Field(strict=False)]
METRIC_RESULTS: dict[str, tuple[str, ...]] = {name: tuple(entry.results) for name, entry in METRICS.items()}
_RESULTS = {name: result for entry in METRICS.values() for name, result in entry.results.items()}
LOWER_IS_BETTER = frozenset(name for name, result in _RESULTS.items() if result.lower_is_better)
UNITS = {name: result.unit for name, result in _RESULTS.items() if result.unit}


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a result is better than another one of the same metric. Nothing is better than a nan, nor is a nan."""
    return value < than if metric in LOWER_IS_BETTER else value > than
