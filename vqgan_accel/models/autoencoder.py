"""The convolutional encoder and decoder of MaskGIT's VQ-GAN (Chang et al. 2022, arXiv 2202.04200), in its two published
variants: `old` (no convolution after upsampling, linear output) and `head` (see MaskGITConfig).

Module names are those of the seed's checkpoints: blocks count residual and resampling blocks in one list.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.config import GROUP_NORM_GROUPS, MaskGITConfig


class UnbiasedGroupNorm(nn.GroupNorm):
    """GroupNorm that divides by n - 1, as the seed's last revision does; exact, by torch's own kernel.

    (x - mean) / sqrt(var n/(n-1) + eps) = s (x - mean) / sqrt(var + eps s^2) with s^2 = (n-1)/n.
    """

    def forward(self, x: Tensor) -> Tensor:
        n = x[0].numel() // self.num_groups
        shrink = (n - 1) / n
        return F.group_norm(x, self.num_groups, self.weight * shrink**0.5, self.bias, self.eps * shrink)


def _group_norm(channels: int, config: MaskGITConfig) -> nn.GroupNorm:
    norm = UnbiasedGroupNorm if config.norm_variance == "unbiased" else nn.GroupNorm
    return norm(GROUP_NORM_GROUPS, channels, eps=config.norm_eps)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with pre-activation; a 1x1 shortcut of the raw input where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, config: MaskGITConfig) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _group_norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)"""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.conv_shortcut(x) + residual


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then optionally a 3x3 convolution."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)"""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _residual_blocks(in_channels: int, out_channels: int, config: MaskGITConfig) -> list[nn.Module]:
    widths = [in_channels] + [out_channels] * config.num_res_blocks
    return [ResidualBlock(a, b, config) for a, b in pairwise(widths)]


class Encoder(nn.Module):
    """images (B, 3, H, W) -> latents (B, out_channels, H / stride, W / stride)"""

    def __init__(self, config: MaskGITConfig, out_channels: int) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        blocks: list[nn.Module] = []
        for in_width, out_width in zip([config.channels, *widths[:-1]], widths, strict=True):
            blocks += [*_residual_blocks(in_width, out_width, config), nn.AvgPool2d(2)]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.final_residual = nn.Sequential(*_residual_blocks(widths[-1], widths[-1], config))
        self.norm = _group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.final_residual(self.blocks(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm(x)))


class Decoder(nn.Module):
    """latents (B, in_channels, h, w) -> pixels (B, 3, H, W) = `last_layer(features)`, and these features (B, channels,
    H, W), H = h * stride and W = w * stride.

    The cut before the last convolution is where the adaptive weight looks (Esser et al. 2021, eq. 7).
    """

    def __init__(self, config: MaskGITConfig, in_channels: int) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        blocks: list[nn.Module] = []
        for in_width, out_width in zip(widths[::-1], [*widths[-2::-1], config.channels], strict=True):
            blocks += [*_residual_blocks(in_width, out_width, config), Upsample(out_width, config.upsample_conv)]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.initial_residual = nn.Sequential(*_residual_blocks(widths[-1], widths[-1], config))
        self.blocks = nn.Sequential(*blocks)
        self.norm = _group_norm(config.channels, config)
        self.conv_out = nn.Conv2d(config.channels, 3, 3, padding=1)
        self.activation: nn.Module = nn.Tanh() if config.output_activation == "tanh" else nn.Identity()

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.initial_residual(self.conv_in(latents)))
        features = F.silu(self.norm(x))
        return self.last_layer(features), features

    def last_layer(self, features: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 3, H, W)"""
        return self.activation(self.conv_out(features))
