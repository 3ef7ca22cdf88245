"""What comes with the package beside its code: recipes and launch files.

`configs` and `launch` in this folder are links to the folders of these names in the checkout; a wheel holds copies of
what they lead to, so there is one place where each is written.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from vqgan_accel.files import naming

CONFIGS = Path(__file__).parent / "configs"
LAUNCH = Path(__file__).parent / "launch"
# for users of the trainer; the other scripts there are the checkout's own
LAUNCH_FILES = ("*.yaml", "slurm.sh", "keep_going.sh", "two_cpu_processes.sh", "install_ffcv.sh", "demo_photographs.py")


def recipes() -> dict[str, Path]:
    """Name, such as `imagenet/ema_vqvae_cb4096`, -> its YAML file; sorted by name."""
    files = CONFIGS.rglob("*.yaml") if CONFIGS.is_dir() else ()
    return dict(sorted((file.relative_to(CONFIGS).with_suffix("").as_posix(), file) for file in files))


def summary(recipe: Path) -> str:
    """The first sentence of the comment at its top, without the recipe's own name."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:6] if line.startswith("#"))
    return re.split(r"\.(?= [A-Z]|$)", comment.removeprefix(f"{recipe.stem}: "))[0]


def copy_launch_files(folder: Path) -> list[Path]:
    """Copy accelerate's config files and the scripts for clusters into `folder`. Returns the copies.

    Nothing is overwritten: ValueError, before anything is copied, where one of them is there already.
    """
    files = sorted(file for pattern in LAUNCH_FILES for file in LAUNCH.glob(pattern))
    copies = [folder / file.name for file in files]
    if there := next((copy for copy in copies if copy.exists()), None):
        raise ValueError(f"{there} is there already and may hold your changes; give another folder")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, copy in zip(files, copies, strict=True):
            shutil.copy(file, copy)  # with its mode: scripts stay executable
    return copies
