"""The contract that every quantizer keeps, and the search for the nearest code that three of them share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vqgan_accel.models.precision import without_autocast

Gradient = Literal["straight_through", "rotation"]
Init = Literal["uniform", "sphere", "normal", "kmeans"]
MAX_DISTANCES = 2**27  # entries of one (tokens, codes) block: 512 MB in float32


class QuantizerOutput(NamedTuple):
    quantized: Tensor  # (B, D, h, w) float32, with the straight-through (or soft) gradient to the latents
    codes: Tensor  # (B, h, w) int64 in [0, num_codes), or (B, q, h, w) of q codebooks
    loss: Tensor  # scalar: what the quantizer adds to the tokenizer's loss
    metrics: dict[str, Tensor]  # detached scalars to log: the parts of `loss`


class Found(NamedTuple):
    """What a look into a codebook finds."""

    codes: Tensor  # (B, h, w) int64
    vectors: Tensor  # (B, D, h, w), theirs
    loss: Tensor
    metrics: dict[str, Tensor]


class Lookup(NamedTuple):
    """A codebook whose vectors can be given new values, and what it is compared with."""

    codebook: CodebookQuantizer
    places: tuple[int, ...]  # which of a position's codes are its own
    latents: Tensor  # (B, D, h, w), of all its places one below the other


class Quantizer(nn.Module):
    """Turns latents into codes and back.

    `forward(...).codes` in eval mode, a tokenizer's `encode` and a re-encode after save and load are identical.
    Quantizers compute in float32 whatever the autocast: half precision picks other codes.
    """

    num_codes: int  # K; the largest, where a position has codes of several codebooks
    input_channels: int  # what the encoder must emit: D, or what becomes logits

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """(K,), or of q codebooks the size of each: codes are then (B, q, h, w)."""
        return (self.num_codes,)

    def forward(self, latents: Tensor, sample_seeds: Sequence[int] | None = None) -> QuantizerOutput:
        """latents (B, input_channels, h, w); sample_seeds, B of them, fix the noise of each sample, where there is
        any. (Plain numbers, for DDP would move a tensor to the GPU, and the host wait to have it back.)"""
        with without_autocast(latents):
            return self.quantize(latents.float(), sample_seeds)

    def choose(self, latents: Tensor) -> Tensor:
        """latents (B, input_channels, h, w) -> codes (B, h, w) or (B, q, h, w), without noise or side effects."""
        with without_autocast(latents):
            return self.choose_float(latents.float())

    def choose_float(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def quantize(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> QuantizerOutput:
        raise NotImplementedError

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) or (B, q, h, w) int64 -> (B, D, h, w) float32"""
        raise NotImplementedError

    def compared(self, latents: Tensor) -> Tensor | None:
        """latents (B, input_channels, h, w) -> (B, D, h, w) what their codes' vectors stand for; None where these stand
        for no point"""
        return None

    def code_vectors(self, place: int = 0) -> Tensor:
        """(K, D) the vectors of a codebook, as they are decoded; place: which of a position's codes are its own"""
        codes = torch.arange(self.num_codes, device=self.device)
        return self.codes_to_latents(codes.view(1, 1, -1))[0, :, 0].T

    def lookups(self, latents: Tensor) -> Iterator[Lookup]:
        """latents (B, input_channels, h, w) -> every codebook that can be given new vectors, one after another: what
        one is compared with may depend on the vectors that those before it have by then."""
        return iter(())

    @property
    def device(self) -> torch.device:
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def apply_update(self) -> None:
        """Called once per optimizer step, on every rank, after the gradients of all accumulation rounds. In eval mode
        nothing was taken, and nothing changes."""

    def discard_update(self) -> None:
        """Called instead of `apply_update` where the step is skipped."""


class LookupQuantizer(Quantizer):
    """A quantizer that finds for each latent a code with a vector of its own, so that the found vectors can be parts of
    a sum (`residual`)."""

    gradient: Gradient = "straight_through"

    def comparable(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) as they are compared with codes' vectors"""
        return latents

    def find(self, latents: Tensor) -> Tensor:
        """comparable latents (B, D, h, w) -> codes (B, h, w), without side effects"""
        raise NotImplementedError

    def residual_scale(self) -> Tensor | float:
        """By how much the next level of a residual quantizer is finer; a tensor is (D, 1, 1)."""
        return 1.0

    def look_up(self, latents: Tensor) -> Found:
        """`find` in a forward pass: with losses and, in training, statistics."""
        raise NotImplementedError

    def compared(self, latents: Tensor) -> Tensor:
        return self.comparable(latents)

    def choose_float(self, latents: Tensor) -> Tensor:
        return self.find(self.comparable(latents))

    def quantize(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> QuantizerOutput:
        latents = self.comparable(latents)
        found = self.look_up(latents)
        quantized = GRADIENTS[self.gradient](latents, found.vectors)
        return QuantizerOutput(quantized, found.codes, found.loss, found.metrics)


class CodebookQuantizer(LookupQuantizer):
    """A quantizer with a codebook (K, D), input channels D, which picks the nearest code.

    With l2_normalize, latents and codes are compared and decoded as unit vectors (Yu et al. 2021, arXiv 2110.04627,
    section 3.2).
    """

    l2_normalize: bool
    by_distance = True  # and not by another rule, as IBQ's

    def stored_vectors(self) -> Tensor:
        """(K, D) float32, of any length"""
        raise NotImplementedError

    def stored_vectors_of(self, codes: Tensor) -> Tensor:
        """codes (N,) -> their stored vectors (N, D)"""
        return nn.functional.embedding(codes, self.stored_vectors())

    def codebook_vectors(self) -> Tensor:
        """(K, D) float32, as they are compared and decoded"""
        return self.comparable(self.stored_vectors())

    def comparable(self, latents: Tensor) -> Tensor:
        """(N, D, ...), latents or vectors: unit vectors where l2_normalize, else as they are."""
        return nn.functional.normalize(latents, dim=1) if self.l2_normalize else latents

    def reinitialise(self, codes: Tensor, vectors: Tensor) -> None:
        """Give `codes` (n,) the new `vectors` (n, D)."""
        raise NotImplementedError

    def find(self, latents: Tensor) -> Tensor:
        return nearest_codes(latents, self.codebook_vectors())

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        # taken, then normalised: of a large codebook a batch decodes few vectors
        vectors = self.comparable(self.stored_vectors_of(codes.flatten()))
        return vectors.view(*codes.shape, -1).movedim(-1, 1)

    def lookups(self, latents: Tensor) -> Iterator[Lookup]:
        yield Lookup(self, (0,), latents)


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


def count_all_codes(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """codes (B, h, w) of one codebook, or (B, q, h, w) of those of these sizes -> `count_codes` of each, one after
    another (sum of sizes,)"""
    places = codes.unbind(1) if len(sizes) > 1 else [codes]
    return torch.cat([count_codes(place, size) for place, size in zip(places, sizes, strict=True)])


def flatten(latents: Tensor) -> Tensor:
    """(B, D, h, w) -> (B*h*w, D)"""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Forward: `quantized`. Backward: as if it were `latents` (van den Oord et al. 2017, section 3.2)."""
    return latents + (quantized - latents).detach()


def rotated(latents: Tensor, quantized: Tensor) -> Tensor:
    """Forward: `quantized`. Backward: as if it were |q| / |z| R z, where R turns z into q's direction in their plane
    and is held fast (Fifty et al. 2024, arXiv 2410.06424, section 4.2). (B, D, ...) both."""
    z, q = latents.detach(), quantized.detach()
    z_hat, q_hat = nn.functional.normalize(z, dim=1), nn.functional.normalize(q, dim=1)
    between = nn.functional.normalize(z_hat + q_hat, dim=1)

    def along(direction: Tensor) -> Tensor:
        return (latents * direction).sum(1, keepdim=True)

    turned = latents - 2 * along(between) * between + 2 * along(z_hat) * q_hat
    moved = turned * (q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return moved + (quantized - moved).detach()


GRADIENTS: dict[Gradient, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotated,
}


def initial_codebook(num_codes: int, embedding_dim: int, init: Init) -> Tensor:
    """(K, D). uniform: from U(-1/K, 1/K), as k-means finds it; normal: from N(0, 1); sphere: those, of length 1"""
    if init in ("normal", "sphere"):
        normal = torch.randn(num_codes, embedding_dim)
        return nn.functional.normalize(normal, dim=1) if init == "sphere" else normal
    return torch.empty(num_codes, embedding_dim).uniform_(-1 / num_codes, 1 / num_codes)
