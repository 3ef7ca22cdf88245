"""What a step makes of the losses of its rounds and processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vqgan_accel.training import loop


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
