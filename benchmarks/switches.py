"""Memory layout, torch.compile and forms of AdamW, side by side: the evidence for what setup.py switches on.

    python benchmarks/switches.py [CONFIG] [--size 128] [--batch 4] [--repeats 3]

Milliseconds an image of forward and backward of each network: as it is built, in channels_last, and compiled (in the
layout in which the trainer has it). Then milliseconds of an update of all parameters. Forms take turns; the fastest
turn of each is shown. Perceptual networks have random weights here.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import torch
from step_time import PRECISIONS, asked_for, fastest
from torch import Tensor, nn
from torch.optim import AdamW

from vqgan_accel.config import Config
from vqgan_accel.losses.perceptual import perceptual_shell
from vqgan_accel.models.build import build_discriminator, build_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer

FORMS = ("contiguous", "channels_last", "compiled")


def in_form(network: nn.Module, form: str) -> nn.Module:
    network = copy.deepcopy(network)
    in_the_trainer = torch.contiguous_format if isinstance(network, ImageTokenizer) else torch.channels_last
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last, "compiled": in_the_trainer}
    network.to(memory_format=layouts[form])
    if form == "compiled":
        for part in (network.encoder, network.decoder) if isinstance(network, ImageTokenizer) else (network,):
            part.compile()
    return network


def tokenizer_pass(network: nn.Module, images: Tensor, precision: str) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = network(images)
    (output.reconstruction.sum() + output.quantizer.loss).backward()


def perceptual_pass(network: nn.Module, images: Tensor, precision: str) -> None:
    leaf = images.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        distance = network(leaf, images).mean()
    torch.autograd.grad(distance, leaf)


def discriminator_pass(network: nn.Module, images: Tensor, precision: str) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = network(images)
    logits.sum().backward()


def updates(config: Config) -> dict[str, Callable[[], object]]:
    turns: dict[str, Callable[[], object]] = {}
    for name, settings in (("loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
        networks = nn.ModuleList([build_tokenizer(config), build_discriminator(config)])
        for parameter in networks.parameters():
            parameter.grad = torch.randn_like(parameter)
        turns[name] = AdamW(networks.parameters(), **settings).step
    return turns


def main() -> None:
    warnings.filterwarnings("ignore", module="torch._inductor.*")
    config, images, repeats = asked_for(__doc__, repeats=3)
    print(f"{'ms an image':32}" + "".join(f"{form:>15}" for form in FORMS))
    for name, build, run in (
        ("tokenizer", build_tokenizer, tokenizer_pass),
        ("perceptual network", perceptual_shell, perceptual_pass),
        ("discriminator", build_discriminator, discriminator_pass),
    ):
        network = build(config)
        assert network is not None
        forms = {form: in_form(network, form) for form in FORMS}
        for precision in PRECISIONS:
            turns = {form: functools.partial(run, forms[form], images, precision) for form in FORMS}
            seconds = fastest(turns, repeats)
            print(
                f"{name + ', ' + precision:32}" + "".join(f"{1e3 * seconds[f] / len(images):15.0f}" for f in FORMS),
                flush=True,
            )
    seconds = fastest(updates(config), repeats)
    print("AdamW, ms an update: " + ", ".join(f"{name} {1e3 * value:.0f}" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
