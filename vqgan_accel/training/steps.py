"""The two halves of a training step: what the reconstruction teaches both networks, and what the images teach the
discriminator.

Both are called once per accumulation round inside `accelerator.accumulate`; `accelerator.backward` divides by the
number of rounds, DDP averages over processes on the last one. Losses are float32 whatever the autocast.

Their arithmetic is at its floor (docs/performance.md): each network sees each of its inputs once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqgan_accel.config import DiscriminatorConfig, LossConfig
from vqgan_accel.losses.adversarial import adaptive_weight, fake_loss, generator_loss, r1_penalty, real_loss
from vqgan_accel.losses.reconstruction import reconstruction_loss
from vqgan_accel.models.tokenizer import ImageTokenizer, TokenizerOutput


class GeneratorStep(NamedTuple):
    codes: Tensor  # (B, h, w)
    latents: Tensor  # (B, D, h, w), detached
    fake_logits: Tensor | None  # (B, 1), detached; None without a discriminator
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
    reaches_tokenizer: bool = True,
) -> GeneratorStep:
    """Accumulate the gradient that images (B, 3, H, W) in [-1, 1] give the tokenizer, and the one that their
    reconstructions give the discriminator.

    `discriminator` and `adversarial` are None before adversarial training starts; while the discriminator warms up,
    `reaches_tokenizer` is False: it learns, and the tokenizer does not learn from it. The losses are differentiated
    down to the reconstruction only; one backward pass through the tokenizer then serves them all, weighted. One forward
    pass of the discriminator serves its own loss and the generator's.
    """
    output: TokenizerOutput = tokenizer(images, sample_seeds)
    leaf = output.reconstruction.detach().requires_grad_()
    with accelerator.autocast():
        rec_loss, parts = reconstruction_loss(leaf, images, perceptual, losses)
    (gradient,) = torch.autograd.grad(rec_loss, leaf)
    total = rec_loss.detach() + output.quantizer.loss.detach()

    fake_logits = None
    if discriminator is not None and adversarial is not None:
        # `discriminator_backward` reduces this half of the gradient over processes together with its own.
        with accelerator.no_sync(discriminator):
            fake_logits = discriminator(leaf)
            gen_loss = generator_loss(adversarial.loss, fake_logits)
            if reaches_tokenizer:
                (d_gen,) = torch.autograd.grad(gen_loss, leaf, retain_graph=True)
            accelerator.backward(fake_loss(adversarial.loss, fake_logits))  # now, for it frees D's graph
        # (`torch.full` is a kernel; for `torch.tensor` the host waits for the GPU.)
        weight = torch.full((), adversarial.weight if reaches_tokenizer else 0.0, device=images.device)
        if reaches_tokenizer:
            if adversarial.adaptive_weight:
                model: ImageTokenizer = accelerator.unwrap_model(tokenizer)
                weight = weight * adaptive_weight(model, output.last_features, gradient, d_gen)
            gradient = gradient + weight * d_gen
        total = total + weight * gen_loss.detach()
        parts |= {"generator": gen_loss.detach(), "adversarial_weight": weight}
        fake_logits = fake_logits.detach()

    # A scalar whose gradient is that of the weighted losses; its value means nothing.
    surrogate = (output.reconstruction * gradient).sum()
    accelerator.backward(surrogate + output.quantizer.loss)
    return GeneratorStep(
        codes=output.quantizer.codes,
        latents=output.latents,
        fake_logits=fake_logits,
        losses={"total": total, **parts, **output.quantizer.metrics},
    )


def discriminator_backward(
    accelerator: Accelerator,
    discriminator: nn.Module,
    images: Tensor,
    fake_logits: Tensor,
    adversarial: DiscriminatorConfig,
    with_r1: bool,
) -> dict[str, Tensor]:
    """Accumulate the gradient that images (B, 3, H, W) give the discriminator, R1's included, and reduce all of it.

    `fake_logits` (B, 1), detached: of the reconstructions, whose gradient `generator_backward` has accumulated; they
    are reported here. R1's forward pass runs in float32, for bf16 rounding is magnified by the second derivative.
    """
    real_images = images.detach().requires_grad_(with_r1)
    real_logits = discriminator(real_images, full_precision=with_r1)
    loss = real_loss(adversarial.loss, real_logits)
    parts = {
        "discriminator": loss.detach() + fake_loss(adversarial.loss, fake_logits),
        "logits_real": real_logits.detach().mean(),
        "logits_fake": fake_logits.mean(),
    }
    if with_r1:
        penalty = r1_penalty(real_logits, real_images)
        loss = loss + adversarial.r1_weight * penalty
        parts["r1"] = penalty.detach()
    accelerator.backward(loss)
    return parts
