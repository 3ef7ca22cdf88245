"""Product quantization (Jegou et al. 2011; of image tokenizers as GSQ, Wang et al. 2024, arXiv 2412.02632): the
channels in groups, each with a code of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vqgan_accel.models.quantizers.base import Lookup, Quantizer, QuantizerOutput
from vqgan_accel.models.quantizers.several import SeveralQuantizers, summed


class ProductQuantizer(SeveralQuantizers):
    """quantized: the groups' vectors, one after another in the channels. loss: the mean of the groups' own, which where
    these are means over elements is the mean over all elements."""

    def __init__(self, groups: Sequence[Quantizer]) -> None:
        """groups: alike, each of the channels that come next"""
        super().__init__(groups, len(groups))
        self.input_channels = len(groups) * groups[0].input_channels

    def quantize(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> QuantizerOutput:
        chunks = latents.chunk(self.places, 1)
        found = [group.quantize(chunk, sample_seeds) for group, chunk in zip(self.parts, chunks, strict=True)]
        sums = summed([one.metrics for one in found])
        return QuantizerOutput(
            torch.cat([one.quantized for one in found], 1),
            torch.stack([one.codes for one in found], 1),
            torch.stack([one.loss for one in found]).mean(),
            {name: value / self.places for name, value in sums.items()},
        )

    def compared(self, latents: Tensor) -> Tensor | None:
        parts = [part.compared(chunk) for part, chunk in zip(self.parts, latents.chunk(self.places, 1), strict=True)]
        return torch.cat(parts, 1) if all(part is not None for part in parts) else None

    def choose_float(self, latents: Tensor) -> Tensor:
        chunks = latents.chunk(self.places, 1)
        return torch.stack([group.choose_float(chunk) for group, chunk in zip(self.parts, chunks, strict=True)], 1)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        places = codes.unbind(1)
        return torch.cat([group.codes_to_latents(one) for group, one in zip(self.parts, places, strict=True)], 1)

    def code_vectors(self, place: int = 0) -> Tensor:
        return self.part(place).code_vectors()

    def lookups(self, latents: Tensor) -> Iterator[Lookup]:
        for place, chunk in enumerate(latents.chunk(self.places, 1)):
            yield from (one._replace(places=(place,)) for one in self.part(place).lookups(chunk))
