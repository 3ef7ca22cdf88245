"""What quantizers that are made of quantizers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqgan_accel.models.quantizers.base import Quantizer


class SeveralQuantizers(Quantizer):
    """Codes are (B, q, h, w) of q places, each of a quantizer of one code a position."""

    def __init__(self, parts: Sequence[Quantizer], places: int) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(parts)
        self.places = places
        self.num_codes = parts[0].num_codes

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.num_codes,) * self.places

    def part(self, place: int) -> Quantizer:
        return self.parts[place % len(self.parts)]  # one that all places share, or each its own

    def apply_update(self) -> None:
        for part in self.parts:
            part.apply_update()

    def discard_update(self) -> None:
        for part in self.parts:
            part.discard_update()


def summed(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in metrics]).sum() for name in metrics[0]}
