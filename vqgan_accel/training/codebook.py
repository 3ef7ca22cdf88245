"""The codebook's upkeep over an epoch: which codes were used by any process, and new vectors for those that were
not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from vqgan_accel.distributed import num_processes, process_index, sum_over_processes
from vqgan_accel.evaluation.measures.codes import codebook_usage, perplexity
from vqgan_accel.models.quantizers import CodebookQuantizer, Quantizer, count_codes
from vqgan_accel.training.state import Stateful

PERTURBATION = 0.01  # of a copied code, in units of the spread of the codes in use


class CodebookUsage(Stateful):
    """How often each code was used since the epoch began, over all processes, in steps that were not skipped."""

    def __init__(self, num_codes: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)  # (K,)
        self.new_counts = torch.zeros_like(self.counts)  # of this optimizer step so far, on this process

    def add(self, codes: Tensor) -> None:
        """codes of any shape, of one round on this process"""
        self.new_counts += count_codes(codes, len(self.counts))

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
        return {"perplexity": perplexity(self.counts), "codebook_usage": codebook_usage(self.counts)}

    def unused(self) -> Tensor:
        """(n,) the codes that nobody used"""
        return (self.counts == 0).nonzero().flatten()

    def reset(self) -> None:
        self.counts.zero_()


def reinitialise_unused(
    quantizer: Quantizer,
    optimizer: Optimizer,
    usage: CodebookUsage,
    latents: list[Tensor],
    source: Literal["latents", "used_codes"],
    seed: int,
) -> int:
    """Replace the unused codes, with the same draw on every rank; returns how many.

    latents: this process's encoder outputs (B, D, h, w), one tensor per accumulation round of the current step.
    """
    assert isinstance(quantizer, CodebookQuantizer)
    unused = usage.unused()
    generator = torch.Generator().manual_seed(seed)
    if source == "latents":
        vectors = draw_latents(latents, len(unused), generator)
        unused = unused[: len(vectors)]
    else:
        vectors = draw_used_codes(quantizer.codebook_vectors().detach(), usage.counts, len(unused), generator)
    if len(unused):
        quantizer.reinitialise(unused, vectors)
        forget_moments(quantizer, optimizer, unused)
    return len(unused)


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
