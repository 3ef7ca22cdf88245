"""Sums, means and decisions over processes that are no-ops without torch.distributed, so that a model or a step is
written once.

Every rank must call them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqgan_accel.compat import destroy_process_group

T = TypeVar("T")


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


def decided_by_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on the main process, on every rank; none goes on before it is done.

    Its ValueError or OSError is raised on every rank, so that all stop with its sentence.
    """
    outcome: list[Any] = [None, None]  # the result, the error
    if process_index() == 0:
        try:
            outcome[0] = decide()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if num_processes() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """Every rank's entries together, on each."""
    parts: list[Any] = [mine] * num_processes()
    if num_processes() > 1:
        dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def gathered_rows(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all ranks, one rank's after another's, on each; ranks may have different numbers of them."""
    if num_processes() == 1:
        return rows
    numbers = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(num_processes())]
    dist.all_gather(numbers, torch.tensor([len(rows)], device=rows.device))
    most = max(int(number) for number in numbers)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(number)] for part, number in zip(parts, numbers, strict=True)])


def same_everywhere(value: str) -> bool:
    """Whether every rank gave the same value."""
    values: list[Any] = [value]
    if num_processes() > 1:
        values = [None] * num_processes()
        dist.all_gather_object(values, value)
    return len(set(values)) == 1


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """Ends this process's part in the group on the way out: gloo's threads abort a process that exits without it.

    After an error NCCL is left as it is, for it would wait for the other processes; the launcher ends them.
    """
    try:
        yield
    except BaseException:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            destroy_process_group()
        raise
    if dist.is_initialized():
        destroy_process_group()
