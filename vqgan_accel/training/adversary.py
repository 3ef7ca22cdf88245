"""The adversarial game from the discriminator's side: it judges reconstructions, teaches the tokenizer, and learns.

Each accumulation round calls `judge`, `teach` (both in round.py) and `learn`, inside `accelerator.accumulate`. Its
weights are the same in all three, so one forward pass of the reconstructions serves its own loss and the tokenizer's,
and its gradient crosses the wire once, in `learn` (docs/performance.md).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from vqgan_accel.config import DiscriminatorConfig
from vqgan_accel.losses.adversarial import adaptive_weight, fake_loss, generator_loss, r1_penalty, real_loss
from vqgan_accel.losses.terms import LossTerm, with_terms
from vqgan_accel.models.discriminators.base import Discriminator
from vqgan_accel.models.precision import ieee_float32
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.training.learner import Learner
from vqgan_accel.training.plan import Phase


class Verdict(NamedTuple):
    """Of a round's reconstructions; all detached."""

    logits: Tensor  # (B, 1, ...)
    pull: Tensor | None  # (B, 3, H, W), the gradient of `generator_loss`; None while the discriminator learns alone
    generator_loss: Tensor  # scalar
    fake_loss: Tensor  # scalar, the fake half of the discriminator's own
    terms: dict[str, Tensor]  # scalars, unweighted: what further terms say of the fakes


class Lesson(NamedTuple):
    """What the tokenizer learns from a verdict."""

    pull: Tensor  # (B, 3, H, W): the gradient of all losses with respect to the reconstruction
    weight: Tensor  # scalar, of the generator's loss in it


class Adversary:
    """The discriminator, its optimizer, its losses, and where the game stands: `phase` and `with_r1` are set at the
    beginning of every optimizer step."""

    phase: Phase = "absent"
    with_r1: bool = False  # whether R1 is due

    def __init__(
        self,
        accelerator: Accelerator,
        config: DiscriminatorConfig,
        discriminator: Learner[Discriminator],
        terms: dict[str, LossTerm],
    ) -> None:
        self.accelerator, self.config, self.discriminator, self.terms = accelerator, config, discriminator, terms

    def judge(self, reconstruction: Tensor) -> Verdict:
        """reconstruction (B, 3, H, W), a leaf that requires a gradient. The gradient that it gives the discriminator is
        accumulated, and not yet reduced over processes."""
        with self.accelerator.no_sync(self.discriminator.wrapped):
            logits = self.discriminator.wrapped(reconstruction)
            generator = generator_loss(self.config.loss, logits)
            pull = None
            if self.phase == "teaching":
                (pull,) = torch.autograd.grad(generator, reconstruction, retain_graph=True)
            fake = fake_loss(self.config.loss, logits)
            loss, terms = with_terms(
                fake, self.terms, {name: term.on_fake(logits) for name, term in self.terms.items()}
            )
            self.accelerator.backward(loss)  # now, for it frees the graph
        return Verdict(logits.detach(), pull, generator.detach(), fake.detach(), terms)

    @property
    def needs_features(self) -> bool:
        """Whether `teach` looks at the last layer's input."""
        return self.phase == "teaching" and self.config.adaptive_weight

    def teach(self, verdict: Verdict, pull: Tensor, tokenizer: ImageTokenizer, last_features: Tensor | None) -> Lesson:
        """Add the verdict's share, times its weight, to `pull` (B, 3, H, W), the gradient of the losses between the
        reconstruction and its image. last_features: see `adaptive_weight`; None where `needs_features` says no."""
        # (`torch.full` is a kernel; for `torch.tensor` the host waits for the GPU.)
        if verdict.pull is None:
            return Lesson(pull, torch.full((), 0.0, device=pull.device))
        weight = torch.full((), self.config.weight, device=pull.device)
        if last_features is not None:
            weight = weight * adaptive_weight(tokenizer, last_features, pull, verdict.pull)
        return Lesson(pull + weight * verdict.pull, weight)

    def learn(self, images: Tensor, verdict: Verdict) -> dict[str, Tensor]:
        """Accumulate the gradient that images (B, 3, H, W) in [-1, 1] give the discriminator, R1's included, and reduce
        it together with the verdict's. Returns detached scalars of this process and round.

        With R1 all of it runs in IEEE float32, for the second derivative magnifies the rounding of bf16 and of TF32.
        """
        with ieee_float32() if self.with_r1 else nullcontext():
            return self._learn(images, verdict)

    def _learn(self, images: Tensor, verdict: Verdict) -> dict[str, Tensor]:
        images = images.detach().requires_grad_(self.with_r1)
        logits = self.discriminator.wrapped(images, full_precision=self.with_r1)
        real = real_loss(self.config.loss, logits)
        loss, terms = with_terms(real, self.terms, {name: term.on_real(logits) for name, term in self.terms.items()})
        parts = {
            "discriminator": real.detach() + verdict.fake_loss,
            "logits_real": logits.detach().mean(),
            "logits_fake": verdict.logits.mean(),
            **{
                f"discriminator_{name}": terms.get(name, 0.0) + verdict.terms.get(name, 0.0)
                for name in {**verdict.terms, **terms}
            },
        }
        if self.with_r1:
            penalty = r1_penalty(logits, images)
            loss = loss + self.config.r1_weight * penalty
            parts["r1"] = penalty.detach()
        self.accelerator.backward(loss)
        return parts
