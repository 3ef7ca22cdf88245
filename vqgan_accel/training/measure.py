"""How long a training step of a config takes on this machine, and how much of the device's memory: measured with the
real step on random images, before there is a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import Config, DataConfig
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.views import TrainingViews
from vqgan_accel.losses.perceptual import perceptual_shell
from vqgan_accel.models.build import build_discriminator, build_tokenizer
from vqgan_accel.models.precision import ieee_float32
from vqgan_accel.training.arithmetic import arithmetic
from vqgan_accel.training.networks import Built, build_terms, prepare_networks
from vqgan_accel.training.plan import Phase
from vqgan_accel.training.round import tokenizer_backward

REPEATS = 5  # of each kind of step, of which the fastest counts: other programs only make them slower
VIEW_SECONDS = 1.0  # of decoding


class Timings(NamedTuple):
    """Seconds on one process."""

    plain: float  # a step before the discriminator starts
    adversarial: float  # a step afterwards
    with_r1: float  # such a step to which R1 is applied
    forward: float  # validation, for one image
    memory: float  # share of the device's memory at its peak; 0 on a CPU


def measure_step(config: Config, batch_size: int) -> Timings | None:
    """Of `batch_size` images on this process, perceptual network and optimizers included. None where they do not fit
    in the GPU's memory.

    The perceptual network has random weights, which cost what its own do.
    """
    try:
        with arithmetic(config.training):
            return _measured(config, batch_size)
    except torch.cuda.OutOfMemoryError:
        pass  # the networks live on in the error's traceback until here
    torch.cuda.empty_cache()
    return None


def _measured(config: Config, batch_size: int) -> Timings:
    accelerator = start_accelerator(config.training.mixed_precision, config.training.timeout_minutes)
    device, d_config, size = accelerator.device, config.discriminator, config.data.image_size
    built = Built(build_tokenizer(config), build_discriminator(config), perceptual_shell(config), build_terms(config))
    networks = prepare_networks(built, config, accelerator)
    images = torch.rand(batch_size, 3, size, size, device=device) * 2 - 1
    seeds = (0,) * batch_size

    def step(phase: Phase, with_r1: bool = False) -> None:
        adversary = networks.adversary if phase != "absent" else None
        if adversary is not None:
            adversary.phase, adversary.with_r1 = phase, with_r1
        made = tokenizer_backward(
            accelerator, networks.tokenizer, networks.reconstruction_loss, adversary, images, seeds
        )
        if adversary is not None and made.verdict is not None:
            adversary.learn(images, made.verdict)
        for learner in networks.learners[: 2 if adversary else 1]:
            learner.optimizer.step()
            learner.optimizer.zero_grad()
        built.tokenizer.quantizer.apply_update()

    def reconstruct() -> None:
        with torch.no_grad(), ieee_float32():
            built.tokenizer.eval()(images)
        built.tokenizer.train()

    memory = 0.0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    plain = _seconds(lambda: step("absent"), device)
    adversarial = _seconds(lambda: step("teaching"), device) if d_config else plain
    with_r1 = _seconds(lambda: step("teaching", True), device) if d_config and d_config.r1_weight else adversarial
    forward = _seconds(reconstruct, device) / batch_size
    if device.type == "cuda":
        memory = torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
    return Timings(plain, adversarial, with_r1, forward, memory)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one allocates, and looks for the fastest kernels


def measure_views(source: ImageSource, config: DataConfig) -> float:
    """Seconds that one loader process takes for a training view: reading, decoding, cropping, resizing."""
    views = TrainingViews(source, config.model_copy(update={"on_error": "skip"}), seed=0)
    start, number = time.perf_counter(), 0
    while time.perf_counter() < start + VIEW_SECONDS:
        views[0, number * 997 % len(source)]  # from all over it
        number += 1
    return (time.perf_counter() - start) / number
