"""Which codes a tokenizer uses, and how many bits they are worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.measures.base import Collected, Measure, Seen, Setting
from vqgan_accel.models.quantizers import count_codes


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of the code distribution; counts (K,). Between 1 and K; 0 where nothing was counted."""
    p = counts.double() / counts.sum()
    return float(torch.special.entr(p).sum().exp()) if counts.any() else 0.0


def codebook_usage(counts: Tensor) -> float:
    """Percentage of the K codes that were used at least once; counts (K,)"""
    return 100 * float((counts > 0).double().mean())


class Codebook(Measure):
    """How often each code was used."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.uses = torch.zeros(setting.num_codes, dtype=torch.int64, device=setting.device)
        self.pixels = torch.zeros((), dtype=torch.int64, device=setting.device)

    def update(self, seen: Seen) -> None:
        self.uses += count_codes(seen.codes, len(self.uses))
        self.pixels += seen.images[:, 0].numel()

    def counts(self) -> Tensor:
        """(K,) int64 over all processes; every one calls it."""
        return sum_over_processes(self.uses)

    def results(self, collected: Collected) -> dict[str, float]:
        counts, pixels = self.counts(), int(sum_over_processes(self.pixels))
        codes = perplexity(counts)
        bits = math.log2(codes) if codes else 0.0
        return {
            "perplexity": codes,
            "codebook_usage": codebook_usage(counts),
            "bits_per_token": bits,
            "bits_per_pixel": bits * int(counts.sum()) / pixels,
        }

    def reset(self) -> None:
        self.uses.zero_()
        self.pixels.zero_()
