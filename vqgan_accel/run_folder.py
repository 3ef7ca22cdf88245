"""Where a run keeps what, and how files there are written: whole or not at all.

RUN/config.yaml                    the resolved config
RUN/metrics.jsonl                  one JSON object per logged step
RUN/clock.jsonl                    how long those steps took, by the clock of the machine
RUN/starts.jsonl                   one JSON object for each time that training was started: machine, versions, images
RUN/validation.json                the last validation: its protocol, and how often it used each code
RUN/report.html                    all of it to be looked at, written at the end of training
RUN/.lock                          held by the process that trains there
RUN/wandb_id                       the id of the run on wandb, where it is tracked there
RUN/images/step_00001000.png       validation originals over reconstructions
RUN/checkpoints/step_00001000/     see training/checkpoint.py; `latest` and `best` are links to such folders
RUN/evaluation/...                 what evaluate.py measured
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CONFIG = "config.yaml"
LOCK = ".lock"
ASK_AGAIN = 1.0  # seconds between two tries to get it
METRICS = "metrics.jsonl"
CLOCK = "clock.jsonl"
STARTS = "starts.jsonl"
VALIDATION = "validation.json"
REPORT = "report.html"
PICTURES = "images"  # a folder of one for each validation
WANDB_ID = "wandb_id"  # of the run there, so that a resumed one goes on in the same curves
TOKENIZER = "tokenizer"  # folders inside a checkpoint
TOKENIZER_EMA = "tokenizer_ema"
TOKENIZER_CONFIG = "config.json"  # files there, named so by diffusers
WEIGHTS_PATTERN = "diffusion_pytorch_model*.safetensors*"
DISCRIMINATOR = "discriminator.safetensors"  # a file there
EVALUATION = "evaluation"  # a folder of one for each split
EVALUATION_RESULTS = "metrics.json"  # a file there


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def picture_file(run: Path, step: int) -> Path:
    """Of a validation: originals over reconstructions."""
    return run / PICTURES / f"{step_name(step)}.png"


def pictures(run: Path) -> dict[int, Path]:
    """Step of a validation -> its picture, in the order of the steps."""
    found = [file for file in (run / PICTURES).glob("step_*.png") if re.fullmatch(r"step_\d{8,}", file.stem)]
    return {
        step_of(file.with_suffix("")): file for file in sorted(found, key=lambda file: step_of(file.with_suffix("")))
    }


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = checkpoints_folder(run)
    try:
        names = os.listdir(folder)  # not glob, which takes a folder that cannot be read for an empty one
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [folder / name for name in names if re.fullmatch(r"step_\d{8,}", name) and (folder / name).is_dir()]
    return sorted(found, key=step_of)


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new, never a part, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)


def require_absent(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another output folder")


@contextmanager
def written_as_a_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside `folder`, which takes its name at the end; nothing is left where writing fails.

    ValueError where there is something at `folder` already.
    """
    require_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(folder):
            partial.mkdir(parents=True)
            yield partial
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            os.replace(partial, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk's error does not say which file was written; this one does."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Make a file's content, or a folder's renames, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderHeldError(ValueError):
    """Another process is at work in the folder."""


def lock(run: Path, patience: float = 0.0) -> IO[str]:
    """Keep other processes from working in the same folder until the file is closed or this process ends.

    FolderHeldError where another one does, still after `patience` seconds. (POSIX locks, which work over NFS and are
    not inherited by data workers.)
    """
    file = (run / LOCK).open("a")
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < end:
                time.sleep(ASK_AGAIN)
                continue
            file.close()
            raise FolderHeldError(
                f"another process is at work in {run}; wait for its end, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        return file


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    write_atomically(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def append_line(path: Path, values: dict[str, Any]) -> None:
    """One JSON object as a line of its own at the end of the file."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; what is none, such as a last line that was cut off, is passed over. Empty
    where there is no file."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def find_tokenizer(path: Path) -> tuple[Path, Path | None]:
    """(folder of a saved tokenizer, its run's config or None) for a run, a checkpoint, a saved tokenizer, or a name on
    the Hugging Face hub, whose files are downloaded once.

    A run means its latest checkpoint; of a checkpoint the averaged weights are taken where it has them.
    FileNotFoundError where there is none.
    """
    if not path.is_dir():
        path = downloaded(path)
    checkpoint = path
    if checkpoints_folder(path).is_dir():
        found = checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path} is a run without a complete checkpoint: train it first")
        checkpoint = found[-1]
    config = next(
        (parent / CONFIG for parent in (path, *path.resolve().parents[:3]) if (parent / CONFIG).is_file()), None
    )
    for tokenizer in (checkpoint / TOKENIZER_EMA, checkpoint / TOKENIZER, checkpoint):
        if (tokenizer / TOKENIZER_CONFIG).is_file():
            return tokenizer, config
    raise FileNotFoundError(
        f"{path} holds no tokenizer: give a run folder, a checkpoint or a folder of save_pretrained"
    )


def downloaded(name: Path) -> Path:
    """The folder in which the hub's files of that name are kept."""
    missing = f"there is no run, checkpoint or saved tokenizer at {name}"
    # Names on the hub are USER/NAME; below a folder that is here something was mistyped.
    if name.is_absolute() or len(name.parts) != 2:
        raise FileNotFoundError(missing)
    if name.parent.exists():
        raise FileNotFoundError(f"{missing} (and as the folder {name.parent} is here, the hub was not asked for it)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(name), allow_patterns=[TOKENIZER_CONFIG, CONFIG, WEIGHTS_PATTERN]))
    except (OSError, HFValidationError) as error:  # its errors of the network and of the server are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"{missing}, nor can that name be had from the Hugging Face hub ({reason})") from None
