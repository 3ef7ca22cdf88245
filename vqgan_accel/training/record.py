"""What a run folder keeps of how the run came about: the config, and each time that training was started."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from vqgan_accel import __version__
from vqgan_accel.config import Config, flat_config, load_config, save_config
from vqgan_accel.files import append_line
from vqgan_accel.run_folder import CLOCK, CONFIG, METRICS, STARTS, VALIDATION, WANDB_ID, pictures
from vqgan_accel.training.plan import Plan
from vqgan_accel.training.state import Progress
from vqgan_accel.words import now

PACKAGES = ("torchvision", "accelerate", "diffusers", "torchmetrics")  # beside torch


def changes_since_the_beginning(run: Path, config: Config) -> list[str]:
    """`key: before -> now`; empty where the run's config.yaml says the same."""
    try:
        return config_changes(load_config(run / CONFIG), config)
    except (ValueError, FileNotFoundError) as error:  # another version's, or lost: no reason not to go on
        return [f"in what way is not known ({error})"]


def record_config(run: Path, config: Config, resuming: bool) -> None:
    """Write the resolved config, once the checkpoint has been found to fit it. One process calls it."""
    if resuming:
        for change in changes_since_the_beginning(run, config):
            print(f"config changed since the run began: {change}", flush=True)
    else:
        for name in (METRICS, CLOCK, STARTS, VALIDATION, WANDB_ID):  # of a run that never came to a checkpoint
            (run / name).unlink(missing_ok=True)
        for picture in pictures(run).values():
            picture.unlink()
    save_config(config, run / CONFIG)


def record_start(accelerator: Accelerator, plan: Plan, progress: Progress, validation_images: str) -> None:
    """On what, and with which versions, training goes on from here. One process calls it."""
    start = {
        "step": progress.step,
        "total_steps": plan.total_steps,
        "time": now(),
        "processes": plan.num_processes,
        "device": device_name(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "training_images": progress.training_images,
        "validation_images": validation_images,
        "versions": versions(),
    }
    append_line(Path(plan.config.output_dir) / STARTS, start)


def versions() -> dict[str, str]:
    """Of what decides the numbers of a run."""
    own = {"vqgan_accel": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {name: version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    """Such as 'NVIDIA H100 80GB HBM3', or 'AMD EPYC, 8 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The model's own name where the system tells it, else the architecture."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = ""
    found = re.search(r"^model name\s*: (.+)$", facts, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def config_changes(old: Config, new: Config) -> list[str]:
    before, after = (flat_config(config) for config in (old, new))
    common = before.keys() & after.keys()  # a section of another type has other keys, of which its type tells
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and (key in common or key.endswith(".type"))
    ]
