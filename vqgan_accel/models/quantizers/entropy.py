"""The quantizer of MaskGIT's tokenizer (Chang et al. 2022, arXiv 2202.04200): nearest code plus an entropy loss that
asks for confident assignments (low entropy per token) and even use of the codes (high entropy of the mean).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vqgan_accel.distributed import mean_over_processes_with_gradient
from vqgan_accel.models.quantizers.base import Found, Gradient, Init, flatten
from vqgan_accel.models.quantizers.nearest import StandardQuantizer

LOG_EPS = 1e-5  # keeps the logarithm of a code that nobody uses finite


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
        target: Literal["softmax", "argmax"],
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
        # With |z|^2, which no softmax needs, the logits of the near codes are small and keep more of float32's digits.
        tokens, codebook = flatten(latents), self.codebook_vectors()
        distances = tokens.square().sum(1, keepdim=True) - 2 * tokens @ codebook.T + codebook.square().sum(1)
        entropy_loss = self.entropy_loss(-distances / self.temperature)
        return found._replace(
            loss=found.loss + self.ratio * entropy_loss,
            metrics={**found.metrics, "entropy_loss": entropy_loss.detach()},
        )

    def entropy_loss(self, logits: Tensor) -> Tensor:
        """logits (M, K) -> scalar in [-log K, log K]; the mean distribution is formed over the tokens of all
        processes."""
        log_probabilities = logits.log_softmax(-1)
        target = logits.softmax(-1)
        if self.target == "argmax":
            one_hot = torch.zeros_like(target).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
            target = one_hot + (target - target.detach())  # hard in the forward pass, soft in the backward pass
        mean = mean_over_processes_with_gradient(target.mean(0))
        entropy_of_mean = -(mean * (mean + LOG_EPS).log()).sum()
        mean_entropy = -(target * log_probabilities).sum(-1).mean()
        return mean_entropy - entropy_of_mean
