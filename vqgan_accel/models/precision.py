"""Where float32 is meant as it is: what decides codes, scores, R1, and the weight of the adversarial loss.

Two things round it off behind one's back: autocast (bf16), and TF32, which torch lets cuDNN's convolutions use on
NVIDIA GPUs since Ampere: 10 bits of mantissa in place of 23 (docs/exactness.md has what that does).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from vqgan_accel.compat import tf32_switches


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on x's device. (The meta device, on which networks are counted, knows no autocast.)"""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@contextmanager
def ieee_float32(but_convolutions: bool = False) -> Iterator[None]:
    """No TF32 while it is open, in forward and backward passes, or only in convolutions; afterwards what was there
    before. It holds for the whole process. (Also a decorator.)"""
    switches = tf32_switches()
    before = [getattr(owner, name) for owner, name, _, _ in switches]
    for place, (owner, name, tf32, ieee) in enumerate(switches):
        setattr(owner, name, tf32 if place == 0 and but_convolutions else ieee)
    try:
        yield
    finally:
        for (owner, name, _, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def tf32_convolutions() -> bool:
    """Whether float32 convolutions may be rounded to TF32 here and now."""
    owner, name, tf32, _ = tf32_switches()[0]
    return getattr(owner, name) == tf32
