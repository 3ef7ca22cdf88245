"""Runs that take a second: a few generated images, the smallest networks that the config allows, two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from images import noise

from vqgan_accel.config import Config, QuantizerConfig, parse_config
from vqgan_accel.config.quantizers import KeptCodebookConfig, NearestCodeConfig, QuantizerField
from vqgan_accel.sections import sections_of, type_of

SIZE = 16  # pixels
DISCRIMINATOR = {"channel_base": 64, "channel_max": 16, "minibatch_stddev_group": 2}  # 0.1 MB
SPLITS = {"train": 8, "validation": 3, "test": 3}  # images

QUANTIZER_SECTIONS = {type_of(section): section for section in sections_of(QuantizerField)}
NEAREST = [kind for kind, section in QUANTIZER_SECTIONS.items() if issubclass(section, NearestCodeConfig)]
KEPT = [kind for kind, section in QUANTIZER_SECTIONS.items() if issubclass(section, KeptCodebookConfig)]  # of NEAREST


def having(kind: str, **settings: Any) -> dict[str, Any]:
    """Those of the settings that this type of quantizer has a key for."""
    section = QUANTIZER_SECTIONS.get(kind)  # None: of a type that there is not, which a test may ask for
    return {name: value for name, value in settings.items() if section and name in section.model_fields}


INNER = {"type": "ema", "num_codes": 16, "embedding_dim": 8}
SMALL: dict[str, dict[str, Any]] = {  # what makes a type small that has no num_codes
    "fsq": {"levels": [4, 3]},
    "lfq": {"bits": 4},
    "bsq": {"bits": 4},
    "residual": {"depth": 3, "inner": INNER, "dropout": 0.5},
    "product": {"groups": 2, "inner": {**INNER, "type": "standard"}},
}


def small(kind: str) -> dict[str, Any]:
    """16 codes of 8 numbers where it has keys for that, and else what SMALL has."""
    return {"type": kind, **having(kind, num_codes=16, embedding_dim=8), **SMALL.get(kind, {})}


def tiny_quantizer(kind: str, **settings: Any) -> QuantizerConfig:
    return QUANTIZER_SECTIONS[kind].model_validate(small(kind) | settings)


# One of each type that there is: what these are tried with, a new one is tried with, too.
QUANTIZERS = {kind: tiny_quantizer(kind) for kind in QUANTIZER_SECTIONS}


def write_images(folder: Path, n: int, size: int = SIZE, seed: int = 0) -> list[Path]:
    """`n` PNG 000.png, 001.png, ... of size x size pixels in `folder`; all their contents differ."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03}.png" for index in range(n)]
    for index, path in enumerate(paths):
        noise(size, size, seed=seed * 1000 + index).save(path)
    return paths


def write_splits(folder: Path, size: int = SIZE) -> Path:
    """train/, validation/ and test/ in `folder`, all images different; what is there already stays. Returns it."""
    for seed, (split, n) in enumerate(SPLITS.items()):
        if not (folder / split).exists():
            write_images(folder / split, n, size, seed)
    return folder


def tiny_config(folder: Path, **overrides: Any) -> Config:
    """A run of two steps in folder/run on folder/images, which it writes where `data.path` is not given.

    Overrides are the top-level keys, sections as dicts that are merged into the tiny ones:
    tiny_config(tmp_path, seed=1, training={"max_steps": 4}, quantizer={"type": "gumbel"}, discriminator=DISCRIMINATOR).
    """
    kind = overrides.get("quantizer", {}).get("type", "standard")
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "data": {"path": str(folder / "images"), "image_size": SIZE, "workers": 0},
        "autoencoder": {"channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1},
        "quantizer": small(kind),
        "losses": {"perceptual_weight": 0},
        "training": {"max_steps": 2, "total_batch_size": 4},
        "evaluation": {"metrics": ["l2", "psnr", "ssim", "codebook"], "batch_size": 2, "grid_images": 2},
    }
    if "path" not in overrides.get("data", {}):
        write_splits(folder / "images")
    return parse_config(merged(values, overrides))


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with `overrides` put over them, dicts inside dicts too."""
    result = dict(values)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
