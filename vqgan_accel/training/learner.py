"""A network that learns, and the optimizer that moves it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Learner(Generic[Network]):
    name: str  # in metrics.jsonl and in a checkpoint's optimizer file
    network: Network  # its weights have the names that checkpoints have
    wrapped: nn.Module  # the same as training calls it: on several processes, inside DDP
    optimizer: Optimizer

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def clip(self, max_norm: float | None) -> Tensor:
        """The norm of the gradient (already reduced: the same on every rank), clipped to `max_norm` where given."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
