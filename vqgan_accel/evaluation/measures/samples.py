"""Metrics of Inception's features of single images, not of their Gaussian: as torch-fidelity 0.4 computes them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vqgan_accel.evaluation.collected import Samples
from vqgan_accel.evaluation.measures.base import Collected, Measure, Need, Setting, fake, real

SEED = 2020  # torch-fidelity's, of the subsets and of the order
SPLITS = 10  # of the Inception Score
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
NEIGHBOURS = 3
BLOCK = 1024  # rows of a matrix of distances


class InceptionScore(Measure):
    """Salimans et al. 2016, arXiv 1606.03498, of the reconstructions."""

    needs = (Need("inception", fake, Samples),)

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.classifier: Tensor = setting.networks["inception"].fc.weight  # type: ignore[assignment,union-attr]

    def results(self, collected: Collected) -> dict[str, float]:
        mean, std = inception_score(collected(self.needs[0]).double() @ self.classifier.double().T)
        return {"inception_score": mean, "inception_score_std": std}


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Of logits (N, C) without the layer's bias: mean and standard deviation of exp E KL(p(y given x), p(y)) over ten
    parts of the images, shuffled."""
    logits = logits[np.random.RandomState(SEED).permutation(len(logits))].double()
    p, log_p, parts = logits.softmax(1), logits.log_softmax(1), min(SPLITS, len(logits))
    bounds = [i * len(logits) // parts for i in range(parts + 1)]
    scores = []
    for part in (slice(*pair) for pair in pairwise(bounds)):
        divergence = p[part] * (log_p[part] - p[part].mean(0, keepdim=True).log())
        scores.append(float(divergence.sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


class KID(Measure):
    """Binkowski et al. 2018, arXiv 1801.01401."""

    needs = (Need("inception", fake, Samples), Need("inception", real, Samples))
    least_images = 2
    called = "KID"

    def results(self, collected: Collected) -> dict[str, float]:
        mean, std = kernel_distance(*(collected(need).double() for need in self.needs))
        return {"kid": mean, "kid_std": std}


def kernel_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Of features (N, D) and (M, D): mean and standard deviation over subsets of the unbiased squared maximum mean
    discrepancy under the kernel (x'y / D + 1)^3. Subsets are of all where there are fewer than 1,000."""
    size, draw = min(SUBSET_SIZE, len(x), len(y)), np.random.RandomState(SEED)
    values = []
    for _ in range(SUBSETS):
        a = x[draw.choice(len(x), size, replace=False)]
        b = y[draw.choice(len(y), size, replace=False)]
        aa, bb, ab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append(float(within / (size * (size - 1)) - 2 * ab.mean()))
    return float(np.mean(values)), float(np.std(values))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class PrecisionRecall(Measure):
    """Kynkaanniemi et al. 2019, arXiv 1904.06991, with k = 3, over Inception's features instead of VGG16's."""

    needs = (Need("inception", fake, Samples), Need("inception", real, Samples))
    least_images = NEIGHBOURS + 1
    called = "precision_recall"

    def results(self, collected: Collected) -> dict[str, float]:
        made, images = (collected(need).double() for need in self.needs)
        return {"precision": covered(made, images), "recall": covered(images, made)}


def covered(points: Tensor, by: Tensor) -> float:
    """The share of `points` (N, D) that lie within the distance of one of `by` (M, D) to its third neighbour there."""
    radii = torch.cat([torch.cdist(rows, by).kthvalue(NEIGHBOURS + 1).values for rows in by.split(BLOCK)])
    inside = [(torch.cdist(rows, by) <= radii).any(1) for rows in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())
