"""What a config amounts to: parameters, latent grid, bits per pixel, GFLOP per image. Networks are built on the meta
device, so describing a large recipe takes no memory.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vqgan_accel.config import Config
from vqgan_accel.losses.perceptual import LPIPSDistance, MobileNetDistance
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator
from vqgan_accel.models.tokenizer import ImageTokenizer

# An EMA codebook is its sums over its counts, smoothed by epsilon: with another epsilon, codes are others.
QUANTIZER_LAYOUT = ("type", "num_codes", "embedding_dim", "l2_normalize", "epsilon", "hidden_channels")


def build_tokenizer(config: Config) -> ImageTokenizer:
    return ImageTokenizer(
        config.autoencoder.model_dump(mode="json"), config.quantizer.model_dump(mode="json"), config.data.image_size
    )


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


def build_discriminator(config: Config) -> StyleGAN2Discriminator | None:
    d = config.discriminator
    if d is None:
        return None
    return StyleGAN2Discriminator(config.data.image_size, d.channel_base, d.channel_max, d.minibatch_stddev_group)


def trainable_parameters(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) if module is not None else 0


def latent_summary(config: Config) -> dict[str, Any]:
    side = config.data.image_size // config.autoencoder.stride
    bits = side * side * math.log2(config.quantizer.num_codes)
    return {
        "latent_grid": [side, side],
        "num_codes": config.quantizer.num_codes,
        "embedding_dim": config.quantizer.embedding_dim,
        "bits_per_pixel": bits / config.data.image_size**2,
    }


def describe(config: Config) -> dict[str, Any]:
    """Parameters are those that a gradient trains; GFLOP count a multiply-add as two, forward only, per image.

    The perceptual network's figure is of one comparison: two images through it.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # LPIPS reads its linear heads
        tokenizer, discriminator = build_tokenizer(config), build_discriminator(config)
        image = torch.empty(1, 3, config.data.image_size, config.data.image_size)
        tokens = torch.empty(1, config.quantizer.embedding_dim, *latent_summary(config)["latent_grid"])
        perceptual = perceptual_shell(config)
    parameters = {"tokenizer": trainable_parameters(tokenizer), "discriminator": trainable_parameters(discriminator)}
    gflop = {
        "encoder": _gflop(tokenizer.encoder, image),
        "decoder": _gflop(tokenizer.decoder, tokens),
        "discriminator": _gflop(discriminator, image) if discriminator else 0.0,
        "perceptual": _gflop(perceptual.to("meta"), image, image) if perceptual else 0.0,
    }
    return {
        "image_size": config.data.image_size,
        **latent_summary(config),
        "quantizer": config.quantizer.type,
        "parameters": parameters | {"total_trainable": sum(parameters.values())},
        "gflop_per_image": gflop,
    }


def perceptual_shell(config: Config) -> nn.Module | None:
    """The perceptual network without its weights."""
    if config.losses.perceptual_weight == 0:
        return None
    match config.losses.perceptual_network:
        case "mobilenet_v2":
            return MobileNetDistance()
        case "lpips_vgg":
            return LPIPSDistance("vgg")
        case "lpips_alex":
            return LPIPSDistance("alex")
        case "lpips_squeeze":
            return LPIPSDistance("squeeze")


def _gflop(module: nn.Module, *inputs: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() / 1e9


def description_lines(summary: dict[str, Any]) -> list[str]:
    """`describe`'s result as text."""
    parameters, gflop = summary["parameters"], summary["gflop_per_image"]
    height, width = summary["latent_grid"]
    return [
        f"image              {summary['image_size']} x {summary['image_size']} px",
        f"latent grid        {height} x {width} = {height * width} codes of {summary['num_codes']} "
        f"({summary['quantizer']} quantizer, dimension {summary['embedding_dim']})",
        f"compression        {summary['bits_per_pixel']:.4f} bits per pixel",
        f"parameters         {parameters['tokenizer']:,} tokenizer + {parameters['discriminator']:,} discriminator "
        f"= {parameters['total_trainable']:,} trainable",
        "GFLOP per image    " + ", ".join(f"{value:.1f} {name}" for name, value in gflop.items() if value),
    ]
