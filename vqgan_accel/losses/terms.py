"""The contract of a further loss: what it adds to the losses between images, or to the discriminator's.

A term is one file, with its section (see `vqgan_accel.sections.TermSection`) and its module, and one line, the field of
LossConfig that holds the section: that field's name is its name in metrics.jsonl, and what it adds to the
discriminator's loss is there as `discriminator_NAME`.
"""

from __future__ import annotations

from torch import Tensor, nn


class LossTerm(nn.Module):
    """Each hook returns a scalar that is multiplied by `weight` and added, or None. What the term keeps from step to
    step are its buffers; they change in `apply_update` only.

    P processes of b images must give the gradients of one process of P * b: a mean over samples is one of this
    process's samples, and whatever else compares images is formed over all processes (`vqgan_accel.distributed`).
    """

    weight: float

    def on_reconstruction(self, reconstruction: Tensor, images: Tensor) -> Tensor | None:
        """Both (B, 3, H, W) in [-1, 1]: added to the losses between a reconstruction and its image."""
        return None

    def on_fake(self, logits: Tensor) -> Tensor | None:
        """logits (B, 1, ...) of reconstructions: added to the discriminator's loss. `on_real` is the other half."""
        return None

    def on_real(self, logits: Tensor) -> Tensor | None:
        """logits (B, 1, ...) of the same round's images."""
        return None

    @property
    def needs_discriminator(self) -> bool:
        """Whether it says nothing without one."""
        return type(self).on_reconstruction is LossTerm.on_reconstruction

    def apply_update(self) -> None:
        """Called once per optimizer step, on every rank, after all of its rounds."""

    def discard_update(self) -> None:
        """Called in its place where the step is skipped."""


def with_terms(
    loss: Tensor, terms: dict[str, LossTerm], values: dict[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss with the `values` of its terms added, each times its weight; and these values, detached."""
    said = {name: value for name, value in values.items() if value is not None}
    for name, value in said.items():
        loss = loss + terms[name].weight * value
    return loss, {name: value.detach() for name, value in said.items()}
