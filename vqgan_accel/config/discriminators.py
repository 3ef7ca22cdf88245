"""The discriminators' sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from vqgan_accel.sections import ByType, DiscriminatorSection

if TYPE_CHECKING:
    from vqgan_accel.models.discriminators.base import Discriminator


class StyleGAN2Config(DiscriminatorSection):
    type: Literal["stylegan2"] = Field("stylegan2", description="the residual one of Karras et al. 2020")
    channel_base: int = Field(32768, gt=0, description="channels at resolution r: min(channel_base / r, channel_max)")
    channel_max: int = Field(512, gt=0, description="see channel_base")
    minibatch_stddev_group: int = Field(4, ge=1, description="samples per group of the minibatch-stddev layer")

    def build(self, image_size: int) -> Discriminator:
        from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator

        return StyleGAN2Discriminator(image_size, self.channel_base, self.channel_max, self.minibatch_stddev_group)

    def require_image_size(self, image_size: int) -> None:
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(
                "the StyleGAN2 discriminator needs data.image_size to be a power of two of at least 8, not "
                f"{image_size}; change it or set discriminator=null"
            )

    @property
    def group(self) -> tuple[str, int]:
        return "minibatch_stddev_group", self.minibatch_stddev_group


DiscriminatorConfig = StyleGAN2Config
DiscriminatorField = Annotated[DiscriminatorConfig, ByType(default="stylegan2")]
