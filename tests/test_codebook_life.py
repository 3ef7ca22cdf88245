"""How long codes live: the windows in which uses are counted, the rule for rare ones, rest of EMA codes, several
codebooks, and the key of former runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits, metrics, train_until
from tiny import tiny_config, tiny_quantizer
from torch import Tensor
from torch.optim import AdamW

from vqgan_accel.config import load_config, parse_config, save_config
from vqgan_accel.evaluation.measures.codes import codebook_usage, perplexity, usage_metrics
from vqgan_accel.models.quantizers import EMAQuantizer, StandardQuantizer, count_all_codes
from vqgan_accel.models.quantizers.base import Lookup
from vqgan_accel.models.quantizers.ema import RESTS_BELOW
from vqgan_accel.sections import Duration, Reinit
from vqgan_accel.training.codebook import CodebookUsage, rarely_used, reinitialise_rare
from vqgan_accel.training.loop import train
from vqgan_accel.training.plan import Plan, make_plan, usage_window

D = 4


# ---- when


@pytest.mark.parametrize(
    ("reinit_every", "epoch", "window"),
    [
        (None, 5, 5),  # nothing is replaced: epochs are reported
        (None, None, None),
        (5, 5, 5),
        (15, 5, 5),  # three epochs: the last of them counts
        (3, 5, 3),
        (10, 15, 10),
        (15, 10, 15),
        (7, None, 7),
    ],
)
def test_uses_are_counted_over_epochs_or_from_one_replacement_to_the_next(
    reinit_every: int | None, epoch: int | None, window: int | None
) -> None:
    assert usage_window(reinit_every, epoch) == window


def plan_of(reinit_every: str | None, num_images: int | None = 50, **training: Any) -> Plan:
    """5 steps an epoch"""
    quantizer = {"type": "ema", "reinit_every": reinit_every, "reinit_below": 0.25}
    values = {"max_steps": 40, "total_batch_size": 10, **training}
    config = parse_config({"data": {"image_size": 16}, "quantizer": quantizer, "training": values})
    return make_plan(config, num_images, 1)


@pytest.mark.parametrize(
    ("every", "reported", "replaced"),
    [
        (None, [5, 10, 15, 20, 25], []),
        ("1 epoch", [5, 10, 15, 20, 25], [5, 10, 15, 20, 25]),
        ("2 epochs", [5, 10, 15, 20, 25], [10, 20]),
        ("10 steps", [5, 10, 15, 20, 25], [10, 20]),  # that is two epochs
        ("3 steps", [3, 6, 9, 12, 15, 18, 21, 24], [3, 6, 9, 12, 15, 18, 21, 24]),
        ("0.4 epochs", [*range(2, 26, 2)], [*range(2, 26, 2)]),
        ("0.05 epochs", [*range(1, 26)], [*range(1, 26)]),  # a quarter of a step
        ("7 steps", [7, 14, 21], [7, 14, 21]),
    ],
)
def test_the_steps_after_which_uses_are_reported_and_codes_replaced(
    every: str | None, reported: list[int], replaced: list[int]
) -> None:
    plan = plan_of(every)
    assert [step for step in range(1, 26) if plan.reports_usage_at(step)] == reported
    assert [step + 1 for step in range(25) if plan.reinit_at(step)] == replaced
    for step in replaced:
        assert plan.reinit_at(step - 1) == (plan.config.quantizer.reinit_every, 0.25, "latents")


def test_a_stream_of_unknown_length_replaces_in_steps_and_reports_at_validations_where_it_never_does() -> None:
    steps = {"validate_every": "4 steps", "checkpoint_every": "9 steps"}
    plan = plan_of("6 steps", None, **steps)
    assert [step for step in range(1, 15) if plan.reports_usage_at(step)] == [6, 12]
    assert [step + 1 for step in range(15) if plan.reinit_at(step)] == [6, 12]
    plan = plan_of(None, None, **steps)
    assert [step for step in range(1, 15) if plan.reports_usage_at(step)] == [4, 8, 12]
    assert not any(plan.reinit_at(step) for step in range(40))
    with pytest.raises(ValueError, match=r"quantizer\.reinit_every is 2 epochs"):
        plan_of("2 epochs", None, **steps)


def test_every_zero_steps_is_refused() -> None:
    for never in ("0 steps", "0 epochs"):
        with pytest.raises(ValueError, match=r"every 0 steps; null means never"):
            plan_of(never)


@pytest.mark.seconds
def test_a_run_that_replaces_in_steps_says_so_at_those_steps_and_resumes(tmp_path: Path) -> None:
    """2 steps an epoch; between two replacements a checkpoint holds the uses so far."""
    quantizer = {"type": "standard", "reinit_every": "3 steps", "reinit_below": 0.5}
    training = {"max_steps": 7, "log_every": 1}
    whole = train(tiny_config(tmp_path / "whole", quantizer=quantizer, training=training))
    lines = {line["step"]: line for line in metrics(whole) if "l2" in line}
    assert [step for step, line in lines.items() if "recent_perplexity" in line] == [3, 6]
    assert [step for step, line in lines.items() if line.get("reinitialised_codes")] == [3, 6]
    assert not any("epoch_perplexity" in line for line in lines.values())
    config = tiny_config(tmp_path / "parts", quantizer=quantizer, training=training)
    with pytest.raises(BaseException, match=r"resume|4|1"):
        train_until(config, 5)
    parts = train(config, resume=True)
    assert_same_bits(whole / "checkpoints" / "latest", parts / "checkpoints" / "latest")


# ---- which


@pytest.mark.parametrize(
    ("below", "rare"),
    [
        (0.0, [1]),
        (0.04, [1]),  # the mean is 25: less than 1
        (0.05, [1, 2]),  # 1 is less than 1.25
        (0.2, [1, 2]),  # 5 is not less than 5
        (0.21, [1, 2, 3]),
        (0.99, [1, 2, 3]),
    ],
)
def test_codes_used_less_than_a_share_of_the_mean_are_rare(below: float, rare: list[int]) -> None:
    counts = torch.tensor([94, 0, 1, 5, 25, 25])
    assert rarely_used(counts, below).tolist() == rare


def test_rare_codes_are_replaced_and_those_near_the_mean_are_not() -> None:
    torch.manual_seed(0)
    quantizer, latents = StandardQuantizer(6, D, 0.25), torch.randn(4, D, 3, 2)
    before = quantizer.codebook.detach().clone()
    usage = CodebookUsage((6,), torch.device("cpu"))
    usage.counts += torch.tensor([94, 0, 1, 5, 25, 25])
    optimizer = AdamW(quantizer.parameters())
    for source in ("latents", "used_codes"):
        reinit = Reinit(Duration(1, "epochs"), 0.21, source)
        assert reinitialise_rare(quantizer, optimizer, usage, [latents], reinit, seed=1) == 3
        changed = (quantizer.codebook.detach() != before).any(1)
        assert changed.tolist() == [False, True, True, True, False, False]
    # drawn from the codes that stay: a rare one is nobody's source
    to_kept = torch.cdist(quantizer.codebook.detach()[1:4], before[[0, 4, 5]]).amin(1)
    assert to_kept.max() < 0.05 * before.std()


# ---- moving averages that rest


def step_with(quantizer: EMAQuantizer, latents: Tensor) -> None:
    quantizer(latents)
    quantizer.apply_update()


def near_the_first(quantizer: EMAQuantizer, seed: int) -> Tensor:
    """(4, D, 2, 2): latents that only choose code 0"""
    noise = 0.01 * torch.randn(4, D, 2, 2, generator=torch.Generator().manual_seed(seed))
    return quantizer.codebook_vectors()[0].view(1, D, 1, 1) + noise


def resting() -> tuple[EMAQuantizer, Tensor]:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(8, D, 0.25, decay=0.99, epsilon=1e-5, init="sphere")
    before = quantizer.codebook_vectors().clone()
    for step in range(3000):
        step_with(quantizer, near_the_first(quantizer, step))
    return quantizer, before


@pytest.mark.seconds
def test_an_ema_code_that_nobody_uses_rests_where_it_is_and_comes_back_at_its_first_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its count stays at about 0.01: the smoothing moves it by epsilon / 0.01, one part in a thousand. Without the
    rule the count falls to 0.99^3000 = 8e-14 and epsilon takes the code to the origin."""
    quantizer, before = resting()
    unused = slice(1, None)
    moved = (quantizer.codebook_vectors() - before)[unused].norm(dim=1) / before[unused].norm(dim=1)
    assert moved.max() < 0.002
    counts = quantizer.counts[unused]
    assert (counts < RESTS_BELOW).all() and (counts > 0.98 * RESTS_BELOW).all()
    assert quantizer.counts[0].item() == pytest.approx(16, rel=1e-3)

    # used once: a step of the moving average, from the count at which it rested
    new = before[3] + 0.1
    weight = 0.99 * quantizer.counts[3]
    sums = 0.99 * quantizer.sums[3] + 0.01 * new
    step_with(quantizer, new.view(1, D, 1, 1))
    torch.testing.assert_close(quantizer.counts[3], weight + 0.01)
    torch.testing.assert_close(quantizer.codebook_vectors()[3], sums / (weight + 0.01), rtol=2e-3, atol=0)
    half_way = (quantizer.codebook_vectors()[3] - before[3]).norm() / (new - before[3]).norm()
    assert half_way.item() == pytest.approx(0.01 / (0.0199), rel=0.02)
    for step in range(200):
        step_with(quantizer, torch.cat([new.view(1, D, 1, 1), near_the_first(quantizer, step)[:, :, :1, :1]]))
    torch.testing.assert_close(quantizer.codebook_vectors()[3], new, rtol=0, atol=2e-3)

    monkeypatch.setattr("vqgan_accel.models.quantizers.ema.RESTS_BELOW", 0.0)
    quantizer, before = resting()
    moved = (quantizer.codebook_vectors() - before)[unused].norm(dim=1) / before[unused].norm(dim=1)
    assert moved.min() > 0.5


def test_whether_a_code_rests_is_decided_by_the_uses_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = EMAQuantizer(2, D, 0.25, decay=0.9, epsilon=1e-5)
    quantizer.counts.copy_(torch.tensor([5.0, 0.005]))
    other = {2: torch.tensor([0.0, 3.0]), 2 * D: torch.ones(2, D)}
    monkeypatch.setattr("vqgan_accel.models.quantizers.ema.sum_over_processes", lambda mine: mine + other[mine.numel()])
    quantizer.apply_update()
    torch.testing.assert_close(quantizer.counts, torch.tensor([4.5, 0.0045 + 0.3]))


# ---- several codebooks


def test_codes_of_several_codebooks_are_counted_one_after_another() -> None:
    codes = torch.tensor([[[[0, 1]], [[3, 3]]], [[[0, 0]], [[2, 3]]]])  # (2, 2, 1, 2)
    assert count_all_codes(codes, (2, 4)).tolist() == [3, 1, 0, 0, 1, 3]
    assert count_all_codes(codes[:, 1], (4,)).tolist() == [0, 0, 1, 3]
    usage = CodebookUsage((2, 4), torch.device("cpu"))
    usage.add(codes)
    usage.apply_update()
    quantizer: Any = None
    assert usage.of(Lookup(quantizer, (0,), codes)).tolist() == [3, 1]
    assert usage.of(Lookup(quantizer, (1,), codes)).tolist() == [0, 0, 1, 3]
    shared = CodebookUsage((4, 4), torch.device("cpu"))  # one codebook at two places
    shared.add(codes)
    shared.apply_update()
    assert shared.of(Lookup(quantizer, (0, 1), codes)).tolist() == [3, 1, 1, 3]


def test_the_perplexity_of_several_codebooks_is_that_of_a_code_of_theirs_on_average() -> None:
    counts = torch.tensor([4, 4, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    found = usage_metrics(counts, (2, 2, 8))
    assert found == {
        "perplexity": 0.0,
        "codebook_usage": pytest.approx(50.0),
        "perplexity_1": pytest.approx(2.0),
        "perplexity_2": 0.0,
        "perplexity_3": pytest.approx(4.0),
        "codebook_usage_1": 100.0,
        "codebook_usage_2": 0.0,
        "codebook_usage_3": 50.0,
    }
    two = usage_metrics(counts[[0, 1, 4, 5, 6, 7]], (2, 4))
    assert two["perplexity"] == pytest.approx(math.sqrt(2 * 4))
    # bits add up: log2 of it times the number of codebooks are the bits of a position
    assert 2 * math.log2(two["perplexity"]) == pytest.approx(1 + 2)
    one = usage_metrics(counts, (12,))
    assert one == {"perplexity": perplexity(counts), "codebook_usage": codebook_usage(counts)}


# ---- the key of former runs


def test_the_former_key_is_still_read_as_whole_epochs(tmp_path: Path) -> None:
    for former, every in ((3, Duration(3, "epochs")), (None, None)):
        section = tiny_quantizer("ema", reinit_every_epochs=former)
        assert section.reinit_every == every
        assert section == tiny_quantizer("ema", reinit_every=None if every is None else str(every))
    assert "reinit_every_epochs" not in section.model_dump()
    config = tiny_config(tmp_path, quantizer={"reinit_every": "2 epochs"})
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "reinit_every: 2 epochs" in text
    (tmp_path / "config.yaml").write_text(text.replace("reinit_every: 2 epochs", "reinit_every_epochs: 2"))
    assert load_config(tmp_path / "config.yaml") == config
    overridden = load_config(tmp_path / "config.yaml", ["quantizer.reinit_every_epochs=4"])
    assert str(overridden.quantizer.reinit.every) == "4 epochs"


@pytest.mark.parametrize("former", [2, None])
def test_both_keys_are_refused(former: int | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reinit_every_epochs is the former name of reinit_every: give one of them"):
        tiny_quantizer("ema", reinit_every_epochs=former, reinit_every="3 steps")
    config = tiny_config(tmp_path, quantizer={"reinit_every": "2 epochs"})
    save_config(config, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="give one of them"):
        load_config(tmp_path / "config.yaml", ["quantizer.reinit_every_epochs=4"])


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2 epochs and a half"])
def test_a_former_value_that_made_no_sense_still_makes_none(wrong: object) -> None:
    with pytest.raises(ValueError):
        tiny_quantizer("ema", reinit_every_epochs=wrong)
