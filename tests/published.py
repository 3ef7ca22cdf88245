"""taming-transformers' and LlamaGen's networks a second time, as functions of published names: a weight is drawn when
it is first asked for, so that one forward pass makes a checkpoint and what it should give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Names(NamedTuple):
    """What a program calls the parts of its networks. `up(level, levels)`: level 0 is the full resolution."""

    down: str
    up: Callable[[int, int], str]
    block: str
    mid: tuple[str, str, str]


TAMING = Names(
    "encoder.down.{}", lambda level, levels: f"decoder.up.{level}", "block", ("block_1", "attn_1", "block_2")
)
LLAMAGEN = Names(
    "encoder.conv_blocks.{}", lambda level, levels: f"decoder.conv_blocks.{levels - 1 - level}", "res", ("0", "1", "2")
)


class VQGAN:
    def __init__(self, names: Names, multipliers: tuple[int, ...], attention: tuple[int, ...], seed: int = 0) -> None:
        self.names, self.multipliers, self.attention = names, multipliers, attention
        self.channels, self.blocks, self.latent_channels, self.dim, self.num_codes = 32, 1, 16, 8, 64
        self.weights: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)

    def weight(self, name: str, *shape: int, mean: float = 0.0) -> Tensor:
        if name not in self.weights:
            scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
            self.weights[name] = mean + scale * torch.randn(shape, generator=self.random)
        return self.weights[name]

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3, stride: int = 1) -> Tensor:
        weight, bias = self.weight(f"{name}.weight", out, x.shape[1], kernel, kernel), self.weight(f"{name}.bias", out)
        return F.conv2d(x, weight, bias, stride, kernel // 2 if stride == 1 else 0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        n = x.shape[1]
        return F.group_norm(x, 32, self.weight(f"{name}.weight", n, mean=1.0), self.weight(f"{name}.bias", n), 1e-6)

    def residual(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, kernel=1))

    def attend(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, x.shape[1], kernel=1).flatten(2) for part in "qkv")
        mixing = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(2)
        h = torch.einsum("bij,bcj->bci", mixing, v).view_as(x)
        return x + self.conv(f"{name}.proj_out", h, x.shape[1], kernel=1)

    def level(self, name: str, x: Tensor, level: int, blocks: int) -> Tensor:
        for block in range(blocks):
            x = self.residual(f"{name}.{self.names.block}.{block}", x, self.channels * self.multipliers[level])
            if level in self.attention:
                x = self.attend(f"{name}.attn.{block}", x)
        return x

    def middle(self, network: str, x: Tensor) -> Tensor:
        first, attention, second = (f"{network}.mid.{part}" for part in self.names.mid)
        return self.residual(second, self.attend(attention, self.residual(first, x, x.shape[1])), x.shape[1])

    def latents(self, images: Tensor) -> Tensor:
        """What the quantizer gets."""
        x = self.conv("encoder.conv_in", images, self.channels)
        for level in range(len(self.multipliers)):
            name = self.names.down.format(level)
            x = self.level(name, x, level, self.blocks)
            if level < len(self.multipliers) - 1:
                x = self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), x.shape[1], stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, self.latent_channels), self.dim, kernel=1)

    def pixels(self, quantized: Tensor) -> Tensor:
        x = self.conv("post_quant_conv", quantized, self.latent_channels, kernel=1)
        levels = len(self.multipliers)
        x = self.middle("decoder", self.conv("decoder.conv_in", x, self.channels * self.multipliers[-1]))
        for level in reversed(range(levels)):
            name = self.names.up(level, levels)
            x = self.level(name, x, level, self.blocks + 1)
            if level > 0:
                x = self.conv(f"{name}.upsample.conv", F.interpolate(x, scale_factor=2), x.shape[1])
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), 3)

    def nearest(self, latents: Tensor, unit: bool = False) -> tuple[Tensor, Tensor]:
        """(codes, quantized) of VQModel, or of LlamaGen's unit vectors."""
        codebook = self.weight("quantize.embedding.weight", self.num_codes, self.dim)
        if unit:
            latents, codebook = F.normalize(latents, dim=1), F.normalize(codebook, dim=1)
        codes = (latents[:, None] - codebook[None, :, :, None, None]).square().sum(2).argmin(1)
        return codes, codebook[codes].permute(0, 3, 1, 2)

    def most_likely(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, quantized) of GumbelVQ without its noise."""
        codes = self.conv("quantize.proj", latents, self.num_codes, kernel=1).argmax(1)
        codebook = self.weight("quantize.embed.weight", self.num_codes, self.dim)
        return codes, codebook[codes].permute(0, 3, 1, 2)
