"""What doctor says of versions and of GPUs, from what nvidia-smi and the kernel module have really printed."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from vqgan_accel import doctor
from vqgan_accel.doctor import CORE, OLDEST_DRIVER, WHEELS, gpu_fault, package_line, version_bounds

ROOT = Path(__file__).parent.parent


def smi(line: str) -> str:
    """The head of nvidia-smi's table."""
    rule = "+" + "-" * 89 + "+\n"
    return f"Wed Jan 24 15:18:40 2024\n{rule}| {line} |\n{rule}| GPU  Name   Persistence-M | Bus-Id    Disp.A |\n"


SMI_450 = smi("NVIDIA-SMI 450.57       Driver Version: 450.57       CUDA Version: 11.0    ")
SMI_550 = smi("NVIDIA-SMI 550.40.07              Driver Version: 550.40.07      CUDA Version: 12.4    ")
SMI_610 = smi("NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: 13.3    ")
SMI_331 = smi("NVIDIA-SMI 331.62     Driver Version: 331.62        ")
PROC_550 = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024\n"
PROC_565 = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  565.57.01  Release Build  (dvs-builder@U16-A24-9-2)  "
    "Thu Oct 10 12:15:00 UTC 2024\nGCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
)


# ---- GPUs


@pytest.mark.parametrize(
    ("driver", "cuda", "said", "wheels"),
    [
        (SMI_550, "13.0", "torch 2.9.1 (CUDA 13.0) needs NVIDIA driver 580 or newer, and here is 550.40.07", 12),
        (PROC_550, "13.0", "torch 2.9.1 (CUDA 13.0) needs NVIDIA driver 580 or newer, and here is 550.90.07", 12),
        (PROC_565, "13.0", "torch 2.9.1 (CUDA 13.0) needs NVIDIA driver 580 or newer, and here is 565.57.01", 12),
        (SMI_450, "13.0", "torch 2.9.1 (CUDA 13.0) needs NVIDIA driver 580 or newer, and here is 450.57", 11),
        (SMI_450, "12.1", "torch 2.9.1 (CUDA 12.1) needs NVIDIA driver 525 or newer, and here is 450.57", 11),
        (SMI_610, "14.0", "torch 2.9.1 (CUDA 14.0) needs NVIDIA driver of its age or newer, and here is 610.43.02", 13),
        (SMI_450, None, "torch 2.9.1 is built without CUDA, and here is NVIDIA driver 450.57", 11),
        (SMI_550, None, "torch 2.9.1 is built without CUDA, and here is NVIDIA driver 550.40.07", 12),
        (PROC_565, None, "torch 2.9.1 is built without CUDA, and here is NVIDIA driver 565.57.01", 12),
        (SMI_610, None, "torch 2.9.1 is built without CUDA, and here is NVIDIA driver 610.43.02", 13),
    ],
)
def test_a_torch_that_does_not_suit_the_driver_is_told_with_the_command_that_does(driver, cuda, said, wheels):
    assert gpu_fault(driver, "2.9.1", cuda) == f"{said}: pip install {WHEELS[wheels]}"


@pytest.mark.parametrize("cuda", ["11.8", "12.1", None])
def test_a_driver_before_cuda_11_has_to_be_updated(cuda):
    assert gpu_fault(SMI_331, "2.4.1", cuda).endswith(" 331.62: update it to 525 or newer")


@pytest.mark.parametrize(
    ("driver", "cuda"),
    [(SMI_450, "11.8"), (SMI_550, "11.8"), (SMI_550, "12.8"), (PROC_550, "12.9"), (SMI_610, "12.1"), (SMI_610, "13.0")],
)
def test_a_driver_runs_every_minor_version_of_its_cuda_and_older_ones(driver, cuda):
    said = gpu_fault(driver, "2.9.1", cuda)
    assert said.startswith("no GPU: NVIDIA driver ") and "CUDA_VISIBLE_DEVICES" in said and "pip" not in said


@pytest.mark.parametrize("cuda", ["12.1", None])
def test_without_a_driver_there_is_no_gpu_and_nothing_to_install(cuda):
    assert gpu_fault("", "2.9.1", cuda) == "no GPU: there is no NVIDIA driver here"


def test_the_cuda_that_nvidia_smi_states_is_believed_over_the_drivers_number():
    """A container with NVIDIA's forward compatibility package: an old kernel module, new libraries."""
    forward = smi("NVIDIA-SMI 470.57.02    Driver Version: 470.57.02    CUDA Version: 12.4    ")
    assert "pip" not in gpu_fault(forward, "2.6.0", "12.6")
    for unknown in ("N/A", "ERR!"):
        assert WHEELS[11] in gpu_fault(forward.replace("12.4", unknown), "2.6.0", "12.6")


def test_every_command_installs_builds_that_its_driver_runs_of_version_bounds():
    tested = version_bounds()
    for cuda, command in WHEELS.items():
        assert cuda in OLDEST_DRIVER
        label = re.search(r" --index-url \S+/whl/(cu(\d\d)\d)$", command)
        assert label and int(label[2]) == cuda
        for line in command.split(" --")[0].split():
            wanted = Requirement(line)
            (bound,) = wanted.specifier
            assert bound.version.endswith(f"+{label[1]}")
            assert package_line(wanted.name, bound.version, tested[wanted.name]) == bound.version
    assert WHEELS[13].split("+")[0] == f"torch=={tested['torch'][1]}"


def test_the_kernel_module_is_asked_where_nvidia_smi_fails(monkeypatch, tmp_path):
    def fails(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(18, "nvidia-smi")  # Driver/library version mismatch

    (tmp_path / "version").write_text(PROC_550)
    for where in (tmp_path / "version", tmp_path / "none"):
        monkeypatch.setattr(doctor.subprocess, "run", fails)
        monkeypatch.setattr(doctor, "KERNEL_MODULE", where)
        assert doctor.driver_text() == (PROC_550 if where.exists() else "")


def test_a_gpu_that_torch_sees_is_named_and_the_driver_not_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"A100 {index}")
    monkeypatch.setattr(doctor, "driver_text", None)
    assert doctor._devices() == f"A100 0, A100 1 (CUDA {torch.version.cuda})"


# ---- versions


def test_a_version_outside_the_tested_ones_is_told_and_one_within_is_not():
    tested = ("2.4.1", "2.14.1")
    for within in ("2.4.1", "2.4.1+cu121", "2.14.1", "2.14.1+cu130", "2.9", "2.5.0a0+872d972e41.nv24.8"):
        assert package_line("torch", within, tested) == within
    assert package_line("torch", "2.4.0+cu121", tested) == (
        "2.4.0+cu121, older than what was tested (2.4.1): pip install 'torch>=2.4.1'"
    )
    assert package_line("torch", "2.14.2", tested) == "2.14.2, newer than what was tested (2.14.1)"
    assert package_line("torch", "3.0", None) == "3.0"
    assert package_line("torch", None, tested) == "MISSING: pip install torch"


def test_the_bounds_are_those_of_setup_cfg_and_its_two_files():
    pins = {}
    for name in ("constraints-lowest.txt", "requirements.txt"):
        lines = (ROOT / name).read_text().splitlines()
        pins[name] = dict(line.split("==") for line in lines if not line.startswith("#"))
    lowest, newest = pins.values()
    tested = version_bounds()
    assert set(CORE) <= set(tested) and set(newest) == set(tested)
    assert tested == {name: (lowest[name], newest[name]) for name in newest}


def test_a_checkout_that_is_not_installed_has_no_bounds(monkeypatch):
    def requires(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", requires)
    assert version_bounds() == {}
