"""Checkpoints and YAML files of the PyTorch-Lightning trainer that this project re-creates (SerezD,
vqvae-vqgan-pytorch-lightning), into a folder that evaluate.py and fine-tuning read like a checkpoint of ours.

Its two published revisions differ in the network: `old`, of its tables, and `head`, with a convolution after each
upsampling (see MaskGITConfig). The keys tell which one a checkpoint is of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgan_accel.config import Config, EMAQuantizerConfig, MaskGITConfig, parse_config
from vqgan_accel.interop.importing import Settings, numbers, read_state_dict, whole_numbers, write_import
from vqgan_accel.models.build import build_discriminator, build_tokenizer
from vqgan_accel.models.quantizers.ema import smoothed_counts
from vqgan_accel.models.weights import fit_state

CODEBOOK = "quantizer.codebook.weight"
DISCRIMINATOR_PREFIX = "criterion.discriminator."
OLD = {"upsample_conv": False, "norm_eps": 1e-5, "output_activation": "none", "pixel_statistics": "imagenet"}
HEAD = {"upsample_conv": True, "norm_eps": 1e-6, "output_activation": "tanh", "pixel_statistics": "half"}


def import_lightning(checkpoint: Path, yaml_file: Path, output: Path) -> list[str]:
    """Write output/config.yaml, output/tokenizer/ and, where the checkpoint has one, output/discriminator.safetensors.

    Returns lines that say what was found. FileNotFoundError or ValueError names the file or the key that is wrong;
    nothing of a checkpoint is executed, and the folder appears when it is complete.
    """
    settings = Settings(yaml_file)
    weights, found = read_state_dict(checkpoint, "encoder.norm.weight", CODEBOOK)
    config = converted_config(settings, weights, output)

    tokenizer = build_tokenizer(config)
    fit_state(tokenizer, tokenizer_weights(weights, config), "the YAML file", str(checkpoint))
    d_weights = {
        name.removeprefix(DISCRIMINATOR_PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(DISCRIMINATOR_PREFIX) and not name.endswith("resample_filter")  # a constant
    }
    discriminator = build_discriminator(config) if d_weights else None
    if d_weights:
        if discriminator is None:
            raise ValueError(
                f"{checkpoint} holds a discriminator, of which {yaml_file} says nothing (loss.adversarial_params)"
            )
        fit_state(discriminator, d_weights, "the YAML file", str(checkpoint))

    write_import(output, config, tokenizer, discriminator)
    assert isinstance(config.autoencoder, MaskGITConfig)
    revision = "head" if config.autoencoder.upsample_conv else "old"
    return [
        f"{output}: {config.quantizer.type} quantizer, {config.quantizer.num_codes} codes, revision {revision}, "
        + f"from epoch {found.get('epoch', 'unknown')}",
        "with its discriminator" if d_weights else "without a discriminator",
    ]


def tokenizer_weights(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The trainer's names and shapes to ours."""
    result = {
        name: tensor.flatten() if ".norm" in name else tensor  # norm weights are (1, C, 1, 1) at head
        for name, tensor in weights.items()
        if name.startswith(("encoder.", "decoder."))
    }
    codebook = weights[CODEBOOK]
    match config.quantizer.type:
        case "ema":
            # The codebook is what it quantizes with; ours is sums over smoothed counts, so the sums follow.
            assert isinstance(config.quantizer, EMAQuantizerConfig)
            counts = weights["quantizer.ema_count"]
            if not counts.any():  # where nothing has been counted, its counts are 0 and ours 1
                counts = torch.ones_like(counts)
            result["quantizer.counts"] = counts
            result["quantizer.sums"] = codebook * smoothed_counts(counts, config.quantizer.epsilon)[:, None]
        case "gumbel":
            result["quantizer.codebook"] = codebook
            number = len(codebook)  # before it had x_to_logits, its encoder emitted the logits themselves
            result["quantizer.x_to_logits.weight"] = weights.get(
                "quantizer.x_to_logits.weight", torch.eye(number).view(number, number, 1, 1)
            )
            result["quantizer.x_to_logits.bias"] = weights.get("quantizer.x_to_logits.bias", torch.zeros(number))
        case _:
            result["quantizer.codebook"] = codebook
    return result


def converted_config(settings: Settings, weights: dict[str, Tensor], output: Path) -> Config:
    """The trainer's YAML as a config of ours; what the networks look like inside follows from the weights."""
    take = settings.take
    upsample_conv = any(name.startswith("decoder.blocks.") and ".conv." in name for name in weights)
    unbiased = weights["encoder.norm.weight"].ndim == 4  # that revision's own GroupNorm
    values: dict[str, Any] = {
        "output_dir": f"runs/{output.name}",
        "data": {"image_size": take("image_size", int), "crop_scale": None, "horizontal_flip": False},
        "autoencoder": {
            "channels": take("autoencoder.channels", int),
            "channel_multipliers": take("autoencoder.channel_multipliers", whole_numbers),
            "num_res_blocks": take("autoencoder.num_res_blocks", int),
            "norm_variance": "unbiased" if unbiased else "biased",
            **(HEAD if upsample_conv else OLD),
        },
        "quantizer": _quantizer(settings),
        "losses": {"l1_weight": 0.0, "l2_weight": 1.0, "perceptual_weight": 0.0},
        "training": {
            "max_epochs": take("training.max_epochs", float),
            "total_batch_size": take("training.cumulative_bs", int),
            "base_lr": take("training.base_lr", float),
            "betas": take("training.betas", numbers),
            "eps": take("training.eps", float),
            "weight_decay": take("training.weight_decay", float),
        },
    }
    for theirs, ours in (("warmup_epochs", "lr_warmup"), ("decay_epochs", "lr_decay")):
        if (epochs := take(f"training.{theirs}", float, None)) is not None:
            values["training"][ours] = f"{epochs} epochs"
    if take("loss", default=None) is not None:
        adversarial = take("loss.adversarial_params", dict, None)
        values["losses"] = {
            "l1_weight": take("loss.l1_weight", float),
            "l2_weight": take("loss.l2_weight", float),
            "perceptual_weight": take("loss.perc_weight", float),
            "perceptual_network": "lpips_alex" if adversarial is None else "lpips_vgg",  # as its two losses have it
        }
        if adversarial is not None:
            place = "loss.adversarial_params"
            older = "g_weight" not in adversarial  # one key for the weight, always adaptive
            values["discriminator"] = {
                "loss": take(f"{place}.loss_type", str).replace("-", "_"),
                "start": f"{take(f'{place}.start_epoch', float)} epochs",
                "weight": take(f"{place}.{'adaptive_weight' if older else 'g_weight'}", float),
                "adaptive_weight": older or take(f"{place}.use_adaptive", bool),
                "r1_weight": take(f"{place}.r1_reg_weight", float, 0.0),
                "r1_every": take(f"{place}.r1_reg_every", int),
            }
    return parse_config(values, source=str(settings.file))


def _quantizer(settings: Settings) -> dict[str, Any]:
    take = settings.take
    kind, place = take("quantizer.type", str), "quantizer.params"
    values: dict[str, Any] = {
        "type": kind,
        "num_codes": take("quantizer.num_embeddings", int),
        "embedding_dim": take("quantizer.embedding_dim", int),
    }
    if kind == "gumbel":
        end = take(f"{place}.temp_final")
        start, cost = take(f"{place}.temp", float), take(f"{place}.kl_cost", float)
        decay, warmup = take(f"{place}.temp_decay_epochs"), take(f"{place}.kl_warmup_epochs")
        return values | {
            "straight_through": take(f"{place}.straight_through", bool),
            "temperature_start": start,
            "temperature_end": start if end is None or decay is None else float(end),
            "temperature_decay": f"{decay or 1} epochs",
            "kl_cost": cost,
            "kl_warmup": f"{warmup or 0} epochs",
        }
    values["commitment_cost"] = take(f"{place}.commitment_cost", float)
    if kind == "ema":
        values |= {"decay": take(f"{place}.decay", float), "epsilon": take(f"{place}.epsilon", float)}
    if kind == "entropy":
        values |= {
            "entropy_ratio": take(f"{place}.ent_loss_ratio", float),
            "entropy_temperature": take(f"{place}.ent_temperature", float),
            "entropy_target": take(f"{place}.ent_loss_type", str),
        }
    return values
