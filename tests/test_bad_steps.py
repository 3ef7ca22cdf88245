"""A step in which any value at all is not finite changes nothing: neither weights nor moments, nor what is counted.

The networks begin with weights under which just the named values overflow.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, tensors
from safetensors.torch import load_file, save_file
from start import config_with_start
from tiny import DISCRIMINATOR, write_images

from vqgan_accel.config import Config
from vqgan_accel.training.loop import train

TOKENIZER = "tokenizer/diffusion_pytorch_model.safetensors"
# It warms up, so that `total` has no part of it.
GAME = {"discriminator": DISCRIMINATOR | {"warmup": "9 steps"}}
R1 = {"discriminator": GAME["discriminator"] | {"r1_weight": 1.0, "r1_every": 1}}
LINEAR = {"autoencoder": {"output_activation": "none"}}
# what overflows -> (settings, file of folder/start, tensor -> what all of it is)
OVERFLOWS: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, float]]] = {
    ("grad_norm_tokenizer",): (LINEAR, {f"{TOKENIZER}:decoder.conv_out.weight": 1e15}),
    ("grad_norm_discriminator",): (GAME, {"discriminator.safetensors:b4.out.weight": 1e25}),
    ("r1", "grad_norm_discriminator"): (R1, {"discriminator.safetensors:b4.out.weight": 1e25}),
    # reconstructions are black to the last bit, and only images overflow
    ("discriminator", "logits_real", "grad_norm_discriminator"): (
        GAME,
        {
            "discriminator.safetensors:b16.fromrgb.weight": 3e38,
            f"{TOKENIZER}:decoder.conv_out.weight": 0.0,
            f"{TOKENIZER}:decoder.conv_out.bias": 0.0,
        },
    ),
}


def config_that_overflows(folder: Path, settings: dict[str, Any], weights: dict[str, float]) -> Config:
    training = {"log_every": 1, "ema_decay": 0.5, "validate_every": "100 steps"}
    config = config_with_start(folder, settings | {"training": training, "quantizer": {"reinit_every": "1 epoch"}})
    for path, value in weights.items():
        file, name = path.split(":")
        found = {key: tensor.clone() for key, tensor in load_file(folder / "start" / file).items()}
        save_file(found | {name: torch.full_like(found[name], value)}, folder / "start" / file)
    return config


@pytest.mark.parametrize("overflowing", OVERFLOWS, ids=" ".join)
def test_one_value_that_is_not_finite_is_enough_to_skip_the_step(overflowing: tuple[str, ...], tmp_path: Path) -> None:
    run = train(config_that_overflows(tmp_path, *OVERFLOWS[overflowing]))
    for line in [line for line in metrics(run) if "l2" in line]:
        assert {name for name, value in line.items() if not math.isfinite(float(value))} == set(overflowing)
        assert line["bad_steps"] == line["step"]
    # the last step ended an epoch, in which no code was counted and so none replaced
    assert line["epoch_codebook_usage"] == line["epoch_perplexity"] == 0
    assert "reinitialised_codes" not in line
    before, after = tensors(tmp_path / "start"), tensors(run / "checkpoints" / "latest")
    assert {name for name in after if not name.startswith("tokenizer_ema/")} == before.keys()  # no moments
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_the_codes_of_a_skipped_step_are_not_counted_among_those_of_sound_ones(tmp_path: Path) -> None:
    """R1's gradient overflows in the first step; in the second there is no R1."""
    write_images(tmp_path / "images" / "train", 12)  # an epoch of three steps, of which two are trained
    write_images(tmp_path / "images" / "validation", 3, seed=1)
    settings = {"discriminator": R1["discriminator"] | {"r1_every": 2}, "data": {"path": str(tmp_path / "images")}}
    config = config_that_overflows(tmp_path, settings, {"discriminator.safetensors:b4.out.weight": 1e12})
    run = train(config)
    first, second = (line for line in metrics(run) if "l2" in line)
    assert (first["bad_steps"], second["bad_steps"]) == (1, 1)
    progress = json.loads((run / "checkpoints" / "latest" / "progress.json").read_text())
    assert sum(progress["code_counts"]) == 4 * 16  # 4 images of 4 x 4 codes
