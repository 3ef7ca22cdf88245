"""The two halves of a training step: the tokenizer's gradient and the discriminator's.

Both are called once per accumulation round inside `accelerator.accumulate`; `accelerator.backward` divides by the
number of rounds, DDP averages over processes on the last one. Losses are float32 whatever the autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqgan_accel.config import DiscriminatorConfig, LossConfig
from vqgan_accel.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, r1_penalty
from vqgan_accel.losses.reconstruction import reconstruction_loss
from vqgan_accel.models.tokenizer import ImageTokenizer, TokenizerOutput


class GeneratorStep(NamedTuple):
    reconstruction: Tensor  # (B, 3, H, W), detached
    codes: Tensor  # (B, h, w)
    latents: Tensor  # (B, D, h, w), detached
    losses: dict[str, Tensor]  # detached scalars of this process and round


def generator_backward(
    accelerator: Accelerator,
    tokenizer: nn.Module,
    perceptual: nn.Module | None,
    discriminator: nn.Module | None,
    images: Tensor,
    sample_seeds: Tensor | None,
    losses: LossConfig,
    adversarial: DiscriminatorConfig | None,
) -> GeneratorStep:
    """Accumulate the tokenizer's gradient on images (B, 3, H, W) in [-1, 1].

    `discriminator` and `adversarial` are None before adversarial training starts. The losses are differentiated down
    to the reconstruction only; one backward pass through the tokenizer then serves them all, weighted.
    """
    output: TokenizerOutput = tokenizer(images, sample_seeds)
    leaf = output.reconstruction.detach().requires_grad_()
    with accelerator.autocast():
        rec_loss, parts = reconstruction_loss(leaf, images, perceptual, losses)
    (gradient,) = torch.autograd.grad(rec_loss, leaf)
    total = rec_loss.detach() + output.quantizer.loss.detach()

    if discriminator is not None and adversarial is not None:
        # The unwrapped network: its parameters get no gradient here, so nothing of it crosses the wire.
        with accelerator.autocast():
            fake_logits = accelerator.unwrap_model(discriminator)(leaf)
        gen_loss = generator_loss(adversarial.loss, fake_logits)
        (d_gen,) = torch.autograd.grad(gen_loss, leaf)
        weight = torch.tensor(adversarial.weight, device=images.device)
        if adversarial.adaptive_weight:
            model: ImageTokenizer = accelerator.unwrap_model(tokenizer)
            weight = weight * adaptive_weight(model, output.last_features, gradient, d_gen)
        gradient = gradient + weight * d_gen
        total = total + weight * gen_loss.detach()
        parts |= {"generator": gen_loss.detach(), "adversarial_weight": weight}

    # A scalar whose gradient is that of the weighted losses; its value means nothing.
    surrogate = (output.reconstruction * gradient).sum()
    accelerator.backward(surrogate + output.quantizer.loss)
    return GeneratorStep(
        leaf.detach(), output.quantizer.codes, output.latents, {"total": total, **parts, **output.quantizer.metrics}
    )


def discriminator_backward(
    accelerator: Accelerator,
    discriminator: nn.Module,
    images: Tensor,
    reconstruction: Tensor,
    adversarial: DiscriminatorConfig,
    with_r1: bool,
) -> dict[str, Tensor]:
    """Accumulate the discriminator's gradient on images and detached reconstructions (B, 3, H, W).

    R1 and the adversarial loss share one backward pass through the DDP-wrapped network: one reduction. R1's forward
    pass runs in float32, for bf16 rounding is magnified by the second derivative.
    """
    fake_logits = discriminator(reconstruction)
    real_images = images.detach().requires_grad_(with_r1)
    real_logits = discriminator(real_images, full_precision=with_r1)
    loss = discriminator_loss(adversarial.loss, real_logits, fake_logits)
    parts = {
        "discriminator": loss.detach(),
        "logits_real": real_logits.detach().mean(),
        "logits_fake": fake_logits.detach().mean(),
    }
    if with_r1:
        penalty = r1_penalty(real_logits, real_images)
        loss = loss + adversarial.r1_weight * penalty
        parts["r1"] = penalty.detach()
    accelerator.backward(loss)
    return parts
