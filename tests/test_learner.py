"""A network and its optimizer: one rate for all of its groups, one norm over all of its parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from vqgan_accel.training.learner import Learner


def learner_with(*gradients: list[float]) -> Learner[nn.Module]:
    """A parameter, in a group of its own, for each gradient."""
    network = nn.ParameterList([torch.zeros(len(gradient)) for gradient in gradients])
    for parameter, gradient in zip(network, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return Learner("it", network, network, SGD([{"params": [parameter]} for parameter in network], lr=1.0))


def test_the_rate_is_that_of_every_group_upwards_and_downwards() -> None:
    learner = learner_with([1.0], [1.0])
    for rate in (0.5, 2.0, 0.0):
        learner.set_learning_rate(rate)
        assert [group["lr"] for group in learner.optimizer.param_groups] == [rate, rate]


@pytest.mark.parametrize(
    ("max_norm", "factor"), [(None, 1.0), (1.0, 1 / 7), (3.5, 1 / 2), (7.5, 1.0)], ids=["never", "1", "half", "above"]
)
def test_the_norm_is_that_of_all_parameters_before_it_is_clipped(max_norm: float | None, factor: float) -> None:
    learner = learner_with([2.0, -6.0], [0.0, 3.0])
    assert learner.clip(max_norm).item() == 7.0
    first, second = (parameter.grad for parameter in learner.network.parameters())
    torch.testing.assert_close(first, factor * torch.tensor([2.0, -6.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(second, factor * torch.tensor([0.0, 3.0]), rtol=1e-6, atol=0)
