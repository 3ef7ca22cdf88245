"""StyleGAN2's residual discriminator in plain PyTorch operators, differentiable twice (R1 needs that).

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958), appendix B;
equalised learning rate and minibatch standard deviation are from Karras et al. 2018 (arXiv 1710.10196).
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan_accel.models.discriminators.base import Discriminator
from vqgan_accel.models.discriminators.convolution import conv2d
from vqgan_accel.models.precision import without_autocast

SQRT2 = math.sqrt(2.0)  # keeps the variance of unit-normal activations through a leaky relu
SQRT_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two branches


class StyleGAN2Discriminator(Discriminator):
    """One logit an image: residual blocks from `image_size` down to 8 x 8, then the 4 x 4 epilogue.

    Parameters are called `b{resolution}.{layer}.{weight,bias}`, as in NVIDIA's checkpoints.
    """

    def __init__(
        self,
        image_size: int,  # pixels a side, a power of two >= 8
        channel_base: int = 32768,  # channels at resolution r: min(channel_base // r, channel_max)
        channel_max: int = 512,
        minibatch_stddev_group: int = 4,  # images a group; a smaller batch is one group
    ) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two and at least 8, not {image_size}.")
        self.image_size = image_size
        self.resolutions = [2**i for i in range(image_size.bit_length() - 1, 2, -1)]  # image_size, ..., 16, 8
        channels = {r: min(channel_base // r, channel_max) for r in [*self.resolutions, 4]}
        for r in self.resolutions:
            self.add_module(f"b{r}", Block(channels[r], channels[r // 2], from_rgb=r == image_size))
        self.b4 = Epilogue(channels[4], minibatch_stddev_group)

    def forward(self, images: Tensor, full_precision: bool = False) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> logits (B, 1), float32.

        `full_precision` switches autocast off in here, where a wrapper that enters autocast around the whole forward
        (Accelerate's) cannot undo it: R1 in bfloat16 gives parameter gradients that are several per cent off.
        Take R1's derivatives outside autocast too: the second one runs convolutions of its own.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"The discriminator takes images (B, 3, {size}, {size}), not {tuple(images.shape)}.")
        with without_autocast(images) if full_precision else nullcontext():
            x = images.to(self.b4.out.weight.dtype)
            for r in self.resolutions:
                x = self.get_submodule(f"b{r}")(x)
        logits: Tensor = self.b4(x)
        return logits


class Block(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H/2, W/2); the first block takes the image instead, (B, 3, H, W)."""

    blur_kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int, from_rgb: bool) -> None:
        super().__init__()
        # A leaky relu commutes with a positive factor, so every gain sits in its layer's weight scale and the
        # activations are never multiplied: conv1's is sqrt(2) of the activation times sqrt(1/2) of the sum.
        self.fromrgb = EqualizedConv2d(3, in_channels, 1, gain=SQRT2) if from_rgb else None
        self.conv0 = EqualizedConv2d(in_channels, in_channels, 3, padding=1, gain=SQRT2)
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, stride=2, gain=SQRT2 * SQRT_HALF)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, bias=False, gain=SQRT_HALF)
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(kernel, kernel)
        self.register_buffer("blur_kernel", kernel / kernel.sum(), persistent=False)  # (4, 4): a constant, not state

    def forward(self, x: Tensor) -> Tensor:
        if self.fromrgb is not None:
            x = leaky_relu(self.fromrgb(x))
        skip: Tensor = self.skip(blur(x, self.blur_kernel, padding=1, stride=2))
        x = leaky_relu(self.conv0(x))
        x = leaky_relu(self.conv1(blur(x, self.blur_kernel, padding=2)))  # H -> H+1 -> H/2
        return x + skip


class Epilogue(nn.Module):
    """(B, C, 4, 4) -> logits (B, 1), in float32 whatever the autocast."""

    def __init__(self, channels: int, minibatch_stddev_group: int) -> None:
        super().__init__()
        self.minibatch_stddev_group = minibatch_stddev_group
        self.conv = EqualizedConv2d(channels + 1, channels, 3, padding=1, gain=SQRT2)
        self.fc = EqualizedLinear(channels * 4 * 4, channels, gain=SQRT2)
        self.out = EqualizedLinear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            x = x.to(self.out.weight.dtype)
            x = torch.cat([x, minibatch_stddev(x, self.minibatch_stddev_group)], dim=1)
            x = leaky_relu(self.conv(x))
            x = leaky_relu(self.fc(x.flatten(1)))
            logits: Tensor = self.out(x)
            return logits


class EqualizedConv2d(nn.Module):
    """A convolution whose N(0, 1) weights are scaled by gain / sqrt(fan_in) at run time; `gain` scales the bias too."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.stride, self.padding, self.gain = stride, padding, gain
        self.weight_scale = gain / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * self.gain
        return conv2d(x, self.weight * self.weight_scale, bias, self.stride, self.padding)


class EqualizedLinear(nn.Module):
    """The same for a fully connected layer."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.gain = gain
        self.weight_scale = gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_scale, self.bias * self.gain)


def leaky_relu(x: Tensor) -> Tensor:
    # In place: its derivative follows from the result alone, so the convolution's output need not be kept beside it.
    return F.leaky_relu(x, 0.2, inplace=True)


def blur(x: Tensor, kernel: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Zero-pad x (B, C, H, W), filter every channel with the kernel (4, 4), keep each stride-th pixel."""
    channels = x.shape[1]
    # A copy a call, not a view: DDP re-broadcasts buffers in place at each forward, which would spoil the graph of an
    # earlier forward (D(x), then D(reconstruction), then one backward). It is 16 numbers a channel.
    weight = kernel.to(x.dtype).repeat(channels, 1, 1, 1)
    return conv2d(x, weight, stride=stride, padding=padding, groups=channels)


def minibatch_stddev(x: Tensor, group_size: int) -> Tensor:
    """Standard deviation over a group's images, averaged over its features: x (B, C, H, W) -> (B, 1, H, W).

    Groups are strided: of n images, image j is in group `j mod (n / group_size)`. A global batch that is dealt to P
    processes image by image therefore has the same groups as its parts, where group_size divides each part.
    """
    batch, _, height, width = x.shape
    group_size = min(group_size, batch)
    if batch % group_size:
        raise ValueError(
            f"A batch of {batch} images cannot be cut into minibatch-stddev groups of {group_size}: "
            f"the discriminator's batch size must be a multiple of {group_size}, or smaller than it."
        )
    grouped = x.reshape(group_size, batch // group_size, -1)  # (images of a group, groups, features)
    variance = grouped.var(dim=0, correction=0)
    stddev = (variance + 1e-8).sqrt().mean(dim=1)  # (groups,)
    return stddev.repeat(group_size).reshape(batch, 1, 1, 1).expand(-1, -1, height, width)
