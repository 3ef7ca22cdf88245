"""A convolution whose second derivatives cost what its first ones do, for networks that R1 differentiates twice.

torch's own second derivative forms the weight's part as a convolution with a kernel as large as the image, and with
groups one channel at a time, wanted or not (docs/performance.md has what that costs). Both gradients of a convolution
are again convolutions of ordinary shape; here they are called by name, as StyleGAN2-ADA's `conv2d_gradfix` did for
older versions of torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight


class Geometry(NamedTuple):
    """What `F.conv2d` and `torch.nn.grad` take besides tensors."""

    stride: int
    padding: int
    dilation: int
    groups: int


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """`F.conv2d`: x (B, I, H, W), weight (O, I / groups, k, k), bias (O,) -> (B, O, H', W'), in autocast's precision.

    A gradient in x can be differentiated again, in x, weight and bias, as R1 does; one in weight or bias cannot: torch
    raises a RuntimeError. For autograd alone, not for torch.func.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    geometry = Geometry(stride, padding, 1, groups)
    return _Convolution.apply(x, _Parameters.apply(weight, bias, x.detach(), geometry), weight, bias, geometry)


class _Convolution(Function):
    """Differentiates in x. What arrives for weight and bias it hands on to `parameters` as it is.

    A Function cannot know which of its gradients are asked for, so the costly one of the weight has a node of its own,
    `_Parameters`, which autograd runs only where it is: not for the generator's gradient, not in R1's first pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameters: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        to_x = _InputGradient.apply(gradient, weight, ctx.shape, ctx.geometry) if ctx.needs_input_grad[0] else None
        return to_x, gradient, None, None, None


class _Parameters(Function):
    """A tensor of the convolution's output shape and no memory, for weight and bias to receive their gradients by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.shape, ctx.stride, ctx.geometry = weight.shape, weight.stride(), geometry
        height, width = (
            (side + 2 * geometry.padding - kernel) // geometry.stride + 1
            for side, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
        )
        return weight.new_empty(()).expand(len(x), len(weight), height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        to_weight = None
        if ctx.needs_input_grad[0]:
            to_weight = conv2d_weight(x, ctx.shape, gradient, *ctx.geometry)
            # The strides of a 1x1 kernel say little, but DDP compares them, and copies where they differ.
            if to_weight.stride() != ctx.stride:
                to_weight = to_weight.new_empty_strided(ctx.shape, ctx.stride).copy_(to_weight)
        to_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None
        return to_weight, to_bias, None, None


class _InputGradient(Function):
    """gradient (B, O, H', W') -> (B, I, H, W): the adjoint of the convolution, linear in gradient and in weight."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(gradient if weight.requires_grad else None, weight)
        ctx.geometry = geometry
        return _input_gradient(gradient, weight, shape, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        to_gradient = F.conv2d(direction, weight, None, *ctx.geometry) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = conv2d_weight(direction, weight.shape, gradient, *ctx.geometry)
        return to_gradient, to_weight, None, None


def _input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """As `torch.nn.grad.conv2d_input`, which stands an expanded scalar in for x: a GPU's kernels look at its shape
    alone. A CPU's would copy that out, and take the layout from it."""
    if gradient.device.type == "cpu":
        channels_last = gradient.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=gradient.dtype, memory_format=memory_format)
    else:
        x = gradient.new_empty(()).expand(shape)
    stride, padding, dilation = ([value, value] for value in geometry[:3])
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], geometry.groups, [True, False, False]
    )[0]
