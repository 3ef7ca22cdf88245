"""The quantizers' sections.

A new one may lie beside its module, in one file. These do not, so that a misspelt key is told before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from vqgan_accel.schedules import cosine
from vqgan_accel.sections import ByType, Duration, DurationField, Learning, QuantizerSection, Reinit

if TYPE_CHECKING:
    from vqgan_accel.models.quantizers.base import Quantizer


MOST_LOGIT_WEIGHTS = 2**31  # 8 GiB, and three times as much for gradients and moments


class CodebookConfig(QuantizerSection):
    num_codes: int = Field(1024, ge=2, description="K, the size of the codebook")
    embedding_dim: int = Field(256, ge=1, description="D, the numbers in a code's vector")


class NearestCodeConfig(CodebookConfig):
    """What the three quantizers that pick the nearest code share."""

    commitment_cost: Learning[float] = Field(0.25, ge=0, description="beta (van den Oord et al. 2017, eq. 3)")
    l2_normalize: bool = Field(
        False,
        description="latents and codes are compared, and decoded, as unit vectors (Yu et al. 2021, ViT-VQGAN)",
    )
    reinit_every_epochs: Learning[int | None] = Field(
        None,
        ge=1,
        description="epochs between two replacements of the codes that no image of the epoch before it used; null: "
        "never",
    )
    reinit_from: Learning[Literal["latents", "used_codes"]] = Field(
        "latents",
        description="what they become. latents: encoder outputs; used_codes: perturbed copies of the codes in use",
    )

    @property
    def reinit(self) -> Reinit | None:
        return Reinit(self.reinit_every_epochs, self.reinit_from) if self.reinit_every_epochs is not None else None


class StandardQuantizerConfig(NearestCodeConfig):
    """The nearest code; the codebook learns by gradient (van den Oord et al. 2017)."""

    type: Literal["standard"] = Field(description="nearest code, codebook by gradient")

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.nearest import StandardQuantizer

        return StandardQuantizer(self.num_codes, self.embedding_dim, self.commitment_cost, self.l2_normalize)


class EMAQuantizerConfig(NearestCodeConfig):
    """The nearest code; the codebook is a moving average of the latents that chose it."""

    type: Literal["ema"] = Field(description="nearest code, codebook as a moving average")
    decay: Learning[float] = Field(
        0.99, ge=0, lt=1, description="per optimizer step (van den Oord et al. 2017, appendix A.1)"
    )
    # (Not Learning: a code is its sum over its smoothed count, so with another epsilon it is another vector.)
    epsilon: float = Field(1e-5, gt=0, description="Laplace smoothing of the counts")

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.ema import EMAQuantizer

        return EMAQuantizer(
            self.num_codes, self.embedding_dim, self.commitment_cost, self.decay, self.epsilon, self.l2_normalize
        )


class EntropyQuantizerConfig(NearestCodeConfig):
    """The standard quantizer and a loss that wants each token decided and all codes used."""

    type: Literal["entropy"] = Field(description="the standard one, with an entropy loss")
    entropy_ratio: Learning[float] = Field(0.1, ge=0, description="weight of the entropy loss (MaskGIT's tokenizer)")
    entropy_temperature: Learning[float] = Field(0.01, gt=0, description="of softmax(-distance / temperature)")
    entropy_target: Learning[Literal["softmax", "argmax"]] = Field(
        "softmax",
        description="the distribution whose entropy it is: soft, or one-hot in the forward pass and soft in the "
        "backward pass",
    )

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.entropy import EntropyQuantizer

        return EntropyQuantizer(
            self.num_codes,
            self.embedding_dim,
            self.commitment_cost,
            self.entropy_ratio,
            self.entropy_temperature,
            self.entropy_target,
            self.l2_normalize,
        )


class GumbelQuantizerConfig(CodebookConfig):
    """Logits of the codes, sampled with Gumbel noise in training (Jang et al. 2017; Ramesh et al. 2021)."""

    draws_noise: ClassVar[bool] = True
    type: Literal["gumbel"] = Field(description="Gumbel-softmax")
    hidden_channels: int | None = Field(
        None,
        ge=1,
        description="what the encoder emits, before a 1x1 convolution to one logit per code; null: num_codes, as the "
        "original trainer has it, for up to 46,340 codes",
    )
    straight_through: Learning[bool] = Field(False, description="hard one-hot forward, soft gradient")
    temperature_start: Learning[float] = Field(
        1.0, gt=0, description="tau (Jang et al. 2017), cosine from start to end"
    )
    temperature_end: Learning[float] = Field(0.0625, gt=0, description="tau after temperature_decay")
    temperature_decay: Learning[DurationField] = Field(Duration(7.5, "epochs"), description="the way from start to end")
    kl_cost: Learning[float] = Field(
        0.00859375,
        ge=0,
        description="weight of the KL loss; 6.6 / 768 (Ramesh et al. 2021, A.2: per pixel value, 256 px at f = 16)",
    )
    kl_warmup: Learning[DurationField] = Field(Duration(0.24, "epochs"), description="cosine from 0 to kl_cost")

    @model_validator(mode="after")
    def _one_form(self) -> GumbelQuantizerConfig:
        if self.hidden_channels == self.num_codes:  # equal layouts are to be equal
            object.__setattr__(self, "hidden_channels", None)
        if self.hidden_channels is None and self.num_codes**2 > MOST_LOGIT_WEIGHTS:
            raise ValueError(
                f"hidden_channels null makes the logits of {self.num_codes} codes by num_codes x num_codes = "
                f"{self.num_codes**2:,} weights, more than a GPU holds; set quantizer.hidden_channels, to 256 say"
            )
        return self

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.gumbel import GumbelQuantizer

        return GumbelQuantizer(self.num_codes, self.embedding_dim, self.straight_through, self.hidden_channels)

    def at_step(self, step: int, steps_per_epoch: int | None) -> dict[str, float]:
        decay, warmup = (length.steps(steps_per_epoch) for length in (self.temperature_decay, self.kl_warmup))
        return {
            "temperature": cosine(step, self.temperature_start, self.temperature_end, decay),
            "kl_cost": cosine(step, 0.0, self.kl_cost, warmup),
        }


QuantizerConfig = StandardQuantizerConfig | EMAQuantizerConfig | EntropyQuantizerConfig | GumbelQuantizerConfig
QuantizerField = Annotated[QuantizerConfig, ByType()]
