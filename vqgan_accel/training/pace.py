"""Where the time goes: does a step wait for images, how much of the device does it use, how long is it to the end?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from vqgan_accel.config import DataConfig
from vqgan_accel.training.plan import Plan
from vqgan_accel.words import duration

T = TypeVar("T")
BOTTLENECK = 0.1  # share of a step's time spent in waiting for images that is worth a warning
ENOUGH_STEPS = 20  # to judge by
# What a GPU's data sheet says it can do in bfloat16 without sparsity, by a part of the name that torch gives it.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}


class Work(NamedTuple):
    """What a step asks of each device."""

    images: int  # per optimizer step, of all processes
    processes: int
    gflop: float  # an image, in a step without the discriminator
    gflop_adversarial: float  # and with it


class Pace:
    """Wall-clock means of this process since the last `report`. The first step of a run is left out: in it workers
    start and compilers run."""

    def __init__(self, device: torch.device, work: Work, data: DataConfig, backend: str) -> None:
        self.device, self.work, self.data, self.backend = device, work, data, backend
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

    def report(self, adversarial: bool) -> dict[str, float]:
        """Seconds a step: step_time, and data_time as the part of it in which the loop waited for images; and
        seconds, all that have passed since the last report, validations and checkpoints included.

        Where a step has been timed: images_per_second of all processes; tflops, the arithmetic that the networks'
        forward and backward passes need, of each device; mfu, what share that is of the device's own rate in bfloat16,
        where it is known (`PEAK_TFLOPS`). On a GPU also peak_memory, GiB, the most that tensors have taken there.
        """
        steps, now = max(self.steps, 1), time.perf_counter()
        values = {"data_time": self.data_seconds / steps, "step_time": self.step_seconds / steps}
        values["seconds"], self.reported = now - self.reported, now
        if values["step_time"]:
            values["images_per_second"] = self.work.images / values["step_time"]
            gflop = self.work.gflop_adversarial if adversarial else self.work.gflop
            values["tflops"] = values["images_per_second"] / self.work.processes * gflop / 1e3
        if self.device.type == "cuda":
            values["peak_memory"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            if "tflops" in values and (peak := peak_tflops(torch.cuda.get_device_name(self.device))):
                values["mfu"] = values["tflops"] / peak
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

    def warning(self) -> str | None:
        """What to change where the loader is the bottleneck; once a run. To be asked before `report`."""
        if self.warned or self.steps < ENOUGH_STEPS or self.data_seconds < BOTTLENECK * self.step_seconds:
            return None
        self.warned = True
        remedy = f"raise data.workers (now {self.data.workers})"
        if self.backend != "ffcv":
            remedy += ", or write betons of a resolution near data.image_size with `vqgan-accel make-beton` and set "
            remedy += "data.backend=ffcv"
        return (
            f"the loader is the bottleneck: {self.data_seconds / self.step_seconds:.0%} of a step's time goes into "
            f"waiting for images; {remedy}"
        )


def peak_tflops(name: str) -> float | None:
    """Of a GPU by its name; None where it is not known."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
