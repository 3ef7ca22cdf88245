"""The quantizer of MaskGIT's tokenizer (Chang et al. 2022, arXiv 2202.04200): nearest code plus an entropy loss that
asks for confident assignments (low entropy per token) and even use of the codes (high entropy of the mean).

Of a large codebook the distributions are made for some tokens at a time, and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqgan_accel.distributed import mean_over_processes_with_gradient
from vqgan_accel.models.quantizers.base import Found, Gradient, Init, flatten
from vqgan_accel.models.quantizers.nearest import StandardQuantizer

Target = Literal["softmax", "argmax"]
LOG_EPS = 1e-5  # keeps the logarithm of a code that nobody uses finite
MAX_LOGITS = 2**26  # tokens x codes that are one block: 256 MB in float32, about five times in a forward pass
BLOCK = 2**24  # entries of a block where they are more: nine of 64 MB are all that a pass holds


class EntropyQuantizer(StandardQuantizer):
    """loss = the standard loss + ratio * (mean entropy of p(code | token) - entropy of the mean of p over all
    tokens)."""

    def __init__(
        self,
        num_codes: int,
        embedding_dim: int,
        commitment_cost: float,
        ratio: float,
        temperature: float,
        target: Target,
        l2_normalize: bool = False,
        gradient: Gradient = "straight_through",
        init: Init = "uniform",
    ) -> None:
        super().__init__(num_codes, embedding_dim, commitment_cost, l2_normalize, gradient, init)
        self.ratio = ratio
        self.temperature = temperature
        self.target = target

    def look_up(self, latents: Tensor) -> Found:
        found = super().look_up(latents)
        tokens, codebook = flatten(latents), self.codebook_vectors()

        def logits(some: Tensor) -> Tensor:
            # With |z|^2, which no softmax needs, the logits of the near codes are small and keep more of float32's
            # digits.
            distances = some.square().sum(1, keepdim=True) - 2 * some @ codebook.T + codebook.square().sum(1)
            return -distances / self.temperature

        entropy = entropy_loss(tokens, logits, self.num_codes, self.target)
        return found._replace(
            loss=found.loss + self.ratio * entropy,
            metrics={**found.metrics, "entropy_loss": entropy.detach()},
        )


def entropy_loss(tokens: Tensor, logits: Callable[[Tensor], Tensor], num_codes: int, target: Target) -> Tensor:
    """tokens (M, D); logits: of some of them, (m, D) -> (m, K). Returns a scalar in [-log K, log K]; the mean
    distribution is formed over the tokens of all processes."""

    def of_block(block: Tensor) -> tuple[Tensor, Tensor]:
        return means(logits(block), target)

    whole = len(tokens) * num_codes <= MAX_LOGITS
    blocks = [tokens] if whole else tokens.split(max(1, BLOCK // num_codes))
    if whole:
        parts = [of_block(tokens)]
    else:
        parts = [checkpoint(of_block, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    shares = [len(block) / len(tokens) for block in blocks]
    weighted = [(share * mean, share * entropy) for share, (mean, entropy) in zip(shares, parts, strict=True)]
    distribution, mean_entropy = (sum(some[1:], some[0]) for some in zip(*weighted, strict=True))
    mean = mean_over_processes_with_gradient(distribution)
    entropy_of_mean = -(mean * (mean + LOG_EPS).log()).sum()
    return mean_entropy - entropy_of_mean


def means(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """logits (m, K) -> the mean distribution (K,), and the mean entropy"""
    log_probabilities = logits.log_softmax(-1)
    distribution = logits.softmax(-1)
    if target == "argmax":  # hard in the forward pass, soft in the backward pass
        one_hot = torch.zeros_like(distribution).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        distribution = one_hot + (distribution - distribution.detach())
    return distribution.mean(0), -(distribution * log_probabilities).sum(-1).mean()
