"""The sections of quantizers that give a position several codes, each by a quantizer of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from vqgan_accel.config.quantizers.ibq import IBQQuantizerConfig
from vqgan_accel.config.quantizers.lookup_free import BSQQuantizerConfig, FSQQuantizerConfig, LFQQuantizerConfig
from vqgan_accel.config.quantizers.nearest import (
    EMAQuantizerConfig,
    EntropyQuantizerConfig,
    SimVQQuantizerConfig,
    StandardQuantizerConfig,
)
from vqgan_accel.sections import ByType, Learning, QuantizerSection, Reinit

if TYPE_CHECKING:
    from vqgan_accel.models.quantizers.base import Quantizer

ResidualInner = (
    StandardQuantizerConfig | EMAQuantizerConfig | EntropyQuantizerConfig | SimVQQuantizerConfig | FSQQuantizerConfig
)
ProductInner = ResidualInner | IBQQuantizerConfig | LFQQuantizerConfig | BSQQuantizerConfig
EMA = EMAQuantizerConfig(type="ema")


class SeveralConfig(QuantizerSection):
    """What they share: `inner` is the section of the quantizers that they are made of."""

    inner: QuantizerSection

    @property
    def num_codes(self) -> int:
        return self.inner.num_codes

    @property
    def reinit(self) -> Reinit | None:
        return self.inner.reinit

    @property
    def starts_from_latents(self) -> bool:
        return self.inner.starts_from_latents

    def require_latents(self, number: int) -> None:
        self.inner.require_latents(number)


class ResidualQuantizerConfig(SeveralConfig):
    """Each code is of what those before it have left (Lee et al. 2022, RQ-VAE)."""

    type: Literal["residual"] = Field(description="several codes a position, each of what those before it have left")
    inner: Annotated[ResidualInner, ByType("ema")] = Field(EMA, description="the quantizer of each level")
    depth: int = Field(4, ge=2, le=64, description="levels: codes of a position")
    shared: bool = Field(False, description="one codebook for all levels (Lee et al. 2022, section 3.1)")
    dropout: Learning[float] = Field(
        0.0,
        ge=0,
        le=1,
        description="the share of training images that are decoded from fewer levels, any number being as likely "
        "(Zeghidour et al. 2021, SoundStream, section III.C); all levels learn from all images",
    )

    @model_validator(mode="after")
    def _lengths_matter(self) -> ResidualQuantizerConfig:
        if getattr(self.inner, "l2_normalize", False):
            raise ValueError(
                "inner.l2_normalize makes all of a level's vectors equally long, and what is left gets shorter from "
                "level to level; leave it out, or take type product"
            )
        return self

    @property
    def embedding_dim(self) -> int:
        return self.inner.embedding_dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.num_codes,) * self.depth

    @property
    def draws_noise(self) -> bool:
        return self.dropout > 0

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.residual import ResidualQuantizer

        layers: list[Any] = [self.inner.build() for _ in range(1 if self.shared else self.depth)]
        return ResidualQuantizer(layers, self.depth, self.dropout)


class ProductQuantizerConfig(SeveralConfig):
    """The channels in groups, each with a code of its own (Jegou et al. 2011; GSQ, Wang et al. 2024)."""

    type: Literal["product"] = Field(description="the channels in groups, each with a code of its own")
    inner: Annotated[ProductInner, ByType("ema")] = Field(
        EMA, description="the quantizer of each group, with its channels"
    )
    groups: int = Field(4, ge=2, le=64, description="codes of a position")

    @property
    def embedding_dim(self) -> int:
        return self.groups * self.inner.embedding_dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.num_codes,) * self.groups

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.product import ProductQuantizer

        return ProductQuantizer([self.inner.build() for _ in range(self.groups)])
