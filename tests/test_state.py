"""The list of what has state: nothing that training changes is missing from it, and all of it comes back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_tokenizer
from tiny import DISCRIMINATOR, QUANTIZERS, tiny_config
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqgan_accel import distributed
from vqgan_accel.config import Config
from vqgan_accel.interruption import StopRequest
from vqgan_accel.models.weights import FixedModule
from vqgan_accel.training import checkpoint
from vqgan_accel.training.checkpoint import read_state, write_state
from vqgan_accel.training.loop import take_step
from vqgan_accel.training.setup import Run, open_run
from vqgan_accel.training.state import Average, Progress, StreamPosition, TokenizerState, read_stream

GAME = DISCRIMINATOR | {"r1_weight": 1.0, "adaptive_weight": True}
# parts of a run that hold tensors and whose steps leave nothing behind
WITHOUT_STATE = {
    "validation": "its metrics are reset before each use",
    "batches": "what comes next follows from the step, or is in stream.json",
    "accelerator": "the wrappers of networks and optimizers that are looked at by themselves",
}


def full(folder: Path, quantizer: str) -> Config:
    """A run with everything that a checkpoint can hold."""
    training = {"max_steps": 9, "ema_decay": 0.5, "base_lr": 1e-2}
    return tiny_config(folder, quantizer={"type": quantizer}, discriminator=GAME, training=training)


def things(value: Any, seen: set[int]) -> Iterator[nn.Module | Optimizer | Tensor]:
    """Every module, optimizer and tensor that is reached from `value` through attributes and containers."""
    if id(value) in seen or value is None or isinstance(value, str | int | float | Path | type):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module | Optimizer | Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from things(each, seen)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from things(each, seen)
    elif type(value).__module__.startswith(("vqgan_accel", __name__)):
        for each in vars(value).values():
            yield from things(each, seen)


def tensors_of(thing: nn.Module | Optimizer | Tensor) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from (*thing.parameters(), *thing.buffers())
    else:
        yield from (parameter for group in thing.param_groups for parameter in group["params"])


def missing_from_the_list(run: Run) -> list[str]:
    """The attributes of a run that lead to tensors which no entry of its state leads to."""
    listed = {id(tensor) for thing in things(run.state, set()) for tensor in tensors_of(thing)}
    found = []
    for field in dataclasses.fields(run):
        if field.name in {"state", *WITHOUT_STATE}:
            continue
        for thing in things(getattr(run, field.name), set()):
            fixed = isinstance(thing, FixedModule)
            if not fixed and any(id(tensor) not in listed for tensor in tensors_of(thing)):
                found.append(f"{field.name}: {type(thing).__name__}")
    return found


@pytest.mark.seconds
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_whatever_holds_tensors_in_a_run_is_on_the_list(quantizer: str, tmp_path: Path) -> None:
    with open_run(full(tmp_path, quantizer)) as run:
        take_step(run, StopRequest())
        optimizers = [thing for thing in things(run.networks, set()) if isinstance(thing, Optimizer)]
        assert len(optimizers) == 2 and all(
            any(optimizer is listed for listed in things(run.state["optimizers"], set())) for optimizer in optimizers
        )
        assert missing_from_the_list(run) == []


def test_a_module_a_tensor_or_an_average_that_is_not_listed_is_found(tmp_path: Path) -> None:
    with open_run(full(tmp_path, "ema")) as run:
        run.pace.history = torch.zeros(3)  # type: ignore[attr-defined]
        run.networks.tokenizer.critic = nn.Linear(2, 2)  # type: ignore[attr-defined]
        del run.state["average"]
        assert missing_from_the_list(run) == ["networks: Linear", "networks: ImageTokenizer", "pace: Tensor"]


@pytest.mark.seconds
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_all_of_it_comes_back_from_a_checkpoint(quantizer: str, tmp_path: Path) -> None:
    """Whatever is spoilt after it was written: weights, statistics, moments, counts, numbers."""
    with open_run(full(tmp_path, quantizer)) as run:
        for _ in range(2):
            take_step(run, StopRequest())
        held = tmp_path / "held"
        held.mkdir()
        write_state(run.state, held)
        before = everything(run)
        for thing in things(run.state, set()):
            for tensor in tensors_of(thing):
                spoil(tensor)
            if isinstance(thing, Optimizer):
                for moment in (moment for state in thing.state.values() for moment in state.values()):
                    spoil(moment)
        run.progress.step, run.progress.best, run.progress.bad_steps = 77, 1.0, 5
        assert run.networks.average is not None
        run.networks.average.updates = 0
        assert all(not torch.equal(before[name], value) for name, value in everything(run).items() if value.numel())
        read_state(run.state, held)
        after = everything(run)
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name
        assert run.progress.step == json.loads((held / "progress.json").read_text())["step"] == 2


def test_an_ema_codebook_moves_by_sound_steps_alone() -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["ema"])
    state, images = TokenizerState(tokenizer), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in tokenizer.quantizer.named_buffers()}
    tokenizer(2 * images - 1)
    state.discard_update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.quantizer.named_buffers())
    tokenizer(images)  # of the next step: nothing of the skipped one may be left
    state.apply_update()
    other = tiny_tokenizer(QUANTIZERS["ema"])
    other(images)
    TokenizerState(other).apply_update()
    after = dict(tokenizer.quantizer.named_buffers())
    assert not torch.equal(after["counts"], before["counts"]) and not torch.equal(after["sums"], before["sums"])
    assert all(torch.equal(tensor, after[name]) for name, tensor in other.quantizer.named_buffers())


def test_a_stream_goes_on_where_each_process_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(parts: list[Any], mine: dict[str, Any]) -> None:
        parts[:] = [mine, {"lane 1": {"row": 50}}]

    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather_object)
    position = StreamPosition(lambda step: {"lane 0": {"row": 10 * step}}, Progress(step=4))
    position.gather()
    position.write(tmp_path, {})
    assert read_stream(tmp_path) == {"lane 0": {"row": 40}, "lane 1": {"row": 50}}


def test_without_a_stream_there_is_no_file_of_one(tmp_path: Path) -> None:
    position = StreamPosition(lambda step: {}, Progress(step=4))
    position.gather()
    position.write(tmp_path, {})
    assert list(tmp_path.iterdir()) == [] and read_stream(tmp_path) == {}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_an_average_has_the_bits_of_torchs(quantizer: str) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS[quantizer])
    average = Average(tokenizer, 0.9, torch.device("cpu"))
    expected = AveragedModel(tokenizer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for update in range(3):
        for tensor in tensors_of(tokenizer):
            if tensor.is_floating_point():
                tensor.data += (update + 1) * torch.rand(tensor.shape)
        average.apply_update()
        expected.update_parameters(tokenizer)
    for mine, torchs in zip(tensors_of(average.tokenizer), tensors_of(expected.module), strict=True):
        assert torch.equal(mine, torchs)


@torch.no_grad()
def spoil(tensor: Tensor) -> None:
    tensor.add_(1)


def everything(run: Run) -> dict[str, Tensor]:
    """A copy of what a checkpoint has to hold, by name."""
    networks = run.networks
    assert networks.adversary is not None and networks.average is not None
    numbers = [run.progress.step, run.progress.bad_steps, networks.average.updates]
    found = {"usage": run.usage.counts, "numbers": torch.tensor(numbers)}
    modules = {learner.name: learner.network for learner in networks.learners} | {"average": networks.average.tokenizer}
    for name, module in modules.items():
        found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for learner in networks.learners:
        for index, state in learner.optimizer.state_dict()["state"].items():
            found |= {f"{learner.name}.{index}.{key}": value for key, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def test_bad_steps_in_a_row_are_those_since_the_last_sound_one() -> None:
    progress = Progress()
    for sound in (False, False, True, False):
        progress.apply_update() if sound else progress.discard_update()
    assert (progress.step, progress.bad_steps, progress.bad_steps_in_a_row) == (4, 3, 1)


def test_a_checkpoint_is_on_the_disk_before_a_link_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, then its name; then the links, and only then older ones go."""
    done: list[str] = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(checkpoint, "point", lambda link, name: done.append(f"{link.name} -> {name}"))
    monkeypatch.setattr(
        checkpoint, "set_aside", lambda path: done.append(f"away {path.name}") if path.exists() else None
    )
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)

    def write(folder: Path) -> None:
        (folder / "progress.json").write_text("{}")

    checkpoint.save_checkpoint(tmp_path, 2, write, keep=1, best_step=None)
    partial = ".step_00000002.partial"
    assert sorted(done[:3]) == ["sync .step_00000002.partial", "sync manifest.json", "sync progress.json"]
    assert done[2:4] == [f"sync {partial}", "sync checkpoints"]
    assert done[4:] == ["latest -> step_00000002", "sync checkpoints", "away step_00000001"]
