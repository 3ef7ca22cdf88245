"""Checkpoints and YAML files of the PyTorch-Lightning trainer that this project re-creates (SerezD,
vqvae-vqgan-pytorch-lightning), into a folder that evaluate.py and fine-tuning read like a checkpoint of ours.

Its two published revisions differ in the network: `old`, of its tables, and `head`, with a convolution after each
upsampling (see AutoencoderConfig). The keys tell which one a checkpoint is of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from vqgan_accel.config import Config, EMAQuantizerConfig, parse_config, save_config
from vqgan_accel.describe import build_discriminator, build_tokenizer
from vqgan_accel.models.quantizers.ema import smoothed_counts
from vqgan_accel.models.weights import fit_state, read_safely
from vqgan_accel.run_folder import CONFIG, DISCRIMINATOR, TOKENIZER, written_as_a_whole

DISCRIMINATOR_PREFIX = "criterion.discriminator."
OLD = {"upsample_conv": False, "norm_eps": 1e-5, "output_activation": "none", "pixel_statistics": "imagenet"}
HEAD = {"upsample_conv": True, "norm_eps": 1e-6, "output_activation": "tanh", "pixel_statistics": "half"}


def import_lightning(checkpoint: Path, yaml_file: Path, output: Path) -> list[str]:
    """Write output/config.yaml, output/tokenizer/ and, where the checkpoint has one, output/discriminator.safetensors.

    Returns lines that say what was found. FileNotFoundError or ValueError names the file or the key that is wrong;
    nothing of a checkpoint is executed, and the folder appears when it is complete.
    """
    settings = _read_yaml(yaml_file)
    found = read_safely(checkpoint, "the checkpoint")
    weights = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or "encoder.conv_in.weight" not in weights:
        raise ValueError(
            f"{checkpoint} has no state_dict with the trainer's encoder: it is another program's checkpoint"
        )
    config = converted_config(settings, weights, yaml_file, output)

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

    with written_as_a_whole(output) as partial:
        tokenizer.save_pretrained(partial / TOKENIZER)
        if discriminator is not None:
            save_file(discriminator.state_dict(), partial / DISCRIMINATOR)
        save_config(config, partial / CONFIG)
    revision = "head" if config.autoencoder.upsample_conv else "old"
    return [
        f"{output}: {config.quantizer.type} quantizer, {config.quantizer.num_codes} codes, revision {revision}, "
        + (f"from epoch {found['epoch']}" if isinstance(found, dict) and "epoch" in found else "epoch unknown"),
        "with its discriminator" if d_weights else "without a discriminator",
    ]


def tokenizer_weights(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The trainer's names and shapes to ours."""
    result = {
        name: tensor.flatten() if ".norm" in name else tensor  # norm weights are (1, C, 1, 1) at head
        for name, tensor in weights.items()
        if name.startswith(("encoder.", "decoder."))
    }
    codebook = weights["quantizer.codebook.weight"]
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


def converted_config(settings: dict[str, Any], weights: dict[str, Tensor], source: Path, output: Path) -> Config:
    """The trainer's YAML as a config of ours; what the networks look like inside follows from the weights."""

    def take(section: str, key: str, kind: Callable[[Any], Any] = lambda value: value) -> Any:
        values = settings
        for part in [*section.split("."), key] if section else [key]:
            if not isinstance(values, dict) or part not in values:
                name = f"{section}.{key}" if section else key
                raise ValueError(f"{source} is not a YAML file of that trainer: it has no '{name}'")
            values = values[part]
        try:
            return kind(values)
        except (TypeError, ValueError):
            raise ValueError(f"{source}: '{section}.{key}' is {values!r}, which is no {kind.__name__}") from None

    upsample_conv = any(name.startswith("decoder.blocks.") and ".conv." in name for name in weights)
    unbiased = weights["encoder.norm.weight"].ndim == 4  # that revision's own GroupNorm
    values: dict[str, Any] = {
        "output_dir": f"runs/{output.name}",
        "data": {"image_size": take("", "image_size", int), "crop_scale": None, "horizontal_flip": False},
        "autoencoder": {
            "channels": take("autoencoder", "channels", int),
            "channel_multipliers": list(take("autoencoder", "channel_multipliers")),
            "num_res_blocks": take("autoencoder", "num_res_blocks", int),
            "norm_variance": "unbiased" if unbiased else "biased",
            **(HEAD if upsample_conv else OLD),
        },
        "quantizer": _quantizer(take),
        "losses": {"l1_weight": 0.0, "l2_weight": 1.0, "perceptual_weight": 0.0},
        "training": {
            "max_epochs": take("training", "max_epochs", float),
            "total_batch_size": take("training", "cumulative_bs", int),
            "base_lr": take("training", "base_lr", float),
            "betas": [float(beta) for beta in take("training", "betas")],
            "eps": take("training", "eps", float),
            "weight_decay": take("training", "weight_decay", float),
        },
    }
    for theirs, ours in (("warmup_epochs", "lr_warmup"), ("decay_epochs", "lr_decay")):
        if settings["training"].get(theirs) is not None:
            values["training"][ours] = f"{take('training', theirs, float)} epochs"
    if settings.get("loss") is not None:
        adversarial = settings["loss"].get("adversarial_params")
        values["losses"] = {
            "l1_weight": take("loss", "l1_weight", float),
            "l2_weight": take("loss", "l2_weight", float),
            "perceptual_weight": take("loss", "perc_weight", float),
            "perceptual_network": "lpips_alex" if adversarial is None else "lpips_vgg",  # as its two losses have it
        }
        if adversarial is not None:
            place = "loss.adversarial_params"
            older = "g_weight" not in adversarial  # one key for the weight, always adaptive
            values["discriminator"] = {
                "loss": take(place, "loss_type", str).replace("-", "_"),
                "start": f"{take(place, 'start_epoch', float)} epochs",
                "weight": take(place, "adaptive_weight" if older else "g_weight", float),
                "adaptive_weight": older or take(place, "use_adaptive", bool),
                "r1_weight": float(adversarial.get("r1_reg_weight") or 0.0),
                "r1_every": take(place, "r1_reg_every", int),
            }
    return parse_config(values, source=str(source))


def _quantizer(take: Callable[..., Any]) -> dict[str, Any]:
    kind, place = take("quantizer", "type", str), "quantizer.params"
    values: dict[str, Any] = {
        "type": kind,
        "num_codes": take("quantizer", "num_embeddings", int),
        "embedding_dim": take("quantizer", "embedding_dim", int),
    }
    if kind == "gumbel":
        end = take(place, "temp_final")
        start, cost = take(place, "temp", float), take(place, "kl_cost", float)
        decay, warmup = take(place, "temp_decay_epochs"), take(place, "kl_warmup_epochs")
        return values | {
            "straight_through": take(place, "straight_through", bool),
            "temperature_start": start,
            "temperature_end": start if end is None or decay is None else float(end),
            "temperature_decay": f"{decay or 1} epochs",
            "kl_cost": cost,
            "kl_warmup": f"{warmup or 0} epochs",
        }
    values["commitment_cost"] = take(place, "commitment_cost", float)
    if kind == "ema":
        values |= {"decay": take(place, "decay", float), "epsilon": take(place, "epsilon", float)}
    if kind == "entropy":
        values |= {
            "entropy_ratio": take(place, "ent_loss_ratio", float),
            "entropy_temperature": take(place, "ent_temperature", float),
            "entropy_target": take(place, "ent_loss_type", str),
        }
    return values


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no YAML file at {file}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not isinstance(values.get("training"), dict):
        raise ValueError(f"{file} is not a YAML file of that trainer: it has no 'training' section")
    return values
