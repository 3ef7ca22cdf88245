"""What `vqgan-accel new` measures of a step: each kind of it, with all that it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reset_accelerate
from tiny import DISCRIMINATOR, tiny_config

from vqgan_accel.data.folder import FolderSource
from vqgan_accel.losses.perceptual import MobileNetDistance
from vqgan_accel.models.precision import tf32_convolutions
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.training import measure
from vqgan_accel.training.adversary import Adversary
from vqgan_accel.training.measure import REPEATS, Timings, measure_step, measure_views

PLAIN = ["tokenizer sees 4 images", "perceptual network", "optimizer"]
ADVERSARIAL = ["tokenizer sees 4 images", "perceptual network", "discriminator learns", "optimizer", "optimizer"]


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    yield
    reset_accelerate()


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each thing that was to be timed did, in one go; the n-th took n seconds."""
    each: list[list[str]] = []

    def watch(owner: Any, name: str, word: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if each:  # what comes before the first is not timed
                each[-1].append(word(*arguments))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    def learning(me: Adversary, *_: Any) -> str:
        return "discriminator learns" + (" with R1" if me.with_r1 else "") + (" alone" if me.phase == "alone" else "")

    def seconds(run: Callable[[], None], device: torch.device) -> float:
        each.append([])
        run()
        return float(len(each))

    watch(ImageTokenizer, "forward", lambda tokenizer, images, *_: f"tokenizer sees {len(images)} images")
    watch(MobileNetDistance, "forward", lambda *_: "perceptual network")
    watch(Adversary, "learn", learning)
    watch(torch.optim.AdamW, "step", lambda *_: "optimizer")
    monkeypatch.setattr(measure, "_seconds", seconds)
    return each


def config_with(folder: Path, discriminator: dict[str, Any] | None) -> Any:
    losses = {"perceptual_weight": 1.0, "perceptual_network": "mobilenet_v2"}
    return tiny_config(folder, data={"path": "x"}, losses=losses, discriminator=discriminator)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("discriminator", "timings", "steps"),
    [
        (None, (1, 1, 1, 2 / 4), [PLAIN]),
        (DISCRIMINATOR, (1, 2, 2, 3 / 4), [PLAIN, ADVERSARIAL]),
        (
            DISCRIMINATOR | {"r1_weight": 1.0},
            (1, 2, 3, 4 / 4),
            [PLAIN, ADVERSARIAL, [word.replace("learns", "learns with R1") for word in ADVERSARIAL]],
        ),
    ],
)
def test_each_kind_of_step_is_timed_with_all_that_it_does(
    discriminator: dict[str, Any] | None, timings: Any, steps: Any, done: list[list[str]], tmp_path: Path
) -> None:
    assert measure_step(config_with(tmp_path, discriminator), 4) == Timings(*timings, memory=0.0)
    assert done == [*steps, ["tokenizer sees 4 images"]]  # the last is validation's, for one image


@pytest.mark.parametrize("tf32", [True, False])
def test_it_is_measured_in_the_arithmetic_that_the_config_asks_for(
    tf32: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "_measured", lambda *_: tf32_convolutions())
    config = tiny_config(tmp_path, data={"path": "x"}, training={"tf32": tf32})
    assert measure_step(config, 4) is tf32


def test_what_does_not_fit_in_the_memory_of_a_gpu_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def too_large(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(measure, "_measured", too_large)
    assert measure_step(config_with(tmp_path, None), 4) is None


def test_of_all_tries_but_the_first_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [0.5, *(float(9 - number) for number in range(REPEATS))]
    marks = [mark for length in lengths for mark in (100.0, 100.0 + length)]
    monkeypatch.setattr(time, "perf_counter", lambda: marks.pop(0))
    assert measure._seconds(lambda: None, torch.device("cpu")) == min(lengths[1:]) and not marks


def test_a_view_takes_the_mean_of_those_of_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path).data
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 8)
    source = FolderSource(tmp_path / "images", "train")
    assert measure_views(source, config) == pytest.approx((8 + 1) / 8 / 7)
