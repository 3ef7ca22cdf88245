"""Both halves of a round on given networks, without a run around them: for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD

from vqgan_accel.config import DiscriminatorConfig, LossConfig
from vqgan_accel.losses.reconstruction import ReconstructionLoss
from vqgan_accel.training.adversary import Adversary
from vqgan_accel.training.learner import Learner
from vqgan_accel.training.round import Round, tokenizer_backward


class Game(NamedTuple):
    """Networks as they are, or as Accelerate has prepared them."""

    accelerator: Accelerator
    tokenizer: nn.Module
    losses: LossConfig
    perceptual: nn.Module | None = None
    discriminator: nn.Module | None = None
    adversarial: DiscriminatorConfig | None = None
    with_r1: bool = False

    def adversary(self) -> Adversary | None:
        if self.discriminator is None or self.adversarial is None:
            return None
        adversary = Adversary(self.accelerator, self.adversarial, self.learner("discriminator", self.discriminator), {})
        adversary.phase, adversary.with_r1 = "teaching", self.with_r1
        return adversary

    def learner(self, name: str, network: nn.Module) -> Learner:
        return Learner(name, self.accelerator.unwrap_model(network), network, SGD(network.parameters(), lr=0.0))

    def first_half(self, images: Tensor, seeds: Sequence[int] | None = None) -> Round:
        loss = ReconstructionLoss(self.losses, self.perceptual, {})
        tokenizer = self.learner("tokenizer", self.tokenizer)
        return tokenizer_backward(self.accelerator, tokenizer, loss, self.adversary(), images, seeds)

    def second_half(self, images: Tensor, made: Round) -> dict[str, Tensor]:
        adversary = self.adversary()
        assert adversary is not None and made.verdict is not None
        return adversary.learn(images, made.verdict)
