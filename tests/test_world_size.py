"""P processes x b images train what one process with P*b images trains, whatever the number of accumulation rounds.
(Two processes in every case, four and eight in some.)

Real runs of 20 steps on gloo processes (world_size.py), with an adversarial part from the third step on, R1, minibatch
standard deviation, a moving average of the weights, and re-initialisation of unused codes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, tensors
from safetensors.torch import load_file
from tiny import QUANTIZERS, having
from torch import Tensor
from world_size import ADAMW_TOO, CASES, CHANGED_AT, CHANGES, START, STEPS, Case

pytestmark = pytest.mark.slow

PARAMETERS = 1e-5  # relative: of the largest entry of each tensor
OF_THE_WAY = 1e-4  # relative: of the distance from the initial weights
LOSSES = 1e-4
ADAPTIVE_PAIRS = [(Case(q, "adaptive", "sgd", 1, 2), Case(q, "adaptive", "sgd", 2, 2)) for q in QUANTIZERS]
ADAPTIVE_PAIRS += [(Case("ema", "adaptive", "sgd", 1, 2, "taming"), Case("ema", "adaptive", "sgd", 2, 2, "taming"))]
ADAPTIVE_PAIRS += [
    (Case(q, "adaptive", "sgd", 1, 1, "maskgit", 16), Case(q, "adaptive", "sgd", processes, 1, "maskgit", 16))
    for q, processes in (("ema", 4), ("ema", 8), ("entropy", 4))
]
# lambda and the mean code distribution are formed per round, so (1, 1) and (1, 2) agree where neither is there
ROUNDS_PAIRS = [(Case(q, "fixed", "sgd", 1, 1), Case(q, "fixed", "sgd", 1, 2)) for q in ("standard", "ema", "gumbel")]
REPLACING_PAIRS = [pair for pair in ADAPTIVE_PAIRS if having(pair[0].quantizer, reinit_every=None)]
ADAM_PAIRS = [(Case(q, "adaptive", "adamw", 1, 1), Case(q, "adaptive", "adamw", 2, 1)) for q in ADAMW_TOO]
MANY = [case for case in CASES if case.processes > 1]


def names(case: object) -> str:
    return "~".join(c.name for c in case) if isinstance(case, tuple) and not isinstance(case, Case) else case.name  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    script = Path(__file__).parent / "world_size.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def ranks(place: Path, case: Case) -> list[dict[str, Tensor]]:
    return [load_file(place / f"{rank}.safetensors") for rank in range(case.processes)]


def in_global_order(place: Path, case: Case, what: str) -> Tensor:
    """(steps, global batch, ...): sample g went to round g mod k, process (g div k) mod P."""
    by_rank = torch.stack([rank[what].unflatten(0, (-1, case.rounds)) for rank in ranks(place, case)])
    return by_rank.permute(1, 3, 0, 2, *range(4, by_rank.ndim)).flatten(1, 3)  # (P, S, k, b, ...) -> (S, b*P*k, ...)


def assert_same_parameters(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    keys = [key for key in one if key not in ("images", "codes")]
    assert keys == [key for key in other if key not in ("images", "codes")]
    for key in keys:
        difference = (one[key].double() - other[key].double()).abs().max().item()
        assert difference <= PARAMETERS * one[key].double().abs().max().item(), key
    for network in ("tokenizer.encoder.", "tokenizer.decoder.", "discriminator."):
        names = [key for key in keys if key.startswith(network)]
        way = sum((one[key].double() - one[f"initial.{key}"].double()).square().sum().item() for key in names)
        apart = sum((one[key].double() - other[key].double()).square().sum().item() for key in names)
        assert way > 0 and apart**0.5 <= OF_THE_WAY * way**0.5, network  # beside the way a wrong gradient shows


def assert_same_losses(folder: Path, one: Case, other: Case) -> None:
    assert_same_lines(*(metrics(folder / case.name / "run") for case in (one, other)))


def assert_same_lines(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right) == STEPS + 2  # two of them of validations
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=LOSSES, abs=LOSSES), a["step"]


@pytest.mark.parametrize("pair", [*ADAPTIVE_PAIRS, *ROUNDS_PAIRS, *ADAM_PAIRS], ids=names)
def test_the_same_images_with_the_same_augmentation_get_the_same_codes(folder: Path, pair: tuple[Case, Case]) -> None:
    for what in ("images", "codes"):
        one, other = (in_global_order(folder / case.name, case, what) for case in pair)
        assert torch.equal(one, other), what
    assert (
        len(in_global_order(folder / pair[0].name, pair[0], "codes").unique()) > 8
    )  # they have something to differ in


@pytest.mark.parametrize("pair", [*ADAPTIVE_PAIRS, *ROUNDS_PAIRS, *ADAM_PAIRS], ids=names)
def test_twenty_steps_lead_to_the_same_parameters_and_losses(folder: Path, pair: tuple[Case, Case]) -> None:
    """Tokenizer, its average, discriminator, codebook, EMA statistics, usage of the codes; by SGD, and by AdamW with
    decay, clipping and betas of its own."""
    one, other = (ranks(folder / case.name, case)[0] for case in pair)
    assert_same_parameters(one, other)
    assert_same_losses(folder, *pair)


@pytest.mark.parametrize("change", CHANGES, ids=names)
def test_a_run_resumed_on_another_number_of_processes_goes_on_from_the_same_image(
    folder: Path, change: tuple[Case, Case]
) -> None:
    _, after = change
    whole = Case(after.quantizer, "adaptive", "adamw", 1, 1)
    place = folder / f"{change[0].name}~{after.name}"
    expected = in_global_order(folder / whole.name, whole, "images")[CHANGED_AT:]
    assert torch.equal(in_global_order(place, after, "images"), expected)
    lines, whole_lines = metrics(place / "run"), metrics(folder / whole.name / "run")
    del lines[-2 - (STEPS - CHANGED_AT)]  # the validation at the end of its first part
    assert_same_lines(lines, whole_lines)


def test_a_run_on_three_processes_that_is_resumed_has_the_bits_of_the_uninterrupted_one(folder: Path) -> None:
    whole, broken = (folder / f"three-{name}" / "run" / "checkpoints" / "latest" for name in ("whole", "broken"))
    left, right = tensors(whole), tensors(broken)
    assert left.keys() == right.keys() and len(left) > 100
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("case", MANY, ids=names)
def test_all_processes_hold_the_same_bits(folder: Path, case: Case) -> None:
    one, *others = ranks(folder / case.name, case)
    for key in one.keys() - {"images", "codes"}:
        assert all(torch.equal(one[key], other[key]) for other in others), key


@pytest.mark.parametrize("case", MANY, ids=names)
def test_each_network_is_reduced_once_an_update(folder: Path, case: Case) -> None:
    """Counted by a communication hook. With two rounds the first sends nothing; R1 sends nothing of its own; the
    generator step sends nothing of the discriminator."""
    for rank in range(case.processes):
        record = json.loads((folder / case.name / f"{rank}.json").read_text())
        assert record["wire"] == {
            "tokenizer": [record["sizes"]["tokenizer"]] * STEPS,
            "discriminator": [0] * START + [record["sizes"]["discriminator"]] * (STEPS - START),
        }


def replaced_codes(folder: Path, case: Case) -> dict[int, int]:
    """step -> how many"""
    lines = metrics(folder / case.name / "run")
    return {line["step"]: line["reinitialised_codes"] for line in lines if "reinitialised_codes" in line}


@pytest.mark.parametrize("pair", REPLACING_PAIRS, ids=names)
def test_unused_codes_were_replaced(folder: Path, pair: tuple[Case, Case]) -> None:
    """So that the equal codebooks above say something about the draw."""
    one, other = (replaced_codes(folder, case) for case in pair)
    assert one == other and sum(one.values()) > 0
