"""What is due at which step, against tables that were worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runs import metrics
from tiny import DISCRIMINATOR, tiny_config

from vqgan_accel.config import Config, parse_config
from vqgan_accel.run_folder import checkpoints
from vqgan_accel.training.loop import train
from vqgan_accel.training.plan import Plan, make_plan


class Due(NamedTuple):
    learning_rate: float
    adversarial: bool  # the discriminator learns
    teaches: bool  # and the tokenizer from it
    r1: bool
    reports_usage: bool
    reinit: str | None  # its source
    gumbel: tuple[float, float] | None  # temperature, cost of the KL loss


def due(plan: Plan, step: int) -> Due:
    return Due(
        plan.learning_rate_at(step),
        plan.phase_at(step) != "absent",
        plan.phase_at(step) == "teaching",
        plan.r1_at(step),
        plan.reports_usage_at(step + 1),
        reinit.source if (reinit := plan.reinit_at(step)) else None,
        tuple(plan.quantizer_at(step).values()) or None,
    )


def assert_due(plan: Plan, table: dict[int, Due]) -> None:
    for step, expected in [*table.items(), *reversed(table.items())]:  # in any order: they depend on the step alone
        actual = due(plan, step)
        assert actual[1:-1] == expected[1:-1], step
        assert actual.learning_rate == pytest.approx(expected.learning_rate, rel=1e-8), step
        assert (actual.gumbel or ()) == pytest.approx(expected.gumbel or (), rel=1e-8, abs=1e-12), step


def config_of(training: dict[str, Any], **sections: dict[str, Any]) -> Config:
    return parse_config({"data": {"image_size": 16}, "training": training, **sections})


NO, YES = False, True


def test_a_plan_in_epochs() -> None:
    """45 images in batches of 10 are 4 steps an epoch; 2.7 epochs are 10.8 steps, to the nearest 11. The peak is 0.2
    sqrt(10/40) = 0.1, and the rate 0.02 + 0.04 (1 + cos(pi step / 8)), halved in the first step."""
    config = config_of(
        {
            "max_epochs": 2.7,
            "total_batch_size": 10,
            "base_lr": 0.2,
            "base_batch_size": 40,
            "lr_warmup": "0.5 epochs",
            "lr_decay": "2 epochs",
            "lr_final_ratio": 0.2,
            "validate_every": "0.6 epochs",
            "checkpoint_every": "0.1 epochs",
        },
        quantizer={"type": "ema", "reinit_every": "2 epochs"},
        discriminator=DISCRIMINATOR | {"start": "0.75 epochs", "warmup": "0.5 epochs", "r1_weight": 1.0, "r1_every": 3},
    )
    plan = make_plan(config, num_images=45, num_processes=1)
    assert (plan.steps_per_epoch, plan.total_steps, plan.batch_size, plan.rounds) == (4, 11, 10, 1)
    assert (plan.validate_every, plan.checkpoint_every) == (2, 1)  # 2.4 and 0.4 steps
    table = {
        #       rate          adv. teach r1  epoch reinit
        0: Due(0.05, NO, NO, NO, NO, None, None),
        1: Due(0.09695518130, NO, NO, NO, NO, None, None),
        2: Due(0.08828427125, NO, NO, NO, NO, None, None),
        3: Due(0.07530733729, YES, NO, YES, YES, None, None),
        4: Due(0.06, YES, NO, NO, NO, None, None),
        5: Due(0.04469266271, YES, YES, NO, NO, None, None),
        6: Due(0.03171572875, YES, YES, YES, NO, None, None),
        7: Due(0.02304481870, YES, YES, NO, YES, "latents", None),
        8: Due(0.02, YES, YES, NO, NO, None, None),
        9: Due(0.02, YES, YES, YES, NO, None, None),
        10: Due(0.02, YES, YES, NO, NO, None, None),
    }
    assert_due(plan, table)


def test_a_plan_in_steps_on_two_processes_in_two_rounds() -> None:
    """The peak is 0.02 x 8/16, and the rate 0.005 (1 + cos(pi step / 5)) in quarters up to the fourth step; the
    temperature 0.2 + 0.4 (1 + cos(pi step / 4)); the cost 0.25 (1 - cos(pi step / 3))."""
    config = config_of(
        {
            "max_steps": 5,
            "max_epochs": 3,  # 36 steps: the sooner counts
            "total_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "base_lr": 0.02,
            "base_batch_size": 16,
            "lr_scaling": "linear",
            "lr_warmup": "4 steps",
            "lr_final_ratio": 0.0,
            "validate_every": "3 steps",
            "checkpoint_every": "7 steps",
        },
        quantizer={
            "type": "gumbel",
            "temperature_start": 1.0,
            "temperature_end": 0.2,
            "temperature_decay": "4 steps",
            "kl_cost": 0.5,
            "kl_warmup": "3 steps",
        },
        discriminator=DISCRIMINATOR | {"start": "1 step", "r1_weight": 0.1, "r1_every": 2},
    )
    plan = make_plan(config, num_images=100, num_processes=2)
    assert (plan.steps_per_epoch, plan.total_steps, plan.batch_size, plan.rounds) == (12, 5, 2, 2)
    assert (plan.validate_every, plan.checkpoint_every) == (3, 7)
    table = {
        #       rate          adv. teach r1  epoch reinit
        0: Due(0.0025, NO, NO, NO, NO, None, (1.0, 0.0)),
        1: Due(0.004522542486, YES, YES, YES, NO, None, (0.8828427125, 0.125)),
        2: Due(0.004908813729, YES, YES, NO, NO, None, (0.6, 0.375)),
        3: Due(0.003454915028, YES, YES, YES, NO, None, (0.3171572875, 0.5)),
        4: Due(0.0009549150281, YES, YES, NO, NO, None, (0.2, 0.5)),
    }
    assert_due(plan, table)


def test_a_plan_for_a_stream_of_unknown_length_at_a_constant_rate() -> None:
    training = {"max_steps": 3, "base_lr": 3e-4, "base_batch_size": 1, "lr_scaling": "none", "lr_final_ratio": 1.0}
    every = {"validate_every": "2 steps", "checkpoint_every": "2 steps", "total_batch_size": 8}
    plan = make_plan(config_of(training | every), num_images=None, num_processes=4)
    assert (plan.steps_per_epoch, plan.total_steps, plan.batch_size) == (None, 3, 2)
    assert_due(plan, {step: Due(3e-4, NO, NO, NO, step == 1, None, None) for step in range(3)})  # with validations


def test_a_plan_in_the_middle_of_a_long_run() -> None:
    """1,000 steps of 100 an epoch, from 1e-3 to a tenth of it: 1e-4 + 4.5e-4 (1 + cos(pi step / 1000))."""
    config = config_of(
        {"max_epochs": 10, "total_batch_size": 10, "base_lr": 1e-3, "base_batch_size": 10},
        quantizer={"type": "standard", "reinit_every": "3 epochs", "reinit_from": "used_codes"},
        discriminator=DISCRIMINATOR | {"start": "1 epoch", "warmup": "1 epoch", "r1_weight": 1.0},  # every 16 steps
    )
    plan = make_plan(config, num_images=1009, num_processes=1)
    assert (plan.total_steps, plan.validate_every, plan.checkpoint_every) == (1000, 100, 100)
    table = {
        #         rate         adv. teach r1  epoch reinit
        99: Due(9.784101821e-4, NO, NO, NO, YES, None, None),
        100: Due(9.779754323e-4, YES, NO, YES, NO, None, None),
        116: Due(9.704480241e-4, YES, NO, YES, NO, None, None),
        199: Due(9.148868114e-4, YES, NO, NO, YES, None, None),
        200: Due(9.140576475e-4, YES, YES, NO, NO, None, None),
        250: Due(8.681980515e-4, YES, YES, NO, NO, None, None),
        299: Due(8.156457772e-4, YES, YES, NO, YES, "used_codes", None),
        500: Due(5.5e-4, YES, YES, YES, NO, None, None),
        599: Due(4.122875610e-4, YES, YES, NO, YES, "used_codes", None),
        899: Due(1.224635414e-4, YES, YES, NO, YES, "used_codes", None),
        999: Due(1.000022207e-4, YES, YES, NO, YES, None, None),
    }
    assert_due(plan, table)


@pytest.mark.parametrize("discriminator", [DISCRIMINATOR, DISCRIMINATOR | {"r1_weight": 1.0, "start": "9 steps"}])
def test_r1_is_never_due_without_a_weight_or_before_its_discriminator(discriminator: dict[str, Any]) -> None:
    plan = make_plan(config_of({"max_steps": 9, "total_batch_size": 2}, discriminator=discriminator), 20, 1)
    assert not any(plan.r1_at(step) for step in range(9))


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_epochs": 2.7}, 11),  # 10.8
        ({"max_epochs": 2.6}, 10),  # 10.4
        ({"max_epochs": 0.15}, 1),  # 0.6
        ({"max_epochs": 2, "max_steps": 9}, 8),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_steps": 50}, 50),
    ],
)
def test_training_ends_at_the_nearest_step_of_whichever_limit_comes_first(limits: dict[str, Any], steps: int) -> None:
    assert make_plan(config_of({"total_batch_size": 10, **limits}), num_images=45, num_processes=1).total_steps == steps


def test_a_discriminator_that_would_start_when_training_ends_is_refused() -> None:
    """Where the end is given in steps, which a quick try shortens, the banner tells it."""
    training = {"total_batch_size": 10, "max_epochs": 2}
    for start in ("2 epochs", "9 steps"):
        config = config_of(training, discriminator=DISCRIMINATOR | {"start": start})
        with pytest.raises(ValueError, match=r"start \(step [89]\) is not before training ends \(step 8\)"):
            make_plan(config, num_images=45, num_processes=1)
    config = config_of(training, discriminator=DISCRIMINATOR | {"start": "7 steps"})
    assert make_plan(config, num_images=45, num_processes=1).discriminator_start == 7


@pytest.mark.seconds
def test_a_run_validates_and_saves_when_it_is_due_and_at_its_end(tmp_path: Path) -> None:
    every = {"validate_every": "3 steps", "checkpoint_every": "2 steps", "keep_checkpoints": 9}
    run = train(tiny_config(tmp_path, training={"max_steps": 7, "log_every": 4, **every}))
    assert [line["step"] for line in metrics(run) if "validation/l2" in line] == [3, 6, 7]
    # 3 was the best so far; a line of the losses comes with every second step too, for an epoch ends there
    assert [int(path.name.removeprefix("step_")) for path in checkpoints(run)] == [2, 3, 4, 6, 7]
    assert [line["step"] for line in metrics(run) if "l2" in line] == [2, 4, 6, 7]


def test_what_comes_more_often_than_steps_comes_with_each() -> None:
    """A tenth of an epoch of 4 steps is no step."""
    often = {"validate_every": "0.1 epochs", "checkpoint_every": "0.1 epochs"}
    plan = make_plan(config_of({"max_epochs": 1, "total_batch_size": 10, **often}), 45, 1)
    assert (plan.validate_every, plan.checkpoint_every) == (1, 1)
    assert [plan.validates_at(step) and plan.saves_at(step) for step in (1, 2, 3, 4)] == [True] * 4
