"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): a latent's numbers are bounded and rounded, each
to one of a few levels. Nothing is learnt, so no code can die.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vqgan_accel.models.quantizers.base import Found, LookupQuantizer

MARGIN = 1e-3  # by which the bound is wider than the levels, so that the last ones can be reached
GAIN = {"tanh": 1.0, "sigmoid": 0.8}  # 2 sigmoid(1.6 z) - 1 = tanh(0.8 z) (iFSQ, arXiv 2601.17124)


class FSQQuantizer(LookupQuantizer):
    """Level l of L has the number (l - L // 2) / (L // 2). loss = 0; the gradient is the bound's.

    The bound is tanh(gain z + shift) (L - 1) / 2, less a half and shifted by as much where L is even, so that 0 is a
    level.
    """

    levels: Tensor  # (D, 1, 1) int64
    strides: Tensor  # of the levels' digits in a code

    def __init__(self, levels: Sequence[int], bound: Literal["tanh", "sigmoid"]) -> None:
        super().__init__()
        self.num_codes = math.prod(levels)
        self.input_channels = len(levels)
        self.gain = GAIN[bound]
        strides = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels).view(-1, 1, 1), persistent=False)
        self.register_buffer("strides", torch.tensor(strides).view(-1, 1, 1), persistent=False)

    def comparable(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> about [-1, 1]"""
        half = (self.levels - 1) * (1 + MARGIN) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(self.gain * latents + torch.atanh(offset / half)) * half - offset
        return bounded / (self.levels // 2)

    def find(self, latents: Tensor) -> Tensor:
        middle = self.levels // 2
        digits = (latents.detach() * middle).round().long() + middle
        return (digits.clamp_min(0).minimum(self.levels - 1) * self.strides).sum(1)

    def look_up(self, latents: Tensor) -> Found:
        codes = self.find(latents)
        return Found(codes, self.codes_to_latents(codes), latents.new_zeros(()), {})

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        middle = self.levels // 2
        digits = codes[:, None] // self.strides % self.levels
        return (digits - middle) / middle.float()

    def residual_scale(self) -> Tensor:
        return 1 / self.levels.float()  # each step is divided into as many
