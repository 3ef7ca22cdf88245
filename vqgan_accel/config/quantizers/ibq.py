"""The section of index backpropagation quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vqgan_accel.config.quantizers.nearest import ReplaceableCodesConfig
from vqgan_accel.sections import Learning

if TYPE_CHECKING:
    from vqgan_accel.models.quantizers.base import Quantizer


class IBQQuantizerConfig(ReplaceableCodesConfig):
    """The code of the largest product with the latent; every code learns in every step (Shi et al. 2024)."""

    type: Literal["ibq"] = Field(description="largest product, gradient through the softmax to all codes")
    init: Learning[Literal["uniform", "sphere", "normal", "kmeans"]] = Field(
        "normal",
        description="of the codebook. normal: N(0, 1), as the authors' code; uniform: U(-1/K, 1/K); sphere: random "
        "unit vectors; kmeans: centres of the first step's latents",
    )
    codebook_cost: Learning[float] = Field(
        0.25, ge=0, description="beta, of |sg[z] - e|^2; the other two terms weigh 1 (the authors' code)"
    )
    entropy_ratio: Learning[float] = Field(0.05, ge=0, description="weight of the entropy loss (Shi et al. 2024)")
    entropy_temperature: Learning[float] = Field(
        0.01, gt=0, description="of softmax(z C^T / temperature) in the entropy loss (the authors' code)"
    )

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.ibq import IBQQuantizer

        return IBQQuantizer(
            self.num_codes,
            self.embedding_dim,
            self.codebook_cost,
            self.entropy_ratio,
            self.entropy_temperature,
            self.init,
        )
