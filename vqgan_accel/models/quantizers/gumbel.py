"""The Gumbel-softmax quantizer (Jang et al. 2017, arXiv 1611.01144) as DALL-E's dVAE trains it (Ramesh et al. 2021,
arXiv 2102.12092, appendix A.2): the encoder emits one logit per code, or what a 1x1 convolution makes logits of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqgan_accel.models.quantizers.base import Quantizer, QuantizerOutput, gather_codes, initial_codebook


class GumbelQuantizer(Quantizer):
    """loss = kl_cost * KL(q(code | position) || uniform), mean over positions.

    Training draws a relaxed sample at `temperature`; evaluation takes the most likely code, without noise.
    `temperature` and `kl_cost` are set by the training loop's schedules.
    """

    def __init__(
        self, num_codes: int, embedding_dim: int, straight_through: bool, hidden_channels: int | None = None
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.input_channels = num_codes if hidden_channels is None else hidden_channels
        self.straight_through = straight_through
        self.temperature = 1.0
        self.kl_cost = 0.0
        self.x_to_logits = nn.Conv2d(self.input_channels, num_codes, 1)
        self.codebook = nn.Parameter(initial_codebook(num_codes, embedding_dim, "uniform"))

    def quantize(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> QuantizerOutput:
        logits = self.x_to_logits(latents)  # (B, K, h, w)
        codes = logits.argmax(1)
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(self.num_codes))).sum(1).mean()
        if self.training:
            sample = ((logits + gumbel_noise(logits, sample_seeds)) / self.temperature).softmax(1)
            if self.straight_through:
                hard = torch.zeros_like(sample).scatter_(1, sample.argmax(1, keepdim=True), 1.0)
                sample = hard + (sample - sample.detach())
            quantized = torch.einsum("bkhw,kd->bdhw", sample, self.codebook)
        else:
            quantized = gather_codes(self.codebook, codes)
        return QuantizerOutput(quantized, codes, self.kl_cost * kl, {"kl_loss": kl.detach()})

    def choose_float(self, latents: Tensor) -> Tensor:
        return self.x_to_logits(latents).argmax(1)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return gather_codes(self.codebook, codes)


def gumbel_noise(like: Tensor, sample_seeds: Sequence[int] | None) -> Tensor:
    """Standard Gumbel noise (B, ...) of the shape and device of `like`; sample b's depends on sample_seeds[b] alone.

    Without seeds it comes from torch's global random state.
    """
    exponential = torch.empty(like.shape, dtype=like.dtype, device=like.device)  # whatever `like`'s memory format
    if sample_seeds is None:
        exponential.exponential_()
    else:
        generator = torch.Generator(like.device)
        for sample, seed in zip(exponential, sample_seeds, strict=True):
            sample.exponential_(generator=generator.manual_seed(seed))
    return -exponential.clamp_min(torch.finfo(like.dtype).tiny).log()
