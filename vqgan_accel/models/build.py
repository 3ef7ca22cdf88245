"""The networks of a config, and whether saved ones mean the same in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vqgan_accel.config import Config
from vqgan_accel.sections import layout_of

if TYPE_CHECKING:
    from vqgan_accel.models.discriminators.base import Discriminator
    from vqgan_accel.models.tokenizer import ImageTokenizer


def build_tokenizer(config: Config) -> ImageTokenizer:
    from vqgan_accel.models.tokenizer import ImageTokenizer  # with diffusers, seconds: `describe` does without

    return ImageTokenizer(
        config.autoencoder.model_dump(mode="json"), config.quantizer.model_dump(mode="json"), config.data.image_size
    )


def build_discriminator(config: Config) -> Discriminator | None:
    return config.discriminator.build(config.data.image_size) if config.discriminator else None


def layout_differences(config: Config, saved: ImageTokenizer) -> list[str]:
    """The keys that keep a saved tokenizer's weights from meaning the same in this config, with its own values. (Costs
    and schedules may differ.)"""
    sections = (
        ("autoencoder", layout_of(config.autoencoder), layout_of(saved.settings.autoencoder_config)),
        ("quantizer", layout_of(config.quantizer), layout_of(saved.settings.quantizer_config)),
    )
    return [
        f"{section}.{name} ({value})"
        for section, ours, theirs in sections
        for name, value in sorted(theirs.items(), key=lambda item: item[0] != "type")
        if name not in ours or ours[name] != value
    ]
