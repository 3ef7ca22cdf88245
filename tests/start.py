"""Weights to start a tiny run with on which rounding decides little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import spread_codebook
from safetensors.torch import save_file
from tiny import merged, tiny_config
from torch import Tensor

from vqgan_accel.config import Config
from vqgan_accel.models.build import build_discriminator, build_tokenizer


def config_with_start(folder: Path, values: dict[str, Any]) -> Config:
    """The tiny config with `values`, that begins with what is written into folder/start: codes as far apart as latents,
    so that no tie is near, and no bias at 0 or norm at 1, which would hide a missing one."""
    start = folder / "start"
    config = tiny_config(folder, **merged(values, {"training": {"init_from": str(start / "tokenizer")}}))
    torch.manual_seed(0)
    tokenizer, discriminator = build_tokenizer(config), build_discriminator(config)
    spread_codebook(tokenizer.quantizer)
    for network in (tokenizer, discriminator):
        for parameter in network.parameters() if network else ():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
    tokenizer.save_pretrained(start / "tokenizer")
    if discriminator is not None:
        save_file(discriminator.state_dict(), start / "discriminator.safetensors")
    return config


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """For the discriminator: slopes 0.2 and 1, without the kink at which rounding decides between them."""
    return 0.6 * x + 0.4 * (x.square() + 1e-2).sqrt()
