"""What a metric is: a class that sees every batch and says its results at the end.

What several metrics need is there once: a network is built once, an image goes through it once, and what is collected
of its features is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqgan_accel.config import EvaluationConfig
from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.collected import Moments, Samples
from vqgan_accel.evaluation.networks import Networks
from vqgan_accel.evaluation.pixels import Pixels, pixels_of
from vqgan_accel.models.tokenizer import ImageTokenizer


class Setting(NamedTuple):
    """What a metric is made with."""

    config: EvaluationConfig
    networks: Networks
    codebook_sizes: tuple[int, ...]
    device: torch.device


class Seen:
    """A batch, as metrics see it."""

    def __init__(
        self,
        setting: Setting,
        images: Tensor,
        reconstructions: Tensor,
        codes: Tensor,
        positions: Tensor,
        tokenizer: ImageTokenizer | None,
        latents: Tensor | None,
    ) -> None:
        """images and reconstructions (B, 3, H, W) in [-1, 1], codes (B, h, w) or (B, q, h, w), positions (B,) in the
        split."""
        self.setting, self.protocol = setting, setting.config.rules
        self.images, self.reconstructions = images, reconstructions.clamp(-1, 1)
        self.codes, self.positions, self.tokenizer, self.latents = codes, positions, tokenizer, latents
        self.pixels: Pixels = pixels_of(self.protocol, images, self.reconstructions)
        self._features: dict[tuple[str, Side], Tensor] = {}

    def features(self, network: str, side: Side) -> Tensor:
        """(B, D)"""
        key = (network, side)
        if key not in self._features:
            self._features[key] = self.setting.networks[network](side(self))
        return self._features[key]


Side = Callable[[Seen], Tensor]  # -> uint8 (B, 3, H, W), what a feature network sees


def real(seen: Seen) -> Tensor:
    return seen.pixels.x_levels


def fake(seen: Seen) -> Tensor:
    return seen.pixels.y_levels


class Need(NamedTuple):
    """What has to be collected for a metric over the whole split."""

    network: str  # a key of networks.NETWORKS
    side: Side
    kind: type[Moments] | type[Samples]


Collected = Callable[[Need], Tensor]  # -> what was collected of it, over all processes


class Measure:
    """One metric. `name` is its key in METRICS, whose results `results` returns."""

    needs: tuple[Need, ...] = ()
    least_images = 1
    called = ""  # in the sentence that says that there are too few

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting

    def update(self, seen: Seen) -> None:
        """Take in a batch of at least one image."""

    def results(self, collected: Collected) -> dict[str, float]:
        """Over all processes; every one calls it and gets the same."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what `update` took in."""


class Mean:
    """Over all images of all processes: sums in float64, reduced once. A nan spoils it, and is not left out."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """values (B,)"""
        self.sums[0] += values.double().sum()
        self.sums[1] += len(values)

    def value(self) -> Tensor:
        total, number = sum_over_processes(self.sums)
        return total / number

    def reset(self) -> None:
        self.sums.zero_()


class MeanOverImages(Measure):
    """A metric that is the mean of a number of each image."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.mean = Mean(setting.device)

    def of_images(self, seen: Seen) -> Tensor:
        """(B,)"""
        raise NotImplementedError

    def update(self, seen: Seen) -> None:
        self.mean.add(self.of_images(seen))

    def results(self, collected: Collected) -> dict[str, float]:
        return {self.name: float(self.mean.value())}

    def reset(self) -> None:
        self.mean.reset()


class MeanDistance(MeanOverImages):
    """A distance between a reconstruction and its image in a network: (B, 3, H, W) x 2 in [-1, 1] -> (B,)"""

    network: str

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.distance: nn.Module = setting.networks[self.network_of(setting.config)]

    def network_of(self, config: EvaluationConfig) -> str:
        return self.network

    def of_images(self, seen: Seen) -> Tensor:
        return self.distance(seen.reconstructions, seen.images)
