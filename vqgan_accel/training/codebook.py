"""The codebook's upkeep: its first vectors, which codes were used by any process, and new vectors for those that were
not, or hardly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vqgan_accel.distributed import num_processes, process_index, sum_over_processes
from vqgan_accel.evaluation.measures.codes import usage_metrics
from vqgan_accel.models.quantizers import CodebookQuantizer, Quantizer, count_all_codes
from vqgan_accel.models.quantizers.base import Lookup, count_codes, flatten, nearest_codes
from vqgan_accel.sections import Reinit
from vqgan_accel.training.state import Stateful

PERTURBATION = 0.01  # of a copied code, in units of the spread of the codes in use
KMEANS_STEPS = 10


class CodebookUsage(Stateful):
    """How often each code was used since the count began, over all processes, in steps that were not skipped."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """sizes: of the codebooks, K each"""
        self.sizes = tuple(sizes)
        self.counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)  # one codebook after another
        self.new_counts = torch.zeros_like(self.counts)  # of this optimizer step so far, on this process
        self.low = False  # few were in use when last looked at, and somebody was told

    def add(self, codes: Tensor) -> None:
        """codes (B, h, w) or (B, q, h, w), of one round on this process"""
        self.new_counts += count_all_codes(codes, self.sizes)

    def apply_update(self) -> None:
        self.counts += sum_over_processes(self.new_counts)
        self.discard_update()

    def discard_update(self) -> None:
        self.new_counts.zero_()

    def write(self, folder: Path, notes: dict[str, Any]) -> None:
        notes["code_counts"] = self.counts.tolist()

    def read(self, folder: Path, notes: dict[str, Any]) -> None:
        self.counts.copy_(torch.tensor(notes["code_counts"]))

    def metrics(self) -> dict[str, float]:
        return usage_metrics(self.counts, self.sizes)

    def of(self, lookup: Lookup) -> Tensor:
        """(K,) the uses of a codebook's codes, in all of its places"""
        counts = self.counts.split(self.sizes)
        return torch.stack([counts[place] for place in lookup.places]).sum(0)

    def reset(self) -> None:
        self.counts.zero_()


# ---- the first vectors


@torch.no_grad()
def initialise_by_kmeans(quantizer: Quantizer, latents: list[Tensor], seed: int) -> None:
    """Give every codebook the centres of what it is compared with.

    latents: this process's encoder outputs (B, D, h, w), one tensor per accumulation round of the first step. The
    centres are the same on every rank, and but for the rounding of sums they do not depend on the processes and rounds.
    """
    generator = torch.Generator().manual_seed(seed)
    for rounds in zip(*(quantizer.lookups(part) for part in latents), strict=True):
        codebook = rounds[0].codebook
        compared = [codebook.comparable(part.latents) for part in rounds]
        centres = draw_latents(compared, codebook.num_codes, generator)
        for _ in range(KMEANS_STEPS):
            centres = codebook.comparable(lloyd_step(compared, centres))
        codebook.reinitialise(torch.arange(len(centres), device=centres.device), centres)


def lloyd_step(latents: list[Tensor], centres: Tensor) -> Tensor:
    """latents (B, D, h, w) of every round, of all processes; centres (K, D) -> the mean of those that are nearest to
    each, which stays where there are none (Lloyd 1982)."""
    sums = torch.zeros(len(centres), centres.shape[1] + 1, dtype=torch.float64, device=centres.device)
    for part in latents:
        codes = nearest_codes(part, centres)
        sums[:, 0] += count_codes(codes, len(centres))
        sums[:, 1:].index_add_(0, codes.flatten(), flatten(part).double())
    sums = sum_over_processes(sums)
    counts, totals = sums[:, :1], sums[:, 1:]
    return torch.where(counts > 0, totals / counts.clamp_min(1), centres.double()).float()


# ---- new vectors


def reinitialise_rare(
    quantizer: Quantizer, optimizer: Optimizer, usage: CodebookUsage, latents: list[Tensor], reinit: Reinit, seed: int
) -> int:
    """Replace the codes that are hardly used, with the same draw on every rank; returns how many.

    latents: this process's encoder outputs (B, D, h, w), one tensor per accumulation round of the current step.
    """
    generator, replaced = torch.Generator().manual_seed(seed), 0
    for rounds in zip(*(quantizer.lookups(part) for part in latents), strict=True):
        codebook, counts = rounds[0].codebook, usage.of(rounds[0])
        codes = rarely_used(counts, reinit.below)
        if reinit.source == "latents":
            vectors = draw_latents([part.latents for part in rounds], len(codes), generator)
            codes = codes[: len(vectors)]
        else:
            kept = counts.index_fill(0, codes, 0)
            vectors = draw_used_codes(codebook.codebook_vectors().detach(), kept, len(codes), generator)
        if len(codes):
            codebook.reinitialise(codes, vectors)
            forget_moments(codebook, optimizer, codes)
        replaced += len(codes)
    return replaced


def rarely_used(counts: Tensor, below: float) -> Tensor:
    """counts (K,) -> (n,) the codes used less than `below` times as often as the mean code (Jukebox's rule, Dhariwal et
    al. 2020, in units of the mean), and those that were not used at all"""
    return (counts.double() < (below * counts.double().mean()).clamp_min(0.5)).nonzero().flatten()


def draw_latents(latents: list[Tensor], number: int, generator: torch.Generator) -> Tensor:
    """`number` vectors (n, D), at most the pool's size, without replacement from the global batch's latents.

    Every rank draws the same (sample, position) pairs, fills in those it holds, and the sum over ranks completes
    them: the result depends neither on the number of processes nor on the rounds.
    """
    rounds, (batch, dim, height, width) = len(latents), latents[0].shape
    positions = height * width
    pool = rounds * num_processes() * batch * positions
    drawn = torch.randperm(pool, generator=generator)[:number]
    sample, position = drawn // positions, drawn % positions
    # the inverse of data.order.global_index: sample = (local * processes + process) * rounds + round
    round_index, within_round = sample % rounds, sample // rounds
    process, local = within_round % num_processes(), within_round // num_processes()
    mine = process == process_index()
    vectors = torch.zeros(len(drawn), dim, device=latents[0].device)
    tokens = torch.stack(latents).permute(0, 1, 3, 4, 2).reshape(rounds, batch, positions, dim).float()
    where = [index[mine].to(tokens.device) for index in (round_index, local, position)]
    vectors[mine.to(tokens.device)] = tokens[where[0], where[1], where[2]]
    return sum_over_processes(vectors)


def draw_used_codes(codebook: Tensor, counts: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` codes (n, D) in proportion to their use, perturbed: an exact copy never wins an argmin and stays
    dead."""
    if number == 0:
        return codebook[:0]
    chosen = torch.multinomial(counts.cpu().double(), number, replacement=True, generator=generator)
    vectors = codebook[chosen.to(codebook.device)]
    spread = codebook[counts > 0].std(0, correction=0)  # (D,); 0 where a single code is left in use
    spread = torch.where(spread > 0, spread, PERTURBATION * vectors.abs().mean().clamp_min(1e-6))
    noise = torch.randn(vectors.shape, generator=generator).to(codebook.device)
    return vectors + PERTURBATION * spread * noise


def forget_moments(quantizer: CodebookQuantizer, optimizer: Optimizer, codes: Tensor) -> None:
    """Zero the optimizer's moments of the codebook rows `codes`, where the codebook is a parameter."""
    for parameter in quantizer.parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state.get(parameter, {}):
                optimizer.state[parameter][moment][codes] = 0
