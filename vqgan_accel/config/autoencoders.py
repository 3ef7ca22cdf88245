"""The sections of encoder and decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from vqgan_accel.sections import ByType, Section

if TYPE_CHECKING:
    from vqgan_accel.models.autoencoder import Decoder, Encoder
    from vqgan_accel.models.taming import TamingDecoder, TamingEncoder

GROUP_NORM_GROUPS = 32


class ConvolutionalConfig(Section):
    """What both autoencoders share: levels of blocks, each but perhaps the last with half the side of the one before.

    `autoencoder.type` is `maskgit` where it is not given.
    """

    channels: int = Field(
        128,
        gt=0,
        description="width of the first level; times each multiplier, a multiple of 32 (GroupNorm)",
    )
    channel_multipliers: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = Field(
        (1, 2, 2, 4),
        description="one per level",
    )

    @model_validator(mode="after")
    def _check_widths(self) -> ConvolutionalConfig:
        for multiplier in self.channel_multipliers:
            if multiplier < 1 or self.channels * multiplier % GROUP_NORM_GROUPS:
                raise ValueError(
                    f"channels {self.channels} x multiplier {multiplier} = {self.channels * multiplier} "
                    "cannot be split "
                    f"into GroupNorm's {GROUP_NORM_GROUPS} groups; make every product a positive multiple of "
                    f"{GROUP_NORM_GROUPS}"
                )
        return self


class MaskGITConfig(ConvolutionalConfig):
    """The defaults are the original trainer's last revision (`head`) but for norm_variance, where that used `unbiased`.

    Its tables (`old`): upsample_conv false, norm_eps 1e-5, output_activation none, pixel_statistics imagenet.
    """

    type: Literal["maskgit"] = Field("maskgit", description="the networks of MaskGIT's tokenizer")
    num_res_blocks: int = Field(2, ge=1, description="per level, and at the bottom")
    upsample_conv: bool = Field(True, description="a 3x3 convolution after each nearest-neighbour upsampling")
    norm_eps: float = Field(1e-6, gt=0, description="GroupNorm's epsilon")
    norm_variance: Literal["biased", "unbiased"] = Field(
        "biased",
        description="of GroupNorm: over n (torch's), or over n - 1",
    )
    output_activation: Literal["tanh", "none"] = Field("tanh", description="after the decoder's last convolution")
    pixel_statistics: Literal["half", "imagenet"] = Field(
        "half",
        description="what the networks see inside: [-1, 1], or (x - mean) / std",
    )

    @property
    def stride(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** len(self.channel_multipliers)

    def build(self, latent_channels: int, embedding_dim: int) -> tuple[Encoder, Decoder]:
        from vqgan_accel.models.autoencoder import Decoder, Encoder

        return Encoder(self, latent_channels), Decoder(self, embedding_dim)


class TamingConfig(ConvolutionalConfig):
    """The VQGAN of taming-transformers (Esser et al. 2021), which diffusers has as `VQModel`."""

    pixel_statistics: ClassVar[Literal["half"]] = "half"
    type: Literal["taming"] = Field("taming", description="the networks of diffusers' VQModel")
    num_res_blocks: int = Field(2, ge=1, description="per level of the encoder; the decoder has one more")
    attention_levels: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        (-1,),
        description="levels with attention after every block, beside the bottom, which always has it; 0 is the full "
        "resolution, -1 the coarsest level",
    )
    latent_channels: int = Field(
        256,
        gt=0,
        description="width between these networks and the quantizer's 1x1 convolutions",
    )

    @model_validator(mode="after")
    def _check_levels(self) -> TamingConfig:
        number = len(self.channel_multipliers)
        if bad := [level for level in self.attention_levels if not -number <= level < number]:
            raise ValueError(f"attention_levels has {bad[0]}, and the {number} levels are 0 to {number - 1}")
        counted = tuple(sorted({level % number for level in self.attention_levels}))
        object.__setattr__(self, "attention_levels", counted)  # one form of each layout, so that equal ones are equal
        return self

    @property
    def stride(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def build(self, latent_channels: int, embedding_dim: int) -> tuple[TamingEncoder, TamingDecoder]:
        from vqgan_accel.models.taming import TamingDecoder, TamingEncoder

        return TamingEncoder(self, latent_channels), TamingDecoder(self, embedding_dim)


AutoencoderConfig = MaskGITConfig | TamingConfig
AutoencoderField = Annotated[AutoencoderConfig, ByType(default="maskgit")]
