"""The sections of quantizers whose codes follow from a latent's numbers, one by one: they have no codebook."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from vqgan_accel.sections import Learning, QuantizerSection

if TYPE_CHECKING:
    from vqgan_accel.models.quantizers.base import Quantizer

MOST_CODES = 2**20  # of each of which the uses are counted


class FSQQuantizerConfig(QuantizerSection):
    """Each number of a latent is bounded and rounded to one of a few levels (Mentzer et al. 2023)."""

    type: Literal["fsq"] = Field(description="each number rounded to one of a few levels")
    levels: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = Field(
        (8, 5, 5, 5),
        description="of each number of a latent, from 3 on; their product is the number of codes (Mentzer et al. 2023, "
        "table 1)",
    )
    bound: Literal["tanh", "sigmoid"] = Field(
        "tanh",
        description="before rounding. tanh: tanh(z) (Mentzer et al. 2023); sigmoid: 2 sigmoid(1.6 z) - 1, under which "
        "normal numbers use all levels alike (iFSQ, arXiv 2601.17124)",
    )

    @model_validator(mode="after")
    def _few_codes(self) -> FSQQuantizerConfig:
        if min(self.levels) < 3:
            raise ValueError(
                f"levels has {min(self.levels)}: with 0 as a level there are at least 3; type lfq or bsq has signs"
            )
        require_few("levels", self.num_codes)
        return self

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)

    @property
    def embedding_dim(self) -> int:
        return len(self.levels)

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.fsq import FSQQuantizer

        return FSQQuantizer(self.levels, self.bound)


class BinaryConfig(QuantizerSection):
    """What those share whose codes are the signs of a latent's numbers."""

    bits: int = Field(10, ge=1, description="numbers of a latent; 2^bits codes")
    entropy_ratio: Learning[float] = Field(0.1, ge=0, description="weight of the entropy loss")
    entropy_gamma: Learning[float] = Field(
        1.0, ge=0, description="weight in it of the entropy of the mean, which is to be high"
    )

    @model_validator(mode="after")
    def _few_codes(self) -> BinaryConfig:
        require_few("bits", self.num_codes)
        return self

    @property
    def num_codes(self) -> int:
        return 2**self.bits

    @property
    def embedding_dim(self) -> int:
        return self.bits


class LFQQuantizerConfig(BinaryConfig):
    """The signs of a latent's numbers, which an entropy loss spreads over all codes (Yu et al. 2023, MAGVIT-v2)."""

    type: Literal["lfq"] = Field(description="the signs of a latent's numbers, with an entropy loss")
    commitment_cost: Learning[float] = Field(0.25, ge=0, description="of |z - sg[sign z]|^2 (Yu et al. 2023)")
    entropy_temperature: Learning[float] = Field(
        0.01, gt=0, description="of softmax(-|z - code|^2 / temperature); 1 / 100 in public code"
    )
    entropy_group: Learning[int] = Field(
        9,
        ge=1,
        le=20,
        description="bits whose joint distribution has its entropy in the loss; of more bits the groups' are added up",
    )

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.lfq import LFQQuantizer

        return LFQQuantizer(
            self.bits,
            self.commitment_cost,
            self.entropy_ratio,
            self.entropy_gamma,
            self.entropy_temperature,
            self.entropy_group,
        )


class BSQQuantizerConfig(BinaryConfig):
    """The signs of a unit vector's numbers, as a unit vector (Zhao et al. 2024)."""

    type: Literal["bsq"] = Field(description="the signs of a unit vector's numbers, with an entropy loss")
    entropy_temperature: Learning[float] = Field(
        1.0, gt=0, description="of softmax(-|u - code|^2 / temperature): 2 / tau of Zhao et al. 2024, eq. 8"
    )
    entropy_group: Learning[int] = Field(
        1, ge=1, le=20, description="as lfq's: 1 is the paper's approximation, 9 what the authors' code has"
    )

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.bsq import BSQQuantizer

        return BSQQuantizer(
            self.bits, self.entropy_ratio, self.entropy_gamma, self.entropy_temperature, self.entropy_group
        )


def require_few(key: str, number: int) -> None:
    if number > MOST_CODES:
        raise ValueError(
            f"{key} makes {number:,} codes, more than the {MOST_CODES:,} whose uses are counted; give a position "
            "several codes, with quantizer.type=product and this one as quantizer.inner"
        )
