"""FSQ, LFQ and BSQ: closed forms, brute force over all codes, and `vector-quantize-pytorch`."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.config import parse_config
from vqgan_accel.models.quantizers import BSQQuantizer, FSQQuantizer, LFQQuantizer, Quantizer, ResidualQuantizer
from vqgan_accel.models.quantizers import lfq as lfq_module
from vqgan_accel.models.quantizers.lfq import BinaryQuantizer, bit_entropies, distribution, mean_distribution

LEVELS = ((8, 5, 5, 5), (4, 3), (3,), (7, 6, 4))


@pytest.fixture
def theirs_is() -> Any:
    """The extra `comparisons`, which the lowest versions do without."""
    return pytest.importorskip("vector_quantize_pytorch")


def latents(channels: int, scale: float = 1.0, batch: int = 6, seed: int = 3) -> Tensor:
    return scale * torch.randn(batch, channels, 4, 2, generator=torch.Generator().manual_seed(seed))


def tokens_of(grid: Tensor) -> Tensor:
    """(B, D, h, w) -> (B h w, D) float64"""
    return grid.detach().double().permute(0, 2, 3, 1).flatten(0, 2)


def every_code(quantizer: Quantizer) -> Tensor:
    """(1, 1, K)"""
    return torch.arange(quantizer.num_codes).view(1, 1, -1)


@pytest.mark.parametrize(
    "quantizer",
    [
        *(FSQQuantizer(levels, "tanh") for levels in LEVELS),
        LFQQuantizer(7, 0.25, 0.1, 1, 1, 9),
        BSQQuantizer(7, 0, 1, 1, 1),
    ],
    ids=str,
)
def test_every_code_has_a_vector_of_its_own_and_is_found_for_it(quantizer: FSQQuantizer | BinaryQuantizer) -> None:
    codes = every_code(quantizer)
    vectors = quantizer.codes_to_latents(codes)
    assert len(tokens_of(vectors).unique(dim=0)) == quantizer.num_codes
    assert torch.equal(quantizer.find(vectors), codes)


# ---- FSQ


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_is_vector_quantize_pytorchs(levels: tuple[int, ...], theirs_is: Any) -> None:
    """Codes, vectors and the gradient; its shift for even levels is the inverse of tanh, too (the paper's listing has
    tan)."""
    ours, theirs = FSQQuantizer(levels, "tanh"), theirs_is.FSQ(list(levels))
    z = latents(len(levels), 1.5).requires_grad_()
    other = z.detach().clone().requires_grad_()
    output, (quantized, codes) = ours(z), theirs(other)
    assert torch.equal(output.codes, codes.long())
    assert len(output.codes.unique()) > min(20, ours.num_codes - 1)
    torch.testing.assert_close(output.quantized, quantized, rtol=0, atol=1e-6)
    direction = torch.randn(z.shape)
    gradients = [
        torch.autograd.grad((q * direction).sum(), x)[0] for q, x in ((output.quantized, z), (quantized, other))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert output.loss == 0 and output.metrics == {}


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_levels_and_gradients_are_those_of_the_papers_formula(bound: str) -> None:
    """Worked out in float64 for each number alone."""
    levels = (8, 5, 3, 4)
    quantizer = FSQQuantizer(levels, bound)
    z = latents(4, 2.0, batch=60).requires_grad_()
    output = quantizer(z)
    (gradient,) = torch.autograd.grad(output.quantized.sum(), z)
    for place, count in enumerate(levels):
        half, offset = (count - 1) * 1.001 / 2, 0.5 if count % 2 == 0 else 0.0
        shift, gain = math.atanh(offset / half), {"tanh": 1.0, "sigmoid": 0.8}[bound]
        x = tokens_of(z)[:, place]
        bounded = (gain * x + shift).tanh() if bound == "tanh" else 2 * (1.6 * (x + shift / gain)).sigmoid() - 1
        level = (bounded * half - offset).round()
        assert relative_error(tokens_of(output.quantized)[:, place], level / (count // 2)) < 1e-6
        slope = gain * (1 - bounded**2) * half / (count // 2)
        assert relative_error(tokens_of(gradient)[:, place], slope) < 1e-4
        assert level.unique().tolist() == list(range(-(count // 2), count - count // 2))


def test_what_lies_beyond_the_levels_takes_the_last_one() -> None:
    """A residual may."""
    quantizer = FSQQuantizer((4, 3), "tanh")
    far = torch.tensor([[[[5.0]], [[-5.0]]], [[[-5.0]], [[5.0]]]])
    assert quantizer.find(far).flatten().tolist() == [3 + 4 * 0, 0 + 4 * 2]


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_zero_is_a_level_of_its_own_whether_their_number_is_odd_or_even(bound: str) -> None:
    quantizer = FSQQuantizer((8, 5, 4), bound)
    assert not quantizer(torch.zeros(1, 3, 1, 1)).quantized.abs().max() > 1e-6
    compared = quantizer.comparable(torch.zeros(1, 3, 1, 1))
    assert compared.abs().max() < 1e-6  # not near where two levels meet


def test_under_the_sigmoid_bound_normal_numbers_are_spread_evenly_and_under_tanh_they_are_not() -> None:
    """Of 5 levels of a number. (Not so their bins: rounding leaves the two outer levels half of a step each.)"""
    z = torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-0.95, 0.95, 39)
    apart, shares = {}, {}
    for bound in ("tanh", "sigmoid"):
        quantizer = FSQQuantizer((5,), bound)
        values = quantizer.comparable(z).flatten() / 1.001
        apart[bound] = max(abs(float((values < x).float().mean()) - (float(x) + 1) / 2) for x in grid)
        shares[bound] = (torch.bincount(quantizer.choose(z).flatten(), minlength=5) / len(z)).tolist()
    assert apart["sigmoid"] < 0.02 and apart["tanh"] > 0.04
    assert shares["sigmoid"] == pytest.approx([0.125, 0.25, 0.25, 0.25, 0.125], abs=0.02)
    assert shares["tanh"] != pytest.approx([0.125, 0.25, 0.25, 0.25, 0.125], abs=0.02)


def test_half_precision_latents_are_rounded_in_float32() -> None:
    """bfloat16 has fewer numbers between -1 and 1 than levels (vector-quantize-pytorch, issue 114)."""
    quantizer = FSQQuantizer((256, 256), "tanh")
    z = latents(2, batch=200)
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(z)
    assert torch.equal(output.codes, quantizer(z).codes) and output.quantized.dtype == torch.float32


def test_levels_of_a_residual_round_on_finer_grids() -> None:
    levels, depth = (5, 4), 3
    ours = ResidualQuantizer([FSQQuantizer(levels, "tanh") for _ in range(depth)], depth, 0.0)
    z = latents(2, batch=200)
    compared = ours.compared(z)
    output = ours(z)
    assert output.codes.shape == (200, 3, 4, 2) and torch.equal(ours.choose(z), output.codes)
    torch.testing.assert_close(ours.codes_to_latents(output.codes), output.quantized, rtol=0, atol=1e-6)
    # of an odd number of levels the error is at most half of the last level's step, which is (1/2) (1/5)^2
    assert (compared - output.quantized)[:, 0].abs().max() < 0.5 * 0.5 / 25 + 2e-3


def test_the_scales_of_a_residual_are_vector_quantize_pytorchs(theirs_is: Any) -> None:
    levels, depth = (5, 4), 3
    ours = ResidualQuantizer([FSQQuantizer(levels, "tanh") for _ in range(depth)], depth, 0.0)
    theirs = theirs_is.ResidualFSQ(dim=2, levels=list(levels), num_quantizers=depth)
    scales = torch.stack([ours.level(place)[1].flatten() if place else torch.ones(2) for place in range(depth)])
    torch.testing.assert_close(scales, theirs.scales.view(depth, 2).float())


# ---- LFQ and BSQ


def test_lfq_is_vector_quantize_pytorchs_in_codes_and_in_each_loss(theirs_is: Any) -> None:
    bits, temperature = 8, 0.7
    ours = LFQQuantizer(bits, 0.25, 0.1, 1.0, temperature, bits)
    theirs = theirs_is.LFQ(
        codebook_size=2**bits, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=1.0
    )
    z = latents(bits, 0.6)
    output = ours(z)
    (quantized, codes, _), parts = theirs(z, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.quantized, quantized, rtol=0, atol=1e-6)
    entropy = parts.per_sample_entropy - parts.batch_entropy
    assert output.metrics["entropy_loss"].item() == pytest.approx(entropy.item(), rel=1e-3)  # they add 1e-5 in logs
    assert output.metrics["commitment_loss"].item() == pytest.approx(parts.commitment.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(0.1 * entropy.item() + 0.25 * parts.commitment.item(), rel=1e-3)


def brute_force(z: Tensor, codes: Tensor, temperature: float, gamma: float) -> Tensor:
    """z (M, D), codes (K, D), float64 -> the entropy loss from all distances."""
    distances = (z[:, None] - codes).square().sum(2)
    p = (-distances / temperature).softmax(1)
    mean = p.mean(0)
    return torch.special.entr(p).sum(1).mean() - gamma * torch.special.entr(mean).sum()


@pytest.mark.parametrize("group", [10, 20])
@pytest.mark.parametrize("kind", ["lfq", "bsq"])
def test_the_factorised_entropies_are_those_over_all_1024_codes(kind: str, group: int) -> None:
    bits, gamma, temperature = 10, 0.8, 0.5
    quantizer: BinaryQuantizer = LFQQuantizer(bits, 0.0, 1.0, gamma, temperature, group)
    if kind == "bsq":
        quantizer = BSQQuantizer(bits, 1.0, gamma, temperature, group)
    z = latents(bits, 0.5).requires_grad_()
    loss = quantizer(z).loss
    codes = tokens_of(quantizer.codes_to_latents(every_code(quantizer)))
    other = z.detach().double().requires_grad_()
    compared = F.normalize(other, dim=1) if kind == "bsq" else other
    expected = brute_force(compared.permute(0, 2, 3, 1).flatten(0, 2), codes, temperature, gamma)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, other)[0]
    assert relative_error(gradients[0].double(), gradients[1]) < 1e-5


def test_of_groups_the_entropies_are_added_up() -> None:
    """Which is exact where the groups are independent, and never less than the entropy of all bits."""
    logits = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    whole, groups, single = (LFQQuantizer(6, 0, 1, 1, 1, group).entropy_loss(logits) for group in (6, 4, 1))
    assert single < groups < whole  # the loss has the entropy of the mean with a minus
    bits = torch.sigmoid(logits.double()).mean(0)
    mean_entropy = (
        torch.special.entr(torch.sigmoid(logits.double())).sum()
        + torch.special.entr(1 - torch.sigmoid(logits.double())).sum()
    )
    expected = mean_entropy / 500 - (torch.special.entr(bits) + torch.special.entr(1 - bits)).sum()
    assert single.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_distributions_over_codes_are_the_products_of_their_bits(bits: int) -> None:
    logits = torch.randn(7, bits, dtype=torch.float64)
    p = torch.sigmoid(logits)
    expected = torch.stack(
        [
            torch.stack([p[:, place] if bit else 1 - p[:, place] for place, bit in enumerate(code)]).prod(0)
            for code in product((0, 1), repeat=bits)
        ],
        1,
    )
    torch.testing.assert_close(distribution(logits), expected)
    torch.testing.assert_close(mean_distribution(logits), expected.mean(0))


def test_the_entropy_of_a_bit_is_exact_however_sure_it_is() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 20.0, -300.0, 3000.0])
    p = torch.sigmoid(logits.double())
    expected = torch.special.entr(p) + torch.special.entr(torch.sigmoid(-logits.double()))
    torch.testing.assert_close(bit_entropies(logits).double(), expected, rtol=1e-6, atol=1e-30)


def test_gradients_over_two_processes_average_to_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = LFQQuantizer(6, 0.25, 0.5, 1.0, 0.5, 4)
    logits = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(quantizer.entropy_loss(logits), logits)
    shards, means = (logits[::2], logits[1::2]), []
    with monkeypatch.context() as patch:
        patch.setattr(lfq_module, "mean_over_processes_with_gradient", lambda mean: means.append(mean.detach()) or mean)
        for shard in shards:
            quantizer.entropy_loss(shard)
    total = sum(means) / 2
    for shard, own in zip(shards, means, strict=True):
        monkeypatch.setattr(lfq_module, "mean_over_processes_with_gradient", lambda mean, own=own: mean + (total - own))
        (part,) = torch.autograd.grad(quantizer.entropy_loss(shard), logits)
        rows = slice(0, None, 2) if shard is shards[0] else slice(1, None, 2)
        torch.testing.assert_close(part[rows] / 2, expected[rows])


def test_tokens_that_are_all_sure_of_one_code_leave_finite_gradients() -> None:
    """The other codes' chances are 0 in float32, and the slope of p log p there is infinite."""
    for quantizer in (LFQQuantizer(4, 0.25, 0.1, 1, 0.01, 9), BSQQuantizer(4, 0.1, 1, 0.001, 1)):
        z = torch.full((2, 4, 2, 2), 3.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(quantizer(z).loss, z)
        assert gradient.isfinite().all()


def test_bsq_has_unit_vectors_and_lengths_do_not_matter() -> None:
    quantizer = BSQQuantizer(9, 0.1, 1.0, 1.0, 1)
    z = latents(9)
    output = quantizer(z)
    torch.testing.assert_close(quantizer.codes_to_latents(output.codes).norm(dim=1), torch.ones(6, 4, 2))
    assert torch.equal(quantizer.choose(5 * z), output.codes)
    torch.testing.assert_close(quantizer(5 * z).loss, output.loss)
    assert quantizer(z).loss.item() == pytest.approx(0.1 * output.metrics["entropy_loss"].item())  # and no commitment


def test_zero_is_negative_everywhere() -> None:
    for quantizer in (LFQQuantizer(4, 0.25, 0.1, 1, 1, 9), BSQQuantizer(4, 0.1, 1, 1, 1)):
        output = quantizer(torch.zeros(1, 4, 1, 1))
        assert output.codes.item() == 0 and (output.quantized < 0).all() and output.loss.isfinite()


def test_18_bits_take_no_table_of_tokens_times_codes() -> None:
    quantizer = LFQQuantizer(18, 0.25, 0.1, 1.0, 0.1, 18)
    z = latents(18, 0.3, batch=128).requires_grad_()  # 1,024 tokens; the table would be 1 GB
    largest: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: largest.append(x.numel()) or x, lambda x: x):
        loss = quantizer(z).loss
    loss.backward()
    assert max(largest) <= 2**19 and z.grad is not None and z.grad.isfinite().all() and z.grad.abs().max() > 0


# ---- what cannot be


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            ["quantizer.type=fsq", "quantizer.levels=[8,1]"],
            "levels has 1: with 0 as a level there are at least 3; type lfq",
        ),
        (["quantizer.type=fsq", "quantizer.levels=[]"], "'quantizer.levels' is []: "),
        (
            ["quantizer.type=fsq", "quantizer.levels=[64,64,64,64]"],
            "levels makes 16,777,216 codes, more than the 1,048,",
        ),
        (
            ["quantizer.type=lfq", "quantizer.bits=21"],
            "bits makes 2,097,152 codes, more than the 1,048,576 whose uses are",
        ),
        (["quantizer.type=bsq", "quantizer.bits=0"], "'quantizer.bits' is 0"),
        (["quantizer.type=fsq", "quantizer.reinit_every=1 epoch"], "'quantizer.reinit_every' belongs to another"),
    ],
)
def test_impossible_levels_are_one_sentence(override: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_config({"training": {"max_steps": 1}}, override)
    assert sentence in str(error.value) and len(str(error.value).splitlines()) == 1
