"""Sums and means over processes that are no-ops without torch.distributed, so that a model or a step is written once.

Every rank must call them in the same order.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum over ranks, the same bits on each; a new tensor, without gradient."""
    value = value.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(value)
    return value


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean over ranks, the same bits on each; a new tensor, without gradient."""
    return sum_over_processes(value) / num_processes()


def mean_over_processes_with_gradient(value: Tensor) -> Tensor:
    """Forward: the mean over ranks. Backward: the gradient goes to this rank's value unscaled.

    A loss of the mean is the same on every rank, and DDP averages the parameters' gradients over ranks; averaging the
    ranks' terms is just what the derivative of the mean asks for, so no communication is needed in the backward pass.
    """
    return value + (mean_over_processes(value) - value.detach())
