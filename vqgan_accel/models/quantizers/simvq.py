"""SimVQ (Zhu et al. 2024, arXiv 2411.02038): the codes are a learnt linear map of random vectors, which are frozen.

Whatever code is chosen, the map learns, and all codes move with it: none is left behind. C comes from N(0, 1/D), and
the map has a bias and torch's own first values, as in the authors' code. There nothing has weight decay; here the map's
weight has as much as any linear layer's.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.models.quantizers.base import CodebookQuantizer, Found, Gradient, Lookup, initial_codebook
from vqgan_accel.models.quantizers.nearest import nearest_with_losses


class SimVQQuantizer(CodebookQuantizer):
    """loss = |sg[z] - e|^2 + beta |z - sg[e]|^2 with e = W c + b, means over all elements; C is frozen."""

    frozen: Tensor  # (K, D) C

    def __init__(
        self,
        num_codes: int,
        embedding_dim: int,
        commitment_cost: float,
        l2_normalize: bool = False,
        gradient: Gradient = "straight_through",
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.input_channels = embedding_dim
        self.commitment_cost = commitment_cost
        self.l2_normalize = l2_normalize
        self.gradient = gradient
        self.register_buffer("frozen", initial_codebook(num_codes, embedding_dim, "normal") * embedding_dim**-0.5)
        self.projection = nn.Linear(embedding_dim, embedding_dim)

    def stored_vectors(self) -> Tensor:
        # In float64: else the last bits of a product of matrices depend on where in memory they lie, and a loaded
        # tokenizer's codes were not those of the saved one.
        weight, bias = self.projection.weight.double(), self.projection.bias.double()
        return F.linear(self.frozen.double(), weight, bias).float()

    def look_up(self, latents: Tensor) -> Found:
        return nearest_with_losses(latents, self.codebook_vectors(), self.commitment_cost)

    def lookups(self, latents: Tensor) -> Iterator[Lookup]:
        return iter(())  # a code moves with all others, and cannot be given a vector of its own
