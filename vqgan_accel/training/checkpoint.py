"""Checkpoints that are complete or absent.

step_00001000/
  tokenizer/            ImageTokenizer.save_pretrained
  tokenizer_ema/        the same of the averaged weights, where training keeps them
  discriminator.safetensors
  optimizers.safetensors  the moments of both optimizers; rates and other settings follow from the config
  stream.json           where each lane of a stream stands, where data.streaming
  NAME.safetensors      what a further loss of that name keeps
  progress.json         position, counters, results so far, use of the codes in the current epoch
  manifest.json         size and sha256 of every file above
  validated.json        the best result, as the validation after this checkpoint has left it; it takes precedence

A checkpoint is written aside, synced and renamed; only then `latest` moves and older ones go. Randomness is a
function of position, so no random state is kept. Names with a leading dot are leftovers of an interruption, or
checkpoints found damaged: they go with the next checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vqgan_accel.files import point, sync, write_json
from vqgan_accel.run_folder import BEST, LATEST, checkpoints, checkpoints_folder, step_name
from vqgan_accel.training.state import Progress, Stateful

PROGRESS = "progress.json"
MANIFEST = "manifest.json"
VALIDATED = "validated.json"
PARTIAL, REMOVED = ".partial", ".removed"  # endings of folders on their way in and out


def write_state(state: dict[str, Stateful], folder: Path) -> None:
    notes: dict[str, Any] = {}
    for part in state.values():
        part.write(folder, notes)
    notes.setdefault("averaged_steps", 0)  # which older versions expect without an average, too
    write_json(folder / PROGRESS, notes)


def read_state(state: dict[str, Stateful], folder: Path) -> None:
    """Fill `state` in place. ValueError where the checkpoint is of other networks than the config's."""
    try:
        notes = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        if (folder / VALIDATED).is_file():
            notes |= json.loads((folder / VALIDATED).read_text(encoding="utf-8"))
        for part in state.values():
            part.read(folder, notes)
    except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"checkpoint {folder} does not fit this config ({reason}); resume with the config it was trained with"
        ) from None


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], keep: int, best_step: int | None) -> Path:
    """Write a checkpoint with `write(folder)`, then point `latest` and `best` at their steps and prune. One process
    calls it.

    OSError, one sentence, where it cannot be written: the older checkpoints are as they were.
    """
    folder = checkpoints_folder(run)
    partial, final = folder / f".{step_name(step)}{PARTIAL}", folder / step_name(step)
    remove_leftovers(folder)
    try:
        partial.mkdir(parents=True)
        write(partial)
        write_json(partial / MANIFEST, {name: _fingerprint(partial / name) for name in _files(partial)})
        for path in [*partial.rglob("*"), partial]:
            sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} cannot be written ({error}); the ones before it are intact: put that right, then go "
            "on with --resume"
        ) from error
    # (A folder of that name can only be damaged, or the run would have been resumed from it.)
    set_aside(final)
    os.replace(partial, final)
    sync(folder)
    point_links(run, step, best_step)
    older = [path for path in checkpoints(run) if path.name <= final.name]
    for path in older[:-keep]:
        if path.name != step_name(best_step or -1):
            set_aside(path)
    remove_leftovers(folder)
    return final


def note_validation(run: Path, progress: Progress) -> None:
    """What the validation of a step that is saved already has changed. One process calls it."""
    results = {name: getattr(progress, name) for name in ("best", "best_step", "validation_due")}
    file = checkpoints_folder(run) / step_name(progress.step) / VALIDATED
    write_json(file, results)
    sync(file)
    point_links(run, progress.step, progress.best_step)


def point_links(run: Path, step: int, best_step: int | None) -> None:
    """`latest` and `best`, from what a checkpoint says: an interruption between two renames is made good here."""
    for name, target in ((LATEST, step), (BEST, best_step)):
        link = checkpoints_folder(run) / name
        if link.is_dir() and not link.is_symlink():  # a copy that followed links
            set_aside(link)
        if target is None or not (checkpoints_folder(run) / step_name(target)).is_dir():
            link.unlink(missing_ok=True)
            continue
        point(link, step_name(target))
    sync(checkpoints_folder(run))


def set_aside(checkpoint: Path) -> None:
    """Take a checkpoint out of the run, whole or not at all; `remove_leftovers` takes it off the disk."""
    if checkpoint.exists():
        os.replace(checkpoint, checkpoint.with_name(f".{checkpoint.name}.{time.time_ns()}{REMOVED}"))


def remove_leftovers(folder: Path) -> None:
    """What is in use elsewhere (a file that is being read over NFS) stays until the next time: no run dies of it."""
    for path in folder.glob(".*"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.suffix in (PARTIAL, REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def latest_intact(run: Path, say: Callable[[str], None]) -> Path:
    """The newest checkpoint whose files match its manifest; damaged ones are named aloud and set aside. One process
    calls it.

    ValueError where all of a run's checkpoints are damaged.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(run)):
        fault = damage(path)
        if fault is None:
            for other in damaged:
                set_aside(other)
            return path
        damaged.append(path)
        say(f"checkpoint {path} is damaged ({fault}); going back to the one before it")
    raise ValueError(f"every checkpoint in {checkpoints_folder(run)} is damaged; restore one or start a new output_dir")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. OSError where they cannot be read just now."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _fingerprint(checkpoint / name) != expected:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, AttributeError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None if PROGRESS in manifest else f"{MANIFEST} is incomplete"


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
