"""Seconds of one training step beside two other ways to write it, on the same networks, images and losses.

    python benchmarks/step_time.py [CONFIG] [--size 128] [--batch 4] [--repeats 4]

1. The plain way (plain_step.py), in float32 and in bf16, on the recipe's networks.
2. The way of diffusers' example for its VQModel (examples/vqgan/train_vqgan.py): each batch trains the tokenizer or the
   discriminator, in turn, so that both are trained by two batches; hinge losses, lambda from the perceptual loss alone,
   by two backward passes; the perceptual network in float32 always. Its gradient penalty in every step is left out, in
   its favour. Both sides train a VQModel (pip install diffusers) with our discriminator and perceptual network.

Before anything is timed, the gradients of ours and of the plain way are compared. Competitors take turns; the fastest
turn of each is shown, and the share of this processor's rate that it reaches, by the FLOPs that step_flops.py counts.
Perceptual networks have random weights here.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from one_round import Game
from plain_step import OneHotQuantizer, plain_discriminator_backward, plain_generator_backward, torchs_convolutions
from step_flops import CASES, COUNTED, RECIPE, Case, build, counted, halves
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from vqgan_accel.config import Config, DiscriminatorConfig, load_config
from vqgan_accel.losses.perceptual import perceptual_shell
from vqgan_accel.models.build import build_discriminator, build_tokenizer
from vqgan_accel.models.quantizers import QuantizerOutput, StandardQuantizer
from vqgan_accel.models.tokenizer import TokenizerOutput

PRECISIONS = ("float32", "bf16")
Networks = tuple[nn.Module, nn.Module, nn.Module]  # tokenizer, perceptual network, discriminator


class OneProcess:
    """What the steps ask of an Accelerator, which allows one precision a process."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def prepare(self, module: nn.Module) -> nn.Module:
        return Autocast(module, self)

    def unwrap_model(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, Autocast) else module

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Autocast(nn.Module):
    """As Accelerate prepares a network: autocast around its forward pass."""

    def __init__(self, module: nn.Module, accelerator: OneProcess) -> None:
        super().__init__()
        self.module, self.accelerator = module, accelerator

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        with self.accelerator.autocast():
            return self.module(*arguments, **settings)


class Competitor:
    """Networks of its own, from the same weights, and both optimizers."""

    def __init__(self, networks: Networks, precision: str, fused: bool) -> None:
        self.tokenizer, self.perceptual, self.discriminator = copy.deepcopy(networks)
        self.accelerator = OneProcess(precision)
        self.optimizers = [
            AdamW(network.parameters(), lr=1e-6, fused=fused) for network in (self.tokenizer, self.discriminator)
        ]

    def update(self, *which: int) -> None:
        for index in which:
            self.optimizers[index].step()
            self.optimizers[index].zero_grad()

    def gradients(self) -> list[Tensor | None]:
        return [p.grad for network in (self.tokenizer, self.discriminator) for p in network.parameters()]


class Ours(Competitor):
    def __init__(self, networks: Networks, precision: str) -> None:
        super().__init__(networks, precision, fused=True)
        for network in (self.perceptual, self.discriminator):
            network.to(memory_format=torch.channels_last)
        self.prepared = [self.accelerator.prepare(network) for network in (self.tokenizer, self.discriminator)]

    def backward(self, images: Tensor, config: Config, adversarial: DiscriminatorConfig | None, case: Case) -> None:
        tokenizer, discriminator = self.prepared
        accelerator: Any = self.accelerator
        game = Game(accelerator, tokenizer, config.losses, self.perceptual, discriminator, adversarial, case.r1)
        made = game.first_half(images)
        if adversarial is not None:
            game.second_half(images, made)


class Plain(Competitor):
    def __init__(self, networks: Networks, precision: str) -> None:
        super().__init__(networks, precision, fused=False)
        assert isinstance(self.tokenizer.quantizer, StandardQuantizer)
        self.tokenizer.quantizer = OneHotQuantizer(self.tokenizer.quantizer)

    def backward(self, images: Tensor, config: Config, adversarial: DiscriminatorConfig | None, case: Case) -> None:
        autocast, losses = self.accelerator.autocast(), config.losses
        with torchs_convolutions():
            reconstruction = plain_generator_backward(
                self.tokenizer, self.perceptual, self.discriminator, images, losses, adversarial, autocast
            )
            if adversarial is not None:
                self.discriminator.zero_grad()
                plain_discriminator_backward(self.discriminator, images, reconstruction, adversarial, case.r1, autocast)


class VQModelTokenizer(nn.Module):
    """diffusers' VQModel, as our steps see a tokenizer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.decoder = model.decoder
        self.decoder.conv_out.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        self.features = arguments[0].detach()

    def last_layer(self, features: Tensor) -> Tensor:
        return self.decoder.conv_out(features)

    def forward(
        self, images: Tensor, sample_seeds: Sequence[int] | None = None, keep_features: bool = True
    ) -> TokenizerOutput:
        latents = self.model.encode(images).latents
        quantized, loss, (_, _, codes) = self.model.quantize(latents)
        reconstruction = self.decoder(self.model.post_quant_conv(quantized))
        output = QuantizerOutput(quantized, codes, loss, {})
        return TokenizerOutput(reconstruction.float(), output, latents.detach(), self.features)


class Example(Competitor):
    """diffusers' example: `networks[0]` is a VQModelTokenizer, of which it sees the VQModel."""

    def __init__(self, networks: Networks, precision: str) -> None:
        super().__init__(networks, precision, fused=False)

    def step(self, images: Tensor) -> None:
        """One update of each network, each on `images`."""
        with torchs_convolutions():
            self.train_tokenizer(images)
            self.train_discriminator(images)

    def train_tokenizer(self, images: Tensor) -> None:
        with self.accelerator.autocast():
            reconstruction, commitment = self.tokenizer.model(images, return_dict=False)
        reconstruction = reconstruction.float()
        loss = F.mse_loss(images, reconstruction) + commitment
        perceptual = self.perceptual(reconstruction, images).mean()  # not prepared in the example: float32 always
        with self.accelerator.autocast():
            logits = self.discriminator(reconstruction)
        adversarial, last = -logits.mean(), self.tokenizer.decoder.conv_out.weight
        norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (perceptual, adversarial)]
        weight = (norms[0] / norms[1].clamp(min=1e-8)).clamp(max=1e4)
        (loss + perceptual + weight * adversarial).backward()
        self.update(0)

    def train_discriminator(self, images: Tensor) -> None:
        self.optimizers[1].zero_grad()
        with self.accelerator.autocast():
            reconstruction, _ = self.tokenizer.model(images, return_dict=False)
            fake, real = self.discriminator(reconstruction.float().detach()), self.discriminator(images)
        (F.relu(1 + fake) + F.relu(1 - real)).mean().backward()
        self.update(1)


def fastest(turns: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds; the first turn of each is not counted."""
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, turn in turns.items():
            begun = time.perf_counter()
            turn()
            seconds = time.perf_counter() - begun
            if repeat:
                best[name] = min(best.get(name, seconds), seconds)
    return best


def full_step(competitor: Ours | Plain, images: Tensor, config: Config, case: Case) -> Callable[[], None]:
    assert config.discriminator is not None
    adversarial = config.discriminator.model_copy(update={"adaptive_weight": case.adaptive})
    if not case.perceptual:
        config = config.model_copy(update={"losses": config.losses.model_copy(update={"perceptual_weight": 0.0})})
        competitor.perceptual = None  # type: ignore[assignment]

    def run() -> None:
        competitor.backward(images, config, adversarial if case.adversarial else None, case)
        competitor.update(*([0, 1] if case.adversarial else [0]))

    return run


def rates() -> dict[str, dict[str, float]]:
    """GFLOP/s of this processor: of a matrix product, and of the friendliest convolution in the discriminator."""
    result: dict[str, dict[str, float]] = {}
    for precision, dtype in zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True):
        a = torch.randn(2048, 2048, dtype=dtype)
        x, w = torch.randn(4, 512, 64, 64, dtype=dtype), torch.randn(512, 512, 3, 3, dtype=dtype)
        x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))
        times = fastest({"mm": lambda a=a: a @ a, "conv": lambda x=x, w=w: F.conv2d(x, w, padding=1)}, 5)
        result[precision] = {
            "matrix product": 2e-9 * 2048**3 / times["mm"],
            "convolution": 2e-9 * 4 * 512 * 512 * 9 * 64**2 / times["conv"],
        }
    return result


def check_gradients(networks: Networks, images: Tensor, config: Config) -> None:
    """Both ways on the same networks and images, in float32; stops where they are not the same step."""
    found = []
    for way in (Ours, Plain):
        competitor = way(networks, "float32")
        competitor.backward(images, config, config.discriminator, CASES[4])
        found.append(competitor.gradients())
    pairs = list(zip(*found, strict=True))
    worst = max(
        ((a - b).norm() / b.norm()).item() for a, b in pairs if a is not None and b is not None and b.norm() > 0
    )
    if any((a is None) != (b is None) for a, b in pairs):
        worst = float("inf")
    print(f"gradients of both ways, R1 included: no parameter's differ by more than {worst:.1e} of their norm")
    if worst > 1e-2:
        raise SystemExit("the two ways do not compute the same step: there is nothing to compare")


def compare_with_plain_way(networks: Networks, images: Tensor, config: Config, repeats: int) -> None:
    processor = rates()
    for precision, kinds in processor.items():
        print(f"{precision} here: " + ", ".join(f"{value:.0f} GFLOP/s {kind}" for kind, value in kinds.items()))
    print(f"\n{'':20}{'float32':^24}{'bf16':^24}{'ours bf16 /':>14}{'% of the rate, float32, bf16':^32}")
    print(
        f"{'seconds a step':20}"
        + f"{'plain':>8}{'ours':>8}{'x':>8}" * 2
        + f"{'plain float32':>14}"
        + "".join(f"{kind:>16}" for kind in processor["bf16"])
    )
    for case in (CASES[0], CASES[3], CASES[4]):
        ways = [(precision, way) for precision in PRECISIONS for way in (Plain, Ours)]
        turns = {
            f"{way.__name__} {precision}": full_step(way(networks, precision), images, config, case)
            for precision, way in ways
        }
        plain32, ours32, plain16, ours16 = fastest(turns, repeats).values()
        gflop = len(images) * sum(
            counted(half).sum() for half in halves(config, case, build(config, case, COUNTED), plain=False)
        )
        reached = {"float32": gflop / ours32, "bf16": gflop / ours16}
        print(
            f"{case.name:20}{plain32:8.2f}{ours32:8.2f}{plain32 / ours32:8.2f}{plain16:8.2f}{ours16:8.2f}"
            f"{plain16 / ours16:8.2f}{plain32 / ours16:14.2f}"
            + "".join(
                f"{' and '.join(f'{reached[p] / processor[p][kind]:.0%}' for p in PRECISIONS):>16}"
                for kind in processor["bf16"]
            )
        )


def compare_with_example(
    discriminator: nn.Module, perceptual: nn.Module, images: Tensor, config: Config, repeats: int
) -> None:
    try:
        from diffusers import VQModel
    except ImportError:
        print("\nwithout diffusers (pip install diffusers) there is no comparison with its example")
        return
    model = VQModel(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(64, 128, 256, 512),
        layers_per_block=2,
        latent_channels=256,
        num_vq_embeddings=1024,
        vq_embed_dim=256,
    )
    networks = (VQModelTokenizer(model), perceptual, discriminator)
    print(f"\n{'VQModel, seconds to update both networks':44}{'example':>10}{'ours':>10}{'x':>8}")
    turns: dict[str, Callable[[], None]] = {}
    for precision in PRECISIONS:
        turns[f"example {precision}"] = functools.partial(Example(networks, precision).step, images)
        turns[f"ours {precision}"] = full_step(Ours(networks, precision), images, config, CASES[3])
    seconds = fastest(turns, repeats)
    for precision in PRECISIONS:
        example, ours = seconds[f"example {precision}"], seconds[f"ours {precision}"]
        print(f"{precision:44}{example:10.2f}{ours:10.2f}{example / ours:8.2f}")
    print("(the example reads two batches meanwhile, each of which trains one network)")


def asked_for(description: str | None, repeats: int) -> tuple[Config, Tensor, int]:
    """From the command line: a recipe at some size, random images for it, and how many turns each competitor has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=RECIPE)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=repeats)
    arguments = parser.parse_args()
    config = load_config(arguments.config, [f"data.image_size={arguments.size}"])
    print(
        f"{arguments.config} at {arguments.size} px, batch {arguments.batch}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads of {platform.machine()}"
    )
    torch.manual_seed(0)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size) * 2 - 1
    return config, images, arguments.repeats


def main() -> None:
    config, images, repeats = asked_for(__doc__, repeats=4)
    tokenizer, discriminator, perceptual = (
        build_network(config) for build_network in (build_tokenizer, build_discriminator, perceptual_shell)
    )
    assert discriminator is not None and perceptual is not None
    nn.init.normal_(tokenizer.quantizer.codebook)  # codes apart: no ties for rounding to decide
    networks = (tokenizer, perceptual, discriminator)
    check_gradients(networks, images, config)
    compare_with_plain_way(networks, images, config, repeats)
    compare_with_example(discriminator, perceptual, images, config, repeats)


if __name__ == "__main__":
    main()
