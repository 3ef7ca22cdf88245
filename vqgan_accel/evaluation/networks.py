"""The feature networks of metrics, each built once whichever metrics ask for it. A new one is an entry of NETWORKS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.config import WeightFiles
from vqgan_accel.losses.perceptual import MobileNetDistance, MobileNetFeatures, load_lpips
from vqgan_accel.models.dinov2 import load_dinov2
from vqgan_accel.models.efficientnet import EfficientNetLite0, load_efficientnet
from vqgan_accel.models.weights import FixedModule, downloading, load_state, state_hash


class ByteFeatures(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, D) of a network that takes images in [-1, 1]."""

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.network, self.num_features = network, num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.float() / 127.5 - 1)


class EfficientNetDistance(FixedModule):
    """LPIPS's construction over EfficientNet-Lite0, without learnt weights: (B, 3, H, W) x 2 in [-1, 1] -> (B,)"""

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        distance = torch.zeros(len(images), device=images.device)
        for a, b in zip(self.network.taps(reconstruction), self.network.taps(images), strict=True):
            difference = F.normalize(a, dim=1, eps=1e-8) - F.normalize(b, dim=1, eps=1e-8)
            distance = distance + difference.square().sum(1).mean((1, 2))
        return distance


def mobilenet_features(weights: WeightFiles) -> ByteFeatures:
    network = MobileNetFeatures()
    network.load_published(weights.mobilenet_v2)
    return ByteFeatures(network, 1280)


def efficientnet_features(weights: WeightFiles) -> ByteFeatures:
    return ByteFeatures(load_efficientnet(weights.efficientnet_lite0), EfficientNetLite0.num_features)


def inception(weights: WeightFiles) -> nn.Module:
    """uint8 (B, 3, H, W) -> (B, 2048) of the Inception network of FID's original TensorFlow code (torch-fidelity's
    port). Its `fc` gives the Inception Score's logits."""
    # These take as long to import as torch: only where they are used.
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = weights.inception
    if file is not None:
        load_state(Path(file), "weights.inception")  # torch-fidelity itself would execute what a pickle asks for
    try:
        with downloading(URL_INCEPTION_V3) if file is None else nullcontext():
            # antialias=False is the resize of the original code (TensorFlow 1's), which published numbers are made with
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], file, antialias=False)
    except (URLError, OSError) as error:
        raise ValueError(
            f"FID's Inception weights could not be downloaded from {URL_INCEPTION_V3} ({error}); fetch that file "
            "elsewhere and give its path as weights.inception=FILE, or leave 'rfid', 'pfid', 'kid', 'precision_recall' "
            "and 'inception_score' out of the metrics"
        ) from None
    except (RuntimeError, KeyError) as error:
        if file is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"weights.inception: {file} does not hold torch-fidelity's Inception network ({reason})"
        ) from None
    network.num_features = 2048
    return network


# What a Frechet distance takes: uint8 (B, 3, H, W) -> (B, num_features). A distance: see MeanDistance.
NETWORKS: dict[str, Callable[[WeightFiles], nn.Module]] = {
    "lpips_vgg": lambda weights: load_lpips("vgg", weights),
    "lpips_alex": lambda weights: load_lpips("alex", weights),
    "lpips_squeeze": lambda weights: load_lpips("squeeze", weights),
    "mobilenet_distance": lambda weights: MobileNetDistance.published(weights.mobilenet_v2),
    "efficientnet_distance": lambda weights: EfficientNetDistance(load_efficientnet(weights.efficientnet_lite0)),
    "inception": lambda weights: inception(weights),
    "mobilenet_v2": lambda weights: mobilenet_features(weights),
    "efficientnet_lite0": lambda weights: efficientnet_features(weights),
    "dinov2": lambda weights: load_dinov2(weights.dinov2),
}


class Networks:
    """Those of NETWORKS that have been asked for. ValueError or FileNotFoundError, naming the setting, where weights
    are not to be had."""

    def __init__(self, weights: WeightFiles, device: torch.device) -> None:
        self.weights, self.device = weights, device
        self.built: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self.built:
            self.built[name] = NETWORKS[name](self.weights).to(self.device)
        return self.built[name]

    def hashes(self) -> dict[str, str]:
        return {name: state_hash(network) for name, network in self.built.items()}
