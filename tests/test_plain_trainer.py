"""`train()` computes what the plain trainer computes: every logged value of every step, and at the end the weights,
their average and the optimizers' moments, for every quantizer and every phase of the adversarial game."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import TAMING, mostly_slow
from plain_trainer import PlainTrainer
from runs import metrics, tensors
from start import config_with_start, smooth_leaky_relu
from tiny import DISCRIMINATOR, having, merged
from torch import Tensor

from vqgan_accel.config import Config, validated
from vqgan_accel.models.discriminators import stylegan2
from vqgan_accel.training import loop
from vqgan_accel.training.loop import train
from vqgan_accel.training.setup import Run

TOLERANCE = 1e-5  # relative: of each logged value, and of the largest entry of each weight
MOMENTS = 1e-4  # the same of AdamW's moments: gradients cancel, and rounding stays
SHOWS = 100  # times the tolerance: what a wrong setting moves some weight by, at least

# Few and large steps: 12 of them move the weights by some per cent of the largest, and decay takes as much. An epsilon
# as large as gradients are makes AdamW feel their size (and the clipping), and keeps it from making steps of rounding.
BASE: dict[str, Any] = {
    "autoencoder": {"channels": 64},  # two in a group: a bias before a norm of one channel a group learns nothing
    "losses": {"l1_weight": 0.0, "l2_weight": 1.0},  # L1 has a kink, and a case of its own
    "training": {
        "max_steps": 12,  # 6 epochs
        "base_lr": 1e-3,
        "lr_scaling": "none",
        "lr_warmup": "4 steps",
        "lr_final_ratio": 0.3,
        "betas": [0.8, 0.95],
        "eps": 1e-3,
        "weight_decay": 5.0,
        "log_every": 1,
        "validate_every": "100 steps",  # and at the end
        "validation_metrics": ["l2"],
        "best_metric": "l2",
    },
}
GAME = DISCRIMINATOR | {"weight": 0.5, "r1_weight": 3.0, "r1_every": 3}
REINIT = {"reinit_every": "2 epochs"}  # after steps 4, 8 and 12
EMA = {"type": "ema", "decay": 0.8, "epsilon": 0.1}
ENTROPY = {"type": "entropy", "entropy_temperature": 0.5, "entropy_ratio": 0.5}
GUMBEL = {"type": "gumbel", "kl_cost": 0.5, "kl_warmup": "4 epochs", "temperature_decay": "10 steps"}
SIMVQ = {"type": "simvq", "commitment_cost": 0.5}
IBQ = {"type": "ibq", "codebook_cost": 0.4, "entropy_ratio": 0.5, "entropy_temperature": 0.5}
CAREFUL = {"ema_decay": 0.75, "max_grad_norm": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "standard": {"quantizer": {"commitment_cost": 0.5}},
    "standard, unit vectors, reinit from latents": {"quantizer": {"l2_normalize": True, **REINIT}},
    "standard, reinit from used codes": {"quantizer": {**REINIT, "reinit_from": "used_codes"}},
    "ema": {"quantizer": EMA},
    "ema, unit vectors, reinit from used codes": {
        "quantizer": {**EMA, **REINIT, "reinit_from": "used_codes", "l2_normalize": True}
    },
    "ema, reinit from latents of two rounds": {
        "quantizer": EMA | REINIT,
        "training": {"gradient_accumulation_steps": 2},
    },
    "entropy": {"quantizer": ENTROPY},
    "entropy, argmax, unit vectors, reinit from latents": {
        "quantizer": {**ENTROPY, **REINIT, "entropy_target": "argmax", "l2_normalize": True}
    },
    "standard, rotation": {"quantizer": {"gradient": "rotation"}},
    "ema, rotation, unit vectors": {"quantizer": EMA | {"gradient": "rotation", "l2_normalize": True}},
    "standard, reinit of rare codes in steps": {"quantizer": {"reinit_every": "3 steps", "reinit_below": 0.5}},
    "ema, reinit of rare codes from used codes in steps": {
        "quantizer": EMA | {"reinit_every": "5 steps", "reinit_below": 0.3, "reinit_from": "used_codes"}
    },
    "standard, kmeans of two rounds": {
        "quantizer": {"init": "kmeans", "num_codes": 16},
        "training": {"gradient_accumulation_steps": 2},
    },
    "entropy, sphere": {"quantizer": ENTROPY | {"init": "sphere"}},
    "simvq": {"quantizer": SIMVQ},
    "simvq, rotation, unit vectors": {"quantizer": SIMVQ | {"gradient": "rotation", "l2_normalize": True}},
    "ibq": {"quantizer": IBQ},
    "ibq, reinit from latents of two rounds": {
        "quantizer": IBQ | REINIT,
        "training": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2},
    },
    "gumbel": {"quantizer": GUMBEL},
    "gumbel, straight through": {"quantizer": GUMBEL | {"straight_through": True, "hidden_channels": 16}},
    "fsq": {"quantizer": {"type": "fsq", "levels": [8, 5, 5]}},
    "fsq, sigmoid": {"quantizer": {"type": "fsq", "levels": [4, 3], "bound": "sigmoid"}, "training": CAREFUL},
    "lfq": {"quantizer": {"type": "lfq", "bits": 6, "entropy_temperature": 0.5, "entropy_group": 4}},
    "bsq": {"quantizer": {"type": "bsq", "bits": 6, "entropy_temperature": 0.3, "entropy_gamma": 0.7}},
    "residual, reinit from latents": {
        "quantizer": {
            "type": "residual",
            "depth": 3,
            "dropout": 0.5,
            "inner": {**EMA, **REINIT, "num_codes": 16, "embedding_dim": 8},
        },
        "training": {"gradient_accumulation_steps": 2},
    },
    "product of unit vectors, reinit from used codes": {
        "quantizer": {
            "type": "product",
            "groups": 2,
            "inner": {
                **REINIT,
                "type": "standard",
                "l2_normalize": True,
                "reinit_from": "used_codes",
                "num_codes": 64,
                "embedding_dim": 8,
            },
        },
    },
    "l1": {"losses": {"l1_weight": 0.7, "l2_weight": 0.4}},
    "attention": {"autoencoder": TAMING | {"channels": 64}, "training": {"base_lr": 3e-4}},
    "clipped and averaged": {"training": CAREFUL},
    "rates by the square root of the batch, decayed early": {
        "training": {"lr_scaling": "sqrt", "base_batch_size": 9, "lr_decay": "4 epochs", "lr_warmup": "0 steps"}
    },
    "rates by the batch": {"training": {"lr_scaling": "linear", "base_batch_size": 3}},
    "game": {"discriminator": GAME},
    "hinge, adaptive": {"discriminator": GAME | {"loss": "hinge", "adaptive_weight": True}},
    "gumbel, game later": {"quantizer": GUMBEL, "discriminator": GAME | {"start": "2 epochs"}, "training": CAREFUL},
    "ema, discriminator warms up": {
        "quantizer": EMA,
        "discriminator": GAME | {"start": "1 step", "warmup": "2 epochs", "adaptive_weight": True},
        "training": CAREFUL,
    },
    "game never": {"discriminator": GAME | {"start": "12 steps"}},
    "entropy, game in two rounds": {
        "quantizer": ENTROPY,
        "discriminator": GAME | {"adaptive_weight": True},
        "training": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2},
    },
    "everything": {
        "quantizer": EMA | REINIT | {"l2_normalize": True},
        "discriminator": GAME | {"loss": "hinge", "adaptive_weight": True, "start": "3 steps", "warmup": "2 steps"},
        "training": CAREFUL | {"gradient_accumulation_steps": 2},
    },
    **{
        f"decoder of {quantizer['type']} only": {
            "quantizer": quantizer,
            "discriminator": GAME | {"adaptive_weight": True},
            "training": CAREFUL | {"decoder_only": True},
        }
        for quantizer in ({"type": "standard"}, EMA, ENTROPY, GUMBEL, IBQ)
    },
}


SECONDS = ("entropy", "gumbel", "simvq", "ibq", "fsq", "lfq", "bsq", "game", "everything")
SECONDS += ("residual, reinit from latents", "product of unit vectors, reinit from used codes")


@pytest.fixture(autouse=True)
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stylegan2, "leaky_relu", smooth_leaky_relu)


@pytest.mark.parametrize("case", mostly_slow(CASES, *SECONDS, fast=["standard"]))
def test_twelve_steps_are_those_of_the_plain_trainer(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(CASES[case], tmp_path)
    if getattr(config.quantizer, "init", "uniform") in ("kmeans", "sphere"):  # a codebook of its own
        config = starting_anew(config, tmp_path / "start", monkeypatch)
    run = train(config)
    plain = PlainTrainer(config, tmp_path / "start")
    lines = [line for line in metrics(run) if "l2" in line]  # and not those of the validation
    if "reinit" in case:
        assert sum(line.get("reinitialised_codes", 0) > 0 for line in lines) >= 2
    assert len(lines) == len(plain.lines)
    for ours, expected in zip(lines, plain.lines, strict=True):
        assert ours == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE / 10), ours["step"]
    assert_same_tensors(tensors(run / "checkpoints" / "latest"), plain.tensors())


def prepared(case: dict[str, Any], folder: Path) -> Config:
    """Its config; in folder/start is what it starts with."""
    values = merged(BASE, case)
    if "type" in case.get("autoencoder", {}):
        values["autoencoder"] = case["autoencoder"]  # another architecture, with keys of its own
    kind = case.get("quantizer", {}).get("type", "standard")
    values["quantizer"] = having(kind, num_codes=64) | case.get("quantizer", {})
    return config_with_start(folder, values)


def starting_anew(config: Config, start: Path, patch: pytest.MonkeyPatch) -> Config:
    """A run that begins with new weights, which it writes into `start` before its first step."""

    def kept(run: Run, batches: list[Any]) -> None:
        run.networks.tokenizer.network.save_pretrained(start / "tokenizer")
        given(run, batches)

    given = loop.give_first_codes
    patch.setattr(loop, "give_first_codes", kept)
    return validated(merged(config.model_dump(mode="json"), {"training": {"init_from": None}}), "anew")


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, apart in distances(actual, expected).items():
        assert apart <= (MOMENTS if is_moment(name) else TOLERANCE), name


def is_moment(name: str) -> bool:
    return name.startswith("optimizers")


def distances(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference in each tensor, in units of its largest entry; in a moment that is less than a hundredth
    of its network's largest, in units of that: the gradient of some biases is 0 but for rounding."""
    scales = {name: value.abs().max().item() for name, value in expected.items()}
    for name in filter(is_moment, expected):
        network, _, kind = name.split("/")
        alike = [scales[key] for key in scales if key.startswith(f"{network}/") and key.endswith(f"/{kind}")]
        scales[name] = max(scales[name], max(alike) / 100)
    return {name: (actual[name] - value).abs().max().item() / scales[name] for name, value in expected.items()}


# a case of CASES -> what is changed in it
CHANGES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("everything", {"training": training})
        for training in (
            {"betas": [0.95, 0.8]},
            {"betas": [0.8, 0.9]},
            {"eps": 1.2e-3},
            {"weight_decay": 4.5},
            {"base_lr": 1.1e-3},
            {"lr_warmup": "5 steps"},
            {"lr_final_ratio": 0.25},
            {"lr_decay": "11 steps"},
            {"max_grad_norm": None},
            {"ema_decay": 0.7},
            {"gradient_accumulation_steps": 1},
        )
    ),
    *(
        ("everything", {"discriminator": discriminator})
        for discriminator in (
            {"loss": "non_saturating"},
            {"start": "2 steps"},
            {"warmup": "3 steps"},
            {"weight": 0.45},
            {"adaptive_weight": False},
            {"r1_weight": 2.5},
            {"r1_every": 4},
        )
    ),
    ("everything", {"losses": {"l1_weight": 0.1}}),
    ("everything", {"quantizer": {"l2_normalize": False}}),
    ("everything", {"quantizer": {"commitment_cost": 0.2}}),
    ("everything", {"quantizer": {"decay": 0.79}}),
    ("everything", {"quantizer": {"reinit_every": "3 epochs"}}),
    ("everything", {"quantizer": {"reinit_from": "used_codes"}}),
    ("ema", {"quantizer": {"epsilon": 0.12}}),
    ("entropy", {"quantizer": {"entropy_ratio": 0.45}}),
    ("entropy", {"quantizer": {"entropy_temperature": 0.55}}),
    ("entropy", {"quantizer": {"entropy_target": "argmax"}}),
    ("gumbel", {"quantizer": {"temperature_decay": "11 steps"}}),
    ("gumbel", {"quantizer": {"kl_warmup": "5 epochs"}}),
    ("gumbel", {"quantizer": {"straight_through": True}}),
    ("gumbel", {"seed": 1}),
    ("simvq", {"quantizer": {"commitment_cost": 0.45}}),
    ("simvq", {"quantizer": {"gradient": "rotation"}}),
    ("ibq", {"quantizer": {"codebook_cost": 5.0}}),
    ("ibq", {"quantizer": {"entropy_ratio": 0.45}}),
    ("ibq", {"quantizer": {"entropy_temperature": 0.55}}),
    ("standard, reinit of rare codes in steps", {"quantizer": {"reinit_below": 0.0}}),
    ("standard, reinit of rare codes in steps", {"quantizer": {"reinit_every": "4 steps"}}),
]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Config, Path, dict[str, Tensor]]]:
    """The config of a case, what it starts with, and what the plain trainer makes of it."""

    @cache
    def trained(case: str) -> tuple[Config, Path, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp("plain")
        config = prepared(CASES[case], folder)
        return config, folder / "start", PlainTrainer(config, folder / "start").tensors()

    return trained


@pytest.mark.slow  # it tests the oracle, not the package
@pytest.mark.parametrize(("case", "change"), CHANGES, ids=str)
def test_every_setting_moves_the_weights_by_far_more_than_the_tolerance(
    case: str, change: dict[str, Any], plainly: Callable[[str], tuple[Config, Path, dict[str, Tensor]]]
) -> None:
    """So that the agreement above says something about each."""
    config, start, expected = plainly(case)
    changed = validated(merged(config.model_dump(mode="json"), change), "changed")
    apart = distances(PlainTrainer(changed, start).tensors(), expected)
    assert max(value for name, value in apart.items() if not is_moment(name)) > SHOWS * TOLERANCE
