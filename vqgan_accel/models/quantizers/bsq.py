"""Binary spherical quantization (Zhao et al. 2024, arXiv 2406.07548): a code is the signs of a unit vector's numbers,
and its vector those signs, as a unit vector. The distance between the two is bounded, so nothing has to be committed.
"""

from __future__ import annotations

from torch import Tensor, nn

from vqgan_accel.models.quantizers.lfq import BinaryQuantizer


class BSQQuantizer(BinaryQuantizer):
    """u = z / |z|, q = sign(u) / sqrt(bits). loss: the entropy loss; the entropy of the mean is the sum over groups of
    bits, each bit by itself in the paper (eq. 12)."""

    def __init__(self, bits: int, ratio: float, gamma: float, temperature: float, group: int) -> None:
        super().__init__(bits, bits**-0.5, 0.0, ratio, gamma, temperature, group)

    def comparable(self, latents: Tensor) -> Tensor:
        return nn.functional.normalize(latents, dim=1)
