"""bf16: which operators of a step run in it and which do not, and how far its gradients are from float32's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import reset_accelerate, tiny_tokenizer
from one_round import Game
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vqgan_accel.config import LossConfig, StandardQuantizerConfig, StyleGAN2Config
from vqgan_accel.losses.perceptual import LPIPSDistance
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator

SIZE = 32
LOSSES = LossConfig(perceptual_weight=1.0)
ADVERSARIAL = StyleGAN2Config(adaptive_weight=True, r1_weight=1.0)


class Dtypes(TorchDispatchMode):
    """The dtypes of the floating-point arguments of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.of: defaultdict[str, list[torch.dtype]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        self.of[func._overloadpacket.__name__].extend(dtypes)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def accelerate_afterwards() -> Iterator[None]:
    yield
    reset_accelerate()


def run(
    precision: str, with_r1: bool, losses: LossConfig = LOSSES
) -> tuple[list[nn.Module], dict[str, Tensor], Dtypes, Dtypes]:
    """One step -> tokenizer and discriminator with their gradients, its values, and the dtypes in its two halves."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8), image_size=SIZE)
    torch.manual_seed(0)
    d_model, perceptual = StyleGAN2Discriminator(SIZE, channel_base=512, channel_max=16), LPIPSDistance("squeeze")
    images = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    tokenizer, discriminator = accelerator.prepare(model, d_model)
    first, second = Dtypes(), Dtypes()
    game = Game(accelerator, tokenizer, losses, perceptual, discriminator, ADVERSARIAL, with_r1)
    with first:
        made = game.first_half(images)
    with second:
        parts = game.second_half(images, made)
    return [model, d_model], made.losses | parts, first, second


@pytest.mark.seconds
def test_convolutions_run_in_bf16_and_what_decides_codes_losses_and_the_weight_in_float32() -> None:
    _, values, first, second = run("bf16", with_r1=False)
    for half in (first, second):
        # float32: D's epilogue, and in the first half the last layer that lambda looks at and LPIPS's linear heads
        assert half.of["convolution"].count(torch.bfloat16) > 2 * half.of["convolution"].count(torch.float32)
        assert half.of["convolution_backward"].count(torch.bfloat16) > half.of["convolution_backward"].count(
            torch.float32
        )
    assert set(first.of["addmm"]) == {torch.float32}  # distances, D's last layers
    for operator in ("mse_loss", "argmin", "softplus", "linalg_vector_norm", "var"):
        assert set(first.of[operator]) <= {torch.float32}, operator
    assert first.of["mse_loss"] and first.of["argmin"] and first.of["softplus"] and first.of["linalg_vector_norm"]
    assert {value.dtype for value in values.values()} == {torch.float32}


@pytest.mark.seconds
def test_r1_is_float32_from_the_images_to_the_last_gradient() -> None:
    _, _, _, second = run("bf16", with_r1=True)
    assert second.of["convolution"] and second.of["convolution_backward"]
    assert torch.bfloat16 not in {dtype for dtypes in second.of.values() for dtype in dtypes}


@pytest.mark.seconds
@pytest.mark.parametrize("with_r1", [False, True])
def test_a_step_in_bf16_has_the_values_of_one_in_float32_and_its_gradients_point_the_same_way(with_r1: bool) -> None:
    """Networks that have learnt nothing magnify rounding: the tokenizer's gradients are a quarter apart here, and 8 %
    in the trained demo (cosine 0.997)."""
    losses = LossConfig(l1_weight=0, l2_weight=1, perceptual_weight=0)  # L1 and LPIPS have kinks besides
    exact, values, *_ = run("no", with_r1, losses)
    rounded, bf16_values, *_ = run("bf16", with_r1, losses)
    for name, value in values.items():
        assert bf16_values[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name
    for network, other in zip(exact, rounded, strict=True):
        ours, expected = (
            torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]) for each in (other, network)
        )
        assert ours.shape == expected.shape
        assert F.cosine_similarity(ours, expected, dim=0) > 0.9


@pytest.mark.seconds
def test_features_as_large_as_the_network_are_returned_only_where_lambda_needs_them() -> None:
    """In bf16 Accelerate copies whatever a network returns to float32."""
    asked: list[bool] = []
    for adaptive in (True, False):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8), image_size=SIZE)
        discriminator = StyleGAN2Discriminator(SIZE, channel_base=512, channel_max=16)
        tokenizer, discriminator = accelerator.prepare(model, discriminator)
        model.register_forward_hook(lambda *hooked: asked.append(hooked[-1].last_features is not None))
        config = StyleGAN2Config(adaptive_weight=adaptive)
        losses = LossConfig(perceptual_weight=0)
        game = Game(accelerator, tokenizer, losses, None, discriminator, config)
        game.first_half(torch.rand(4, 3, SIZE, SIZE) * 2 - 1)
        reset_accelerate()
    assert asked == [True, False]
