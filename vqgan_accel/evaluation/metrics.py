"""The metrics that are asked for, over a whole split: sums on each process, one reduction at the end, nothing padded.

What each is, is in measures/; evaluation.protocol says how pixels become what they see (pixels.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vqgan_accel.config import EvaluationConfig, Metric, WeightFiles
from vqgan_accel.config.metrics import METRICS
from vqgan_accel.evaluation.collected import Moments, Samples
from vqgan_accel.evaluation.measures.base import Measure, Need, Seen, Setting, real
from vqgan_accel.evaluation.measures.codes import Codebook
from vqgan_accel.evaluation.networks import Networks
from vqgan_accel.models.tokenizer import ImageTokenizer

FEW = 10  # images per feature, below which a Gaussian's covariance is poorly known


class Metrics:
    """The metrics named in `names`, accumulated batch by batch. The same instance serves one split, then `reset`.

    Raises ValueError or FileNotFoundError, naming the setting, where a feature network's weights are not to be had.
    """

    def __init__(
        self,
        names: Iterable[Metric],
        codebook_sizes: tuple[int, ...],
        config: EvaluationConfig,
        weights: WeightFiles,
        device: torch.device,
    ) -> None:
        self.names = tuple(names)
        self.networks = Networks(weights, device)
        self.setting = Setting(config, self.networks, codebook_sizes, device)
        self.codebook = Codebook("codebook", self.setting)  # counted in any case, for the picture
        self.measures = [
            self.codebook if name == "codebook" else measure_class(name)(name, self.setting) for name in self.names
        ]
        self.needs = list(dict.fromkeys(need for measure in self.measures for need in measure.needs))
        self.known: dict[Need, Tensor] = {}  # of the images: a reference, or what the last evaluation collected
        self.reference: dict[str, Any] | None = None  # where that is a reference: what it is, for the protocol
        self.reset()

    @torch.no_grad()
    def update(
        self,
        images: Tensor,
        reconstructions: Tensor,
        codes: Tensor,
        positions: Tensor,
        tokenizer: ImageTokenizer | None = None,
        latents: Tensor | None = None,
    ) -> None:
        """images and reconstructions (B, 3, H, W) in [-1, 1], codes (B, h, w) or (B, q, h, w), positions (B,) in the
        split; B may be 0. tokenizer: for metrics that decode other codes, and with its latents (B, input_channels, h,
        w) for the error of quantization."""
        if not len(images):
            return
        positions = positions.to(images.device, non_blocking=True)
        seen = Seen(self.setting, images, reconstructions, codes, positions, tokenizer, latents)
        for measure in dict.fromkeys([self.codebook, *self.measures]):
            measure.update(seen)
        for need, collected in self.collecting.items():
            collected.add(seen.features(need.network, need.side), seen.positions)

    @torch.no_grad()
    def update_reference(self, images: Tensor, positions: Tensor) -> None:
        """Take in images that reconstructions are compared with in place of their own. See `collected_reference`."""
        if not len(images):
            return
        none = torch.empty(0, dtype=torch.int64, device=images.device)
        positions = positions.to(images.device, non_blocking=True)
        seen = Seen(self.setting, images, images, none, positions, None, None)
        for need, collected in self.collecting.items():
            if need.side is real:
                collected.add(seen.features(need.network, real), seen.positions)

    def collected_reference(self) -> dict[Need, Tensor]:
        """What `update_reference` took in; every process calls it."""
        reduced = {need: one.reduced() for need, one in self.collecting.items() if need.side is real}
        return {need: as_given(need, value) for need, value in reduced.items()}

    def set_reference(self, known: dict[Need, Tensor], what: dict[str, Any]) -> None:
        """Compare with `known`, of every need of the images, from now on."""
        self.known, self.reference = known, what
        self.reset()

    def compute(self) -> dict[str, float]:
        """Every result of METRIC_RESULTS[name] for the metrics asked for; every rank calls it and gets the same."""
        reduced = self.known | {need: collected.reduced() for need, collected in self.collecting.items()}
        self.known = {need: value for need, value in reduced.items() if need.side is real}
        results: dict[str, float] = {}
        for measure in self.measures:
            results |= measure.results(reduced.__getitem__)
        return results

    def code_counts(self) -> Tensor:
        """(sum of K,) int64, one codebook after another, over all processes; every rank calls it."""
        return self.codebook.counts()

    def require(self, num_images: int) -> None:
        """ValueError where the metrics cannot be formed on so few images."""
        for measure in self.measures:
            if num_images < measure.least_images:
                names = [other.name for other in self.measures if other.called == measure.called]
                raise ValueError(
                    f"{measure.called} needs at least {measure.least_images} images and the split has {num_images} "
                    f"that can be read; leave {' and '.join(names)} out of the metrics"
                )

    def too_few(self, num_images: int) -> list[str]:
        """Of each distance between Gaussians that so few images say little of, a sentence."""
        sizes = {
            measure.name: int(self.networks[need.network].num_features)  # type: ignore[arg-type]
            for measure in self.measures
            for need in measure.needs[:1]
            if need.kind is Moments
        }
        return [
            f"{name} of {num_images:,} images, fewer than {FEW} x its {size:,} features, is larger than of many"
            for name, size in sizes.items()
            if num_images < FEW * size
        ]

    def reset(self, same_images: bool = False) -> None:
        """same_images: the next ones are those of the evaluation before: what was collected of them is kept."""
        if not (same_images or self.reference is not None):
            self.known = {}
        self.codebook.reset()
        for measure in self.measures:
            measure.reset()
        self.collecting: dict[Need, Moments | Samples] = {
            need: need.kind(int(self.networks[need.network].num_features), self.setting.device)  # type: ignore[arg-type]
            for need in self.needs
            if need not in self.known
        }

    def network_hashes(self) -> dict[str, str]:
        return self.networks.hashes()


def measure_class(name: Metric) -> type[Measure]:
    module, _, attribute = METRICS[name].measure.rpartition(".")
    found: type[Measure] = getattr(import_module(module), attribute)
    return found


def as_given(need: Need, value: Tensor) -> Tensor:
    """A reference has no halves: it is not drawn with the reconstructions, image by image."""
    return value.sum(0, keepdim=True) if need.kind is Moments else value
