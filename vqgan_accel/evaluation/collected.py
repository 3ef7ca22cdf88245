"""What is collected of feature networks over a whole split, on each process, and reduced once at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from vqgan_accel.distributed import gathered_rows, sum_over_processes


class Moments:
    """All that a Gaussian needs, as sums, apart for images at even and at odd positions: memory does not grow with the
    images, and one all-reduce is the whole reduction."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        size = num_features + 1
        self.sums = torch.zeros(2, size, size, dtype=torch.float64, device=device)

    def add(self, features: Tensor, positions: Tensor) -> None:
        """features (B, D) of the images at `positions` (B,)"""
        rows = torch.cat([features.double(), features.new_ones(len(features), 1).double()], 1)
        for half in range(2):
            own = rows * (positions % 2 == half)[:, None]
            self.sums[half] += own.T @ own

    def reduced(self) -> Tensor:
        """(2, D + 1, D + 1) of each half [sum of x x', sum of x; sum of x', number]"""
        return sum_over_processes(self.sums)


def sums_of(mean: Tensor, covariance: Tensor) -> Tensor:
    """(1, D + 1, D + 1): what Moments would hold of two images with this mean and this covariance."""
    total = 2 * mean
    squares = covariance + torch.outer(total, mean)
    return torch.cat([torch.cat([squares, total[None]]), torch.cat([total, total.new_tensor([2])])[:, None]], 1)[None]


class Samples:
    """The features themselves, on every process those of all images."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.features = [torch.empty(0, num_features, device=device)]
        self.positions = [torch.empty(0, dtype=torch.int64, device=device)]

    def add(self, features: Tensor, positions: Tensor) -> None:
        """features (B, D) of the images at `positions` (B,)"""
        self.features.append(features.float())
        self.positions.append(positions)

    def reduced(self) -> Tensor:
        """(N, D) in the order of the split"""
        order = gathered_rows(torch.cat(self.positions)).argsort()
        return gathered_rows(torch.cat(self.features))[order]
