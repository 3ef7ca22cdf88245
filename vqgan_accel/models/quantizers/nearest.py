"""The standard quantizer: nearest code, codebook trained by gradient (van den Oord et al. 2017, arXiv 1711.00937)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.models.quantizers.base import (
    CodebookQuantizer,
    Found,
    Gradient,
    Init,
    gather_codes,
    initial_codebook,
    nearest_codes,
)


class StandardQuantizer(CodebookQuantizer):
    """loss = |sg[z] - e|^2 + beta |z - sg[e]|^2 (eq. 3), means over all elements."""

    def __init__(
        self,
        num_codes: int,
        embedding_dim: int,
        commitment_cost: float,
        l2_normalize: bool = False,
        gradient: Gradient = "straight_through",
        init: Init = "uniform",
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.input_channels = embedding_dim
        self.commitment_cost = commitment_cost
        self.l2_normalize = l2_normalize
        self.gradient = gradient
        self.codebook = nn.Parameter(self.comparable(initial_codebook(num_codes, embedding_dim, init)))

    def stored_vectors(self) -> Tensor:
        return self.codebook

    def look_up(self, latents: Tensor) -> Found:
        return nearest_with_losses(latents, self.codebook_vectors(), self.commitment_cost)

    @torch.no_grad()
    def reinitialise(self, codes: Tensor, vectors: Tensor) -> None:
        self.codebook[codes] = self.comparable(vectors)


def nearest_with_losses(latents: Tensor, codebook: Tensor, commitment_cost: float) -> Found:
    """latents (B, D, h, w), codebook (K, D), both as they are compared"""
    codes = nearest_codes(latents, codebook)
    vectors = gather_codes(codebook, codes)
    codebook_loss = F.mse_loss(vectors, latents.detach())
    commitment_loss = F.mse_loss(latents, vectors.detach())
    return Found(
        codes,
        vectors,
        codebook_loss + commitment_cost * commitment_loss,
        {"codebook_loss": codebook_loss.detach(), "commitment_loss": commitment_loss.detach()},
    )
