"""Quantizers against golden numbers, plain second implementations and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import load_golden, relative_error
from scipy.stats import chisquare
from tiny import KEPT, NEAREST, QUANTIZERS, having, tiny_quantizer
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.models.quantizers import (
    CodebookQuantizer,
    EMAQuantizer,
    EntropyQuantizer,
    GumbelQuantizer,
    Quantizer,
    StandardQuantizer,
    base,
)
from vqgan_accel.models.quantizers.base import gather_codes, nearest_codes
from vqgan_accel.models.quantizers.entropy import LOG_EPS, Target, entropy_loss
from vqgan_accel.models.quantizers.gumbel import gumbel_noise

K, D = 32, 16
DECAY, EPSILON = 0.9, 1e-5


# what of a type is not as its section has it
SPECIAL: dict[str, dict[str, float]] = {
    "ema": {"decay": DECAY, "epsilon": EPSILON},
    "entropy": {"entropy_temperature": 0.5},
}


def build(name: str) -> Quantizer:
    """K codes of D numbers where its section says so, of unit scale in place of U(-1/K, 1/K)."""
    torch.manual_seed(0)
    size = having(name, num_codes=K, embedding_dim=D)
    quantizer = tiny_quantizer(name, **size, **SPECIAL.get(name, {})).build()
    if isinstance(quantizer, GumbelQuantizer):
        quantizer.kl_cost = 0.5
    with torch.no_grad():
        for key in ("codebook", "sums"):
            if hasattr(quantizer, key):
                getattr(quantizer, key).normal_()
    return quantizer


def build_ema() -> EMAQuantizer:
    quantizer = build("ema")
    assert isinstance(quantizer, EMAQuantizer)
    return quantizer


def build_codebook(name: str) -> CodebookQuantizer:
    quantizer = build(name)
    assert isinstance(quantizer, CodebookQuantizer)
    return quantizer


def random_latents(quantizer: Quantizer, batch: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(batch, quantizer.input_channels, 4, 2, generator=torch.Generator().manual_seed(seed))


def tokens_of(latents: Tensor) -> list[Tensor]:
    """Every position's vector, in the order of codes.flatten()."""
    return [
        latents[b, :, i, j]
        for b in range(latents.shape[0])
        for i in range(latents.shape[2])
        for j in range(latents.shape[3])
    ]


each_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
each_codebook = pytest.mark.parametrize("name", NEAREST)
each_kept_codebook = pytest.mark.parametrize("name", KEPT)
each_variant = pytest.mark.parametrize("variant", ["old", "head"])


# ---- golden numbers


@each_variant
@pytest.mark.parametrize("name", ["standard", "entropy", "entropy_argmax"])
def test_codes_losses_and_gradients_equal_the_golden_numbers(name: str, variant: str) -> None:
    golden = load_golden(f"quantizer_{name}_{variant}")
    quantizer = {
        "standard": StandardQuantizer(K, D, 0.25),
        "entropy": EntropyQuantizer(K, D, 0.25, ratio=0.1, temperature=0.01, target="softmax"),
        "entropy_argmax": EntropyQuantizer(K, D, 0.25, ratio=0.1, temperature=0.5, target="argmax"),
    }[name]
    quantizer.load_state_dict({"codebook": golden["codebook"]})
    latents = golden["in.latent"].requires_grad_()
    output = quantizer(latents)
    torch.autograd.backward(output.quantized.square().sum() + output.loss)
    assert torch.equal(output.codes.flatten(1), golden["out.codes"])
    assert relative_error(output.quantized, golden["out.quantized"]) <= 1e-5
    assert relative_error(output.loss, golden["out.loss"].squeeze()) <= 1e-5
    assert latents.grad is not None and relative_error(latents.grad, golden["grad.latent"]) <= 1e-5
    gradient = quantizer.codebook.grad
    assert gradient is not None and relative_error(gradient, golden["grad.codebook"]) <= 1e-5


@each_variant
def test_gumbel_logits_kl_loss_and_most_likely_codes_equal_the_golden_numbers(variant: str) -> None:
    golden = load_golden(f"quantizer_gumbel_{variant}")
    quantizer = GumbelQuantizer(K, D, straight_through=False)
    quantizer.load_state_dict({name: golden[name] for name in quantizer.state_dict()})
    quantizer.kl_cost = 0.0005
    output = quantizer(golden["in.encoder_output"])
    assert relative_error(quantizer.x_to_logits(golden["in.encoder_output"]), golden["out.logits"]) <= 1e-5
    assert relative_error(output.loss, golden["out.kl_loss"].squeeze()) <= 1e-5
    assert torch.equal(output.codes.flatten(1), golden["out.codes_argmax"])


# ---- the nearest code


@pytest.mark.parametrize("max_distances", [None, 7 * K, 1], ids=["one block", "blocks of 7", "blocks of 1"])
def test_nearest_codes_are_the_argmin_of_float64_distances_however_the_tokens_are_split(
    max_distances: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[Tensor] = []
    partial_distances = base.partial_distances
    monkeypatch.setattr(
        base, "partial_distances", lambda *operands: blocks.append(partial_distances(*operands)) or blocks[-1]
    )
    if max_distances is not None:
        monkeypatch.setattr(base, "MAX_DISTANCES", max_distances)
    torch.manual_seed(0)
    latents, codebook = torch.randn(3, D, 5, 4), torch.randn(K, D)
    distances = torch.cdist(torch.stack(tokens_of(latents)).double(), codebook.double())
    codes = nearest_codes(latents, codebook)
    assert codes.shape == (3, 5, 4) and codes.dtype == torch.int64
    assert torch.equal(codes.flatten(), distances.argmin(1))
    assert len(codes.unique()) > K / 2
    tokens_per_block = {None: 60, 7 * K: 7, 1: 1}[max_distances]
    assert len(blocks) == math.ceil(60 / tokens_per_block)
    assert max(block.numel() for block in blocks) == tokens_per_block * K


def test_nearest_codes_are_right_for_a_new_codebook_far_smaller_than_the_latents() -> None:
    torch.manual_seed(0)
    latents, codebook = 30 * torch.randn(3, 256, 5, 4), base.initial_codebook(1024, 256, "uniform")
    assert codebook.abs().max() <= 1 / 1024 and codebook.std() > 0.5 / 1024
    distances = torch.cdist(torch.stack(tokens_of(latents)).double(), codebook.double()).square()
    chosen = distances.gather(1, nearest_codes(latents, codebook).view(-1, 1)).squeeze(1)
    # |z|^2 is near 230,000 and the distances differ by about 1: with it in float32, near ones could not be told apart.
    assert (chosen - distances.amin(1)).max() <= 1e-5 * distances.std(1).mean()


@each_codebook
def test_the_gradient_of_the_quantized_latents_goes_straight_through_to_the_latents(name: str) -> None:
    quantizer = build_codebook(name)
    latents = random_latents(quantizer).requires_grad_()
    output = quantizer(latents)
    expected = quantizer.codebook_vectors()[output.codes].permute(0, 3, 1, 2)
    torch.testing.assert_close(output.quantized, expected, rtol=0, atol=1e-6)
    direction = torch.randn_like(latents)
    inputs = [latents, *quantizer.parameters()]
    gradient, *others = torch.autograd.grad((output.quantized * direction).sum(), inputs, allow_unused=True)
    assert torch.equal(gradient, direction)
    assert all(other is None for other in others)


@each_codebook
def test_the_loss_and_its_gradients_equal_a_plain_loop_over_tokens(name: str) -> None:
    quantizer = build_codebook(name)
    if isinstance(quantizer, EntropyQuantizer):
        quantizer.ratio = 0.0
    latents = random_latents(quantizer).requires_grad_()
    output = quantizer(latents)
    codebook = quantizer.codebook_vectors()
    squares = [(z - codebook[k]).square() for z, k in zip(tokens_of(latents), output.codes.flatten(), strict=True)]
    loss = torch.stack(squares).mean()
    commitment, codebook_cost = 0.25, 0.0 if name == "ema" else 1.0
    assert output.loss.item() == pytest.approx((commitment + codebook_cost) * loss.item(), rel=1e-6)
    assert output.metrics["commitment_loss"].item() == pytest.approx(loss.item(), rel=1e-6)

    (expected,) = torch.autograd.grad(loss, latents, retain_graph=True)
    (gradient,) = torch.autograd.grad(output.loss, latents, retain_graph=True)
    assert relative_error(gradient, commitment * expected) <= 1e-6
    for parameter in quantizer.parameters():
        (expected,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        (gradient,) = torch.autograd.grad(output.loss, parameter, retain_graph=True)
        assert relative_error(gradient, expected) <= 1e-6


@each_kept_codebook
def test_with_l2_normalize_it_is_the_plain_quantizer_of_unit_vectors(name: str) -> None:
    unit, plain = build_codebook(name), build_codebook(name)
    unit.l2_normalize = True
    vectors = plain.stored_vectors() if not isinstance(plain, EMAQuantizer) else plain.sums
    vectors.data.copy_(F.normalize(vectors.data, dim=1))
    if isinstance(unit, EMAQuantizer):  # what the next latents are averaged with
        unit.sums.copy_(vectors)
    latents = 3 * random_latents(unit)
    left, right = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    ours, expected = unit(left), plain(F.normalize(right, dim=1))
    weights = torch.randn(ours.quantized.shape, generator=torch.Generator().manual_seed(2))
    for output in (ours, expected):
        ((output.quantized * weights).sum() + output.loss).backward()
    assert torch.equal(ours.codes, expected.codes) and len(ours.codes.unique()) > 3
    torch.testing.assert_close(ours.quantized, expected.quantized)
    torch.testing.assert_close(ours.loss, expected.loss)
    assert left.grad is not None and right.grad is not None
    torch.testing.assert_close(left.grad, right.grad)
    torch.testing.assert_close(unit.codes_to_latents(ours.codes).norm(dim=1), torch.ones(ours.codes.shape))
    assert torch.equal(unit.choose(7 * latents), ours.codes)
    assert not torch.equal(build_codebook(name).choose(latents), ours.codes)  # lengths matter where it is off
    unit.apply_update()
    plain.apply_update()
    torch.testing.assert_close(unit.codebook_vectors(), F.normalize(plain.codebook_vectors(), dim=1))
    unit.reinitialise(torch.tensor([1]), torch.full((1, D), 5.0))
    torch.testing.assert_close(unit.stored_vectors()[1], torch.full((D,), D**-0.5))


def test_new_codes_are_unit_vectors_where_l2_normalize() -> None:
    for quantizer in (
        StandardQuantizer(K, D, 0.25, l2_normalize=True),
        EMAQuantizer(K, D, 0.25, DECAY, EPSILON, l2_normalize=True),
        EntropyQuantizer(K, D, 0.25, 0.1, 0.5, "softmax", l2_normalize=True),
    ):
        torch.testing.assert_close(quantizer.stored_vectors().norm(dim=1), torch.ones(K))


def test_a_gumbel_quantizer_may_make_its_logits_of_fewer_channels() -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(K, D, straight_through=False, hidden_channels=6).eval()
    latents = random_latents(quantizer)
    assert latents.shape[1] == quantizer.input_channels == 6
    weight, bias = quantizer.x_to_logits.weight[:, :, 0, 0], quantizer.x_to_logits.bias
    assert bias is not None
    logits = torch.stack([weight @ token + bias for token in tokens_of(latents)])
    assert torch.equal(quantizer(latents).codes.flatten(), logits.argmax(1))


def test_an_ema_codebook_is_no_parameter() -> None:
    assert not list(build("ema").parameters())
    assert set(build("ema").state_dict()) == {"counts", "sums"}


@each_quantizer
def test_codes_to_latents_gives_what_eval_mode_decodes_from(name: str) -> None:
    quantizer = build(name).eval()
    output = quantizer(random_latents(quantizer))
    torch.testing.assert_close(quantizer.codes_to_latents(output.codes), output.quantized, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dimension", [1, 3, 8, 256])
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_codes_are_decoded_to_the_bits_of_the_whole_codebook(dimension: int, l2_normalize: bool) -> None:
    """Though only those that are asked for are divided and normalised."""
    generator = torch.Generator().manual_seed(0)
    ema = EMAQuantizer(300, dimension, 0.25, 0.99, 1e-5, l2_normalize)
    ema.counts.copy_(torch.rand(300, generator=generator) * 5)
    ema.sums.copy_(torch.randn(300, dimension, generator=generator))
    standard = StandardQuantizer(300, dimension, 0.25, l2_normalize)
    standard.codebook.data.copy_(ema.sums)
    for quantizer in (ema, standard):
        for shape in ((1, 1, 1), (2, 5, 7), (1, 40, 40)):
            codes = torch.randint(300, shape, generator=generator)
            expected = gather_codes(quantizer.codebook_vectors(), codes)
            found = quantizer.codes_to_latents(codes)
            assert torch.equal(found, expected) and found.stride() == expected.stride()


@each_quantizer
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast_changes_no_bit_of_codes_loss_quantized_latents_or_gradients(name: str, mode: str) -> None:
    quantizer = build(name).train(mode == "train")
    latents = random_latents(quantizer).requires_grad_()
    seeds = range(len(latents))
    expected = quantizer(latents, seeds)
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(latents, seeds)
    assert torch.equal(output.codes, expected.codes)
    for value, other in ((output.loss, expected.loss), (output.quantized, expected.quantized)):
        assert value.dtype == torch.float32
        assert torch.equal(value, other)
        gradients = [
            torch.autograd.grad((y + 0 * latents.sum()).square().sum(), latents, retain_graph=True)[0]
            for y in (value, other)
        ]
        assert torch.equal(*gradients)


@each_quantizer
def test_bfloat16_latents_are_quantized_as_the_same_numbers_in_float32(name: str) -> None:
    quantizer = build(name).eval()
    latents = random_latents(quantizer).bfloat16()
    output, expected = quantizer(latents), quantizer(latents.float())
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(quantizer.choose(latents), expected.codes)


# ---- moving averages


def sonnet_step(
    counts: list[float], sums: list[Tensor], codebook: Tensor, tokens: list[Tensor]
) -> tuple[list[float], list[Tensor], Tensor]:
    """van den Oord et al. 2017, appendix A.1, code by code in float64; returns the new N, m and e = m / smoothed N."""
    nearest = [min(range(K), key=lambda k: float((z - codebook[k]).square().sum())) for z in tokens]
    for k in range(K):
        mine = [z for z, code in zip(tokens, nearest, strict=True) if code == k]
        counts[k] = DECAY * counts[k] + (1 - DECAY) * len(mine)
        sums[k] = DECAY * sums[k] + (1 - DECAY) * sum(mine, torch.zeros(D, dtype=torch.float64))
    return counts, sums, smoothed_codebook(counts, sums)


def smoothed_codebook(counts: list[float], sums: list[Tensor]) -> Tensor:
    n = sum(counts)
    return torch.stack([m / ((N + EPSILON) / (n + K * EPSILON) * n) for N, m in zip(counts, sums, strict=True)])


def test_the_ema_codebook_equals_a_plain_loop_over_sonnets_formulas() -> None:
    quantizer = build_ema()
    counts, sums = [1.0] * K, list(quantizer.sums.double())
    codebook = smoothed_codebook(counts, sums)
    for step in range(6):
        latents = random_latents(quantizer, seed=step)
        quantizer(latents)
        quantizer.apply_update()
        counts, sums, codebook = sonnet_step(counts, sums, codebook, tokens_of(latents.double()))
        assert relative_error(quantizer.codebook_vectors().double(), codebook) <= 1e-6, step
        assert relative_error(quantizer.counts.double(), torch.tensor(counts, dtype=torch.float64)) <= 1e-6


def test_unused_ema_codes_stay_where_they_are() -> None:
    quantizer = build_ema()
    before = quantizer.codebook_vectors().clone()
    used = torch.zeros(K, dtype=torch.bool)
    for step in range(20):
        used[quantizer(0.1 * random_latents(quantizer, seed=step)).codes] = True
        quantizer.apply_update()
        moved = (quantizer.codebook_vectors() - before).norm(dim=1) / before.norm(dim=1)
        assert moved[~used].max() < 1e-4  # the smoothing's share: epsilon / N with N = 0.9^20
    assert 0 < used.sum() < K - 5
    assert moved[used].min() > 0.01


def test_a_new_ema_codebook_is_its_sums_and_does_not_explode_at_the_first_step() -> None:
    quantizer = EMAQuantizer(K, D, 0.25, DECAY, EPSILON)
    assert torch.equal(quantizer.counts, torch.ones(K))
    torch.testing.assert_close(quantizer.codebook_vectors(), quantizer.sums, rtol=1e-6, atol=0)
    assert quantizer.sums.abs().max() <= 1 / K
    latents = torch.randn(64, D, 4, 2)  # far more tokens than codes: smoothing by the batch's size would show
    quantizer(latents)
    quantizer.apply_update()
    assert quantizer.codebook_vectors().abs().max() <= latents.abs().max()


def test_two_rounds_applied_once_equal_one_double_batch() -> None:
    split, whole = build_ema(), build_ema()
    latents = random_latents(whole, batch=4)
    split(latents[:2])
    split(latents[2:])
    assert torch.equal(split.codebook_vectors(), whole.codebook_vectors())  # nothing moves between the rounds
    whole(latents)
    for quantizer in (split, whole):
        quantizer.apply_update()
    assert torch.equal(split.counts, whole.counts)
    assert relative_error(split.sums, whole.sums) <= 1e-6
    assert not torch.equal(whole.counts, torch.ones(K))


def test_ema_statistics_are_summed_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shard, other = build_ema(), build_ema(), build_ema()
    latents = random_latents(whole, batch=4)
    whole(latents)
    whole.apply_update()
    shard(latents[::2])
    other(latents[1::2])
    theirs = {K: other.new_counts, K * D: other.new_sums}
    monkeypatch.setattr(
        "vqgan_accel.models.quantizers.ema.sum_over_processes", lambda mine: mine + theirs[mine.numel()]
    )
    shard.apply_update()
    assert torch.equal(shard.counts, whole.counts)
    assert relative_error(shard.sums, whole.sums) <= 1e-6


def test_eval_mode_and_a_discarded_update_leave_the_ema_codebook_bit_for_bit() -> None:
    quantizer = build_ema()
    before = {name: tensor.clone() for name, tensor in quantizer.named_buffers()}
    quantizer.eval()(random_latents(quantizer))
    assert not quantizer.new_counts.any() and not quantizer.new_sums.any()
    quantizer.train()(random_latents(quantizer))
    assert quantizer.new_counts.sum() == 3 * 8
    quantizer.discard_update()
    for name, tensor in quantizer.named_buffers():
        assert torch.equal(tensor, before[name]), name


# ---- new vectors for codes


@each_kept_codebook
def test_reinitialised_codes_have_their_new_vectors_and_the_others_keep_theirs(name: str) -> None:
    quantizer = build_codebook(name)
    quantizer(random_latents(quantizer))
    quantizer.apply_update()
    before = quantizer.codebook_vectors().detach().clone()
    codes, vectors = torch.tensor([3, 0, 17]), 5 * torch.randn(3, D)
    quantizer.reinitialise(codes, vectors)
    assert relative_error(quantizer.codebook_vectors()[codes], vectors) <= 1e-6
    rest = torch.ones(K, dtype=torch.bool).index_fill(0, codes, False)
    assert relative_error(quantizer.codebook_vectors()[rest], before[rest]) <= 1e-5
    # Exactly its own vector: nothing is nearer.
    own = quantizer.codebook_vectors()[codes].detach().T[None, :, :, None]
    assert torch.equal(quantizer.eval()(own).codes.flatten(), codes)


def test_a_reinitialised_ema_code_has_its_vector_however_strong_the_smoothing() -> None:
    quantizer = EMAQuantizer(K, D, 0.25, DECAY, epsilon=0.5)
    quantizer(random_latents(quantizer, batch=40))  # 320 tokens for 32 codes
    quantizer.apply_update()
    codes, vectors = torch.tensor([3, 0, 17]), torch.randn(3, D)
    quantizer.reinitialise(codes, vectors)
    assert relative_error(quantizer.codebook_vectors()[codes], vectors) <= 1e-6


def test_the_next_steps_do_not_undo_a_reinitialised_ema_code() -> None:
    quantizer = build_ema()
    for step in range(30):  # by now the counts are far from 1
        quantizer(0.1 * random_latents(quantizer, batch=8, seed=step))
        quantizer.apply_update()
    dead = quantizer.counts.argmin()
    assert quantizer.counts[dead] < 0.1
    vectors = torch.full((1, D), 2.0)
    quantizer.reinitialise(dead[None], vectors)
    for step in range(3):  # unused
        quantizer(0.1 * random_latents(quantizer, batch=8, seed=step))
        quantizer.apply_update()
        assert relative_error(quantizer.codebook_vectors()[dead[None]], vectors) <= 1e-4
    quantizer(torch.full((1, D, 1, 1), 2.1))  # used once: a step of the moving average, from count 0.9^3
    quantizer.apply_update()
    weight = DECAY * DECAY**3
    expected = (weight * 2.0 + (1 - DECAY) * 2.1) / (weight + 1 - DECAY)
    assert quantizer.codebook_vectors()[dead].mean().item() == pytest.approx(expected, rel=1e-4)


# ---- entropy


def entropy_of(logits: Tensor, target: Target = "softmax") -> Tensor:
    return entropy_loss(logits, lambda some: some, logits.shape[1], target)


def test_undecided_tokens_have_an_entropy_loss_of_zero() -> None:
    # Each token's entropy and that of the mean are both log K; LOG_EPS leaves log(1 + K eps).
    loss = entropy_of(torch.full((7, K), 3.0))
    assert loss.item() == pytest.approx(math.log1p(K * LOG_EPS), abs=2e-6)


@pytest.mark.parametrize("target", ["softmax", "argmax"])
def test_certain_tokens_that_use_all_codes_evenly_have_an_entropy_loss_of_minus_log_k(target: Target) -> None:
    loss = entropy_of(1000 * torch.eye(K).repeat(2, 1), target)
    assert loss.item() == pytest.approx(-math.log(K), abs=1.1 * K * LOG_EPS)


@pytest.mark.parametrize("target", ["softmax", "argmax"])
def test_certain_tokens_that_share_one_code_have_an_entropy_loss_of_zero(target: Target) -> None:
    loss = entropy_of(1000 * torch.eye(K)[[4]].repeat(9, 1), target)
    assert loss.item() == pytest.approx(0, abs=2 * LOG_EPS)


def test_the_entropy_loss_equals_a_plain_computation_from_distances() -> None:
    quantizer = build("entropy")
    assert isinstance(quantizer, EntropyQuantizer)
    latents = random_latents(quantizer)
    codebook = quantizer.codebook.detach().double()
    distances = torch.cdist(torch.stack(tokens_of(latents)).double(), codebook).square()
    p = torch.softmax(-distances / quantizer.temperature, 1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(1).mean() + (mean * (mean + LOG_EPS).log()).sum()
    output, standard = quantizer(latents), StandardQuantizer.look_up(quantizer, latents)
    assert output.metrics["entropy_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (output.loss - standard.loss).item() == pytest.approx(0.1 * expected.item(), rel=1e-4)


@pytest.mark.parametrize("target", ["softmax", "argmax"])
def test_gradients_of_the_entropy_loss_over_two_processes_average_to_those_of_one(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, K, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(entropy_of(logits, target), logits)
    means: list[Tensor] = []  # of each shard's targets, as an all-reduce would see them
    place = "vqgan_accel.models.quantizers.entropy.mean_over_processes_with_gradient"
    shards = (logits[::2], logits[1::2])
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda mean: means.append(mean.detach()) or mean)
        for shard in shards:
            entropy_of(shard, target)
    monkeypatch.setattr(place, lambda mean: mean + (sum(means) / 2 - mean.detach()))
    losses = [entropy_of(shard, target) for shard in shards]
    (gradient,) = torch.autograd.grad((losses[0] + losses[1]) / 2, logits)
    assert relative_error(gradient, expected) <= 1e-12


# ---- gumbel


@pytest.mark.parametrize("straight_through", [False, True])
def test_a_samples_noise_depends_on_its_seed_alone(straight_through: bool) -> None:
    quantizer = build("gumbel")
    assert isinstance(quantizer, GumbelQuantizer)
    quantizer.straight_through = straight_through
    latents, seeds = random_latents(quantizer, batch=4), (11, 2**62 + 5, 13, 0)
    whole = quantizer(latents, seeds).quantized
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    for order in ([0], [2, 1], [3, 2, 1, 0], [1, 1, 3]):  # any position, any batch, any global random state
        part = quantizer(latents[order], [seeds[place] for place in order]).quantized
        torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    other = quantizer(latents, [seed + 1 for seed in seeds]).quantized
    assert (other - whole).flatten(1).norm(dim=1).min() > 0.1


def test_equal_seeds_give_equal_noise_and_different_seeds_different_noise() -> None:
    noise = gumbel_noise(torch.empty(3, 5, 4, 2), (7, 8, 7))
    assert torch.equal(noise[0], noise[2])
    assert not (noise[0] == noise[1]).any()
    with pytest.raises(ValueError):
        gumbel_noise(torch.empty(3, 5, 4, 2), (7, 8))


def test_noise_does_not_depend_on_the_memory_format() -> None:
    like = torch.empty(2, 5, 4, 2)
    channels_last = like.to(memory_format=torch.channels_last)
    assert torch.equal(gumbel_noise(like, (7, 8)), gumbel_noise(channels_last, (7, 8)))


def test_noise_has_the_mean_and_variance_of_the_gumbel_distribution() -> None:
    noise = gumbel_noise(torch.empty(100, 1000), range(100)).double()
    n = noise.numel()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * (math.pi**2 / 6 / n) ** 0.5)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert noise.isfinite().all()


def test_the_argmax_of_noisy_logits_is_distributed_as_their_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    n = 20_000
    noise = gumbel_noise(torch.empty(n, 5), range(n))
    observed = torch.bincount((logits + noise).argmax(1), minlength=5)
    expected = n * logits.double().softmax(0)
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
    shifted = n * (logits.double() + torch.tensor([0.2, 0, 0, 0, 0])).softmax(0)
    assert chisquare(observed.numpy(), shifted.numpy()).pvalue < 1e-6  # the test could tell


def test_as_the_temperature_falls_the_sample_tends_to_one_code_and_as_it_rises_to_the_mean_of_all() -> None:
    quantizer = build("gumbel")
    assert isinstance(quantizer, GumbelQuantizer)
    latents, seeds = random_latents(quantizer), range(3)
    noisy = quantizer.x_to_logits(latents) + gumbel_noise(latents, seeds)
    quantizer.temperature = 1e-6
    hard = quantizer.codebook[noisy.argmax(1)].permute(0, 3, 1, 2)
    torch.testing.assert_close(quantizer(latents, seeds).quantized, hard, rtol=0, atol=1e-5)
    quantizer.temperature = 1e7
    mean = quantizer.codebook.mean(0)[None, :, None, None].expand_as(hard)
    torch.testing.assert_close(quantizer(latents, seeds).quantized, mean, rtol=0, atol=1e-5)
    quantizer.temperature = 0.7
    soft = torch.einsum("bkhw,kd->bdhw", (noisy / 0.7).softmax(1), quantizer.codebook)
    torch.testing.assert_close(quantizer(latents, seeds).quantized, soft, rtol=0, atol=1e-5)


def test_straight_through_is_one_code_forwards_and_the_soft_sample_backwards() -> None:
    quantizer = build("gumbel")
    assert isinstance(quantizer, GumbelQuantizer)
    latents, seeds = random_latents(quantizer).requires_grad_(), range(3)
    direction = torch.randn(3, D, 4, 2)
    soft = quantizer(latents, seeds).quantized
    quantizer.straight_through = True
    hard = quantizer(latents, seeds).quantized
    noisy = quantizer.x_to_logits(latents) + gumbel_noise(latents, seeds)
    torch.testing.assert_close(hard, quantizer.codebook[noisy.argmax(1)].permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    inputs = [latents, *quantizer.x_to_logits.parameters()]
    gradients, expected = (torch.autograd.grad((y * direction).sum(), inputs) for y in (hard, soft))
    for gradient, other in zip(gradients, expected, strict=True):
        assert relative_error(gradient, other) <= 1e-6


def test_the_kl_loss_has_its_closed_form() -> None:
    quantizer = GumbelQuantizer(4, D, straight_through=False)
    torch.nn.init.dirac_(quantizer.x_to_logits.weight)
    torch.nn.init.zeros_(quantizer.x_to_logits.bias)
    quantizer.kl_cost = 0.5

    def kl(*probabilities: float) -> float:
        return quantizer(torch.tensor(probabilities).log().view(1, 4, 1, 1)).metrics["kl_loss"].item()

    assert kl(0.25, 0.25, 0.25, 0.25) == pytest.approx(0, abs=1e-6)
    assert kl(0.5, 0.25, 0.125, 0.125) == pytest.approx(math.log(4) - 1.75 * math.log(2), rel=1e-5)
    assert kl(1.0, 1e-30, 1e-30, 1e-30) == pytest.approx(math.log(4), rel=1e-5)
    # The mean over positions, times kl_cost.
    q = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    output = quantizer(q.log().T.reshape(1, 4, 2, 1))
    assert output.loss.item() == pytest.approx(0.5 * (math.log(4) - 1.75 * math.log(2)) / 2, rel=1e-5)


def test_evaluation_takes_the_most_likely_code_without_noise_and_without_touching_the_random_state() -> None:
    quantizer = build("gumbel").eval()
    assert isinstance(quantizer, GumbelQuantizer)
    latents = random_latents(quantizer)
    state = torch.get_rng_state()
    output, again = quantizer(latents), quantizer(latents, torch.arange(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output.quantized, again.quantized)
    logits = F.conv2d(latents.double(), quantizer.x_to_logits.weight.double(), quantizer.x_to_logits.bias.double())
    assert torch.equal(output.codes, logits.argmax(1))
    assert torch.equal(output.quantized, quantizer.codebook[output.codes].permute(0, 3, 1, 2))
