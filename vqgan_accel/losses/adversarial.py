"""The adversarial game: hinge and non-saturating losses, R1, and the adaptive weight of the generator's term."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.distributed import mean_over_processes
from vqgan_accel.models.precision import ieee_float32, without_autocast
from vqgan_accel.models.tokenizer import ImageTokenizer

AdversarialLoss = Literal["hinge", "non_saturating"]
MAX_ADAPTIVE_WEIGHT = 1e4


def generator_loss(kind: AdversarialLoss, fake_logits: Tensor) -> Tensor:
    """fake_logits (B, 1) -> scalar the generator lowers: -mean(D) (hinge), mean softplus(-D) (Goodfellow et al.
    2014)."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def real_loss(kind: AdversarialLoss, real_logits: Tensor) -> Tensor:
    """real_logits (B, 1) -> one half of the scalar that the discriminator lowers; `fake_loss` is the other."""
    return F.relu(1 - real_logits).mean() if kind == "hinge" else F.softplus(-real_logits).mean()


def fake_loss(kind: AdversarialLoss, fake_logits: Tensor) -> Tensor:
    """fake_logits (B, 1) -> scalar. Hinge: Lim & Ye 2017, arXiv 1705.02894; non-saturating: Goodfellow et al. 2014."""
    return F.relu(1 + fake_logits).mean() if kind == "hinge" else F.softplus(fake_logits).mean()


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """mean_b |d sum(D(x)) / d x_b|^2 (Mescheder et al. 2018, eq. 9, without its 1/2), differentiable in D's weights.

    `real_logits` (B, 1) come from `images` (B, 3, H, W), which must require a gradient.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def adaptive_weight(tokenizer: ImageTokenizer, last_features: Tensor, d_rec: Tensor, d_gen: Tensor) -> Tensor:
    """lambda = |G_rec| / (|G_gen| + 1e-8), clamped to [0, 1e4] (Esser et al. 2021, arXiv 2012.09841, eq. 7).

    G are the gradients of the two losses with respect to the decoder's last convolution. They follow from the losses'
    gradients with respect to the reconstruction, d_rec and d_gen (B, 3, H, W), and from that layer's input
    last_features (B, channels, H, W), so no backward pass through the tokenizer is needed. Averaged over processes
    before the norms are taken: one value, that of the global batch, the same on every rank.
    """
    weight = tokenizer.decoder.conv_out.weight
    with torch.enable_grad(), without_autocast(last_features), ieee_float32():
        reconstruction = tokenizer.last_layer(last_features.float())
        (g_rec,) = torch.autograd.grad(reconstruction, weight, d_rec, retain_graph=True)
        (g_gen,) = torch.autograd.grad(reconstruction, weight, d_gen)
    g_rec, g_gen = mean_over_processes(torch.stack([g_rec, g_gen]))
    return (g_rec.norm() / (g_gen.norm() + 1e-8)).clamp(0, MAX_ADAPTIVE_WEIGHT)
