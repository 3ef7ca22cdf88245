"""Distances in the feature space of a fixed network: LPIPS (Zhang et al. 2018, arXiv 1801.03924, the authors'
package) and, for machines that cannot download its backbones, the same construction over torchvision's MobileNetV2
without learnt channel weights. The second is never called LPIPS.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.config import Config, LossConfig, WeightFiles
from vqgan_accel.models.precision import without_autocast
from vqgan_accel.models.weights import IMAGENET_MEAN, IMAGENET_STD, FixedModule, fit_state, freeze, load_published

BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet"}  # lpips' name -> ours and torchvision's
MOBILENET_TAPS = (1, 3, 6, 13, 17)  # the last block at each of MobileNetV2's five resolutions


def backbone_of(network: str) -> str:
    """losses.perceptual_network -> the key of its weights in `weights`."""
    return BACKBONES.get(network.removeprefix("lpips_"), network)


def build_perceptual(config: LossConfig, weights: WeightFiles) -> nn.Module | None:
    """The network of losses.perceptual_network, frozen; None where its weight is 0."""
    distance = _untrained(config)
    if distance is not None:
        distance.load(weights)
    return distance


def perceptual_shell(config: Config) -> nn.Module | None:
    """The same network without its weights, to count or to time."""
    return _untrained(config.losses)


def _untrained(config: LossConfig) -> LPIPSDistance | MobileNetDistance | None:
    if config.perceptual_weight == 0:
        return None
    match config.perceptual_network:
        case "mobilenet_v2":
            return MobileNetDistance()
        case "lpips_vgg":
            return LPIPSDistance("vgg")
        case "lpips_alex":
            return LPIPSDistance("alex")
        case "lpips_squeeze":
            return LPIPSDistance("squeeze")


def load_lpips(network: Literal["vgg", "alex", "squeeze"], weights: WeightFiles) -> LPIPSDistance:
    """LPIPS v0.1 with its learnt linear heads (in the package) and an ImageNet backbone (downloaded, or the named
    file)."""
    distance = LPIPSDistance(network)
    distance.load(weights)
    return distance


class LPIPSDistance(FixedModule):
    """(B, 3, H, W) x 2 in [-1, 1] -> (B,); the backbone is random until `load`."""

    def __init__(self, network: Literal["vgg", "alex", "squeeze"]) -> None:
        super().__init__()
        import lpips  # with torchvision, seconds: only where it is used

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(pretrained|weights).*", category=UserWarning)
            self.lpips = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
        self.normalize = lpips.normalize_tensor
        self.backbone = BACKBONES[network]
        freeze(self)

    def load(self, weights: WeightFiles) -> None:
        file: str | None = getattr(weights, self.backbone)
        fit_backbone(self.lpips.net, load_published(self.backbone, file), f"weights.{self.backbone}", file)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        network = self.lpips
        a, b = (network.net(network.scaling_layer(x)) for x in (reconstruction, images))
        distance = torch.zeros(len(images), device=images.device)
        with without_autocast(images):  # the package's own sum, but float32 from the features on
            for head, x, y in zip(network.lins, a, b, strict=True):
                difference = self.normalize(x.float()) - self.normalize(y.float())
                distance = distance + head(difference.square()).mean((1, 2, 3))
        return distance


def fit_backbone(net: nn.Module, published: dict[str, Tensor], setting: str, file: str | None) -> None:
    """Copy torchvision's `features.{i}.*` into lpips' slices, whose modules keep the index i as their name."""
    state = {}
    for name in net.state_dict():
        source = "features." + name.split(".", 1)[1]
        if source not in published:
            raise ValueError(f"{setting}: {file or 'the download'} has no tensor '{source}': it is another network's")
        state[name] = published[source]
    fit_state(net, state, setting, file)


class MobileNetFeatures(FixedModule):
    """torchvision's MobileNetV2 up to its last convolution, for images in [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v2

        self.features = mobilenet_v2(weights=None).features
        self.register_buffer("mean", 2 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1) - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        freeze(self)

    def load_published(self, file: str | None) -> None:
        published = load_published("mobilenet_v2", file)
        state = {name: tensor for name, tensor in published.items() if name.startswith("features.")}
        fit_state(self, state, "weights.mobilenet_v2", file)

    def taps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the outputs of MOBILENET_TAPS, finest first"""
        x, taps = (images - self.mean) / self.std, []
        for index, layer in enumerate(self.features[: MOBILENET_TAPS[-1] + 1]):
            x = layer(x)
            if index in MOBILENET_TAPS:
                taps.append(x)
        return taps

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the pooled features (B, 1280)"""
        return self.features((images - self.mean) / self.std).mean((2, 3))


class MobileNetDistance(FixedModule):
    """MobileNetV2 feature distance: (B, 3, H, W) x 2 in [-1, 1] -> (B,).

    Features are normalised to unit length along the channels; squared differences are summed over channels, averaged
    over positions, and summed over the taps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = MobileNetFeatures()

    @classmethod
    def published(cls, file: str | None) -> MobileNetDistance:
        distance = cls()
        distance.load(WeightFiles(mobilenet_v2=file))
        return distance

    def load(self, weights: WeightFiles) -> None:
        self.network.load_published(weights.mobilenet_v2)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        distance = torch.zeros(len(images), device=images.device)
        for a, b in zip(self.network.taps(reconstruction), self.network.taps(images), strict=True):
            difference = F.normalize(a.float(), dim=1, eps=1e-8) - F.normalize(b.float(), dim=1, eps=1e-8)
            distance = distance + difference.square().sum(1).mean((1, 2))
        return distance
