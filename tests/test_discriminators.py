"""Every discriminator of the config's union keeps the contract of models/discriminators/base.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vqgan_accel.config.discriminators import DiscriminatorField
from vqgan_accel.models.discriminators.base import Discriminator
from vqgan_accel.sections import DiscriminatorSection, sections_of, type_of

SIZE = 32
SECTIONS = {type_of(section): section for section in sections_of(DiscriminatorField)}
SMALL = {"stylegan2": {"channel_base": 256, "channel_max": 16}}  # fields that make a network quick


def section(kind: str) -> DiscriminatorSection:
    made = SECTIONS[kind](**SMALL.get(kind, {}))  # type: ignore[arg-type]
    assert isinstance(made, DiscriminatorSection)
    return made


def build(kind: str) -> Discriminator:
    torch.manual_seed(0)
    return section(kind).build(SIZE)


def images(number: int) -> Tensor:
    return torch.rand(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


each = pytest.mark.parametrize("kind", SECTIONS)


@each
def test_it_gives_float32_logits_for_each_image(kind: str) -> None:
    number = 2 * section(kind).group[1]
    logits = build(kind)(images(number))
    assert logits.shape[:2] == (number, 1) and logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert build(kind)(images(number)).dtype == torch.float32


@each
def test_its_slope_has_the_gradient_that_differences_give(kind: str) -> None:
    """Differentiable twice: along a direction in its weights, the penalty |d sum(D) / dx|^2 changes as its gradient
    says."""
    network, number = build(kind).double(), section(kind).group[1]
    x = images(number).double()

    def penalty() -> Tensor:
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)
        return slope.square().sum()

    parameters = list(network.parameters())
    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
        values.append(penalty().detach())
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(step * direction)
    assert ((values[0] - values[1]) / 2e-6).item() == pytest.approx(float(expected), rel=1e-4)


@each
def test_with_full_precision_it_computes_in_float32_also_under_autocast(kind: str) -> None:
    network, x = build(kind), images(section(kind).group[1])
    plain = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        exact, rounded = network(x, full_precision=True), network(x)
    assert torch.equal(exact, plain)
    assert not torch.equal(rounded, plain)


@each
def test_a_batch_that_is_dealt_out_in_whole_groups_gets_the_logits_of_the_whole(kind: str) -> None:
    """Image by image to two processes, as training deals them."""
    network, number = build(kind), 4 * section(kind).group[1]
    x = images(number)
    whole = network(x)
    for process in range(2):
        torch.testing.assert_close(network(x[process::2]), whole[process::2], rtol=1e-5, atol=1e-6)


@each
def test_it_keeps_no_statistics(kind: str) -> None:
    network = build(kind).train()
    assert not any(isinstance(module, _BatchNorm | nn.SyncBatchNorm) for module in network.modules())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    first = network(images(section(kind).group[1]))
    assert torch.equal(first, network(images(section(kind).group[1])))
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


@each
def test_an_image_size_that_it_cannot_take_is_a_sentence_that_names_the_key(kind: str) -> None:
    for size in (1, 3, 7):
        try:
            section(kind).require_image_size(size)
        except ValueError as error:
            assert "data.image_size" in str(error)
        else:
            section(kind).build(size)
