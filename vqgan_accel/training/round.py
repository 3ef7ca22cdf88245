"""The tokenizer's half of an accumulation round; `Adversary.learn` is the other one.

Called inside `accelerator.accumulate`; `accelerator.backward` divides by the number of rounds, DDP averages over
processes on the last one. Losses are float32 whatever the autocast. The arithmetic is at its floor
(docs/performance.md): each network sees each of its inputs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from vqgan_accel.losses.reconstruction import ReconstructionLoss
from vqgan_accel.models.tokenizer import ImageTokenizer, TokenizerOutput
from vqgan_accel.training.adversary import Adversary, Verdict
from vqgan_accel.training.learner import Learner


class Round(NamedTuple):
    codes: Tensor  # (B, h, w)
    latents: Tensor  # (B, D, h, w), detached
    losses: dict[str, Tensor]  # detached scalars of this process and round
    verdict: Verdict | None  # the adversary's, for its own half


def tokenizer_backward(
    accelerator: Accelerator,
    tokenizer: Learner[ImageTokenizer],
    reconstruction_loss: ReconstructionLoss,
    adversary: Adversary | None,
    images: Tensor,
    sample_seeds: Sequence[int] | None,
) -> Round:
    """Accumulate the gradient that images (B, 3, H, W) in [-1, 1] give the tokenizer, and the one that their
    reconstructions give the discriminator. sample_seeds: see Quantizer.forward; adversary: None while its
    phase is `absent`.

    The losses are differentiated down to the reconstruction only; one backward pass through the tokenizer then serves
    them all, weighted.
    """
    keep_features = adversary is not None and adversary.needs_features
    output: TokenizerOutput = tokenizer.wrapped(images, sample_seeds, keep_features)
    leaf = output.reconstruction.detach().requires_grad_()
    with accelerator.autocast():
        loss, parts = reconstruction_loss(leaf, images)
    (pull,) = torch.autograd.grad(loss, leaf)
    total = loss.detach() + output.quantizer.loss.detach()

    verdict = None
    if adversary is not None:
        verdict = adversary.judge(leaf)
        pull, weight = adversary.teach(verdict, pull, tokenizer.network, output.last_features)
        verdict = verdict._replace(pull=None)  # as large as the images, and a step keeps the verdicts of its rounds
        total = total + weight * verdict.generator_loss
        parts |= {"generator": verdict.generator_loss, "adversarial_weight": weight}

    # A scalar whose gradient is that of the weighted losses; its value means nothing.
    surrogate = (output.reconstruction * pull).sum()
    accelerator.backward(surrogate + output.quantizer.loss)

    losses = {"total": total, **parts, **output.quantizer.metrics}
    return Round(output.quantizer.codes, output.latents, losses, verdict)
