"""Frechet distances (Heusel et al. 2017, arXiv 1706.08500) between the features of images and of reconstructions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqgan_accel.evaluation.collected import Moments
from vqgan_accel.evaluation.measures.base import Collected, Measure, Need, Setting, Side, fake, real


class Gaussian(NamedTuple):
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D), over N - 1


def gaussian(sums: Tensor) -> Gaussian:
    """Of the sums (D + 1, D + 1) that Moments keeps."""
    number, total = sums[-1, -1], sums[-1, :-1]
    mean = total / number.clamp_min(1)
    return Gaussian(mean, (sums[:-1, :-1] - torch.outer(total, mean)) / (number - 1).clamp_min(1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m - n|^2 + tr S + tr T - 2 tr (S T)^(1/2)

    With S = R R' the last trace is that of (R' T R)^(1/2), which is symmetric: half of the time. What rounding makes of
    an eigenvalue of zero is not let in, for its square root would add up.
    """
    if not all(part.isfinite().all() for part in (*a, *b)):
        return float("nan")
    root = _root(a.covariance)
    inner = torch.linalg.eigvalsh(root.T @ b.covariance @ root)
    shared = inner[_above_rounding(inner)].sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return float(shift + a.covariance.trace() + b.covariance.trace() - 2 * shared)


def _root(covariance: Tensor) -> Tensor:
    """(D, D) S -> R (D, rank) with R R' = S"""
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return root
    values, vectors = torch.linalg.eigh(covariance)  # of fewer images than features
    kept = _above_rounding(values)
    return vectors[:, kept] * values[kept].sqrt()


def _above_rounding(values: Tensor) -> Tensor:
    """Eigenvalues in ascending order -> which of them are not zero."""
    return values > len(values) * torch.finfo(values.dtype).eps * values[-1:].clamp_min(0)


class Frechet(Measure):
    network: str
    side: Side = staticmethod(fake)
    least_images = 2
    called = "a Frechet distance"

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.needs = (Need(self.network, real, Moments), Need(self.network, self.side, Moments))

    def results(self, collected: Collected) -> dict[str, float]:
        """The distance, and half of the difference between those of the two halves of the images: the jackknife's
        standard error, of two groups."""
        images, others = (collected(need) for need in self.needs)
        whole = frechet_distance(gaussian(images.sum(0)), gaussian(others.sum(0)))
        if len(images) == 1:  # a reference, which is given, and has no halves
            images = images.expand(2, -1, -1)
        first, second = (frechet_distance(gaussian(x), gaussian(y)) for x, y in zip(images, others, strict=True))
        return {self.name: whole, f"{self.name}_std": abs(first - second) / 2}


class RFID(Frechet):
    network = "inception"


class FDMobileNet(Frechet):
    network = "mobilenet_v2"


class FDEfficientNet(Frechet):
    network = "efficientnet_lite0"


class FDDINOv2(Frechet):
    network = "dinov2"
