"""Arithmetic and memory of one training step, counted on torch's meta device: no weights, no data, some seconds.

    python benchmarks/step_flops.py [CONFIG] [--batch 32]

GFLOP an image (a multiply-add is two) of the two halves of a step, beside the floor that docs/performance.md derives
from the networks' forward passes, and beside the plain way (plain_step.py). Then the most bytes that tensors made in a
step hold at once, gradients included.
"""

from __future__ import annotations

import argparse
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from one_round import Game
from plain_step import OneHotQuantizer, plain_discriminator_backward, plain_generator_backward, torchs_convolutions
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vqgan_accel.config import Config, load_config
from vqgan_accel.describe import describe
from vqgan_accel.losses.perceptual import perceptual_shell
from vqgan_accel.models.build import build_discriminator, build_tokenizer
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator
from vqgan_accel.models.quantizers import StandardQuantizer
from vqgan_accel.models.tokenizer import ImageTokenizer

COUNTED = 4  # images of the counted batch: one group of the minibatch standard deviation
RECIPE = "configs/imagenet/standard_vqgan_cb1024_adaptive_R1.yaml"


class Case(NamedTuple):
    """What a step is asked for."""

    name: str
    perceptual: bool = True
    adversarial: bool = True
    adaptive: bool = False
    r1: bool = False


CASES = [
    Case("VQ-VAE", perceptual=False, adversarial=False),
    Case("no discriminator", adversarial=False),
    Case("fixed weight"),
    Case("adaptive weight", adaptive=True),
    Case("adaptive, R1 step", adaptive=True, r1=True),
]


class Networks(NamedTuple):
    """On the meta device."""

    tokenizer: ImageTokenizer
    perceptual: nn.Module | None
    discriminator: StyleGAN2Discriminator | None
    images: Tensor


def build(config: Config, case: Case, batch: int) -> Networks:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # LPIPS reads its linear heads
        perceptual = perceptual_shell(config) if case.perceptual else None
        return Networks(
            build_tokenizer(config),
            perceptual.to("meta") if perceptual is not None else None,
            build_discriminator(config) if case.adversarial else None,
            torch.zeros(batch, 3, config.data.image_size, config.data.image_size),
        )


def halves(
    config: Config, case: Case, networks: Networks, plain: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The step's first and second half, to be called in this order: ours, or the plain way."""
    tokenizer, perceptual, discriminator, images = networks
    assert config.discriminator is not None
    adversarial = (
        config.discriminator.model_copy(update={"adaptive_weight": case.adaptive}) if case.adversarial else None
    )
    losses, accelerator, autocast = config.losses, Accelerator(cpu=True), torch.autocast("cpu", enabled=False)
    if not case.perceptual:
        losses = losses.model_copy(update={"perceptual_weight": 0.0})
    game = Game(accelerator, tokenizer, losses, perceptual, discriminator, adversarial, case.r1)
    made: list[Any] = []  # what the first half hands to the second

    def first() -> None:
        if plain:
            with torchs_convolutions():
                made.append(
                    plain_generator_backward(
                        tokenizer, perceptual, discriminator, images, losses, adversarial, autocast
                    )
                )
        else:
            made.append(game.first_half(images))

    def second() -> None:
        (handed,) = made
        if discriminator is None or adversarial is None:
            return
        if plain:
            discriminator.zero_grad()
            with torchs_convolutions():
                plain_discriminator_backward(discriminator, images, handed, adversarial, case.r1, autocast)
        else:
            game.second_half(images, handed)

    if plain:
        assert isinstance(tokenizer.quantizer, StandardQuantizer)
        tokenizer.quantizer = OneHotQuantizer(tokenizer.quantizer)
    return first, second


def floor(config: Config, case: Case) -> float:
    """GFLOP an image that the mathematics of a step needs: see docs/performance.md, "The floor"."""
    forward = describe(config)["gflop_per_image"]
    tokenizer, _, discriminator, _ = build(config, case._replace(adversarial=True), 1)
    assert discriminator is not None
    size, quantizer = config.data.image_size, config.quantizer
    tokens = (size // config.autoencoder.stride) ** 2
    first_layer = gflop_of(tokenizer.encoder.conv_in.weight, size**2)
    last_layer = gflop_of(tokenizer.decoder.conv_out.weight, size**2)
    distances = 2e-9 * tokens * quantizer.num_codes * quantizer.embedding_dim
    from_rgb = gflop_of(discriminator.get_submodule(f"b{size}.fromrgb").weight, size**2)
    filters = sum(
        gflop_of(discriminator.get_submodule(f"b{r}").blur_kernel, ((r + 1) ** 2 + (r // 2) ** 2))
        * discriminator.get_submodule(f"b{r}.conv0").weight.shape[1]
        for r in discriminator.resolutions
    )

    total = 3 * (forward["encoder"] + forward["decoder"]) - first_layer + distances
    if case.perceptual:  # of two images, and back to one of them
        total += 1.5 * forward["perceptual"]
    if case.adversarial:  # two inputs forward, back to all weights but the filters', and once more to the fake input
        total += 7 * forward["discriminator"] - 2 * filters - 2 * from_rgb
    if case.adaptive:  # two gradients of its weight
        total += 2 * last_layer
    if case.r1:  # to the image, and from there back to all layers and weights
        total += 3 * forward["discriminator"] - filters
    return total


def gflop_of(kernel: Tensor, positions: int) -> float:
    """Of a convolution with this kernel, at `positions`; a multiply-add is two."""
    return 2e-9 * kernel.numel() * positions


class Gflop(TorchDispatchMode):
    """FLOPs by torch's own formulas, of operators that autograd runs and of the others. (FlopCounterMode itself follows
    modules too, which fails where `autograd.grad` is asked for the gradient of a module's input.)"""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            gflop = formula(*args, **kwargs, out_val=result) / 1e9
            if torch._C._current_graph_task_id() == -1:
                self.forward += gflop
            else:
                self.backward += gflop
        return result


def counted(run: Callable[[], None]) -> np.ndarray:
    """GFLOP an image, forward and backward."""
    with Gflop() as gflop:
        run()
    return np.array([gflop.forward, gflop.backward]) / COUNTED


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made in here held at once: one entry a storage, taken out when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen | old:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_gib(*runs: Callable[[], None]) -> float:
    with PeakBytes() as bytes_:
        for run in runs:
            run()
    return bytes_.peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=RECIPE)
    parser.add_argument("--batch", type=int, default=32, help="images of a process, for the bytes")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    print(f"{arguments.config}, {config.data.image_size} px, GFLOP an image\n")
    forward = describe(config)["gflop_per_image"]
    print(
        "one pass forward   " + ", ".join(f"{value:.1f} {name}" for name, value in forward.items()) + " (two images)\n"
    )

    print(f"{'':22}{'first half':^18}{'second half':^18}{'':30}{'plain way':>10}")
    print(
        f"{'step':22}"
        + f"{'forward':>9}{'backward':>9}" * 2
        + f"{'together':>10}{'floor':>10}{'x floor':>10}"
        + f"{'':>2}{'together':>9}{'x floor':>9}"
    )
    totals: list[np.ndarray] = []
    for case in CASES:
        ours, plain = (
            np.array([counted(half) for half in halves(config, case, build(config, case, COUNTED), way)])
            for way in (False, True)
        )
        least = floor(config, case)
        print(
            f"{case.name:22}"
            + "".join(f"{value:9.1f}" for value in ours.flat)
            + f"{ours.sum():10.1f}{least:10.1f}{ours.sum() / least:10.3f}{plain.sum():11.1f}{plain.sum() / least:9.3f}"
        )
        totals.append(ours.sum(0))
    print(f"\n{'ours, by what it is for':26}{'forward':>10}{'backward':>10}")
    names = ["tokenizer", "perceptual network", "discriminator", "adaptive weight", "R1, on its steps"]
    for name, (ahead, back) in zip(names, np.diff(totals, axis=0, prepend=np.zeros((1, 2))), strict=True):
        print(f"{name:26}{ahead:10.1f}{back:10.1f}")

    print(f"\n{f'GiB at batch {arguments.batch}':22}{'ours':>10}{'plain way':>11}{'ratio':>8}")
    for case in CASES:
        mine, other = (
            peak_gib(*halves(config, case, build(config, case, arguments.batch), way)) for way in (False, True)
        )
        print(f"{case.name:22}{mine:10.2f}{other:11.2f}{other / mine:8.2f}")


if __name__ == "__main__":
    main()
