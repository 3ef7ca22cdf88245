"""What a run says before its first step: lines that were worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import DISCRIMINATOR

from vqgan_accel.config import Config, parse_config
from vqgan_accel.training import banner
from vqgan_accel.training.plan import make_plan


@pytest.fixture(autouse=True)
def without_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banner, "description_lines", lambda summary: ["what describe says"])


def config_of(training: dict[str, Any], **sections: Any) -> Config:
    return parse_config({"output_dir": "runs/x", "data": {"image_size": 16}, "training": training, **sections})


def accelerator_on(device: str, precision: str) -> Any:
    return SimpleNamespace(device=torch.device(device), mixed_precision=precision)


def lines(
    capsys: pytest.CaptureFixture[str],
    config: Config,
    images: int | None = 64,
    processes: int = 1,
    accelerator: Any = None,
    checkpoint: Path | None = None,
) -> list[str]:
    accelerator = accelerator or accelerator_on("cpu", "no")
    step = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
    banner.show_banner(accelerator, make_plan(config, images, processes), step, checkpoint, {})
    return capsys.readouterr().out.splitlines()


def line(found: list[str], title: str) -> str:
    return next(text for text in found if text.startswith(title)).removeprefix(title).strip()


def test_every_number_that_was_derived_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """16 images a step on 2 processes in 4 rounds are 2; 64 are 4 steps an epoch; sqrt(16/64) of 0.2 is 0.1."""
    config = config_of(
        {
            "max_epochs": 9,
            "max_steps": 16,
            "total_batch_size": 16,
            "gradient_accumulation_steps": 4,
            "base_lr": 0.2,
            "base_batch_size": 64,
            "lr_warmup": "3 steps",
            "lr_decay": "12 steps",
            "lr_final_ratio": 0.25,
            "log_every": 5,
            "validate_every": "6 steps",
            "checkpoint_every": "7 steps",
        },
        discriminator=DISCRIMINATOR | {"start": "2 steps", "warmup": "3 steps"},
    )
    checkpoint = Path("runs/x/checkpoints/step_00000004")
    assert lines(capsys, config, 64, 2, accelerator_on("cpu", "bf16"), checkpoint) == [
        "output             runs/x, resuming from step_00000004",
        f"processes          2 on cpu, mixed precision bf16, torch {torch.__version__}",
        "what describe says",
        "batch              16 = 2 processes x 4 rounds x 2 images",
        "data               64 training images, 4 steps per epoch; backend folder",
        "training           steps 4 to 16 (4.0 epochs)",
        "learning rate      0.1 = 0.2 x sqrt of 16/64; warm-up 3 steps, cosine to 0.025 over 12",
        "adversarial        from step 2, reaching the tokenizer after 3 more",
        "every              5 steps a log line, 6 a validation, 7 a checkpoint",
    ]


def test_of_a_stream_of_unknown_length_nothing_is_counted_in_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    every = {"validate_every": "2 steps", "checkpoint_every": "2 steps"}
    data = {"image_size": 16, "path": "user/photographs", "backend": "hub", "streaming": True}
    found = lines(capsys, config_of({"max_steps": 9, "total_batch_size": 64, **every}, data=data), images=None)
    assert line(found, "output") == "runs/x"
    assert line(found, "data") == "an unknown number of training images; backend hub, streaming"
    assert line(found, "training") == "steps 0 to 9"


def test_images_that_are_divided_by_their_names_are_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"image_size": 16, "train_split": "all", "validation_fraction": 0.05, "validation_group": "folder"}
    found = lines(capsys, config_of({"max_steps": 9, "total_batch_size": 8}, data=data), images=6400)
    assert line(found, "data") == (
        "6,400 training images, 800 steps per epoch; validation is 0.05 of data.train_split all, by a hash of each "
        "folder's name; backend folder"
    )


@pytest.mark.parametrize(
    ("discriminator", "said"),
    [
        (None, "off"),
        ({}, "from step 0"),
        ({"start": "9 steps"}, "from step 9"),
        ({"start": "10 steps"}, "NEVER: discriminator.start is step 10, and training ends at step 10"),
        ({"start": "4 steps", "warmup": "5 steps"}, "from step 4, reaching the tokenizer after 5 more"),
        (
            {"start": "4 steps", "warmup": "6 steps"},
            "from step 4, NEVER reaching the tokenizer: with discriminator.warmup that is step 10, and training ends "
            "at step 10",
        ),
    ],
)
def test_a_discriminator_that_comes_too_late_is_told(
    discriminator: dict[str, str] | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section = None if discriminator is None else DISCRIMINATOR | discriminator
    config = config_of({"max_steps": 10, "total_batch_size": 8}, discriminator=section)
    assert line(lines(capsys, config), "adversarial") == said


@pytest.mark.parametrize(
    ("batch", "scaling", "factor"),
    [(16, "sqrt", None), (14, "sqrt", 0.234), (1024, "linear", None), (1280, "linear", 5), (4096, "sqrt", None)],
)
def test_a_learning_rate_far_from_where_its_rule_was_tried_is_told(
    batch: int, scaling: str, factor: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = lines(capsys, config_of({"max_steps": 9, "total_batch_size": batch, "lr_scaling": scaling}), images=9999)
    notes = [text.strip() for text in found if "NOTE" in text]
    assert notes == (
        []
        if factor is None
        else [
            f"NOTE: that is {factor} x training.base_lr, far from where the rule was tried; for a batch of {batch} set "
            "base_lr yourself, with training.lr_scaling=none"
        ]
    )


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "told"),
    [
        ("cuda", "no", False, True),
        ("cuda", "no", True, False),
        ("cuda", "bf16", False, False),
        ("cpu", "no", False, False),
    ],
)
def test_slow_float32_convolutions_are_told_where_there_is_something_faster(
    device: str, precision: str, tf32: bool, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of({"max_steps": 9, "total_batch_size": 64, "tf32": tf32})
    found = lines(capsys, config, accelerator=accelerator_on(device, precision))
    assert any("NOTE: float32 convolutions" in text for text in found) == told
