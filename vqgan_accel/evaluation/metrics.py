"""Metrics over a whole split, on torchmetrics: sums on each process, one reduction at the end, no padding anywhere.

Pixel metrics compare images in [0, 1] with reconstructions clipped to it; the Frechet distances see both in 8 bits.
evaluation.protocol says how pixels become these, and which SSIM is meant (pixels.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics import MeanMetric
from torchmetrics import Metric as TorchMetric
from torchmetrics.image.fid import FrechetInceptionDistance

from vqgan_accel.config import EvaluationConfig, Metric, WeightFiles
from vqgan_accel.data.protocols import PROTOCOLS
from vqgan_accel.distributed import sum_over_processes
from vqgan_accel.evaluation.pixels import SSIM, pixels_of, ssim
from vqgan_accel.losses.perceptual import MobileNetDistance, MobileNetFeatures, load_lpips
from vqgan_accel.models.quantizers import count_codes
from vqgan_accel.models.weights import downloading, load_state, state_hash

MIN_MSE = 1e-10  # a perfect reconstruction counts as 100 dB


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of the code distribution; counts (K,). Between 1 and K; 0 where nothing was counted."""
    p = counts.double() / counts.sum()
    return float(torch.special.entr(p).sum().exp()) if counts.any() else 0.0


def codebook_usage(counts: Tensor) -> float:
    """Percentage of the K codes that were used at least once; counts (K,)"""
    return 100 * float((counts > 0).double().mean())


def summed(state: Tensor, group: object = None) -> list[Tensor]:
    """What torchmetrics adds up: of every state, for all are sums, one that is the sum already.

    By itself it gathers one from each process: 33.5 MB, twice, of FID, on each of them, from each of them.
    """
    return [sum_over_processes(state)]


class CodeCounts(TorchMetric):
    """How often each code was used, summed over processes: (K,) int64."""

    counts: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__(dist_sync_fn=summed)
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        self.counts += count_codes(codes, len(self.counts))

    def compute(self) -> Tensor:
        return self.counts


class MobileNetFrechetFeatures(nn.Module):
    """uint8 (B, 3, H, W) -> MobileNetV2's pooled features (B, 1280), for the Frechet distance."""

    num_features = 1280

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        self.network = MobileNetFeatures()
        self.network.load_published(weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.float() / 127.5 - 1)


class Metrics:
    """The metrics named in `names`, accumulated batch by batch. The same instance serves one split, then `reset`.

    Raises ValueError or FileNotFoundError, naming the setting, where a feature network's weights are not to be had.
    """

    def __init__(
        self,
        names: Iterable[Metric],
        num_codes: int,
        config: EvaluationConfig,
        weights: WeightFiles,
        device: torch.device,
    ) -> None:
        self.names = tuple(names)
        self.protocol = PROTOCOLS[config.protocol]
        self.parts: dict[str, Any] = {"codebook": CodeCounts(num_codes)}
        self.networks: dict[str, nn.Module] = {}  # feature networks by metric, for the protocol
        for name in self.names:
            match name:
                case "l2":
                    self.parts[name] = mean_metric()
                case "psnr":
                    self.parts |= {
                        "l2": mean_metric(),
                        "psnr_per_image": mean_metric(),
                    }
                case "ssim":
                    self.parts[name] = mean_metric()
                case "lpips":
                    self.parts[name] = mean_metric()
                    self.networks[name] = load_lpips(config.lpips_network, weights)
                case "mobilenet_distance":
                    self.parts[name] = mean_metric()
                    self.networks[name] = MobileNetDistance.published(weights.mobilenet_v2)
                case "rfid":
                    self.parts[name] = inception_frechet(weights.inception)
                    self.networks[name] = self.parts[name].inception
                case "fd_mobilenet":
                    self.parts[name] = FrechetInceptionDistance(
                        MobileNetFrechetFeatures(weights.mobilenet_v2), dist_sync_fn=summed
                    )
                    self.networks[name] = self.parts[name].inception
        for part in self.parts.values():
            part.to(device)
            if isinstance(part, MeanMetric):
                part.set_dtype(torch.float64)  # sums of many images; `to` would undo it
            if isinstance(part, FrechetInceptionDistance):
                part.orig_dtype = torch.float32  # which a process that saw no image would miss
        for network in self.networks.values():
            network.to(device)

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """images and reconstructions (B, 3, H, W) in [-1, 1], codes (B, h, w); B may be 0."""
        if not len(images):
            return
        reconstructions = reconstructions.clamp(-1, 1)
        pixels = pixels_of(self.protocol, images, reconstructions)
        self.parts["codebook"].update(codes)
        if "l2" in self.parts:
            x, y = pixels.seen(self.protocol.eight_bit_psnr)
            mse = (x - y).square().mean((1, 2, 3))
            self.parts["l2"].update(mse)
        if "psnr_per_image" in self.parts:
            self.parts["psnr_per_image"].update(psnr(mse))
        if "ssim" in self.parts:
            self.parts["ssim"].update(ssim(*pixels.seen(self.protocol.eight_bit_ssim), SSIM[self.protocol.ssim]))
        for name in ("lpips", "mobilenet_distance"):
            if name in self.parts:
                self.parts[name].update(self.networks[name](reconstructions, images))
        for name in ("rfid", "fd_mobilenet"):
            if name in self.parts:
                self.parts[name].update(pixels.x_levels, real=True)
                self.parts[name].update(pixels.y_levels, real=False)

    def compute(self) -> dict[str, float]:
        """Every result of METRIC_RESULTS[name] for the metrics asked for; every rank calls it and gets the same."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*compute.* method of metric .* was called before")
            values = {name: part.compute() for name, part in self.parts.items()}
        results: dict[str, float] = {}
        for name in self.names:
            match name:
                case "psnr":
                    results["psnr"] = float(psnr(values["l2"]))  # of the pooled MSE
                    results["psnr_per_image"] = float(values["psnr_per_image"])
                case "codebook":
                    results["perplexity"] = perplexity(values["codebook"])
                    results["codebook_usage"] = codebook_usage(values["codebook"])
                case _:
                    results[name] = float(values[name])
        return results

    def code_counts(self) -> Tensor:
        """(K,) int64 over all processes; every rank calls it."""
        return self.parts["codebook"].compute()

    def require(self, num_images: int) -> None:
        """ValueError where the metrics cannot be formed on so few images."""
        if num_images < 2 and {"rfid", "fd_mobilenet"} & set(self.names):
            raise ValueError(
                f"a Frechet distance needs at least 2 images and the split has {num_images} that can be read; leave "
                "rfid and fd_mobilenet out of the metrics"
            )

    def reset(self) -> None:
        for part in self.parts.values():
            part.reset()

    def network_hashes(self) -> dict[str, str]:
        return {name: state_hash(network) for name, network in self.networks.items()}


def mean_metric() -> MeanMetric:
    """A mean that a nan spoils, rather than one that leaves it out."""
    return MeanMetric(nan_strategy="disable", dist_sync_fn=summed)


def psnr(mse: Tensor) -> Tensor:
    """Decibels, for pixels in [0, 1]."""
    return -10 * mse.clamp_min(MIN_MSE).log10()


def inception_frechet(weights: str | None) -> FrechetInceptionDistance:
    """FID's own metric over the Inception network of the original TensorFlow code (torch-fidelity's port)."""
    if weights is not None:
        load_state(Path(weights), "weights.inception")  # torch-fidelity itself would execute what a pickle asks for
    try:
        with downloading(URL_INCEPTION_V3) if weights is None else nullcontext():
            # antialias=False is the resize of the original code (TensorFlow 1's), which published numbers are made with
            return FrechetInceptionDistance(
                feature=2048, feature_extractor_weights_path=weights, antialias=False, dist_sync_fn=summed
            )
    except (URLError, OSError) as error:
        raise ValueError(
            f"FID's Inception weights could not be downloaded from {URL_INCEPTION_V3} ({error}); fetch that file "
            "elsewhere and give its path as weights.inception=FILE, or leave 'rfid' out of the metrics"
        ) from None
    except (RuntimeError, KeyError) as error:
        if weights is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"weights.inception: {weights} does not hold torch-fidelity's Inception network ({reason})"
        ) from None
