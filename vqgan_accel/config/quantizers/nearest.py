"""The sections of quantizers with a codebook that latents are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from vqgan_accel.sections import Duration, DurationField, Learning, QuantizerSection, Reinit

if TYPE_CHECKING:
    from vqgan_accel.models.quantizers.base import Quantizer


class CodebookConfig(QuantizerSection):
    num_codes: int = Field(1024, ge=2, description="K, the size of the codebook")
    embedding_dim: int = Field(256, ge=1, description="D, the numbers in a code's vector")


class NearestCodeConfig(CodebookConfig):
    """What the quantizers that pick the nearest code share."""

    commitment_cost: Learning[float] = Field(0.25, ge=0, description="beta (van den Oord et al. 2017, eq. 3)")
    l2_normalize: bool = Field(
        False,
        description="latents and codes are compared, and decoded, as unit vectors (Yu et al. 2021, ViT-VQGAN)",
    )
    gradient: Learning[Literal["straight_through", "rotation"]] = Field(
        "straight_through",
        description="how the decoder's gradient reaches the latents: as it is (van den Oord et al. 2017), or turned "
        "and scaled as code and latent lie to each other (Fifty et al. 2024)",
    )


class ReplaceableCodesConfig(CodebookConfig):
    """What those share whose codes are vectors of their own, which can be given new values."""

    init: Learning[Literal["uniform", "sphere", "normal", "kmeans"]] = Field(
        "uniform",
        description="of the codebook. uniform: U(-1/K, 1/K); sphere: random unit vectors; normal: N(0, 1); kmeans: "
        "centres of the first step's latents",
    )
    reinit_every: Learning[DurationField | None] = Field(
        None,
        description="between two replacements of codes that are hardly used. In steps or parts of an epoch, uses are "
        "counted from one to the next; in whole epochs, over the last of them; null: never",
    )
    reinit_below: Learning[float] = Field(
        0.0,
        ge=0,
        lt=1,
        description="a code is replaced where it is used less than this times as often as the mean code; 0: where it "
        "is not used at all",
    )
    reinit_from: Learning[Literal["latents", "used_codes"]] = Field(
        "latents",
        description="what they become. latents: encoder outputs; used_codes: perturbed copies of the codes in use",
    )

    @model_validator(mode="before")
    @classmethod
    def _former_key(cls, values: Any) -> Any:
        """Runs of before have `reinit_every_epochs: 3`."""
        if not isinstance(values, dict) or "reinit_every_epochs" not in values:
            return values
        if "reinit_every" in values:
            raise ValueError("reinit_every_epochs is the former name of reinit_every: give one of them")
        epochs = values["reinit_every_epochs"]
        kept = {key: value for key, value in values.items() if key != "reinit_every_epochs"}
        return kept | {"reinit_every": f"{epochs} epochs" if type(epochs) is int else epochs}

    @field_validator("reinit_every")
    @classmethod
    def _some_time(cls, every: Duration | None) -> Duration | None:
        if every is not None and every.value == 0:
            raise ValueError("codes cannot be replaced every 0 steps; null means never")
        return every

    @property
    def reinit(self) -> Reinit | None:
        if self.reinit_every is None:
            return None
        return Reinit(self.reinit_every, self.reinit_below, self.reinit_from)

    @property
    def starts_from_latents(self) -> bool:
        return self.init == "kmeans"

    def require_latents(self, number: int) -> None:
        if self.init == "kmeans" and number < self.num_codes:
            raise ValueError(
                f"init kmeans finds {self.num_codes} centres in the latents of the first step, which are {number}; "
                "make training.total_batch_size larger or num_codes smaller"
            )


class KeptCodebookConfig(ReplaceableCodesConfig, NearestCodeConfig):
    """The nearest of codes that are vectors of their own."""


class StandardQuantizerConfig(KeptCodebookConfig):
    """The nearest code; the codebook learns by gradient (van den Oord et al. 2017)."""

    type: Literal["standard"] = Field(description="nearest code, codebook by gradient")

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.nearest import StandardQuantizer

        return StandardQuantizer(
            self.num_codes, self.embedding_dim, self.commitment_cost, self.l2_normalize, self.gradient, self.init
        )


class EMAQuantizerConfig(KeptCodebookConfig):
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
            self.num_codes,
            self.embedding_dim,
            self.commitment_cost,
            self.decay,
            self.epsilon,
            self.l2_normalize,
            self.gradient,
            self.init,
        )


class EntropyQuantizerConfig(KeptCodebookConfig):
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
            self.gradient,
            self.init,
        )


class SimVQQuantizerConfig(NearestCodeConfig):
    """The nearest code; all codes are one learnt linear map of frozen random vectors (Zhu et al. 2024)."""

    type: Literal["simvq"] = Field(description="nearest code, codebook as a learnt map of frozen vectors")

    def build(self) -> Quantizer:
        from vqgan_accel.models.quantizers.simvq import SimVQQuantizer

        return SimVQQuantizer(
            self.num_codes, self.embedding_dim, self.commitment_cost, self.l2_normalize, self.gradient
        )
