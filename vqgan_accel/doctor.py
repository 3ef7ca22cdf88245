"""What this machine has: versions, devices, extras, weights; and what each missing one would enable."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from vqgan_accel.config import WeightFiles
from vqgan_accel.extras import EXTRAS
from vqgan_accel.models.weights import published

CORE = (
    "numpy",
    "pillow",
    "safetensors",
    "torch",
    "torchvision",
    "accelerate",
    "datasets",
    "diffusers",
    "huggingface-hub",
    "torchmetrics",
    "torch-fidelity",
    "lpips",
    "pydantic",
    "omegaconf",
)
USES = {
    "vgg16": "lpips_vgg and LPIPS in the evaluation",
    "alexnet": "lpips_alex",
    "squeezenet": "lpips_squeeze",
    "mobilenet_v2": "the MobileNetV2 feature distance and FD-MobileNetV2",
    "inception": "rFID",
}


def doctor_lines(weights: WeightFiles) -> list[str]:
    """Nothing is downloaded to find out: a missing weight file is one that its first use would download."""
    lines = [f"python           {platform.python_version()} on {platform.machine()}"]
    lines += [f"{name:<17}{_version(name) or 'MISSING: pip install ' + name}" for name in CORE]
    lines.append(f"devices          {_devices()}")
    lines.append(f"bf16             {_bf16()}")
    for package, (extra, use) in EXTRAS.items():
        found = _version(package)
        lines.append(f"{package:<17}{found or f'missing; pip install vqgan_accel[{extra}] would enable {use}'}")
    for name, use in USES.items():
        lines.append(f"{name:<17}{_weights(name, getattr(weights, name), use)}")
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(names) + f" (CUDA {torch.version.cuda})"
    return f"no GPU; {torch.get_num_threads()} CPU threads"


def _bf16() -> str:
    if torch.cuda.is_available():
        return (
            "supported"
            if torch.cuda.is_bf16_supported()
            else "not supported by this GPU: train with mixed_precision=no"
        )
    return "on the CPU, fast only with AMX or AVX512-BF16"


def _weights(name: str, file: str | None, use: str) -> str:
    if file is not None:
        return f"{file}, as weights.{name} says" if Path(file).is_file() else f"weights.{name}={file} is not there"
    name_there = Path(URL_INCEPTION_V3 if name == "inception" else published(name).url).name
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name_there
    if cached.is_file():
        return f"cached in {cached}"
    return f"not here: downloaded at first use, or give weights.{name}=FILE; enables {use}"
