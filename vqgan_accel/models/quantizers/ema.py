"""The quantizer whose codebook is a moving average of the latents (van den Oord et al. 2017, appendix A.1; Sonnet's
VectorQuantizerEMA).

Three things differ from most implementations. Statistics are sums over all processes and accumulation rounds, applied
once per optimizer step, so the codebook does not depend on how a batch is split. Counts start at 1 and sums at the
codebook, and the smoothing total is that of the counts, so unused codes do not explode, and they rest before they
shrink.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.models.quantizers.base import (
    CodebookQuantizer,
    Found,
    Gradient,
    Init,
    count_codes,
    flatten,
    gather_codes,
    initial_codebook,
    nearest_codes,
)

# A count far below epsilon would take the code's vector to the origin: one that nobody uses stays where it is from here
# on, and moves as far as before once it is used again.
RESTS_BELOW = 0.01


class EMAQuantizer(CodebookQuantizer):
    """loss = beta |z - sg[e]|^2; N_k <- decay N_k + (1 - decay) n_k, m_k likewise, e_k = m_k / smoothed N_k."""

    counts: Tensor  # (K,) raw moving averages; smoothing is applied on read
    sums: Tensor  # (K, D)
    new_counts: Tensor  # (K,) of this optimizer step so far, on this process
    new_sums: Tensor  # (K, D)

    def __init__(
        self,
        num_codes: int,
        embedding_dim: int,
        commitment_cost: float,
        decay: float,
        epsilon: float,
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
        self.decay = decay
        self.epsilon = epsilon
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.comparable(initial_codebook(num_codes, embedding_dim, init)))
        self.register_buffer("new_counts", torch.zeros(num_codes), persistent=False)
        self.register_buffer("new_sums", torch.zeros(num_codes, embedding_dim), persistent=False)

    def stored_vectors(self) -> Tensor:
        return self.sums / smoothed_counts(self.counts, self.epsilon)[:, None]

    def stored_vectors_of(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.sums) / smoothed_counts(self.counts, self.epsilon)[codes, None]

    def look_up(self, latents: Tensor) -> Found:
        codebook = self.codebook_vectors()
        codes = nearest_codes(latents, codebook)
        vectors = gather_codes(codebook, codes)
        if self.training:
            self.new_counts += count_codes(codes, self.num_codes)
            self.new_sums.index_add_(0, codes.flatten(), flatten(latents.detach()))
        commitment_loss = F.mse_loss(latents, vectors)
        return Found(
            codes,
            vectors,
            self.commitment_cost * commitment_loss,
            {"commitment_loss": commitment_loss.detach()},
        )

    @torch.no_grad()
    def apply_update(self) -> None:
        if not self.training:
            return
        new_counts, new_sums = sum_over_processes(self.new_counts), sum_over_processes(self.new_sums)
        rests = (new_counts == 0) & (self.counts < RESTS_BELOW)
        share = torch.where(rests, 0.0, 1 - self.decay)  # (K,)
        self.counts.lerp_(new_counts, share)
        self.sums.lerp_(new_sums, share[:, None])
        self.discard_update()

    def discard_update(self) -> None:
        self.new_counts.zero_()
        self.new_sums.zero_()

    @torch.no_grad()
    def reinitialise(self, codes: Tensor, vectors: Tensor) -> None:
        # A count of 1 is the weight of a code that is used about once a step; the sum follows so that m / N is the
        # vector.
        self.counts[codes] = 1.0
        self.sums[codes] = self.comparable(vectors) * smoothed_counts(self.counts, self.epsilon)[codes, None]


def smoothed_counts(counts: Tensor, epsilon: float) -> Tensor:
    """(K,) -> (K,) of the same sum, none of them 0 (Laplace smoothing)."""
    total = counts.sum()
    return (counts + epsilon) / (total + len(counts) * epsilon) * total
