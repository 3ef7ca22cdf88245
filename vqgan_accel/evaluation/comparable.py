"""Which numbers compare: what of an evaluation decides them besides the tokenizer, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from torch import Tensor

from vqgan_accel.config import Config
from vqgan_accel.data.crops import CROPS
from vqgan_accel.evaluation.metrics import Metrics

ARITHMETIC = "float32, IEEE"  # of the tokenizer and of the metrics' networks


def protocol(config: Config, num_images: int, images_hash: str, metrics: Metrics) -> dict[str, Any]:
    """All that decides a number besides the tokenizer. Two evaluations compare if and only if their fingerprints are
    equal."""
    settings, rules = config.evaluation, config.evaluation.rules
    return pictures_protocol(config) | {
        "num_images": num_images,
        "psnr_in_8_bits": rules.eight_bit_psnr,
        "ssim_in_8_bits": rules.eight_bit_ssim,
        "ssim": rules.ssim,
        "images_hash": images_hash,
        "reference": metrics.reference,
        "metrics": list(metrics.names),
        "lpips_network": settings.lpips_network if "lpips" in metrics.names else None,
        "pfid": [settings.pfid_rate, settings.pfid_neighbours] if "pfid" in metrics.names else None,
        "feature_networks_sha256": metrics.network_hashes(),
        "torchmetrics": version("torchmetrics"),
    }


def fingerprint(protocol: dict[str, Any]) -> str:
    """16 hex digits of sha256 over the canonical JSON."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def pictures_protocol(config: Config) -> dict[str, Any]:
    """The part of it that decides the features of images: what a reference must have been made with."""
    rules = config.evaluation.rules
    crop = CROPS[rules.crop]
    return {
        "image_size": config.data.image_size,
        "crop": crop.crop,
        "resize_filter": crop.resize_filter,
        "levels": rules.levels,
        "arithmetic": ARITHMETIC,
    }


def pixel_hash(image: Tensor) -> int:
    """uint8 (3, H, W) -> 40 bits of sha256. Their sum identifies a set of images whatever its order, and the sum of
    eight million of them fits in int64."""
    return int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:5], "little")
