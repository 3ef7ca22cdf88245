"""Index backpropagation quantization (Shi et al. 2024, arXiv 2412.02692): the code of the largest product with the
latent, and a gradient that goes through the softmax of all products, to every code.

The vectors are one_hot C with one_hot = hard + (p - sg[p]) and p = softmax(z C^T). Neither the one-hot matrix nor p is
held from the forward to the backward pass: z and C are all that p needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vqgan_accel.models.precision import without_autocast
from vqgan_accel.models.quantizers.base import (
    MAX_DISTANCES,
    CodebookQuantizer,
    Found,
    Init,
    QuantizerOutput,
    flatten,
    gather_codes,
    initial_codebook,
)
from vqgan_accel.models.quantizers.entropy import BLOCK, entropy_loss


class IBQQuantizer(CodebookQuantizer):
    """loss = |z - e|^2 + |z - sg[e]|^2 + beta |sg[z] - e|^2 + ratio * entropy loss, where the first e has the gradient
    through the softmax ("double quantization"). The weights' places are those of the authors' code."""

    l2_normalize = False
    by_distance = False

    def __init__(
        self,
        num_codes: int,
        embedding_dim: int,
        codebook_cost: float,
        ratio: float,
        temperature: float,
        init: Init = "normal",
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.input_channels = embedding_dim
        self.codebook_cost = codebook_cost
        self.ratio = ratio
        self.temperature = temperature
        self.codebook = nn.Parameter(initial_codebook(num_codes, embedding_dim, init))

    def stored_vectors(self) -> Tensor:
        return self.codebook

    def find(self, latents: Tensor) -> Tensor:
        codebook = self.codebook.detach()
        blocks = flatten(latents.detach()).split(max(1, MAX_DISTANCES // len(codebook)))
        codes = torch.cat([(block @ codebook.T).argmax(1) for block in blocks])
        return codes.view(len(latents), *latents.shape[2:])

    def look_up(self, latents: Tensor) -> Found:
        codes = self.find(latents)
        vectors, tokens = gather_codes(self.codebook, codes), flatten(latents)
        passed = ThroughSoftmax.apply(flatten(vectors), tokens, self.codebook)  # (M, D)
        quantized = passed.view(*codes.shape, -1).movedim(-1, 1)
        commitment_loss = F.mse_loss(latents, vectors.detach())
        loss = F.mse_loss(latents, quantized) + commitment_loss
        loss = loss + self.codebook_cost * F.mse_loss(vectors, latents.detach())
        entropy = entropy_loss(
            tokens, lambda some: some @ self.codebook.T / self.temperature, self.num_codes, "softmax"
        )
        metrics = {"commitment_loss": commitment_loss.detach(), "entropy_loss": entropy.detach()}
        return Found(codes, quantized, loss + self.ratio * entropy, metrics)

    def quantize(self, latents: Tensor, sample_seeds: Any) -> QuantizerOutput:
        found = self.look_up(latents)  # its vectors have their gradient to the latents
        return QuantizerOutput(found.vectors, found.codes, found.loss, found.metrics)

    @torch.no_grad()
    def reinitialise(self, codes: Tensor, vectors: Tensor) -> None:
        self.codebook[codes] = vectors


class ThroughSoftmax(torch.autograd.Function):
    """vectors (M, D), tokens (M, D), codebook (K, D). Forward: the vectors. Backward: as if they were
    vectors + (p - sg[p]) C, made anew a block of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, tokens: Tensor, codebook: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, codebook)
        return vectors.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, codebook = ctx.saved_tensors
        at_once = max(1, BLOCK // len(codebook))
        of_tokens, of_codebook = [], torch.zeros_like(codebook)
        with without_autocast(gradient):
            for some, theirs in zip(tokens.split(at_once), gradient.split(at_once), strict=True):
                p = (some @ codebook.T).softmax(1)  # (m, K)
                slope = theirs @ codebook.T  # of p
                slope.sub_((p * slope).sum(1, keepdim=True)).mul_(p)  # of the products
                of_tokens.append(slope @ codebook)
                of_codebook.addmm_(slope.T, some)
        return gradient, torch.cat(of_tokens), of_codebook
