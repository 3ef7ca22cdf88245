"""pFID: what becomes of rFID where codes are exchanged for near ones, as a generator's errors would (Qiu et al. 2025,
arXiv 2503.08354)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqgan_accel.evaluation.measures.base import Seen, Setting, Side
from vqgan_accel.evaluation.measures.frechet import Frechet
from vqgan_accel.evaluation.pixels import reconstruction_levels
from vqgan_accel.randomness import PERTURBATION, position_seed

BLOCK = 256  # codes whose distances to all others are held at a time


def perturbed_codes(
    codes: Tensor, positions: Tensor, vectors: Sequence[Tensor], rate: float, neighbours: int
) -> Tensor:
    """codes (B, h, w), or (B, q, h, w), of the images at `positions`; vectors (K, D) of each codebook -> each code,
    with probability `rate`, exchanged for one of the `neighbours` that are nearest to it, itself among them. Which ones
    is a function of the position."""
    places = codes.unbind(1) if len(vectors) > 1 else [codes]
    near = torch.stack([_near(*pair, neighbours) for pair in zip(places, vectors, strict=True)], 1)
    near = near.view(*codes.shape, neighbours)
    exchanged, which = [], []
    for position in positions.tolist():
        generator = torch.Generator().manual_seed(position_seed(PERTURBATION, position))
        exchanged.append(torch.rand(codes.shape[1:], generator=generator) < rate)
        which.append(torch.randint(neighbours, codes.shape[1:], generator=generator))
    others = near.gather(-1, torch.stack(which).to(codes.device)[..., None])[..., 0]
    return torch.where(torch.stack(exchanged).to(codes.device), others, codes)


def _near(codes: Tensor, vectors: Tensor, number: int) -> Tensor:
    """codes of any shape of the codebook (K, D) -> (..., number) those nearest to each"""
    used, inverse = codes.unique(return_inverse=True)
    return torch.cat([_nearest(vectors[block], vectors, number) for block in used.split(BLOCK)])[inverse]


def _nearest(some: Tensor, vectors: Tensor, number: int) -> Tensor:
    distances = torch.cdist(some, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(number, largest=False).indices


def perturbed(seen: Seen) -> Tensor:
    config, tokenizer = seen.setting.config, seen.tokenizer
    assert tokenizer is not None, "pfid decodes other codes"
    quantizer = tokenizer.quantizer
    vectors = [quantizer.code_vectors(place) for place in range(len(quantizer.codebook_sizes))]
    codes = perturbed_codes(seen.codes, seen.positions, vectors, config.pfid_rate, config.pfid_neighbours)
    return reconstruction_levels(seen.protocol, tokenizer.decode_own(codes))


class PFID(Frechet):
    network = "inception"
    side: Side = staticmethod(perturbed)

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        wanted, codes = setting.config.pfid_neighbours, min(setting.codebook_sizes)
        if wanted > codes:
            raise ValueError(
                f"evaluation.pfid_neighbours {wanted} is more than the {codes} codes there are; set it to "
                f"at most {codes}, or leave 'pfid' out of the metrics"
            )
