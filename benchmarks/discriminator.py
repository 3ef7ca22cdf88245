"""Where the time of the StyleGAN2 discriminator goes, part by part, as torch's operators have it and as ours do.

    python benchmarks/discriminator.py [--size 256] [--batch 2] [--repeats 3] [--precision no|bf16]

Milliseconds an image of a forward pass, of forward and backward, and of what an R1 step does with the images (forward,
the gradient in the image, and the way back through both). `torch` is `F.conv2d` in contiguous memory, filters as
grouped convolutions; `ours` is our convolution in the same memory; `channels_last` is that in the memory layout that
the trainer uses. Forms take turns; the fastest turn of each is shown.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from plain_step import torchs_convolutions
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from vqgan_accel.losses.adversarial import r1_penalty
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator

WEIGHT_AT = {"aten::conv2d": 1, "aten::convolution_backward": 2, "aten::_convolution_double_backward": 4}  # argument
PARTS = ("3x3 convolutions", "1x1 convolutions", "filters", "leaky ReLU", "rest")


class Form(NamedTuple):
    name: str
    memory_format: torch.memory_format
    convolutions: Callable[[], AbstractContextManager[None]]


FORMS = [
    Form("torch", torch.contiguous_format, torchs_convolutions),
    Form("ours", torch.contiguous_format, nullcontext),
    Form("channels_last", torch.channels_last, nullcontext),
]


def forward(discriminator: StyleGAN2Discriminator, images: Tensor, precision: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = discriminator(images)
        return logits


def forward_backward(discriminator: StyleGAN2Discriminator, images: Tensor, precision: str) -> None:
    forward(discriminator, images, precision).sum().backward()


def with_r1(discriminator: StyleGAN2Discriminator, images: Tensor, precision: str) -> None:
    images = images.detach().requires_grad_()
    logits = discriminator(images, full_precision=True)
    (logits.sum() + r1_penalty(logits, images)).backward()


def part_of(event: FunctionEvent) -> str:
    if "leaky_relu" in event.name:
        return "leaky ReLU"
    kernel = event.input_shapes[WEIGHT_AT[event.name]]
    if kernel[1:] == [1, 4, 4]:
        return "filters"
    return "3x3 convolutions" if kernel[2] == 3 else "1x1 convolutions"


def milliseconds(run: Callable[[], object]) -> dict[str, float]:
    """Of each part of one call; operators inside operators count for the outermost that has a part."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        begun = time.perf_counter()
        run()
        total = 1e3 * (time.perf_counter() - begun)
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events():
        if (event.name in WEIGHT_AT or "leaky_relu" in event.name) and not has_part_above(event):
            spent[part_of(event)] += event.cpu_time_total / 1e3
    spent["rest"] = total - sum(spent.values())
    return spent


def has_part_above(event: FunctionEvent) -> bool:
    above = event.cpu_parent
    while above is not None:
        if above.name in WEIGHT_AT or "leaky_relu" in above.name:
            return True
        above = above.cpu_parent
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="R1 is float32 in both")
    arguments = parser.parse_args()
    print(
        f"{arguments.size} px, batch {arguments.batch}, mixed precision {arguments.precision}, ms an image; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads of {platform.machine()}"
    )
    torch.manual_seed(0)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size) * 2 - 1
    networks = {form: StyleGAN2Discriminator(arguments.size).to(memory_format=form.memory_format) for form in FORMS}
    for title, run in (("forward", forward), ("forward, backward", forward_backward), ("with R1", with_r1)):
        best: dict[Form, dict[str, float]] = {}
        for repeat in range(arguments.repeats + 1):  # the first to warm up
            for form in FORMS:
                networks[form].zero_grad()
                with form.convolutions():
                    spent = milliseconds(lambda run=run, form=form: run(networks[form], images, arguments.precision))
                if repeat and (form not in best or sum(spent.values()) < sum(best[form].values())):
                    best[form] = spent
        print(f"\n{title:20}" + "".join(f"{form.name:>16}" for form in FORMS))
        for part in PARTS:
            print(f"{part:20}" + "".join(f"{best[form][part] / arguments.batch:16.1f}" for form in FORMS))
        totals = [sum(best[form].values()) / arguments.batch for form in FORMS]
        print(f"{'together':20}" + "".join(f"{total:16.1f}" for total in totals))
        print(f"{'times faster':20}" + "".join(f"{totals[0] / total:16.2f}" for total in totals))


if __name__ == "__main__":
    main()
