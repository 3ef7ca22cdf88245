"""Pixel and perceptual losses between a reconstruction and its image, weighted as the config says."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.config import LossConfig


def reconstruction_loss(
    reconstruction: Tensor, images: Tensor, perceptual: nn.Module | None, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both (B, 3, H, W) in [-1, 1] -> (l1_weight L1 + l2_weight L2 + perceptual_weight P, the detached unweighted
    parts).

    Means over all elements; P is the mean over the batch of the perceptual network's distance.
    """
    parts = {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images)}
    total = config.l1_weight * parts["l1"] + config.l2_weight * parts["l2"]
    if perceptual is not None:
        parts["perceptual"] = perceptual(reconstruction, images).mean()
        total = total + config.perceptual_weight * parts["perceptual"]
    return total, {name: part.detach() for name, part in parts.items()}
