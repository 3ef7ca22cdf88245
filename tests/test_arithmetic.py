"""How numbers are rounded and added up on a GPU, seen without one: what its kernels would read, at each operator."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import TAMING, reset_accelerate, tiny_tokenizer
from one_round import Game
from runs import assert_same_bits
from tiny import DISCRIMINATOR, QUANTIZERS, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqgan_accel.compat import tf32_switches
from vqgan_accel.config import LossConfig, StyleGAN2Config, TrainingConfig
from vqgan_accel.evaluation.evaluate import evaluate
from vqgan_accel.losses.perceptual import LPIPSDistance, MobileNetDistance
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator
from vqgan_accel.models.precision import ieee_float32, tf32_convolutions
from vqgan_accel.training import loop
from vqgan_accel.training.arithmetic import WORKSPACE, WORKSPACES, arithmetic, deterministic_algorithms

SIZE = 32
ADVERSARIAL = StyleGAN2Config(adaptive_weight=True, r1_weight=1.0)
CONVOLUTIONS = ("convolution", "convolution_backward")


class Switches(TorchDispatchMode):
    """Operator -> what `tf32_convolutions` and `are_deterministic_algorithms_enabled` said at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.tf32: defaultdict[str, list[bool]] = defaultdict(list)
        self.deterministic: defaultdict[str, list[bool]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        self.tf32[name].append(tf32_convolutions())
        self.deterministic[name].append(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))

    @property
    def convolutions(self) -> set[bool]:
        return {allowed for name in CONVOLUTIONS for allowed in self.tf32[name]}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _, _ in tf32_switches()]
    yield
    reset_accelerate()
    assert [getattr(owner, name) for owner, name, _, _ in tf32_switches()] == before
    assert not torch.are_deterministic_algorithms_enabled()


def training(**settings: Any) -> TrainingConfig:
    return TrainingConfig(max_steps=1, **settings)


def both_halves(
    kind: str = "standard", with_r1: bool = True, perceptual: nn.Module | None = None, **layout: Any
) -> tuple[Switches, Switches]:
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    model = tiny_tokenizer(QUANTIZERS[kind], SIZE, **layout)
    d_model = StyleGAN2Discriminator(SIZE, channel_base=128, channel_max=16)
    losses = LossConfig(perceptual_weight=1.0 if perceptual else 0.0)
    game = Game(accelerator, model, losses, perceptual, d_model, ADVERSARIAL, with_r1)
    images = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    seeds = range(4) if QUANTIZERS[kind].draws_noise else None
    first, second = Switches(), Switches()
    with first:
        made = game.first_half(images, seeds)
    with second:
        game.second_half(images, made)
    return first, second


# ---- TF32


def test_what_torch_allows_by_itself_is_tf32_in_convolutions() -> None:
    """Or nothing below would show anything."""
    assert tf32_convolutions()


def test_r1_and_lambda_are_ieee_and_the_rest_of_the_step_as_the_config_says() -> None:
    with arithmetic(training(tf32=True)):
        first, second = both_halves(with_r1=True)
    assert second.convolutions == {False}  # R1's forward pass, its gradient, and the gradient of that
    # the last layer, forward once, and once backward for each of the two losses
    assert first.tf32["convolution"].count(False) == 1 and first.tf32["convolution_backward"].count(False) == 2
    assert first.tf32["convolution"].count(True) > 10
    with arithmetic(training(tf32=True)):
        _, second = both_halves(with_r1=False)
    assert second.convolutions == {True}


def test_by_default_no_convolution_of_a_step_and_no_matrix_product_is_tf32() -> None:
    owner, name, tf32, _ = tf32_switches()[-1]  # matrix products
    before = getattr(owner, name)
    setattr(owner, name, tf32)
    try:
        with arithmetic(training()):
            first, second = both_halves(with_r1=False, perceptual=LPIPSDistance("squeeze"))
            assert all(getattr(owner, name) == ieee for owner, name, _, ieee in tf32_switches())
    finally:
        setattr(owner, name, before)
    assert first.convolutions == second.convolutions == {False}


def test_a_whole_run_with_tf32_validates_without_it_and_so_does_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {name: Switches() for name in ("take_step", "validate")}

    def watched(name: str, original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with seen[name]:
                return original(*arguments)

        return call

    for name in seen:
        monkeypatch.setattr(loop, name, watched(name, getattr(loop, name)))
    config = tiny_config(tmp_path, training={"tf32": True, "mixed_precision": "no", "max_steps": 1})
    run = loop.train(config)
    assert seen["take_step"].convolutions == {True} and seen["validate"].convolutions == {False}
    with Switches() as switches:
        report = evaluate(run, output=tmp_path / "evaluation")
    assert switches.convolutions == {False}
    assert report["protocol"]["arithmetic"] == "float32, IEEE"


def test_codes_and_pictures_are_ieee_for_whoever_asks() -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["standard"], SIZE)
    with Switches() as switches:
        tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, SIZE, SIZE)))
    assert switches.convolutions == {False} and switches.tf32["convolution"]


def test_an_error_leaves_the_switches_as_they_were() -> None:
    with pytest.raises(KeyError), ieee_float32():
        raise KeyError


# ---- deterministic algorithms

# What torch.use_deterministic_algorithms names in its documentation. The first have a deterministic form too on CUDA,
# which it takes; of the second there is none, and it raises.
REPLACED = {
    "convolution",
    "convolution_backward",
    "index_add_",
    "index_add",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "index_put",
    "index_put_",
    "index_copy_",
    "index_select_backward",
    "gather",
    "replication_pad2d_backward",
    "repeat_interleave",
}
IMPOSSIBLE = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "max_pool3d_with_indices_backward",
    "fractional_max_pool2d_backward",
    "max_unpool2d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward",
    "upsample_trilinear3d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "grid_sampler_2d_backward",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "put_",
    "histc",
    "bincount",
    "kthvalue",
    "median",
    "cumsum",
    "cumsum_",
    "scatter_reduce",
    "scatter_reduce_",
}
OURS = {"convolution", "convolution_backward", "index_add_"}  # docs/exactness.md tells of these


@pytest.mark.seconds
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("layout", [{}, TAMING], ids=["maskgit", "taming"])
def test_a_step_uses_nothing_that_cannot_be_deterministic_and_little_that_is_not_by_itself(
    kind: str, layout: dict[str, Any]
) -> None:
    first, second = both_halves(kind, perceptual=LPIPSDistance("squeeze"), **layout)
    used = {*first.tf32, *second.tf32}
    assert len(used) > 40
    assert not used & IMPOSSIBLE
    assert used & REPLACED <= OURS


@pytest.mark.seconds
@pytest.mark.parametrize("distance", [LPIPSDistance, MobileNetDistance])
def test_neither_does_a_perceptual_network(distance: Any) -> None:
    networks = [distance(name) for name in ("vgg", "alex")] if distance is LPIPSDistance else [distance()]
    for network in networks:
        images = torch.rand(1, 3, 64, 64).requires_grad_()
        with Switches() as switches:
            network(images, torch.rand(1, 3, 64, 64)).sum().backward()
        assert not set(switches.tf32) & IMPOSSIBLE and set(switches.tf32) & REPLACED <= OURS


@pytest.mark.seconds
def test_the_setting_reaches_every_operator_of_a_step_and_changes_nothing_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    original, seen = loop.take_step, Switches()

    def watched(*arguments: Any) -> Any:
        with seen:
            return original(*arguments)

    monkeypatch.setattr(loop, "take_step", watched)
    runs = []
    for deterministic in (True, False):
        config = tiny_config(
            tmp_path,
            output_dir=str(tmp_path / str(deterministic)),
            quantizer={"type": "ema"},
            discriminator=DISCRIMINATOR,
            training={"deterministic": deterministic},
        )
        runs.append(loop.train(config))
        asked = {value for values in seen.deterministic.values() for value in values}
        assert asked == ({True} if deterministic else {True, False})
    assert os.environ[WORKSPACE] == ":4096:8"
    assert_same_bits(*(run / "checkpoints" / "latest" for run in runs))


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("warned_before", [False, True])
def test_while_it_is_asked_for_what_cannot_be_raises_and_afterwards_all_is_as_before(
    workspace: str, warned_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, workspace)
    torch.use_deterministic_algorithms(warned_before, warn_only=warned_before)
    try:
        with pytest.raises(KeyError), deterministic_algorithms(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == warned_before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warned_before
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ[WORKSPACE] == workspace


def test_an_environment_that_forbids_it_and_compilation_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="deterministic cannot be promised with compile"):
        training(deterministic=True, compile=True)
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG is :0:0.*:4096:8 or :16:8"):
        loop.train(tiny_config(tmp_path, training={"deterministic": True}))
    assert not (tmp_path / "run").exists()
