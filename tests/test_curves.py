"""The losses of thirty steps of three recipes are those that are kept in golden/curves.

    python tests/test_curves.py --renew

writes them anew, a step a line: where training is meant to change, `git diff` then shows what became of its numbers.

The bound was measured: with the instructions of processors from SSE4 to AVX-512 (ATEN_CPU_CAPABILITY,
ONEDNN_MAX_CPU_ISA), and with torch's own convolutions in place of oneDNN's, the largest difference was 1.1e-5. That
takes a discriminator without kinks and codes that are far apart: else rounding decides one of a million signs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, mostly_slow
from runs import metrics
from start import config_with_start, smooth_leaky_relu
from tiny import DISCRIMINATOR, merged

from vqgan_accel.models.discriminators import stylegan2
from vqgan_accel.training.loop import train

STEPS = 30
TOLERANCE = 1e-4  # relative, between processors
BASE: dict[str, Any] = {
    "autoencoder": {"channels": 64},
    "quantizer": {"num_codes": 64},
    "training": {
        "max_steps": STEPS,
        "base_lr": 3e-4,
        "lr_scaling": "none",
        "log_every": 1,
        "validate_every": "100 steps",  # and at the end
        "validation_metrics": ["l2"],
        "best_metric": "l2",
    },
}
NOISE = [3.508326292037964, 1.2303847074508667, 0.615044116973877]  # what torch drew where the Gumbel curve was made
GAME = DISCRIMINATOR | {"weight": 0.5, "start": "10 steps"}
RECIPES: dict[str, dict[str, Any]] = {
    "standard": {"quantizer": {"reinit_every": "5 epochs"}},
    "ema_r1_adaptive": {
        "quantizer": {"type": "ema", "decay": 0.9},
        "discriminator": GAME | {"adaptive_weight": True, "warmup": "5 steps", "r1_weight": 1.0, "r1_every": 4},
        "training": {"ema_decay": 0.9, "max_grad_norm": 1.0},
    },
    "gumbel_hinge_two_rounds": {
        "quantizer": {"type": "gumbel", "kl_cost": 0.01, "kl_warmup": "20 steps", "temperature_decay": "25 steps"},
        "discriminator": GAME | {"loss": "hinge"},
        "training": {"gradient_accumulation_steps": 2, "lr_warmup": "5 steps"},
    },
}


def kept(recipe: str) -> Path:
    return GOLDEN / "curves" / f"{recipe}.json"


def curve(recipe: str, folder: Path, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    patch.setattr(stylegan2, "leaky_relu", smooth_leaky_relu)
    return metrics(train(config_with_start(folder, merged(BASE, RECIPES[recipe]))))


@pytest.mark.seconds
@pytest.mark.parametrize("recipe", mostly_slow(RECIPES, "standard"))
def test_thirty_steps_have_the_losses_that_are_kept(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.empty(3).exponential_(generator=torch.Generator().manual_seed(0)).tolist()
    if recipe.startswith("gumbel") and drawn != pytest.approx(NOISE):
        pytest.skip("this torch draws other exponential numbers from the same seed")
    actual, expected = curve(recipe, tmp_path, monkeypatch), json.loads(kept(recipe).read_text())
    assert len(actual) == len(expected) == STEPS + 1  # the last of the validation
    for ours, line in zip(actual, expected, strict=True):
        assert ours == pytest.approx(line, rel=TOLERANCE, abs=TOLERANCE / 100), line["step"]


def renew() -> None:
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            lines = ",\n".join(json.dumps(line) for line in curve(recipe, Path(folder), patch))
        kept(recipe).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit("usage: python tests/test_curves.py --renew")
    renew()
