"""The step that step_flops.py and step_time.py compare with: the same losses, as the trainer that this project
re-creates writes them, but for its compiled operators.

It computes what round.py and adversary.py of `vqgan_accel.training` compute, to rounding (step_time.py checks that
before it times anything), with what those leave out: full distances and a one-hot product in the quantizer, two extra
backward passes for the adaptive weight, the discriminator's gradients in the generator step, a second forward pass of
the discriminator on the reconstruction, torch's own second derivative of a convolution, and contiguous memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqgan_accel.config import DiscriminatorConfig, LossConfig
from vqgan_accel.losses.adversarial import fake_loss, generator_loss, r1_penalty, real_loss
from vqgan_accel.losses.reconstruction import ReconstructionLoss
from vqgan_accel.models.discriminators import stylegan2
from vqgan_accel.models.quantizers import Quantizer, QuantizerOutput, StandardQuantizer
from vqgan_accel.models.tokenizer import ImageTokenizer


class OneHotQuantizer(Quantizer):
    """The standard quantizer with every term of the distance and a product with a one-hot matrix."""

    def __init__(self, standard: StandardQuantizer) -> None:
        super().__init__()
        self.num_codes, self.input_channels = standard.num_codes, standard.input_channels
        self.commitment_cost, self.codebook = standard.commitment_cost, standard.codebook

    def quantize(self, latents: Tensor, sample_seeds: Sequence[int] | None) -> QuantizerOutput:
        batch, dimension, height, width = latents.shape
        tokens = latents.permute(0, 2, 3, 1).reshape(-1, dimension)
        products = tokens @ self.codebook.T
        distances = tokens.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * products
        codes = distances.argmin(1)
        one_hot = torch.zeros(len(codes), self.num_codes, device=codes.device).scatter_(1, codes[:, None], 1)
        quantized = (one_hot @ self.codebook).view(batch, height, width, dimension).permute(0, 3, 1, 2)
        loss = F.mse_loss(quantized, latents.detach()) + self.commitment_cost * F.mse_loss(latents, quantized.detach())
        return QuantizerOutput(latents + (quantized - latents).detach(), codes.view(batch, height, width), loss, {})


@contextmanager
def torchs_convolutions() -> Iterator[None]:
    """The discriminator with `F.conv2d`, its filters as grouped convolutions."""
    ours = stylegan2.conv2d
    stylegan2.conv2d = F.conv2d  # type: ignore[assignment]
    try:
        yield
    finally:
        stylegan2.conv2d = ours


def plain_generator_backward(
    tokenizer: ImageTokenizer,
    perceptual: nn.Module | None,
    discriminator: nn.Module | None,
    images: Tensor,
    losses: LossConfig,
    adversarial: DiscriminatorConfig | None,
    autocast: torch.autocast,
) -> Tensor:
    """The tokenizer's gradient on images (B, 3, H, W), and one of the discriminator that nobody uses -> the
    reconstruction, detached."""
    with autocast:
        output = tokenizer(images)
        rec_loss, _ = ReconstructionLoss(losses, perceptual, {})(output.reconstruction, images)
    total = rec_loss + output.quantizer.loss
    if discriminator is not None and adversarial is not None:
        with autocast:
            logits = discriminator(output.reconstruction)
        gen_loss = generator_loss(adversarial.loss, logits)
        weight: float | Tensor = adversarial.weight
        if adversarial.adaptive_weight:
            last = tokenizer.decoder.conv_out.weight
            (g_rec,) = torch.autograd.grad(rec_loss, last, retain_graph=True)
            (g_gen,) = torch.autograd.grad(gen_loss, last, retain_graph=True)
            weight = weight * (g_rec.norm() / (g_gen.norm() + 1e-8)).clamp(0, 1e4)
        total = total + weight * gen_loss
    total.backward()
    return output.reconstruction.detach()


def plain_discriminator_backward(
    discriminator: nn.Module,
    images: Tensor,
    reconstruction: Tensor,
    adversarial: DiscriminatorConfig,
    with_r1: bool,
    autocast: torch.autocast,
) -> None:
    """The discriminator's gradient on images and detached reconstructions (B, 3, H, W)."""
    real_images = images.detach().requires_grad_(with_r1)
    with autocast:
        fake_logits = discriminator(reconstruction)
        real_logits = discriminator(real_images, full_precision=with_r1)
    loss = real_loss(adversarial.loss, real_logits) + fake_loss(adversarial.loss, fake_logits)
    if with_r1:
        loss = loss + adversarial.r1_weight * r1_penalty(real_logits, real_images)
    loss.backward()
