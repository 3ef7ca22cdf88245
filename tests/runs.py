"""What a run left behind, for comparisons."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vqgan_accel.config import Config
from vqgan_accel.interruption import StopRequest
from vqgan_accel.training.loop import train_to_the_end
from vqgan_accel.training.setup import Run, open_run

REPOSITORY = Path(__file__).parent.parent


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by file and name; copies, for files are mapped."""
    found = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        found |= {f"{file.relative_to(checkpoint)}:{name}": tensor.clone() for name, tensor in load_file(file).items()}
    return found


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert (a / "progress.json").read_text() == (b / "progress.json").read_text()


HOLD = """
import sys
from pathlib import Path
from vqgan_accel.files import lock

held = lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock of `folder` while it is open; killing it lets go sooner."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout and other.stdout.readline() == "locked\n"
            yield other
        finally:
            other.kill()  # its lock goes with it


class StopIn(StopRequest):
    """As if a signal came in step `step` of a run."""

    def __init__(self, run: Run, step: int) -> None:
        super().__init__()
        self.run, self.step = run, step

    def __bool__(self) -> bool:
        progress = self.run.progress
        return progress.step == self.step - 1 and not progress.validation_due


def train_until(config: Config, step: int) -> None:
    """Training of a new run that is asked to stop in that step; it raises as `train` does."""
    with open_run(config) as run:
        train_to_the_end(run, StopIn(run, step))
