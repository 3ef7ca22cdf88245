"""The networks of a run: built from the config, then made ready to learn on this device and with these processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW

from vqgan_accel.config import Config, TrainingConfig, batch_scale
from vqgan_accel.losses.perceptual import build_perceptual
from vqgan_accel.losses.reconstruction import ReconstructionLoss
from vqgan_accel.losses.terms import LossTerm
from vqgan_accel.models.build import build_discriminator, build_tokenizer
from vqgan_accel.models.discriminators.base import Discriminator
from vqgan_accel.models.tokenizer import ImageTokenizer, TokenizerOutput
from vqgan_accel.run_folder import DISCRIMINATOR
from vqgan_accel.training.adversary import Adversary
from vqgan_accel.training.initial import begin_with
from vqgan_accel.training.learner import Learner
from vqgan_accel.training.state import Average, Moments, Stateful, TermState, TokenizerState, Weights


class Built(NamedTuple):
    """As they are built, on the CPU."""

    tokenizer: ImageTokenizer
    discriminator: Discriminator | None
    perceptual: nn.Module | None
    terms: dict[str, LossTerm]  # further losses, by their key in `losses`


@dataclass
class Networks:
    tokenizer: Learner[ImageTokenizer]
    average: Average | None
    reconstruction_loss: ReconstructionLoss
    adversary: Adversary | None

    @property
    def learners(self) -> list[Learner[Any]]:
        return [self.tokenizer, *([self.adversary.discriminator] if self.adversary else [])]

    @property
    def best_tokenizer(self) -> ImageTokenizer:
        """The averaged one where there is one: what is validated."""
        return self.average.tokenizer if self.average else self.tokenizer.network

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint holds of them. The average comes after what it is the average of."""
        state: dict[str, Stateful] = {"tokenizer": TokenizerState(self.tokenizer.network)}
        if self.average is not None:
            state["average"] = self.average
        if self.adversary is not None:
            state["discriminator"] = Weights(self.adversary.discriminator.network, DISCRIMINATOR)
        terms = self.reconstruction_loss.terms
        state |= {name: TermState(term, f"{name}.safetensors") for name, term in terms.items() if term.state_dict()}
        return state | {"optimizers": Moments({learner.name: learner.optimizer for learner in self.learners})}


def build_networks(config: Config, fresh: bool, say: Callable[[str], None]) -> Built:
    """With seeded weights, or for a `fresh` run those of training.init_from. Errors are those of `begin_with` and
    `build_perceptual`."""
    set_seed(config.seed)  # for the initial weights; every later draw is a function of position
    tokenizer, discriminator = build_tokenizer(config), build_discriminator(config)
    if config.training.init_from is not None and fresh:
        for line in begin_with(config.training.init_from, config, tokenizer, discriminator):
            say(line)
    return Built(tokenizer, discriminator, build_perceptual(config.losses, config.weights), build_terms(config))


def build_terms(config: Config) -> dict[str, LossTerm]:
    """ValueError where one would say nothing."""
    terms = {name: section.build() for name, section in config.losses.terms.items()}
    for name, term in terms.items():
        if config.discriminator is None and term.needs_discriminator:
            raise ValueError(f"losses.{name} is a part of a discriminator's loss, and there is none; leave it out")
    return terms


def prepare_networks(built: Built, config: Config, accelerator: Accelerator) -> Networks:
    """Made ready to learn, in the order that correctness needs:

    memory layout, for optimizers keep moments in their weights' layout; what does not learn is frozen before it is
    wrapped, for DDP waits for the gradient of whatever would learn; the average is a copy of what is neither compiled
    nor wrapped; compilation, in place, before the wrapper; the wrapper with its optimizer. A checkpoint is read after
    all of that, and after `settle_buckets`.
    """
    training, device = config.training, accelerator.device
    # The tokenizer stays as it is, for GroupNorm is slow in this layout (docs/performance.md), and so does D on a GPU,
    # where its blur is slow in it (docs/gpu).
    for network in (built.discriminator if device.type == "cpu" else None, built.perceptual):
        if network is not None:
            network.to(memory_format=torch.channels_last)
    if training.decoder_only:
        built.tokenizer.encoder.requires_grad_(False)
        built.tokenizer.quantizer.requires_grad_(False)
    average = Average(built.tokenizer, training.ema_decay, device) if training.ema_decay is not None else None
    if training.compile:  # in place: names in checkpoints stay
        for network in (built.tokenizer.encoder, built.tokenizer.decoder, built.perceptual):
            if network is not None:
                network.compile()
    if built.perceptual is not None:
        built.perceptual.to(device)
    terms = {name: term.to(device) for name, term in built.terms.items()}
    tokenizer = learner("tokenizer", built.tokenizer, decay_groups(built.tokenizer, training), training, accelerator)
    adversary = None
    if config.discriminator is not None and built.discriminator is not None:
        groups = [{"params": list(built.discriminator.parameters()), "weight_decay": training.weight_decay}]
        discriminator = learner("discriminator", built.discriminator, groups, training, accelerator)
        adversary = Adversary(accelerator, config.discriminator, discriminator, terms)
    return Networks(tokenizer, average, ReconstructionLoss(config.losses, built.perceptual, terms), adversary)


def learner(
    name: str, network: Any, groups: list[dict[str, Any]], training: TrainingConfig, accelerator: Accelerator
) -> Learner[Any]:
    """Its learning rate is the peak's; the loop sets that of each step."""
    rate = training.base_lr * batch_scale(training)
    optimizer = AdamW(groups, lr=rate, betas=training.betas, eps=training.eps, fused=True)
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    return Learner(name, network, wrapped, optimizer)


def decay_groups(tokenizer: ImageTokenizer, training: TrainingConfig) -> list[dict[str, Any]]:
    """Weight decay on convolution weights (1x1 ones in diffusers' attention are linear layers): none on norms, biases
    and the codebook."""
    convolutions = {id(module.weight) for module in tokenizer.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in tokenizer.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in convolutions].append(parameter)
    return [
        {"params": groups[True], "weight_decay": training.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def settle_buckets(networks: Networks, accelerator: Accelerator, batch_size: int, image_size: int) -> None:
    """One backward pass of each network for nothing, before a checkpoint is read. (On one process there is no need.)

    DDP lays its buckets out anew after its first reduction, and from three processes on the layout decides in which
    order a gradient's parts are added. In a resumed run the first step's sums would be other ones, in their last bit.
    """
    if accelerator.num_processes == 1:
        return
    images = torch.zeros(batch_size, 3, image_size, image_size, device=accelerator.device)
    output: TokenizerOutput = networks.tokenizer.wrapped(images, (0,) * batch_size)
    accelerator.backward((output.reconstruction.sum() + output.quantizer.loss) * 0)
    networks.tokenizer.network.quantizer.discard_update()
    if networks.adversary is not None:
        accelerator.backward(networks.adversary.discriminator.wrapped(images).sum() * 0)
    for each in networks.learners:
        each.wrapped.zero_grad()
