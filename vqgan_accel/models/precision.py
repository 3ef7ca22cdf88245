"""Where autocast must not reach: what decides codes, R1, and the weight of the adversarial loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on x's device. (The meta device, on which networks are counted, knows no autocast.)"""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
