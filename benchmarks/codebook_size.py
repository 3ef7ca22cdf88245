"""What a quantizer costs as its codebook grows: seconds and peak memory of a forward and a backward pass.

    python benchmarks/codebook_size.py [--types ibq entropy] [--codes 1024 16384 262144] [--dimensions 8]

1,024 tokens (4 images of 16 x 16 latents), each quantizer of the config's union that has as many codes as it is told,
beside the plain way: `cdist`, `one_hot`, a product of matrices, and dense softmaxes where the formula has them. Each
measurement has a process of its own, whose peak is told less what it began with.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.config.quantizers import QuantizerField
from vqgan_accel.sections import sections_of, type_of

SECTIONS = {type_of(section): section for section in sections_of(QuantizerField)}
# of a type, beside its number of codes and their dimension
SETTINGS: dict[str, dict[str, Any]] = {"gumbel": {"hidden_channels": 32}, "entropy": {"init": "normal"}}


class Cost(NamedTuple):
    forward: float  # seconds
    backward: float
    peak: float  # MiB


Ways = Callable[[Tensor], Tensor]  # latents (B, C, 16, 16) -> a scalar of which the gradient is taken


def ours(kind: str, codes: int, dimension: int) -> tuple[Ways, int]:
    """And the channels of its latents."""
    values = {"num_codes": codes, "embedding_dim": dimension, **SETTINGS.get(kind, {})}
    quantizer = SECTIONS[kind].model_validate({"type": kind, **values}).build()

    def scalar(latents: Tensor) -> Tensor:
        output = quantizer(latents, range(len(latents)))
        return output.quantized.sin().sum() + output.loss

    return scalar, quantizer.input_channels


# ---- the plain way


def plain(kind: str, codes: int, dimension: int) -> tuple[Ways, int]:
    codebook = torch.randn(codes, dimension, requires_grad=True)
    head = torch.randn(codes, 32, requires_grad=True)  # Gumbel's logits

    def scalar(latents: Tensor) -> Tensor:
        tokens = latents.permute(0, 2, 3, 1).flatten(0, 2)
        quantized, loss = PLAIN[kind](tokens, head if kind == "gumbel" else codebook)
        return (quantized @ codebook if kind == "gumbel" else quantized).sin().sum() + loss

    return scalar, 32 if kind == "gumbel" else dimension


def plain_nearest(tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    distances = torch.cdist(tokens, codebook)
    chosen = F.one_hot(distances.argmin(1), len(codebook)).float() @ codebook
    loss = F.mse_loss(chosen, tokens.detach()) + 0.25 * F.mse_loss(tokens, chosen.detach())
    return tokens + (chosen - tokens).detach(), loss


def plain_entropy(tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    quantized, loss = plain_nearest(tokens, codebook)
    distances = torch.cdist(tokens, codebook).square()
    return quantized, loss + 0.1 * entropy(-distances / 0.01)


def plain_ibq(tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    products = tokens @ codebook.T
    soft = products.softmax(1)
    hard = F.one_hot(soft.argmax(1), len(codebook)).float()
    passed, chosen = (hard - soft.detach() + soft) @ codebook, hard @ codebook
    loss = F.mse_loss(passed, tokens) + F.mse_loss(chosen.detach(), tokens)
    loss = loss + 0.25 * F.mse_loss(chosen, tokens.detach())
    return passed, loss + 0.05 * entropy(products / 0.01)


def plain_gumbel(tokens: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    logits = tokens @ head.T
    log_q = logits.log_softmax(1)
    return F.gumbel_softmax(logits, 1.0), (log_q.exp() * log_q).sum(1).mean()


def entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(1)
    mean = p.mean(0)
    return -(p * logits.log_softmax(1)).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


PLAIN: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "standard": plain_nearest,
    "ema": plain_nearest,
    "simvq": plain_nearest,
    "entropy": plain_entropy,
    "ibq": plain_ibq,
    "gumbel": plain_gumbel,
}


# ---- measuring


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(said: Connection, way: Callable[..., tuple[Ways, int]], kind: str, codes: int, dimension: int) -> None:
    torch.manual_seed(0)
    scalar, channels = way(kind, codes, dimension)
    before, latents = peak_mib(), torch.randn(4, channels, 16, 16, requires_grad=True)
    start = time.perf_counter()
    loss = scalar(latents)
    middle = time.perf_counter()
    loss.backward()
    said.send(Cost(middle - start, time.perf_counter() - middle, peak_mib() - before))


def measured(way: Callable[..., tuple[Ways, int]], kind: str, codes: int, dimension: int) -> Cost:
    """In a process of its own, forked from one that has imported torch and computed nothing."""
    mine, theirs = multiprocessing.Pipe()
    arguments = (theirs, way, kind, codes, dimension)
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        return Cost(float("nan"), float("nan"), float("nan"))  # it had not enough memory
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fitting = [kind for kind, section in SECTIONS.items() if "num_codes" in section.model_fields]
    parser.add_argument("--types", nargs="+", default=fitting, choices=fitting)
    parser.add_argument("--codes", nargs="+", type=int, default=[2**10, 2**14, 2**18])
    parser.add_argument("--dimensions", nargs="+", type=int, default=[8])
    options = parser.parse_args()
    print("| codes | dimension | type | forward, backward, s | plain way | peak, MiB | plain way | time, memory |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for codes in options.codes:
        for dimension in options.dimensions:
            for kind in options.types:
                mine = measured(ours, kind, codes, dimension)
                row = f"| {codes:,} | {dimension} | {kind} | {mine.forward:.3f}, {mine.backward:.3f} |"
                if kind not in PLAIN:
                    print(f"{row} | {mine.peak:,.0f} | | |", flush=True)
                    continue
                other = measured(plain, kind, codes, dimension)
                faster = (other.forward + other.backward) / (mine.forward + mine.backward)
                row += f" {other.forward:.3f}, {other.backward:.3f} | {mine.peak:,.0f} | {other.peak:,.0f} |"
                print(f"{row} {faster:.1f}x, {other.peak / max(mine.peak, 1):.1f}x |", flush=True)


if __name__ == "__main__":
    main()
