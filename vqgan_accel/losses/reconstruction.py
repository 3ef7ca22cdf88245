"""What a reconstruction is asked to be: near its image in pixels and in features, weighted as the config says."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.config import LossConfig
from vqgan_accel.losses.terms import LossTerm, with_terms


class ReconstructionLoss:
    """l1_weight L1 + l2_weight L2 + perceptual_weight P + further terms.

    L1 and L2 are means over all elements; P is the mean over the batch of the perceptual network's distance.
    """

    def __init__(self, config: LossConfig, perceptual: nn.Module | None, terms: dict[str, LossTerm]) -> None:
        self.config, self.perceptual, self.terms = config, perceptual, terms

    def __call__(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both (B, 3, H, W) in [-1, 1] -> (the weighted sum, its detached unweighted parts)."""
        parts = {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images)}
        total = self.config.l1_weight * parts["l1"] + self.config.l2_weight * parts["l2"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(reconstruction, images).mean()
            total = total + self.config.perceptual_weight * parts["perceptual"]
        further = {name: term.on_reconstruction(reconstruction, images) for name, term in self.terms.items()}
        total, said = with_terms(total, self.terms, further)
        return total, {name: part.detach() for name, part in parts.items()} | said
