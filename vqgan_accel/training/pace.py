"""Where the time goes: does a step wait for images, and how long is it to the end?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from vqgan_accel.config import DataConfig
from vqgan_accel.training.plan import Plan
from vqgan_accel.words import duration

T = TypeVar("T")
BOTTLENECK = 0.1  # share of a step's time spent in waiting for images that is worth a warning
ENOUGH_STEPS = 20  # to judge by


class Pace:
    """Wall-clock means of this process since the last `report`. The first step of a run is left out: in it workers
    start and compilers run."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.first = True
        self.warned = False
        self.reported = time.perf_counter()  # when `report` was last called
        self.validation_seconds = 0.0  # that the last one took
        self._reset()

    def _reset(self) -> None:
        self.steps, self.step_seconds, self.data_seconds = 0, 0.0, 0.0

    def begin_step(self) -> None:
        self.started = time.perf_counter()

    def next(self, batches: Iterator[T]) -> T:
        """The next batch, and how long it took to come."""
        asked = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - asked
        return batch

    def end_step(self) -> None:
        assert self.started is not None
        self.step_seconds += time.perf_counter() - self.started
        self.steps += 1
        if self.first:
            self.first = False
            self._reset()

    @contextmanager
    def validation(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.validation_seconds = time.perf_counter() - begun

    def report(self) -> dict[str, float]:
        """Seconds a step: step_time, and data_time as the part of it in which the loop waited for images; and
        seconds, all that have passed since the last report, validations and checkpoints included."""
        steps, now = max(self.steps, 1), time.perf_counter()
        values = {"data_time": self.data_seconds / steps, "step_time": self.step_seconds / steps}
        values["seconds"], self.reported = now - self.reported, now
        self._reset()
        return values

    def time_left(self, plan: Plan, step: int, step_time: float) -> str:
        """In words, for a run that has done `step` steps and goes on at `step_time` seconds each; empty where nothing
        is known yet."""
        if not step_time or step == plan.total_steps:
            return ""
        validations = -(-plan.total_steps // plan.validate_every) - step // plan.validate_every
        left = (plan.total_steps - step) * step_time + validations * self.validation_seconds
        to_come = plan.discriminator_start is not None and step <= plan.discriminator_start < plan.total_steps
        return f"{'more than ' if to_come else ''}{duration(left)} left"

    def warning(self, data: DataConfig, backend: str) -> str | None:
        """What to change where the loader is the bottleneck; once a run. To be asked before `report`."""
        if self.warned or self.steps < ENOUGH_STEPS or self.data_seconds < BOTTLENECK * self.step_seconds:
            return None
        self.warned = True
        remedy = f"raise data.workers (now {data.workers})"
        if backend != "ffcv":
            remedy += ", or write betons of a resolution near data.image_size with `vqgan-accel make-beton` and set "
            remedy += "data.backend=ffcv"
        return (
            f"the loader is the bottleneck: {self.data_seconds / self.step_seconds:.0%} of a step's time goes into "
            f"waiting for images; {remedy}"
        )
