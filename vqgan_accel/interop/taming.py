"""Checkpoints of taming-transformers (Esser et al. 2021: VQModel and GumbelVQ), of LlamaGen's VQ tokenizer (Sun et al.
2024, arXiv 2406.06525) and of diffusers' VQModel, whose networks are taming's under other names, into our `taming`
architecture.

Their discriminators, PatchGANs, are left behind. Of taming's quantizers two things are not kept: the commitment cost on
the wrong term, which concerns training alone, and GumbelVQ's noise in evaluation: ours takes the most likely code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.vq_model import VQModel
from safetensors import SafetensorError
from torch import Tensor

from vqgan_accel.config import GROUP_NORM_GROUPS, parse_config
from vqgan_accel.interop.diffusers import CODEBOOK, from_vq_model
from vqgan_accel.interop.importing import Settings, read_state_dict, write_import
from vqgan_accel.models.build import build_tokenizer
from vqgan_accel.models.weights import fit_state

# What tells taming's weights from LlamaGen's.
TAMING = ("quant_conv.weight", "encoder.down.0.block.0.norm1.weight")
LLAMAGEN = ("quant_conv.weight", "encoder.conv_blocks.0.res.0.norm1.weight", CODEBOOK)
# Their names -> diffusers'. taming counts the decoder's levels from the full resolution, LlamaGen from the coarsest.
RENAMED = (
    (r"^encoder\.(down|conv_blocks)\.(\d+)\.", r"encoder.down_blocks.\2."),
    (r"^decoder\.conv_blocks\.(\d+)\.", r"decoder.up_blocks.\1."),
    (r"\.(block|res)\.(\d+)\.", r".resnets.\2."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.mid\.(block_1|0)\.", ".mid_block.resnets.0."),
    (r"\.mid\.(attn_1|1)\.", ".mid_block.attentions.0."),
    (r"\.mid\.(block_2|2)\.", ".mid_block.resnets.1."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(\w+)\.norm_out\.", r"\1.conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def import_taming(checkpoint: Path, yaml_file: Path, output: Path) -> list[str]:
    """taming's VQModel or GumbelVQ: writes output/config.yaml and output/tokenizer/, and returns lines that say what
    was found. Errors as in import_lightning."""
    settings = Settings(yaml_file)
    weights, found = read_state_dict(checkpoint, *TAMING)
    if "quantize.used" in weights:
        raise ValueError(f"{checkpoint} has remapped codes ('quantize.used'), which are not supported")
    steps = f"from step {found.get('global_step', 'unknown')}"
    return write_vqgan(weights, training_config(settings, weights), settings.file, checkpoint, output, steps)


def import_llamagen(checkpoint: Path, output: Path) -> list[str]:
    """LlamaGen's tokenizers, which have no YAML file: the keys tell all but the size of the images, and that codes are
    unit vectors, which is so in all that are published."""
    weights, found = read_state_dict(checkpoint, *LLAMAGEN)
    if weights[CODEBOOK].ndim != 2:
        raise ValueError(f"{checkpoint}: '{CODEBOOK}' of shape {tuple(weights[CODEBOOK].shape)} is no codebook")
    num_codes, embedding_dim = weights[CODEBOOK].shape
    values = {
        "data": {"image_size": 256},
        "quantizer": {
            "type": "standard",
            "num_codes": num_codes,
            "embedding_dim": embedding_dim,
            "l2_normalize": True,
        },
        "losses": {"l1_weight": 0.0, "l2_weight": 1.0, "perceptual_weight": 1.0},  # as its trainer has it
        "training": {"max_epochs": 40.0, "total_batch_size": 128, "lr_scaling": "none", "betas": [0.9, 0.95]},
    }
    steps = f"from step {found.get('steps', 'unknown')}"
    return write_vqgan(weights, values, checkpoint, checkpoint, output, steps)


def import_diffusers(folder: str, output: Path) -> list[str]:
    """diffusers' VQModel, from a folder or a name on the hub. Errors as in import_lightning."""
    try:
        loaded: Any = VQModel.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} cannot be read as diffusers' VQModel: {reason}") from None
    model, found = loaded
    config = model.config
    if wrong := [*found["missing_keys"], *found["unexpected_keys"]]:  # which diffusers fills at random
        raise ValueError(f"{folder} has weights that do not fit its config: {wrong[:3]}")
    if (config.act_fn, config.norm_type, config.norm_num_groups) != ("silu", "group", GROUP_NORM_GROUPS):
        raise ValueError(
            f"{folder} has act_fn {config.act_fn}, norm_type {config.norm_type} and {config.norm_num_groups} groups; "
            f"only silu, group and {GROUP_NORM_GROUPS} can be imported"
        )
    weights = model.state_dict()
    num_codes, embedding_dim = weights[CODEBOOK].shape
    values = {
        "data": {"image_size": config.sample_size},
        "quantizer": {"type": "standard", "num_codes": num_codes, "embedding_dim": embedding_dim},
        "training": {"max_epochs": 1.0},
    }
    return write_vqgan(weights, values, folder, folder, output, "from diffusers")


def write_vqgan(
    weights: dict[str, Tensor], values: dict[str, Any], source: object, checkpoint: object, output: Path, steps: str
) -> list[str]:
    """`values`: a config of ours, but for the networks' layout, which follows from the weights."""
    named = in_diffusers_names(weights)
    values |= {"output_dir": f"runs/{output.name}", "autoencoder": layout_of(named, checkpoint)}
    config = parse_config(values, source=str(source))
    tokenizer = build_tokenizer(config)
    fit_state(tokenizer, from_vq_model(named) | quantizer_weights(weights), str(source), str(checkpoint))
    write_import(output, config, tokenizer, discriminator=None)
    quantizer = config.quantizer
    return [
        f"{output}: taming architecture, {quantizer.type} quantizer, {quantizer.num_codes} codes, {steps}",
        "without a discriminator: theirs is another network than ours",
    ]


def in_diffusers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights under VQModel's names, in its shapes."""
    levels = len({name.split(".")[2] for name in weights if name.startswith("decoder.up.")})
    named = {}
    for name, tensor in weights.items():
        if not name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            continue  # the quantizer, the loss's networks
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
        named[name] = tensor.flatten(1) if re.search(r"attentions\.\d+\.to_.*weight", name) else tensor
    return named


def quantizer_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """VQModel's or GumbelVQ's, under our names."""
    if CODEBOOK in weights:
        return {"quantizer.codebook": weights[CODEBOOK]}
    names = {"embed.weight": "codebook", "proj.weight": "x_to_logits.weight", "proj.bias": "x_to_logits.bias"}
    return {
        f"quantizer.{ours}": weights[f"quantize.{theirs}"]
        for theirs, ours in names.items()
        if f"quantize.{theirs}" in weights
    }


def layout_of(named: dict[str, Tensor], checkpoint: object) -> dict[str, Any]:
    """Our `autoencoder` section, from weights under VQModel's names."""
    blocks = [re.match(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight", name) for name in named]
    places = {(int(match[1]), int(match[2])): named[match[0]].shape[0] for match in blocks if match}
    levels = len({name.split(".")[2] for name in named if name.startswith("encoder.down_blocks.")})
    complete = {"encoder.conv_in.weight", "encoder.conv_out.weight"} <= named.keys()
    if not levels or not complete or any((level, 0) not in places for level in range(levels)):
        raise ValueError(f"{checkpoint} has no encoder of taming's or LlamaGen's: it is another program's checkpoint")
    channels = named["encoder.conv_in.weight"].shape[0]
    attention = {match[1] for name in named if (match := re.match(r"encoder\.down_blocks\.(\d+)\.attentions", name))}
    return {
        "type": "taming",
        "channels": channels,
        "channel_multipliers": [places[level, 0] // channels for level in range(levels)],
        "num_res_blocks": 1 + max(block for _, block in places),
        "attention_levels": sorted(map(int, attention)),
        "latent_channels": named["encoder.conv_out.weight"].shape[0],
    }


def training_config(settings: Settings, weights: dict[str, Tensor]) -> dict[str, Any]:
    """taming's YAML as ours, but for the networks' layout. What it does not say, such as the number of GPUs, stays at
    our defaults."""
    take, place = settings.take, "model.params"
    size = {"num_codes": take(f"{place}.n_embed", int), "embedding_dim": take(f"{place}.embed_dim", int)}
    quantizer: dict[str, Any] = {"type": "standard"}
    if "quantize.proj.weight" in weights:
        schedule = f"{place}.temperature_scheduler_config.params"
        quantizer = {
            "type": "gumbel",
            "hidden_channels": weights["quantize.proj.weight"].shape[1],
            "straight_through": True,
            "temperature_start": take(f"{schedule}.lr_max", float, 1.0),
            "temperature_end": take(f"{schedule}.lr_min", float, 1.0),
            "temperature_decay": f"{take(f'{schedule}.max_decay_steps', int, 1)} steps",
            "kl_cost": take(f"{place}.kl_weight", float, 1e-8),
            "kl_warmup": "0 steps",
        }
    loss = f"{place}.lossconfig.params"
    return {
        "data": {"image_size": take(f"{place}.ddconfig.resolution", int)},
        "quantizer": quantizer | size,
        "losses": {
            "l1_weight": take(f"{loss}.pixelloss_weight", float, 1.0),
            "l2_weight": 0.0,
            "perceptual_weight": take(f"{loss}.perceptual_weight", float, 1.0),
        },
        "training": {
            "max_epochs": 1.0,
            "base_lr": take("model.base_learning_rate", float),  # of one image
            "base_batch_size": 1,
            "lr_scaling": "linear",
            "betas": [0.5, 0.9],
            "weight_decay": 0.0,
        },
    }
