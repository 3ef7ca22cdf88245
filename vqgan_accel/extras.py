"""Packages that not everybody needs: setup.cfg's extras, and whether one is installed."""

from __future__ import annotations

import importlib.util

EXTRAS = {  # package -> (extra, what it enables)
    "wandb": ("wandb", "tracking.trackers=[wandb]"),
    "tensorboard": ("tensorboard", "tracking.trackers=[tensorboard]"),
    "ffcv": ("ffcv", "data.backend=ffcv, once its system packages are there: bash launch/install_ffcv.sh VENV"),
    "argcomplete": ("completion", 'the Tab key, after `eval "$(register-python-argcomplete vqgan-accel)"`'),
}


def is_installed(package: str) -> bool:
    """Whether it can be imported. A mere folder of that name, such as the wandb/ that wandb leaves behind, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
