"""data_time and step_time, by a clock that the test turns."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from vqgan_accel.config import Config, DataConfig, parse_config
from vqgan_accel.training.pace import ENOUGH_STEPS, Pace, Work, peak_tflops
from vqgan_accel.training.plan import make_plan
from vqgan_accel.training.tracking import log_line
from vqgan_accel.words import duration


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def batches(self, seconds: float) -> Iterator[int]:
        while True:
            self.now += seconds
            yield 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(pace: Pace, clock: Clock, steps: int, data: float, compute: float, rounds: int = 1) -> None:
    for _ in range(steps):
        pace.begin_step()
        for _ in range(rounds):
            pace.next(clock.batches(data))
        clock.now += compute
        pace.end_step()
        clock.now += 50  # a validation between two steps


def pace_of(backend: str = "folder", workers: int = 4, device: str = "cpu") -> Pace:
    work = Work(images=64, processes=2, gflop=3.0, gflop_adversarial=5.0)
    return Pace(torch.device(device), work, DataConfig(workers=workers), backend)


def times(pace: Pace) -> dict[str, float]:
    return {name: value for name, value in pace.report(False).items() if name in ("data_time", "step_time", "seconds")}


def test_times_are_means_over_the_steps_since_the_last_report_and_over_all_rounds(clock: Clock) -> None:
    pace = pace_of()
    run(pace, clock, 1, data=30, compute=9)  # the first step is not counted
    run(pace, clock, 4, data=0.25, compute=1.5, rounds=2)
    assert times(pace) == {"data_time": 0.5, "step_time": 2.0, "seconds": 39 + 4 * 2 + 5 * 50}
    run(pace, clock, 2, data=0, compute=1)
    assert times(pace) == {"data_time": 0.0, "step_time": 1.0, "seconds": 2 + 2 * 50}
    assert times(pace) == {"data_time": 0.0, "step_time": 0.0, "seconds": 0}


def test_images_and_arithmetic_a_second_are_those_of_the_mean_step(clock: Clock) -> None:
    pace = pace_of()
    run(pace, clock, 1, data=0, compute=1)
    assert "images_per_second" not in pace.report(True)  # nothing was timed yet
    run(pace, clock, 3, data=0.5, compute=1.5)
    plain = pace.report(adversarial=False)
    assert plain["images_per_second"] == 64 / 2.0
    assert plain["tflops"] == pytest.approx(3e-3 * 32 / 2.0)  # of each of the two devices
    run(pace, clock, 1, data=0, compute=4)
    assert pace.report(adversarial=True)["tflops"] == pytest.approx(5e-3 * 32 / 4.0)


def test_on_a_gpu_memory_and_the_share_of_its_own_rate_are_reported(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")  # 312 TFLOP/s
    pace = pace_of(device="cuda")
    assert "mfu" not in pace.report(False)
    run(pace, clock, 2, data=0, compute=0.001)
    values = pace.report(False)
    assert values["peak_memory"] == 3 and values["tflops"] == pytest.approx(3e-3 * 32 / 0.001)
    assert values["mfu"] == pytest.approx(values["tflops"] / 312)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    run(pace, clock, 1, data=0, compute=1)
    assert "mfu" not in pace.report(False)


@pytest.mark.parametrize(
    ("step_time", "data_time", "images", "words"),
    [
        (0.352, 0.0106, 91.2, "0.352 s a step (91 images/s), 3% of it for images"),
        (0.05, 0, 5120.4, "0.05 s a step (5,120 images/s)"),
        (3.2, 0.01, 1.25, "3.2 s a step (1.2 images/s)"),
    ],
)
def test_a_log_line_says_how_fast_it_goes(step_time: float, data_time: float, images: float, words: str) -> None:
    clock = {"step_time": step_time, "data_time": data_time, "images_per_second": images}
    assert log_line(20, 1000, {"total": 0.25}, clock, "5 s left") == f"step 20 of 1,000: loss 0.25; {words}; 5 s left"
    assert log_line(1, 1000, {"total": 0.25}, {"step_time": 0.0}, "") == "step 1 of 1,000: loss 0.25"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


@pytest.mark.parametrize(("backend", "remedy"), [("folder", "make-beton"), ("ffcv", "raise data.workers (now 3)")])
def test_the_warning_comes_once_and_says_what_to_change(clock: Clock, backend: str, remedy: str) -> None:
    pace = pace_of(backend, workers=3)
    run(pace, clock, 1 + ENOUGH_STEPS, data=1, compute=3)
    warning = pace.warning()
    assert warning is not None and "25% of a step's time" in warning and remedy in warning
    assert ("make-beton" in warning) == (backend != "ffcv")
    assert pace.warning() is None


def test_no_warning_where_steps_hardly_wait_or_were_too_few(clock: Clock) -> None:
    pace = pace_of()
    run(pace, clock, 100, data=1, compute=12)
    assert pace.warning() is None
    pace.report(False)
    run(pace, clock, ENOUGH_STEPS - 1, data=1, compute=0)
    assert pace.warning() is None


def test_the_time_left_counts_steps_and_validations(clock: Clock) -> None:
    pace, plan = pace_of(), make_plan(config(discriminator=None), num_images=8, num_processes=1)  # 100 steps
    assert pace.time_left(plan, 10, step_time=0) == ""  # nothing was measured yet
    assert pace.time_left(plan, 10, step_time=2) == "3 min 00 s left"
    for seconds in (900, 60):  # the last one counts
        with pace.validation():
            clock.now += seconds
    # validations after steps 30, 60, 90 and 100
    assert pace.time_left(plan, 10, step_time=2) == "7 min 00 s left"
    assert pace.time_left(plan, 95, step_time=2) == "1 min 10 s left"
    assert pace.time_left(plan, 100, step_time=2) == ""


def test_the_time_left_is_a_lower_bound_until_the_discriminator_has_taken_part(clock: Clock) -> None:
    plan = make_plan(config(discriminator={"start": "40 steps"}), num_images=8, num_processes=1)
    assert pace_of().time_left(plan, 40, step_time=1) == "more than 1 min 00 s left"
    assert pace_of().time_left(plan, 41, step_time=1) == "59 s left"
    plan = make_plan(config(discriminator={"start": "100 steps"}), num_images=8, num_processes=1)  # never
    assert pace_of().time_left(plan, 41, step_time=1) == "59 s left"


def config(discriminator: dict[str, str] | None) -> Config:
    training = {"max_steps": 100, "total_batch_size": 4, "validate_every": "30 steps"}
    return parse_config({"training": training, "discriminator": discriminator})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.354, "0.35 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (86400 * 2 + 3 * 3600 + 59, "2 d 3 h"),
    ],
)
def test_durations_are_told_in_their_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words
