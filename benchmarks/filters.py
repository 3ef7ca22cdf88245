"""Forms of the discriminator's [1 3 3 1] filter, side by side: milliseconds of the value and of both derivatives.

    python benchmarks/filters.py [--channels 128] [--size 256] [--batch 2] [--precision float32|bf16]

`before conv1` keeps every pixel (a 3x3 convolution of stride 2 follows), `before skip` keeps every other one. The
second derivative is what R1 asks for: of the gradient in the input, to the gradient in the output. Memory is
channels_last; the last column is the largest difference from the grouped convolution in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from step_time import fastest
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.models.discriminators.stylegan2 import blur

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
KERNEL = torch.outer(TAPS, TAPS)
Filter = Callable[[Tensor, int, int], Tensor]  # x (B, C, H, W), padding, stride


def ours(x: Tensor, padding: int, stride: int) -> Tensor:
    """A grouped convolution with derivatives of its own."""
    return blur(x, KERNEL, padding, stride)


def grouped(x: Tensor, padding: int, stride: int) -> Tensor:
    """torch's grouped convolution."""
    weight = KERNEL.to(x.dtype).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=x.shape[1])


def separable(x: Tensor, padding: int, stride: int) -> Tensor:
    """Half of the arithmetic, twice the passes through memory."""
    channels = x.shape[1]
    weight = TAPS.to(x.dtype).repeat(channels, 1, 1, 1)
    x = F.conv2d(x, weight, stride=(1, stride), padding=(0, padding), groups=channels)
    return F.conv2d(x, weight.mT.contiguous(), stride=(stride, 1), padding=(padding, 0), groups=channels)


def boxes(x: Tensor, padding: int, stride: int) -> Tensor:
    """[1 3 3 1] is three boxes [1 1], one after another."""
    for index in range(2):
        x = F.avg_pool2d(x, 2, stride=1, padding=int(index < padding))
    return F.avg_pool2d(x, 2, stride=stride)


def slices(x: Tensor, padding: int, stride: int) -> Tensor:
    """Sums of shifted views, which a compiler could fuse."""
    x = F.pad(x, [padding] * 4)
    for dimension in (2, 3):
        kept = x.shape[dimension] - 3
        a, b, c, d = (
            x.narrow(dimension, i, kept)[(slice(None),) * dimension + (slice(None, None, stride),)] for i in range(4)
        )
        x = (a + d) / 8 + (b + c) * 0.375
    return x


def milliseconds(run: Callable[[], object]) -> float:
    return 1e3 * fastest({"it": run}, repeats=3)["it"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.precision == "float32" else torch.bfloat16
    shape = (arguments.batch, arguments.channels, arguments.size, arguments.size)
    print(f"{shape}, {arguments.precision}, {torch.get_num_threads()} threads of torch {torch.__version__}")
    print(f"{'ms':36}{'value':>10}{'first':>10}{'second':>10}{'difference':>12}")
    x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    for place, padding, stride in (("before conv1", 2, 1), ("before skip", 1, 2)):
        expected = grouped(x.detach().float(), padding, stride)
        for form in (grouped, ours, separable, boxes, slices):
            y = form(x, padding, stride)
            slope = torch.randn_like(y).requires_grad_()
            (gradient,) = torch.autograd.grad(y, x, slope, create_graph=True)
            direction = torch.randn_like(gradient)
            figures = (
                milliseconds(lambda form=form, p=padding, s=stride: form(x.detach(), p, s)),
                milliseconds(lambda y=y, g=slope: torch.autograd.grad(y, x, g, retain_graph=True)),
                milliseconds(lambda a=gradient, b=slope, d=direction: torch.autograd.grad(a, b, d, retain_graph=True)),
            )
            difference = (y.float() - expected).abs().max().item()
            title = f"{place}: {form.__name__}"
            print(f"{title:36}" + "".join(f"{value:10.1f}" for value in figures) + f"{difference:12.1e}")
    if dtype == torch.float32:  # the filter taken into the convolution that follows: one of 6 x 6
        y = torch.randn(shape).to(memory_format=torch.channels_last)
        wide = torch.randn(2 * arguments.channels, arguments.channels, 6, 6).to(memory_format=torch.channels_last)
        narrow = wide[..., :3, :3].contiguous(memory_format=torch.channels_last)
        apart = milliseconds(lambda: F.conv2d(grouped(y, 2, 1), narrow, stride=2))
        fused = milliseconds(lambda: F.conv2d(y, wide, stride=2, padding=2))
        print(f"conv1 with its filter before it {apart:.1f} ms, with its filter inside it {fused:.1f} ms")


if __name__ == "__main__":
    main()
