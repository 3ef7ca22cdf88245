"""Residual quantization (Lee et al. 2022, arXiv 2203.01941, section 3.1): the code of each level is of what those
before it have left, and the decoder reads the sum of their vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vqgan_accel.models.quantizers.base import GRADIENTS, Lookup, LookupQuantizer, QuantizerOutput
from vqgan_accel.models.quantizers.several import SeveralQuantizers, summed


class ResidualQuantizer(SeveralQuantizers):
    """r_1 = z, r_{d+1} = r_d - sg[e_d]; quantized: sum of e_d. loss: the sum of the levels' own, which for a nearest
    code have beta |r_d - sg[e_d]|^2 = beta |z - sg[e_1 + ... + e_d]|^2 (eq. 8).

    The gradient of the sum reaches the latents as the levels' quantizer has it. A level of FSQ rounds on a grid that is
    finer by `residual_scale` than that of the level before.
    """

    def __init__(self, layers: Sequence[LookupQuantizer], depth: int, dropout: float) -> None:
        """layers: one for each of `depth` levels, or one for all."""
        super().__init__(layers, depth)
        self.input_channels = layers[0].input_channels
        self.dropout = dropout

    def level(self, place: int) -> tuple[LookupQuantizer, Any]:
        layer: Any = self.part(place)
        return layer, layer.residual_scale() ** place

    def quantize(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> QuantizerOutput:
        latents = left = self.compared(latents)
        levels = self.levels_read(latents, sample_seeds) if self.training and self.dropout else None
        total, found = torch.zeros_like(latents), []
        for place in range(self.places):
            layer, scale = self.level(place)
            found.append(layer.look_up(left / scale))
            vectors = (found[-1].vectors * scale).detach()
            left = left - vectors
            total = total + (vectors if levels is None else vectors * (place < levels))
        return QuantizerOutput(
            GRADIENTS[self.parts[0].gradient](latents, total),
            torch.stack([one.codes for one in found], 1),
            torch.stack([one.loss for one in found]).sum(),
            summed([one.metrics for one in found]),
        )

    def levels_read(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> Tensor:
        """How many levels the decoder reads of each sample (B, 1, 1, 1): all of them, or for a share of `dropout` from
        one to all. Sample b's number depends on sample_seeds[b] alone; without seeds, on torch's global state."""
        draws = torch.empty(len(latents), 2, device=latents.device)
        if sample_seeds is None:
            draws.uniform_()
        else:
            generator = torch.Generator(latents.device)
            for draw, seed in zip(draws, sample_seeds, strict=True):
                draw.uniform_(generator=generator.manual_seed(seed))
        drops, level = draws.unbind(1)
        fewer = (level * self.places).floor() + 1
        return torch.where(drops < self.dropout, fewer, float(self.places)).view(-1, 1, 1, 1)

    def compared(self, latents: Tensor) -> Tensor:
        return self.level(0)[0].comparable(latents)

    def choose_float(self, latents: Tensor) -> Tensor:
        return torch.stack([codes for codes, _ in self.descend(latents)], 1)

    def descend(self, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """latents (B, D, h, w) -> of each level its codes (B, h, w) and what it is of (B, D, h, w)"""
        left = self.compared(latents)
        for place in range(self.places):
            layer, scale = self.level(place)
            codes = layer.find(left / scale)
            yield codes, left
            left = left - layer.codes_to_latents(codes) * scale

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        total = torch.zeros((), device=codes.device)
        for place, one in enumerate(codes.unbind(1)):
            layer, scale = self.level(place)
            total = total + layer.codes_to_latents(one) * scale
        return total

    def code_vectors(self, place: int = 0) -> Tensor:
        layer, scale = self.level(place)
        vectors = layer.code_vectors()
        return vectors * (scale.view(1, -1) if isinstance(scale, Tensor) else scale)

    def lookups(self, latents: Tensor) -> Iterator[Lookup]:
        if len(self.parts) == 1:
            everything = torch.cat([left for _, left in self.descend(latents)], 2)
            yield from (one._replace(places=tuple(range(self.places))) for one in self.parts[0].lookups(everything))
            return
        left = latents
        for place, layer in enumerate(self.parts):
            yield from (one._replace(places=(place,)) for one in layer.lookups(left))
            left = left - layer.codes_to_latents(layer.find(left))  # with the vectors that it has by now
