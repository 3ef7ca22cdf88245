"""Lookup-free quantization (Yu et al. 2023, MAGVIT-v2, arXiv 2310.05737): a code is the signs of a latent's numbers,
and an entropy loss wants each sign decided and all codes used.

Distributions over 2^bits codes are never made: that of a token is the product of its bits', and the mean over tokens of
such products is a product of two matrices, each of half of the bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.distributed import mean_over_processes_with_gradient
from vqgan_accel.models.quantizers.base import Found, LookupQuantizer, flatten

TINY = 1e-30  # keeps the logarithm of a code that no token may be finite, and its slope


class BinaryQuantizer(LookupQuantizer):
    """Codes are signs, the first number's the most significant bit; their vectors have +scale and -scale.

    loss = beta |z - sg[q]|^2 + ratio (mean entropy of p(code | token) - gamma * entropy of the mean of p over all
    tokens), p(code | z) = softmax(-|z - code|^2 / temperature).
    """

    places: Tensor  # (bits, 1, 1) int64: what each bit is worth

    def __init__(
        self,
        bits: int,
        scale: float,
        commitment_cost: float,
        ratio: float,
        gamma: float,
        temperature: float,
        group: int,
    ) -> None:
        super().__init__()
        self.num_codes = 2**bits
        self.input_channels = bits
        self.scale = scale
        self.commitment_cost = commitment_cost
        self.ratio = ratio
        self.gamma = gamma
        self.temperature = temperature
        self.group = group
        self.register_buffer("places", 2 ** torch.arange(bits - 1, -1, -1).view(-1, 1, 1), persistent=False)

    def find(self, latents: Tensor) -> Tensor:
        return ((latents > 0) * self.places).sum(1)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return self.scale * ((codes[:, None] // self.places % 2) * 2.0 - 1)

    def look_up(self, latents: Tensor) -> Found:
        codes = self.find(latents)
        vectors = self.codes_to_latents(codes)
        commitment_loss = F.mse_loss(latents, vectors)
        # |z + s|^2 - |z - s|^2 = 4 s z: what speaks for a positive sign
        entropy_loss = self.entropy_loss(4 * self.scale * flatten(latents) / self.temperature)
        return Found(
            codes,
            vectors,
            self.commitment_cost * commitment_loss + self.ratio * entropy_loss,
            {"commitment_loss": commitment_loss.detach(), "entropy_loss": entropy_loss.detach()},
        )

    def entropy_loss(self, logits: Tensor) -> Tensor:
        """logits (M, bits) of positive signs -> scalar; the mean distribution is that of the tokens of all
        processes."""
        mean_entropy = bit_entropies(logits).sum(1).mean()
        means = [mean_distribution(some) for some in logits.split(self.group, 1)]
        joint = mean_over_processes_with_gradient(torch.cat(means))
        return mean_entropy + self.gamma * (joint * (joint + TINY).log()).sum()


class LFQQuantizer(BinaryQuantizer):
    """Signs of +1 and -1."""

    def __init__(
        self, bits: int, commitment_cost: float, ratio: float, gamma: float, temperature: float, group: int
    ) -> None:
        super().__init__(bits, 1.0, commitment_cost, ratio, gamma, temperature, group)


def bit_entropies(logits: Tensor) -> Tensor:
    """-p log p - (1 - p) log(1 - p) of p = sigmoid(logits), in nats, without the cancellation of the two terms."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def mean_distribution(logits: Tensor) -> Tensor:
    """logits (M, g) of the bits of M tokens -> the mean over tokens of the distribution over the 2^g codes (2^g,)"""
    half = logits.shape[1] // 2
    left, right = (distribution(part) for part in (logits[:, :half], logits[:, half:]))
    return (left.T @ right).flatten() / len(logits)


def distribution(logits: Tensor) -> Tensor:
    """logits (M, g) of independent bits -> (M, 2^g), the first bit the most significant"""
    joint = logits.new_ones(len(logits), 1)
    for logit in logits.unbind(1):
        bit = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)], 1)  # (M, 2)
        joint = (joint[:, :, None] * bit[:, None]).flatten(1)
    return joint
