"""The encoder and decoder of taming-transformers' VQGAN (Esser et al. 2021, arXiv 2012.09841), which are diffusers'
own, cut where our loop needs them cut."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from vqgan_accel.config import GROUP_NORM_GROUPS, TamingConfig


def network_options(config: TamingConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What diffusers' Encoder and Decoder take; VQModel takes both."""
    number = len(config.channel_multipliers)
    with_attention = [level in [chosen % number for chosen in config.attention_levels] for level in range(number)]
    shared = {
        "block_out_channels": [config.channels * multiplier for multiplier in config.channel_multipliers],
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": GROUP_NORM_GROUPS,
    }
    down = ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in with_attention]
    up = ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in reversed(with_attention)]
    return shared | {"down_block_types": down}, shared | {"up_block_types": up}


class TamingEncoder(nn.Module):
    """images (B, 3, H, W) -> latents (B, out_channels, H / stride, W / stride)"""

    def __init__(self, config: TamingConfig, out_channels: int) -> None:
        super().__init__()
        options, _ = network_options(config)
        self.body = Encoder(out_channels=config.latent_channels, double_z=False, **options)
        self.quant_conv = nn.Conv2d(config.latent_channels, out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.body(images)).contiguous()  # attention leaves channels_last behind


class TamingDecoder(nn.Module):
    """latents (B, in_channels, h, w) -> pixels (B, 3, H, W) = `last_layer(features)`, and these features (B, channels,
    H, W): see models.autoencoder.Decoder."""

    def __init__(self, config: TamingConfig, in_channels: int) -> None:
        super().__init__()
        _, options = network_options(config)
        self.post_quant_conv = nn.Conv2d(in_channels, config.latent_channels, 1)
        body = Decoder(in_channels=config.latent_channels, **options)
        self.conv_out = body.conv_out
        body.conv_out = nn.Identity()  # type: ignore[assignment]
        self.body = body

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(self.post_quant_conv(latents))
        return self.last_layer(features), features

    def last_layer(self, features: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 3, H, W)"""
        return self.conv_out(features)
