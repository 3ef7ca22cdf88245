"""The contract that every quantizer keeps, and the search for the nearest code that three of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqgan_accel.models.precision import without_autocast

MAX_DISTANCES = 2**27  # entries of one (tokens, codes) block: 512 MB in float32


class QuantizerOutput(NamedTuple):
    quantized: Tensor  # (B, D, h, w) float32, with the straight-through (or soft) gradient to the latents
    codes: Tensor  # (B, h, w) int64 in [0, num_codes)
    loss: Tensor  # scalar: what the quantizer adds to the tokenizer's loss
    metrics: dict[str, Tensor]  # detached scalars to log: the parts of `loss`


class Quantizer(nn.Module):
    """Turns latents into codes and back.

    `forward(...).codes` in eval mode, a tokenizer's `encode` and a re-encode after save and load are identical.
    Quantizers compute in float32 whatever the autocast: half precision picks other codes.
    """

    num_codes: int
    input_channels: int  # what the encoder must emit: D, or what becomes logits

    def forward(self, latents: Tensor, sample_seeds: Sequence[int] | None = None) -> QuantizerOutput:
        """latents (B, input_channels, h, w); sample_seeds, B of them, fix the noise of each sample, where there is
        any. (Plain numbers, for DDP would move a tensor to the GPU, and the host wait to have it back.)"""
        with without_autocast(latents):
            return self.quantize(latents.float(), sample_seeds)

    def choose(self, latents: Tensor) -> Tensor:
        """latents (B, input_channels, h, w) -> the code of each position (B, h, w), without noise or side effects."""
        with without_autocast(latents):
            return self.choose_float(latents.float())

    def choose_float(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def quantize(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> QuantizerOutput:
        raise NotImplementedError

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 -> (B, D, h, w) float32"""
        raise NotImplementedError

    def apply_update(self) -> None:
        """Called once per optimizer step, on every rank, after the gradients of all accumulation rounds. In eval mode
        nothing was taken, and nothing changes."""

    def discard_update(self) -> None:
        """Called instead of `apply_update` where the step is skipped."""


class CodebookQuantizer(Quantizer):
    """A quantizer with a codebook (K, D), input channels D, whose dead codes can be given new vectors.

    With l2_normalize, latents and codes are compared and decoded as unit vectors (Yu et al. 2021, arXiv 2110.04627,
    section 3.2).
    """

    l2_normalize: bool

    def stored_vectors(self) -> Tensor:
        """(K, D) float32, of any length"""
        raise NotImplementedError

    def stored_vectors_of(self, codes: Tensor) -> Tensor:
        """codes (N,) -> their stored vectors (N, D)"""
        return nn.functional.embedding(codes, self.stored_vectors())

    def codebook_vectors(self) -> Tensor:
        """(K, D) float32, as they are compared and decoded"""
        return self.comparable(self.stored_vectors())

    def comparable(self, vectors: Tensor) -> Tensor:
        """(N, D, ...): unit vectors where l2_normalize, else as they are."""
        return nn.functional.normalize(vectors, dim=1) if self.l2_normalize else vectors

    def reinitialise(self, codes: Tensor, vectors: Tensor) -> None:
        """Give `codes` (n,) the new `vectors` (n, D)."""
        raise NotImplementedError

    def choose_float(self, latents: Tensor) -> Tensor:
        return nearest_codes(self.comparable(latents), self.codebook_vectors())

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        # taken, then normalised: of a large codebook a batch decodes few vectors
        vectors = self.comparable(self.stored_vectors_of(codes.flatten()))
        return vectors.view(*codes.shape, -1).movedim(-1, 1)


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """latents (B, D, h, w), codebook (K, D) -> codes (B, h, w) of the smallest Euclidean distance.

    The term |z|^2 changes no argmin and is left out; tokens go in blocks so that the distances fit in memory.
    """
    batch, _, height, width = latents.shape
    blocks = flatten(latents.detach()).split(max(1, MAX_DISTANCES // len(codebook)))
    return torch.cat([partial_distances(block, codebook.detach()).argmin(1) for block in blocks]).view(
        batch, height, width
    )


def partial_distances(tokens: Tensor, codebook: Tensor) -> Tensor:
    """tokens (M, D), codebook (K, D) -> |e|^2 - 2 z.e (M, K): squared distances less |z|^2."""
    return torch.addmm(codebook.square().sum(1), tokens, codebook.T, alpha=-2)


def gather_codes(codebook: Tensor, codes: Tensor) -> Tensor:
    """codebook (K, D), codes (B, h, w) -> (B, D, h, w)"""
    return nn.functional.embedding(codes, codebook).permute(0, 3, 1, 2)


def count_codes(codes: Tensor, num_codes: int) -> Tensor:
    """codes of any shape -> how often each occurs (K,) int64. Without `bincount`, for which a GPU keeps the host
    waiting."""
    codes = codes.flatten()
    return torch.zeros(num_codes, dtype=torch.int64, device=codes.device).index_add_(0, codes, torch.ones_like(codes))


def flatten(latents: Tensor) -> Tensor:
    """(B, D, h, w) -> (B*h*w, D)"""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Forward: `quantized`. Backward: as if it were `latents` (van den Oord et al. 2017, section 3.2)."""
    return latents + (quantized - latents).detach()


def initial_codebook(num_codes: int, embedding_dim: int) -> Tensor:
    """(K, D) from U(-1/K, 1/K)"""
    return torch.empty(num_codes, embedding_dim).uniform_(-1 / num_codes, 1 / num_codes)
