"""pFID: what becomes of rFID where codes are exchanged for near ones, as a generator's errors would (Qiu et al. 2025,
arXiv 2503.08354)."""

from __future__ import annotations

import torch
from torch import Tensor

from vqgan_accel.evaluation.measures.base import Seen, Setting, Side
from vqgan_accel.evaluation.measures.frechet import Frechet
from vqgan_accel.evaluation.pixels import reconstruction_levels
from vqgan_accel.models.quantizers import Quantizer
from vqgan_accel.randomness import PERTURBATION, position_seed

BLOCK = 256  # codes whose distances to all others are held at a time


def code_vectors(quantizer: Quantizer, device: torch.device) -> Tensor:
    """(K, D), as they are decoded"""
    codes = torch.arange(quantizer.num_codes, device=device)
    return quantizer.codes_to_latents(codes.view(1, 1, -1))[0, :, 0].T


def perturbed_codes(codes: Tensor, positions: Tensor, vectors: Tensor, rate: float, neighbours: int) -> Tensor:
    """codes (B, h, w) of the images at `positions`; vectors (K, D) -> each code, with probability `rate`, exchanged for
    one of the `neighbours` that are nearest to it, itself among them. Which ones is a function of the position."""
    used, inverse = codes.unique(return_inverse=True)
    near = torch.cat([_nearest(vectors[block], vectors, neighbours) for block in used.split(BLOCK)])  # (U, neighbours)
    exchanged, which = [], []
    for position in positions.tolist():
        generator = torch.Generator().manual_seed(position_seed(PERTURBATION, position))
        exchanged.append(torch.rand(codes.shape[1:], generator=generator) < rate)
        which.append(torch.randint(neighbours, codes.shape[1:], generator=generator))
    others = near[inverse, torch.stack(which).to(codes.device)]
    return torch.where(torch.stack(exchanged).to(codes.device), others, codes)


def _nearest(some: Tensor, vectors: Tensor, number: int) -> Tensor:
    distances = torch.cdist(some, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(number, largest=False).indices


def perturbed(seen: Seen) -> Tensor:
    config, tokenizer = seen.setting.config, seen.tokenizer
    assert tokenizer is not None, "pfid decodes other codes"
    vectors = code_vectors(tokenizer.quantizer, seen.codes.device)
    codes = perturbed_codes(seen.codes, seen.positions, vectors, config.pfid_rate, config.pfid_neighbours)
    return reconstruction_levels(seen.protocol, tokenizer.decode_own(codes))


class PFID(Frechet):
    network = "inception"
    side: Side = staticmethod(perturbed)

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        if (wanted := setting.config.pfid_neighbours) > setting.num_codes:
            raise ValueError(
                f"evaluation.pfid_neighbours {wanted} is more than the {setting.num_codes} codes there are; set it to "
                f"at most {setting.num_codes}, or leave 'pfid' out of the metrics"
            )
