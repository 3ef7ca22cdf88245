"""Checkpoints that are complete or absent.

step_00001000/
  tokenizer/            ImageTokenizer.save_pretrained
  tokenizer_ema/        the same of the averaged weights, where training keeps them
  discriminator.safetensors
  optimizers.pt         both AdamW states, read with weights_only
  progress.json         position, counters, results so far, use of the codes in the current epoch
  manifest.json         size and sha256 of every file above

A checkpoint is written aside, synced and renamed; only then `latest` moves and older ones go. Randomness is a
function of position, so no random state is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.run_folder import (
    TOKENIZER,
    TOKENIZER_EMA,
    checkpoints,
    checkpoints_folder,
    step_name,
    sync,
    write_json,
)


@dataclass
class Progress:
    step: int = 0  # optimizer steps taken: the position in the data, the schedules and the noise
    bad_steps: int = 0  # skipped for non-finite values, ever
    bad_steps_in_a_row: int = 0
    skipped_images: int = 0  # unreadable ones replaced under data.on_error=skip
    best: float | None = None  # training.best_metric so far


@dataclass
class TrainingState:
    """Everything that training changes; the networks are unwrapped."""

    tokenizer: ImageTokenizer
    average: AveragedModel | None
    discriminator: nn.Module | None
    optimizers: dict[str, Optimizer]
    code_counts: Tensor  # (K,) use since the epoch began, over all processes
    progress: Progress

    @property
    def averaged_tokenizer(self) -> ImageTokenizer | None:
        if self.average is None:
            return None
        assert isinstance(self.average.module, ImageTokenizer)
        return self.average.module


def write_state(state: TrainingState, folder: Path) -> None:
    state.tokenizer.save_pretrained(folder / TOKENIZER)
    if state.averaged_tokenizer is not None:
        state.averaged_tokenizer.save_pretrained(folder / TOKENIZER_EMA)
    if state.discriminator is not None:
        save_file(state.discriminator.state_dict(), folder / "discriminator.safetensors")
    torch.save({name: optimizer.state_dict() for name, optimizer in state.optimizers.items()}, folder / "optimizers.pt")
    averaged = int(state.average.n_averaged) if state.average is not None else 0
    progress = asdict(state.progress) | {"code_counts": state.code_counts.tolist(), "averaged_steps": averaged}
    write_json(folder / "progress.json", progress)


def read_state(state: TrainingState, folder: Path) -> None:
    """Fill `state` in place. ValueError where the checkpoint is of other networks than the config's."""
    try:
        state.tokenizer.load_state_dict(load_file(folder / TOKENIZER / "model.safetensors"))
        if state.averaged_tokenizer is not None:
            state.averaged_tokenizer.load_state_dict(load_file(folder / TOKENIZER_EMA / "model.safetensors"))
        if state.discriminator is not None:
            state.discriminator.load_state_dict(load_file(folder / "discriminator.safetensors"))
        for name, saved in torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True).items():
            state.optimizers[name].load_state_dict(saved)
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        state.code_counts.copy_(torch.tensor(progress.pop("code_counts")))
    except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"checkpoint {folder} does not fit this config ({reason}); resume with the config it was trained with"
        ) from None
    averaged = progress.pop("averaged_steps")
    if state.average is not None:
        state.average.n_averaged.fill_(averaged)
    state.progress = Progress(**progress)


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], keep: int, best: bool) -> Path:
    """Write a checkpoint with `write(folder)`, then point `latest` (and `best`) at it and prune. One process calls
    it."""
    folder = checkpoints_folder(run)
    partial, final = folder / f".{step_name(step)}.partial", folder / step_name(step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    write_json(partial / "manifest.json", {name: _fingerprint(partial / name) for name in _files(partial)})
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if final.exists():  # a resumed run has come to a step that its interrupted self had saved: the same content
        shutil.rmtree(final)
    os.replace(partial, final)
    sync(folder)
    _point(folder / "latest", final.name)
    if best:
        _point(folder / "best", final.name)
    # Later steps than this one can only be damaged checkpoints that the run was resumed before: they go too.
    kept = {path.name for path in [path for path in checkpoints(run) if path.name <= final.name][-keep:]}
    if (folder / "best").is_symlink():
        kept.add(os.readlink(folder / "best"))
    for path in checkpoints(run):
        if path.name not in kept:
            shutil.rmtree(path)
    return final


def latest_intact(run: Path, say: Callable[[str], None]) -> Path:
    """The newest checkpoint whose files match its manifest; damaged ones are named aloud and passed over.

    ValueError where all of a run's checkpoints are damaged.
    """
    for path in reversed(checkpoints(run)):
        fault = damage(path)
        if fault is None:
            return path
        say(f"checkpoint {path} is damaged ({fault}); going back to the one before it")
    raise ValueError(f"every checkpoint in {checkpoints_folder(run)} is damaged; restore one or start a new output_dir")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _fingerprint(checkpoint / name) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _point(link: Path, target: str) -> None:
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, link)
    sync(link.parent)
