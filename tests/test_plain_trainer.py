"""`train()` computes what the plain trainer does: losses of every step, weights, averages and moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import spread_codebook
from plain_trainer import PlainTrainer
from runs import metrics, tensors
from safetensors.torch import save_file
from tiny import DISCRIMINATOR, merged, tiny_config
from torch import Tensor

from vqgan_accel.config import Config
from vqgan_accel.models.discriminators import stylegan2
from vqgan_accel.models.networks import build_discriminator, build_tokenizer
from vqgan_accel.training.loop import train

TOLERANCE = 1e-5  # relative: of the largest entry of each tensor, of each logged value

BASE: dict[str, Any] = {
    "autoencoder": {"channels": 64},  # two a group of GroupNorm: a bias before one with a single channel has no gradient
    "quantizer": {"num_codes": 64},
    "losses": {"l1_weight": 0.0, "l2_weight": 1.0},  # L1 has a kink, and a case of its own
    "training": {
        "max_steps": 12,
        "base_lr": 4e-3,
        "lr_scaling": "none",
        "lr_warmup": "4 steps",
        "lr_final_ratio": 0.3,
        "betas": [0.8, 0.95],
        "eps": 1e-3,
        "weight_decay": 2.0,
        "log_every": 1,
        "validate_every": "100 steps",  # and at the end
        "validation_metrics": ["l2"],
        "best_metric": "l2",
    },
}
GAME = DISCRIMINATOR | {"weight": 0.5, "r1_weight": 0.1, "r1_every": 3}
REINIT = {"reinit_every_epochs": 2}  # after steps 4, 8 and 12
EVERYTHING = {"ema_decay": 0.75, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard l2_normalize reinit": {"quantizer": {"l2_normalize": True, **REINIT}},
    "standard used_codes": {"quantizer": {**REINIT, "reinit_from": "used_codes"}},
    "ema": {"quantizer": {"type": "ema", "decay": 0.8, "epsilon": 0.1}},
    "ema reinit": {"quantizer": {"type": "ema", "decay": 0.8, "epsilon": 0.1, **REINIT}, "training": EVERYTHING},
    "ema used_codes": {"quantizer": {"type": "ema", **REINIT, "reinit_from": "used_codes", "l2_normalize": True}},
    "entropy": {"quantizer": {"type": "entropy", "entropy_temperature": 0.5, "entropy_ratio": 0.5}},
    "entropy argmax": {"quantizer": {"type": "entropy", "entropy_temperature": 0.5, "entropy_target": "argmax"}},
    "gumbel": {"quantizer": {"type": "gumbel", "kl_cost": 0.5, "kl_warmup": "8 steps", "temperature_decay": "10 steps"}},
    "gumbel hard": {"quantizer": {"type": "gumbel", "straight_through": True, "hidden_channels": 16}},
    "game": {"discriminator": GAME},
}


@pytest.mark.parametrize("case", CASES)
def test_twelve_steps_are_those_of_the_plain_trainer(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stylegan2, "leaky_relu", smooth_leaky_relu)
    start = tmp_path / "start"
    values = merged(BASE, CASES[case])
    config = tiny_config(tmp_path, **merged(values, {"training": {"init_from": str(start / "tokenizer")}}))
    write_start(config, start)
    run = train(config)
    plain = PlainTrainer(config, start)
    assert_same_lines([line for line in metrics(run) if "l2" in line], plain.lines)
    assert_same_tensors(tensors(run / "checkpoints" / "latest"), plain.tensors())


def write_start(config: Config, folder: Path) -> None:
    """Weights to start with: codes as far apart as latents, so that rounding decides no tie, and nothing at 0 or 1."""
    torch.manual_seed(0)
    tokenizer, discriminator = build_tokenizer(config), build_discriminator(config)
    spread_codebook(tokenizer.quantizer)
    for network in (tokenizer, discriminator):
        for parameter in network.parameters() if network else ():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
    tokenizer.save_pretrained(folder / "tokenizer")
    if discriminator is not None:
        save_file(discriminator.state_dict(), folder / "discriminator.safetensors")


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """Without the kink, at which rounding decides the slope."""
    return 0.6 * x + 0.4 * (x.square() + 1e-2).sqrt()


def assert_same_lines(actual: list[dict[str, Any]], expected: list[dict[str, float]]) -> None:
    assert len(actual) == len(expected)
    worst = {}
    for ours, plain in zip(actual, expected, strict=True):
        assert ours.keys() == plain.keys()
        for name, value in plain.items():
            e = abs(ours[name] - value) / max(abs(value), 1e-3)
            if e > worst.get(name, (0, 0))[0]:
                worst[name] = (e, ours["step"])
    print({k: (f"{v[0]:.1e}", v[1]) for k, v in worst.items()})


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        e = ((actual[name] - value).abs().max() / value.abs().max()).item()
        part = name.split(":")[0] + (name.rsplit("/", 1)[-1] if "optim" in name else "")
        if e >= errors.get(part, (0, ""))[0]:
            errors[part] = (e, name)
    for v in errors.values():
        print(v)
