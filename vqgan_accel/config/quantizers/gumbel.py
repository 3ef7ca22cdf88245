"""The section of the Gumbel-softmax quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from vqgan_accel.config.quantizers.nearest import CodebookConfig
from vqgan_accel.schedules import cosine
from vqgan_accel.sections import Duration, DurationField, Learning

if TYPE_CHECKING:
    from vqgan_accel.models.quantizers.base import Quantizer

MOST_LOGIT_WEIGHTS = 2**31  # 8 GiB, and three times as much for gradients and moments


class GumbelQuantizerConfig(CodebookConfig):
    """Logits of the codes, sampled with Gumbel noise in training (Jang et al. 2017; Ramesh et al. 2021)."""

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

    @property
    def draws_noise(self) -> bool:
        return True

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
