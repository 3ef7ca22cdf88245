"""What a config amounts to: parameters, latent grid, bits per pixel, GFLOP per image. Networks are built on the meta
device, so describing a large recipe takes no memory.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vqgan_accel.config import AutoencoderConfig, Config, DiscriminatorConfig, LossConfig, QuantizerConfig

# FLOP that the perceptual networks take to compare two images, for each pixel of one of them, at 256 px. (Building them
# would take longer than all else here. LPIPS of AlexNet and SqueezeNet, which pad less, takes up to a tenth less from
# 128 px on; the other two scale with the pixels.)
PERCEPTUAL_FLOP = {"lpips_vgg": 1_223_668, "lpips_alex": 53_029, "lpips_squeeze": 21_240, "mobilenet_v2": 22_275.5}


def trainable_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def latent_summary(config: Config) -> dict[str, Any]:
    side = config.data.image_size // config.autoencoder.stride
    sizes = config.quantizer.codebook_sizes
    bits = side * side * sum(math.log2(size) for size in sizes)
    return {
        "latent_grid": [side, side],
        "num_codes": config.quantizer.num_codes,
        "codes_per_position": len(sizes),
        "embedding_dim": config.quantizer.embedding_dim,
        "bits_per_pixel": bits / config.data.image_size**2,
    }


def describe(config: Config) -> dict[str, Any]:
    """Parameters are those that a gradient trains; GFLOP count a multiply-add as two, forward only, per image.

    The perceptual network's figure is of one comparison: two images through it.
    """
    image_size = config.data.image_size
    counted = count_networks(config.autoencoder, config.quantizer, config.discriminator, image_size)
    perceptual = perceptual_flop(config.losses, image_size)
    return {
        "image_size": image_size,
        **latent_summary(config),
        "quantizer": config.quantizer.type,
        "parameters": {
            "tokenizer": counted.tokenizer_parameters,
            "discriminator": counted.discriminator_parameters,
            "total_trainable": counted.tokenizer_parameters + counted.discriminator_parameters,
        },
        "gflop_per_image": {
            "encoder": counted.encoder_flop / 1e9,
            "decoder": counted.decoder_flop / 1e9,
            "discriminator": counted.discriminator_flop / 1e9,
            "perceptual": perceptual / 1e9,
        },
    }


class Counted(NamedTuple):
    tokenizer_parameters: int
    discriminator_parameters: int
    encoder_flop: int  # of one image, forward
    decoder_flop: int
    discriminator_flop: int


@functools.cache  # a training asks at its start and for its report
def count_networks(
    autoencoder: AutoencoderConfig,
    codes: QuantizerConfig,
    adversary: DiscriminatorConfig | None,
    image_size: int,
) -> Counted:
    with torch.device("meta"):
        quantizer, discriminator = codes.build(), adversary.build(image_size) if adversary else None
        encoder, decoder = autoencoder.build(quantizer.input_channels, codes.embedding_dim)
        image = torch.empty(1, 3, image_size, image_size)
        side = image_size // autoencoder.stride
        tokens = torch.empty(1, codes.embedding_dim, side, side)
    return Counted(
        trainable_parameters(encoder, quantizer, decoder),
        trainable_parameters(discriminator) if discriminator else 0,
        count_flop(encoder, image),
        count_flop(decoder, tokens),
        count_flop(discriminator, image) if discriminator else 0,
    )


def step_gflop(gflop: dict[str, float], adversarial: bool) -> float:
    """GFLOP an image of a training step's forward and backward passes, from `describe`'s `gflop_per_image`; R1, the
    optimizers and all that is small are left out. benchmarks/step_flops.py counts each of them.

    The tokenizer: forward, back to its inputs, back to its weights. The perceptual network: two images forward, back to
    one of them. The discriminator: two images forward, back to all weights, and once more to the reconstruction.
    """
    plain = 3 * (gflop["encoder"] + gflop["decoder"]) + 1.5 * gflop["perceptual"]
    return plain + (7 * gflop["discriminator"] if adversarial else 0.0)


def perceptual_flop(config: LossConfig, image_size: int) -> float:
    return PERCEPTUAL_FLOP[config.perceptual_network] * image_size**2 if config.perceptual_weight else 0.0


def count_flop(module: nn.Module, images: Tensor) -> int:
    """Of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    return counter.get_total_flops()


def description_lines(summary: dict[str, Any]) -> list[str]:
    """`describe`'s result as text."""
    parameters, gflop = summary["parameters"], summary["gflop_per_image"]
    height, width = summary["latent_grid"]
    several = summary["codes_per_position"]
    each = f" x {several}" if several > 1 else ""
    return [
        f"image              {summary['image_size']} x {summary['image_size']} px",
        f"latent grid        {height} x {width}{each} = {height * width * several} codes of {summary['num_codes']} "
        f"({summary['quantizer']} quantizer, dimension {summary['embedding_dim']})",
        f"compression        {summary['bits_per_pixel']:.4f} bits per pixel",
        f"parameters         {parameters['tokenizer']:,} tokenizer + {parameters['discriminator']:,} discriminator "
        f"= {parameters['total_trainable']:,} trainable",
        "GFLOP per image    " + ", ".join(f"{value:.1f} {name}" for name, value in gflop.items() if value),
    ]
