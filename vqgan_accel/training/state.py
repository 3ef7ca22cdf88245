"""What training changes and a checkpoint holds, as one list: saving, reading, updating and discarding go over it.

Whatever training changes is an entry of `Run.state` or belongs to one; tests/test_state.py walks a run and fails on a
module, an optimizer or a tensor that is neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vqgan_accel.distributed import gathered
from vqgan_accel.files import write_json
from vqgan_accel.losses.terms import LossTerm
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.run_folder import TOKENIZER, TOKENIZER_EMA

OPTIMIZERS = "optimizers.safetensors"
STREAM = "stream.json"


class Stateful:
    """An entry of the list. `notes` are the numbers that progress.json holds, of all entries together."""

    def gather(self) -> None:
        """Called on every process before the main one writes."""

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        """Files into a checkpoint's folder, numbers into `notes`."""
        raise NotImplementedError

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        """The inverse, in place. RuntimeError, ValueError, KeyError or FileNotFoundError where the checkpoint is of
        other networks."""
        raise NotImplementedError

    def apply_update(self) -> None:
        """Called on every process once per optimizer step, after the optimizers', with what its rounds have left."""

    def discard_update(self) -> None:
        """Called in its place where the step is skipped."""


@dataclass
class Progress(Stateful):
    step: int = 0  # optimizer steps taken: the position in the data, the schedules and the noise
    bad_steps: int = 0  # skipped for non-finite values, ever
    bad_steps_in_a_row: int = 0
    skipped_images: int = 0  # unreadable ones replaced under data.on_error=skip
    best: float | None = None  # training.best_metric so far
    best_step: int | None = None  # the step that had it
    validation_due: bool = False  # of this step: it has not been done, or was stopped
    training_images: str = ""  # fingerprint of the split: in another one the position means other images

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        notes |= {field.name: getattr(self, field.name) for field in fields(self)}

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        for field in fields(self):
            setattr(self, field.name, notes.get(field.name, field.default))

    def apply_update(self) -> None:
        self.step += 1
        self.bad_steps_in_a_row = 0

    def discard_update(self) -> None:
        self.step += 1
        self.bad_steps += 1
        self.bad_steps_in_a_row += 1


class TokenizerState(Stateful):
    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer  # unwrapped

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        self.tokenizer.save_pretrained(folder / TOKENIZER)

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        self.tokenizer.load_state_dict(load_file(folder / TOKENIZER / SAFETENSORS_WEIGHTS_NAME))

    def apply_update(self) -> None:
        self.tokenizer.quantizer.apply_update()

    def discard_update(self) -> None:
        self.tokenizer.quantizer.discard_update()


class Average(Stateful):
    """The exponential moving average of a tokenizer's weights; of buffers it has the newest.

    As torch's AveragedModel, which keeps its counter on the device, and keeps the host waiting for it twice an update.
    """

    def __init__(self, tokenizer: ImageTokenizer, decay: float, device: torch.device) -> None:
        self.source, self.decay = tokenizer, decay
        self.tokenizer = deepcopy(tokenizer).to(device)  # type: ignore[arg-type]  # as in evaluation/reconstruct.py
        self.updates = 0  # the first of them copies

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        self.tokenizer.save_pretrained(folder / TOKENIZER_EMA)
        notes["averaged_steps"] = self.updates

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        self.tokenizer.load_state_dict(load_file(folder / TOKENIZER_EMA / SAFETENSORS_WEIGHTS_NAME))
        self.updates = notes["averaged_steps"]

    @torch.no_grad()
    def apply_update(self) -> None:
        averages: list[Tensor] = list(self.tokenizer.parameters())
        newest: list[Tensor] = list(self.source.parameters())
        if self.updates:
            torch._foreach_lerp_(averages, newest, 1 - self.decay)
        else:
            torch._foreach_copy_(averages, newest)
        torch._foreach_copy_(list(self.tokenizer.buffers()), list(self.source.buffers()))
        self.updates += 1


class Weights(Stateful):
    """A module, in a file of its own."""

    def __init__(self, module: nn.Module, file: str) -> None:
        self.module, self.file = module, file

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}, folder / self.file)

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        self.module.load_state_dict(load_file(folder / self.file))


class TermState(Weights):
    """The buffers of a further loss."""

    module: LossTerm

    def apply_update(self) -> None:
        self.module.apply_update()

    def discard_update(self) -> None:
        self.module.discard_update()


class Moments(Stateful):
    """What the optimizers keep of each parameter, as `name/index/key`. Rates and other settings follow from the
    config."""

    def __init__(self, optimizers: dict[str, Optimizer]) -> None:
        self.optimizers = optimizers

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        moments = {
            f"{name}/{index}/{key}": value.contiguous()
            for name, optimizer in self.optimizers.items()
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        save_file(moments, folder / OPTIMIZERS)

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self.optimizers}
        for path, value in load_file(folder / OPTIMIZERS).items():
            name, index, key = path.split("/")
            states[name].setdefault(int(index), {})[key] = value
        for name, optimizer in self.optimizers.items():
            restore_moments(optimizer, states[name], name)


def restore_moments(optimizer: Optimizer, states: dict[int, dict[str, Tensor]], name: str) -> None:
    settings = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not states.keys() <= set(range(len(parameters))):
        raise ValueError(f"{OPTIMIZERS} has {len(states)} parameters of the {name}, not {len(parameters)}")
    for number, state in states.items():
        for key, value in state.items():
            if value.shape == parameters[number].shape:
                # In the parameter's memory layout: fused AdamW pairs numbers by their place in memory, and would
                # silently update a channels_last weight with other weights' moments.
                state[key] = torch.empty_like(parameters[number]).copy_(value)
    optimizer.load_state_dict({"state": states, "param_groups": settings})


class StreamPosition(Stateful):
    """Where each lane of a stream stands. It is read before all else, by `read_stream`: the order begins there."""

    def __init__(self, states_at: Callable[[int], dict[str, Any]], progress: Progress) -> None:
        self.states_at, self.progress = states_at, progress
        self.lanes: dict[str, Any] = {}  # of all processes; empty where the images do not come in a stream

    def gather(self) -> None:
        self.lanes = gathered(self.states_at(self.progress.step))

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        if self.lanes:
            write_json(folder / STREAM, self.lanes)

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        self.lanes = read_stream(folder)


def read_stream(folder: Path) -> dict[str, Any]:
    """Empty where the run did not read a stream."""
    file = folder / STREAM
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
