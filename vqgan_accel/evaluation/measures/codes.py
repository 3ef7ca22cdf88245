"""Which codes a tokenizer uses, and how many bits they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.measures.base import Collected, Measure, Seen, Setting
from vqgan_accel.models.quantizers import Quantizer, count_all_codes


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
        "perplexity": math.prod(value ** (1 / len(parts)) for value in perplexities),
        "codebook_usage": codebook_usage(counts),
    }
    if len(parts) == 1:
        return together
    each = {f"perplexity_{number}": value for number, value in enumerate(perplexities, 1)}
    return together | each | {f"codebook_usage_{number}": codebook_usage(part) for number, part in enumerate(parts, 1)}


def error_sums(quantizer: Quantizer, latents: Tensor, codes: Tensor) -> Tensor | None:
    """latents (B, input_channels, h, w) and their codes -> (2,) float64: the sum of |z - e|^2, and that of |z|^2, whose
    quotient is the relative error of quantization; None where codes' vectors stand for no point."""
    z = quantizer.compared(latents.detach().float())
    if z is None:
        return None
    apart = z - quantizer.codes_to_latents(codes).detach()
    return torch.stack([apart.double().square().sum(), z.double().square().sum()])


def quantization_error(sums: Tensor) -> float:
    """Of `error_sums`: 0 where every latent is its code's vector, 1 where all vectors are 0."""
    apart, whole = sums.tolist()
    return apart / whole if whole else 0.0


class Codebook(Measure):
    """How often each code was used, and how far from the latents they are."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.sizes = setting.codebook_sizes
        self.uses = torch.zeros(sum(self.sizes), dtype=torch.int64, device=setting.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=setting.device)  # pixels, and `error_sums`

    def update(self, seen: Seen) -> None:
        if seen.tokenizer is not None and seen.latents is not None:
            errors = error_sums(seen.tokenizer.quantizer, seen.latents, seen.codes)
            self.sums[1:] += 0 if errors is None else errors
        self.uses += count_all_codes(seen.codes, self.sizes)
        self.sums[0] += seen.images[:, 0].numel()

    def counts(self) -> Tensor:
        """(sum of K,) int64, one codebook after another, over all processes; every one calls it."""
        return sum_over_processes(self.uses)

    def results(self, collected: Collected) -> dict[str, float]:
        counts, sums = self.counts(), sum_over_processes(self.sums)
        usage = usage_metrics(counts, self.sizes)
        bits = math.log2(usage["perplexity"]) if usage["perplexity"] else 0.0
        of_codes = {"bits_per_token": bits, "bits_per_pixel": bits * int(counts.sum()) / int(sums[0])}
        return usage | of_codes | ({"quantization_error": quantization_error(sums[1:])} if sums[1:].any() else {})

    def reset(self) -> None:
        self.uses.zero_()
        self.sums.zero_()
