"""Where a step's time goes: does it wait for images?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from vqgan_accel.config import DataConfig

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

    def report(self) -> dict[str, float]:
        """Seconds a step: step_time, and data_time as the part of it in which the loop waited for images."""
        steps = max(self.steps, 1)
        values = {"data_time": self.data_seconds / steps, "step_time": self.step_seconds / steps}
        self._reset()
        return values

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
