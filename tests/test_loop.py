"""What a step makes of the losses of its rounds and processes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vqgan_accel.config import parse_config
from vqgan_accel.randomness import CODE_REINIT, position_seed
from vqgan_accel.training import loop, upkeep
from vqgan_accel.training.codebook import CodebookUsage
from vqgan_accel.training.plan import make_plan
from vqgan_accel.training.state import Progress


def pretend_another(l1: float, skipped: float, stop: float, patch: pytest.MonkeyPatch) -> None:
    """A second process with these."""
    other = torch.tensor([skipped, stop, l1, 2 * l1])
    patch.setattr(loop, "num_processes", lambda: 2)
    patch.setattr(loop, "sum_over_processes", lambda mine: mine + other)


def losses(*l1: float) -> list[dict[str, Tensor]]:
    """Of a round each."""
    return [{"l1": torch.tensor(value), "total": torch.tensor(2 * value)} for value in l1]


def test_logged_losses_are_means_over_rounds_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_another(5.0, skipped=1, stop=0, patch=monkeypatch)
    values, skipped, stop = loop.global_values(losses(1.0, 2.0, 6.0), {"grad_norm": torch.tensor(8.0)}, 2, False)
    assert values == {"l1": 4.0, "total": 8.0, "grad_norm": 8.0}  # the norm is of reduced gradients
    assert (skipped, stop) == (3, False)


def test_a_nan_or_a_signal_of_one_process_is_seen_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_another(math.nan, skipped=0, stop=1, patch=monkeypatch)
    values, skipped, stop = loop.global_values(losses(1.0), {"grad_norm": torch.tensor(1.0)}, 0, False)
    assert math.isnan(values["l1"]) and math.isnan(values["total"]) and (skipped, stop) == (0, True)


def seed_of_replacement(seed: int, step: int, patch: pytest.MonkeyPatch) -> int:
    """What the replacement of unused codes is drawn from, after that many steps of two an epoch."""
    seeds: list[int] = []
    patch.setattr(upkeep, "reinitialise_rare", lambda *arguments: seeds.append(arguments[-1]))
    training = {"max_steps": 9, "total_batch_size": 4}
    config = parse_config({"seed": seed, "training": training, "quantizer": {"type": "ema", "reinit_every": "1 epoch"}})
    tokenizer = SimpleNamespace(network=SimpleNamespace(quantizer=None), optimizer=None)
    run: Any = SimpleNamespace(
        config=config,
        plan=make_plan(config, num_images=8, num_processes=1),
        progress=Progress(step=step),
        networks=SimpleNamespace(tokenizer=tokenizer),
        usage=CodebookUsage((4,), torch.device("cpu")),
    )
    for name, found in (("health", {}), ("warn_of_collapse", None)):
        patch.setattr(upkeep, name, lambda *arguments, found=found: found)
    taken: Any = SimpleNamespace(latents=None)
    upkeep.look_after_codes(run, [taken])
    (found,) = seeds
    return found


def test_codes_are_drawn_by_seed_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [seed_of_replacement(seed, step, monkeypatch) for seed, step in ((3, 2), (3, 4), (4, 2))]
    assert found == [position_seed(CODE_REINIT, seed, step) for seed, step in ((3, 1), (3, 3), (4, 1))]
    assert len(set(found)) == 3
