"""Which codes a tokenizer uses, and how many bits they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.measures.base import Collected, Measure, Seen, Setting
from vqgan_accel.models.quantizers import count_all_codes


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of the code distribution; counts (K,). Between 1 and K; 0 where nothing was counted."""
    p = counts.double() / counts.sum()
    return float(torch.special.entr(p).sum().exp()) if counts.any() else 0.0


def codebook_usage(counts: Tensor) -> float:
    """Percentage of the K codes that were used at least once; counts (K,)"""
    return 100 * float((counts > 0).double().mean())


def usage_metrics(counts: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """counts (sum of sizes,), of one codebook after another -> `perplexity` (of several the geometric mean: of a code
    of theirs, on average) and `codebook_usage` (% of all of their codes), and of several also those of each, with its
    number: `perplexity_1`."""
    parts = counts.split(tuple(sizes))
    perplexities = [perplexity(part) for part in parts]
    together = {
        "perplexity": math.prod(perplexities) ** (1 / len(parts)),
        "codebook_usage": codebook_usage(counts),
    }
    if len(parts) == 1:
        return together
    each = {f"perplexity_{number}": value for number, value in enumerate(perplexities, 1)}
    return together | each | {f"codebook_usage_{number}": codebook_usage(part) for number, part in enumerate(parts, 1)}


class Codebook(Measure):
    """How often each code was used."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.sizes = setting.codebook_sizes
        self.uses = torch.zeros(sum(self.sizes), dtype=torch.int64, device=setting.device)
        self.pixels = torch.zeros((), dtype=torch.int64, device=setting.device)

    def update(self, seen: Seen) -> None:
        self.uses += count_all_codes(seen.codes, self.sizes)
        self.pixels += seen.images[:, 0].numel()

    def counts(self) -> Tensor:
        """(sum of K,) int64, one codebook after another, over all processes; every one calls it."""
        return sum_over_processes(self.uses)

    def results(self, collected: Collected) -> dict[str, float]:
        counts, pixels = self.counts(), int(sum_over_processes(self.pixels))
        usage = usage_metrics(counts, self.sizes)
        bits = math.log2(usage["perplexity"]) if usage["perplexity"] else 0.0
        return usage | {"bits_per_token": bits, "bits_per_pixel": bits * int(counts.sum()) / pixels}

    def reset(self) -> None:
        self.uses.zero_()
        self.pixels.zero_()
