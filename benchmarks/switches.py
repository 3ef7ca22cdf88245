"""Memory layout, torch.compile and forms of AdamW, side by side: the evidence for what setup.py switches on.

    python benchmarks/switches.py [CONFIG] [--size 128] [--batch 4] [--repeats 3]

Milliseconds an image of forward and backward of each network: as it is built, in channels_last, and compiled (in the
layout in which the trainer has it). Then milliseconds of an update of all parameters. Forms take turns; the fastest
turn of each is shown. Perceptual networks have random weights here.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import warnings
from collections.abc import Callable

import torch
from step_flops import RECIPE
from step_time import PRECISIONS, fastest
from torch import Tensor, nn
from torch.optim import AdamW

from vqgan_accel.config import Config, load_config
from vqgan_accel.describe import build_discriminator, build_tokenizer, perceptual_shell
from vqgan_accel.models.tokenizer import ImageTokenizer

FORMS = ("contiguous", "channels_last", "compiled")


def in_form(network: nn.Module, form: str) -> nn.Module:
    network = copy.deepcopy(network)
    in_the_trainer = torch.contiguous_format if isinstance(network, ImageTokenizer) else torch.channels_last
    network.to(
        memory_format={"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}.get(
            form, in_the_trainer
        )
    )
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=RECIPE)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch._inductor.*")
    config = load_config(arguments.config, [f"data.image_size={arguments.size}"])
    print(
        f"{arguments.config} at {arguments.size} px, batch {arguments.batch}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads of {platform.machine()}"
    )
    torch.manual_seed(0)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size) * 2 - 1
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
            seconds = fastest(turns, arguments.repeats)
            print(
                f"{name + ', ' + precision:32}" + "".join(f"{1e3 * seconds[f] / arguments.batch:15.0f}" for f in FORMS),
                flush=True,
            )
    seconds = fastest(updates(config), arguments.repeats)
    print("AdamW, ms an update: " + ", ".join(f"{name} {1e3 * value:.0f}" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
