"""What a step costs beside what it must: counted on the meta device, where no tensor has values."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import reset_accelerate, tiny_tokenizer
from tiny import tiny_config
from torch import Tensor

from vqgan_accel.config import Config, LossConfig, StyleGAN2Config
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import step_flops
from one_round import Game
from step_flops import CASES, Case


@pytest.fixture(autouse=True)
def accelerate_afterwards() -> Iterator[None]:
    yield
    reset_accelerate()


def small(folder: Path) -> Config:
    """Convolutions of every kind that the recipes have, at a hundredth of their size."""
    return tiny_config(
        folder,
        data={"path": "none", "image_size": 64},
        autoencoder={"channels": 64, "channel_multipliers": [1, 2], "upsample_conv": True},
        losses={"perceptual_weight": 1.0},
        discriminator={"channel_base": 2048, "channel_max": 64, "r1_weight": 10.0},
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_does_the_arithmetic_that_its_mathematics_needs_and_no_more(case: Case, tmp_path: Path) -> None:
    config = small(tmp_path)
    done = sum(
        step_flops.counted(half).sum()
        for half in step_flops.halves(config, case, step_flops.build(config, case, step_flops.COUNTED), plain=False)
    )
    least = step_flops.floor(config, case)
    assert 0.995 * least <= done <= 1.02 * least


@pytest.mark.seconds
@pytest.mark.parametrize("case", CASES[3:], ids=lambda case: case.name)
def test_a_step_holds_fewer_bytes_at_once_than_the_plain_way(case: Case, tmp_path: Path) -> None:
    config = small(tmp_path)
    ours, plain = (
        step_flops.peak_gib(*step_flops.halves(config, case, step_flops.build(config, case, 8), way))
        for way in (False, True)
    )
    assert ours < 0.95 * plain


def test_the_discriminators_graph_is_gone_when_the_tokenizers_backward_pass_begins(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tokenizer = tiny_tokenizer(config.quantizer)
    kept: list[weakref.ref[Tensor]] = []

    class Watched(StyleGAN2Discriminator):
        def forward(self, images: Tensor, full_precision: bool = False) -> Tensor:
            def pack(tensor: Tensor) -> Tensor:
                copy = tensor.detach()  # its own object, which dies with the graph
                kept.append(weakref.ref(copy))
                return copy

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return super().forward(images, full_precision)

    alive: list[int] = []
    tokenizer.decoder.conv_out.weight.register_hook(lambda _: alive.append(sum(ref() is not None for ref in kept)))
    discriminator = Watched(16, channel_base=128, channel_max=16)
    adversarial, losses = StyleGAN2Config(), LossConfig(perceptual_weight=0)
    images = torch.rand(4, 3, 16, 16)
    Game(Accelerator(cpu=True), tokenizer, losses, None, discriminator, adversarial).first_half(images)
    assert len(kept) > 20 and alive == [0]
