"""The discriminator's convolution against torch's own, derivative by derivative, and how much work each one is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vqgan_accel.models.discriminators.convolution import conv2d


def operands(groups: int, kernel: int, side: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x (2, 2 groups, side, side), weight (3 groups, 2, kernel, kernel), bias, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2 * groups, side, side), (3 * groups, 2, kernel, kernel), (3 * groups,)]
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    return x, weight, bias


def derivatives(
    convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, **geometry: int
) -> list[Tensor]:
    """The output, the gradients of a curved loss, and those of the squared gradient in x, which is R1's penalty."""
    y = convolve(x, weight, bias, **geometry)
    loss = y.pow(3).sum()
    first = torch.autograd.grad(loss, [x, weight, bias], retain_graph=True)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    second = torch.autograd.grad(slope.square().sum(), [x, weight, bias])
    return [y, *first, slope, *second]


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    groups=st.integers(1, 3),
    side=st.integers(4, 8),
    channels_last=st.booleans(),
)
def test_values_and_first_and_second_derivatives_are_those_of_torchs_convolution(
    kernel: int, stride: int, padding: int, groups: int, side: int, channels_last: bool
) -> None:
    x, weight, bias = operands(groups, kernel, side)
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    geometry = {"stride": stride, "padding": padding, "groups": groups}
    expected = derivatives(F.conv2d, x, weight, bias, **geometry)
    for ours, torchs in zip(derivatives(conv2d, x, weight, bias, **geometry), expected, strict=True):
        assert ours.shape == torchs.shape
        assert relative_error(ours, torchs) <= 1e-12


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_every_derivative_costs_one_convolution_and_the_weights_only_where_it_is_asked_for() -> None:
    x, weight, _ = operands(groups=1, kernel=3, side=16)
    once = flops(lambda: conv2d(x, weight, padding=1))
    y = conv2d(x, weight, padding=1)
    grad = torch.autograd.grad
    assert flops(lambda: grad(y.sum(), x, retain_graph=True)) == once
    assert flops(lambda: grad(y.sum(), [x, weight], retain_graph=True)) == 2 * once
    slope: list[Tensor] = []
    assert flops(lambda: slope.extend(grad(y.square().sum(), x, create_graph=True))) == once
    # of the penalty: its direction through the convolution and the weight's part, then y's own way back to both
    assert flops(lambda: slope[0].square().sum().backward()) == 4 * once


def test_a_filter_that_is_not_learnt_takes_no_gradient_of_its_own() -> None:
    x, weight, _ = operands(groups=2, kernel=3, side=16)
    weight = weight.detach()
    once = flops(lambda: conv2d(x, weight, groups=2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = conv2d(x, weight, groups=2)
    assert [tensor.shape for tensor in kept] == [weight.shape]  # and keeps no input
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert flops(lambda: slope.square().sum().backward()) == 2 * once


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_weights_gradient_has_the_strides_of_the_weight_which_ddp_compares(kernel: int) -> None:
    x, weight, _ = operands(groups=1, kernel=kernel, side=8)
    weight = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(conv2d(x, weight).square().sum(), weight)
    assert gradient.stride() == weight.stride()


def test_under_autocast_it_rounds_as_torchs_convolution_does_and_gradients_come_back_in_float32() -> None:
    x, weight, bias = operands(groups=1, kernel=3, side=8, dtype=torch.float32)
    results = []
    for convolve in (conv2d, F.conv2d):
        with torch.autocast("cpu", torch.bfloat16):
            y = convolve(x, weight, bias, padding=1)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, weight, bias])])
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype and relative_error(ours.float(), torchs.float()) <= 2**-7


def test_differentiating_a_weights_gradient_again_is_refused_rather_than_wrong() -> None:
    x, weight, _ = operands(groups=1, kernel=3, side=8)
    (gradient,) = torch.autograd.grad(conv2d(x, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
