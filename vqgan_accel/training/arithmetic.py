"""How a run's numbers are rounded and added up on a GPU: as its config says, whatever torch's defaults are.

docs/exactness.md lists what of a step adds in no fixed order there, and what the settings cost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vqgan_accel.config import TrainingConfig
from vqgan_accel.models.precision import ieee_float32
from vqgan_accel.words import either

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when it is first used
WORKSPACES = (":4096:8", ":16:8")  # with which it is deterministic


@contextmanager
def arithmetic(training: TrainingConfig) -> Iterator[None]:
    """training.tf32 and training.deterministic, for the whole process, while it is open."""
    with ieee_float32(but_convolutions=training.tf32), deterministic_algorithms(training.deterministic):
        yield


@contextmanager
def deterministic_algorithms(asked: bool) -> Iterator[None]:
    """If `asked`: what adds in no fixed order is replaced while it is open, and what cannot be raises RuntimeError.
    ValueError where the environment forbids it. To be entered before the GPU is used."""
    if not asked:
        yield
        return
    if (workspace := os.environ.setdefault(WORKSPACE, WORKSPACES[0])) not in WORKSPACES:
        raise ValueError(
            f"training.deterministic: {WORKSPACE} is {workspace}, with which cuBLAS is not; unset it, or set it to "
            f"{either(WORKSPACES)}"
        )
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
