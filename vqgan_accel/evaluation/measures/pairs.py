"""Distances between an image and its reconstruction in the features of a fixed network."""

from __future__ import annotations

from vqgan_accel.config import EvaluationConfig
from vqgan_accel.evaluation.measures.base import MeanDistance


class LPIPS(MeanDistance):
    """Of evaluation.lpips_network."""

    def network_of(self, config: EvaluationConfig) -> str:
        return f"lpips_{config.lpips_network}"


class LPIPSVGG(MeanDistance):
    network = "lpips_vgg"


class LPIPSAlex(MeanDistance):
    network = "lpips_alex"


class LPIPSSqueeze(MeanDistance):
    network = "lpips_squeeze"


class MobileNet(MeanDistance):
    network = "mobilenet_distance"


class EfficientNet(MeanDistance):
    network = "efficientnet_distance"
