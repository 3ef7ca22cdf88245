"""Networks from a config. (The quantizers' builder is beside them.)"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vqgan_accel.config import AutoencoderConfig, Config, TamingConfig
from vqgan_accel.models.autoencoder import Decoder, Encoder
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator

if TYPE_CHECKING:
    from vqgan_accel.models.taming import TamingDecoder, TamingEncoder
    from vqgan_accel.models.tokenizer import ImageTokenizer

# An EMA codebook is its sums over its counts, smoothed by epsilon: with another epsilon, codes are others.
QUANTIZER_LAYOUT = ("type", "num_codes", "embedding_dim", "l2_normalize", "epsilon", "hidden_channels")


def build_autoencoder(
    config: AutoencoderConfig, latent_channels: int, embedding_dim: int
) -> tuple[Encoder | TamingEncoder, Decoder | TamingDecoder]:
    """An encoder of images to (B, latent_channels, h, w), and a decoder of (B, embedding_dim, h, w) to images."""
    if isinstance(config, TamingConfig):
        from vqgan_accel.models.taming import TamingDecoder, TamingEncoder  # diffusers' networks: seconds to import

        return TamingEncoder(config, latent_channels), TamingDecoder(config, embedding_dim)
    return Encoder(config, latent_channels), Decoder(config, embedding_dim)


def build_tokenizer(config: Config) -> ImageTokenizer:
    from vqgan_accel.models.tokenizer import ImageTokenizer

    return ImageTokenizer(
        config.autoencoder.model_dump(mode="json"), config.quantizer.model_dump(mode="json"), config.data.image_size
    )


def build_discriminator(config: Config) -> StyleGAN2Discriminator | None:
    d = config.discriminator
    if d is None:
        return None
    return StyleGAN2Discriminator(config.data.image_size, d.channel_base, d.channel_max, d.minibatch_stddev_group)


def layout_differences(config: Config, saved: ImageTokenizer) -> list[str]:
    """The keys that keep a saved tokenizer's weights from meaning the same in this config, with its own values. (Costs
    and schedules may differ.)"""
    layout, codes = saved.settings.autoencoder_config, saved.settings.quantizer_config
    sections = (
        ("autoencoder", config.autoencoder, layout, type(layout).model_fields),
        ("quantizer", config.quantizer, codes, QUANTIZER_LAYOUT),
    )
    return [
        f"{section}.{name} ({getattr(theirs, name)})"
        for section, ours, theirs, names in sections
        for name in names
        if hasattr(theirs, name) and getattr(ours, name, None) != getattr(theirs, name)
    ]
