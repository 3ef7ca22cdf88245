"""The contract that every discriminator keeps; tests/test_discriminators.py holds each one to it."""

from __future__ import annotations

from torch import Tensor, nn


class Discriminator(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> logits (B, 1, ...) in float32, one or several an image; larger is more real.

    Three promises that the training step builds on:
    - It can be differentiated twice, for R1.
    - With `full_precision` it computes in float32 whatever the autocast, also where a wrapper enters autocast around
      the whole forward: R1 in bfloat16 gives parameter gradients that are several per cent off.
    - Nothing in it is a statistic of one process: what compares images does so within groups that
      `DiscriminatorSection.group` names, and no buffer changes in forward. So there is no BatchNorm.
    """

    def forward(self, images: Tensor, full_precision: bool = False) -> Tensor:
        raise NotImplementedError
