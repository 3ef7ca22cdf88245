"""How long a training step of a config takes on this machine, and how much of the device's memory: measured with the
real step on random images, before there is a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.optim import AdamW

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import Config, DataConfig
from vqgan_accel.data.source import ImageSource
from vqgan_accel.data.views import TrainingViews
from vqgan_accel.losses.perceptual import perceptual_shell
from vqgan_accel.models.networks import build_discriminator, build_tokenizer
from vqgan_accel.training.steps import discriminator_backward, generator_backward

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
        return _measured(config, batch_size)
    except torch.cuda.OutOfMemoryError:
        pass  # the networks live on in the error's traceback until here
    torch.cuda.empty_cache()
    return None


def _measured(config: Config, batch_size: int) -> Timings:
    accelerator = start_accelerator(config.training.mixed_precision)
    device, d_config, size = accelerator.device, config.discriminator, config.data.image_size
    model, d_model, perceptual = build_tokenizer(config), build_discriminator(config), perceptual_shell(config)
    if d_model is not None and device.type == "cpu":  # laid out as training/setup.py does
        d_model.to(memory_format=torch.channels_last)
    if perceptual is not None:
        perceptual.to(memory_format=torch.channels_last).to(device)
    networks = [network for network in (model, d_model) if network is not None]
    prepared = [accelerator.prepare(network, AdamW(network.parameters(), lr=1e-6, fused=True)) for network in networks]
    tokenizer, discriminator = prepared[0][0], prepared[1][0] if d_model is not None else None
    images = torch.rand(batch_size, 3, size, size, device=device) * 2 - 1
    seeds = torch.zeros(batch_size, dtype=torch.int64)

    def step(adversarial: bool, with_r1: bool = False) -> None:
        judged = d_config if adversarial else None
        generated = generator_backward(
            accelerator, tokenizer, perceptual, discriminator if judged else None, images, seeds, config.losses, judged
        )
        if judged is not None and discriminator is not None and generated.fake_logits is not None:
            discriminator_backward(accelerator, discriminator, images, generated.fake_logits, judged, with_r1)
        for _, optimizer in prepared[: 2 if judged else 1]:
            optimizer.step()
            optimizer.zero_grad()
        model.quantizer.apply_update()

    def reconstruct() -> None:
        with torch.no_grad():
            model.eval()(images)
        model.train()

    memory = 0.0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    plain = _seconds(lambda: step(False), device)
    adversarial = _seconds(lambda: step(True), device) if d_config else plain
    with_r1 = _seconds(lambda: step(True, True), device) if d_config and d_config.r1_weight else adversarial
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
