"""The codebook's upkeep: usage over the whole epoch, and new vectors that do not depend on how a batch was split."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from tiny import KEPT, tiny_quantizer
from torch import Tensor
from torch.optim import AdamW

from vqgan_accel.models.quantizers import CodebookQuantizer, EMAQuantizer, StandardQuantizer
from vqgan_accel.sections import Duration, Reinit
from vqgan_accel.training import codebook
from vqgan_accel.training.codebook import (
    CodebookUsage,
    draw_latents,
    draw_used_codes,
    forget_moments,
    rarely_used,
    reinitialise_rare,
)

K, D = 24, 6
FROM_LATENTS, FROM_USED = (Reinit(Duration(1, "epochs"), 0.0, source) for source in ("latents", "used_codes"))
SPECIAL = {"ema": {"decay": 0.9}, "entropy": {"entropy_temperature": 0.5}}
BUILDERS: dict[str, Callable[[], CodebookQuantizer]] = {
    kind: tiny_quantizer(kind, num_codes=K, embedding_dim=D, **SPECIAL.get(kind, {})).build for kind in KEPT
}
each_codebook = pytest.mark.parametrize("name", KEPT)
SHARDINGS = [(1, 1), (1, 2), (2, 1), (2, 2)]  # processes P, accumulation rounds k


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def usage_of(*counts: int) -> CodebookUsage:
    usage = CodebookUsage((len(counts),), torch.device("cpu"))
    usage.counts += torch.tensor(counts)
    return usage


def global_latents(batch: int = 8) -> Tensor:
    """(batch, D, 3, 2): no two positions' vectors are equal."""
    return torch.randn(batch, D, 3, 2, generator=generator(1))


def rows(latents: Tensor) -> Tensor:
    """(B, D, h, w) -> (B*h*w, D)"""
    return torch.stack([latents[b, :, i, j] for b in range(len(latents)) for i in range(3) for j in range(2)])


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m), without the cancellation of torch.cdist's matrix product"""
    return (a[:, None] - b).norm(dim=2)


def shard(latents: Tensor, process: int, processes: int, rounds: int) -> list[Tensor]:
    """What a process holds, a tensor a round: sample g goes to round g mod k, process (g div k) mod P."""
    samples = range(len(latents))
    mine = [[g for g in samples if g % rounds == r and g // rounds % processes == process] for r in range(rounds)]
    return [latents[indices] for indices in mine]


def pretend_to_be(process: int, processes: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codebook, "num_processes", lambda: processes)
    patch.setattr(codebook, "process_index", lambda: process)
    patch.setattr(codebook, "sum_over_processes", lambda partial: partial.clone())  # the test adds them up


# ---- usage


@pytest.mark.parametrize(
    ("counts", "perplexity", "usage"),
    [
        ((5, 5, 5, 5), 4.0, 100.0),
        ((9, 0, 9, 0), 2.0, 50.0),
        ((0, 0, 1, 0), 1.0, 25.0),
        ((4, 2, 2, 0), 2**1.5, 75.0),  # entropy of (1/2, 1/4, 1/4): 1.5 bits
        ((0, 0, 0, 0), 0.0, 0.0),
        ((10**9, 10**9, 0, 0), 2.0, 50.0),
    ],
)
def test_perplexity_and_usage_have_their_closed_forms(counts: tuple[int, ...], perplexity: float, usage: float) -> None:
    metrics = usage_of(*counts).metrics()
    assert metrics == {"perplexity": pytest.approx(perplexity, rel=1e-12), "codebook_usage": usage}


def test_usage_counts_every_code_since_the_last_reset() -> None:
    usage = CodebookUsage((5,), torch.device("cpu"))
    usage.add(torch.tensor([[[0, 3], [3, 3]]]))
    usage.add(torch.tensor([1, 3]))
    usage.apply_update()
    usage.add(torch.tensor([2]))
    usage.discard_update()  # of a step that was skipped
    usage.apply_update()
    assert usage.counts.tolist() == [1, 1, 0, 4, 0]
    assert rarely_used(usage.counts, 0).tolist() == [2, 4]
    counts = usage.counts
    usage.reset()
    assert rarely_used(usage.counts, 0).tolist() == [0, 1, 2, 3, 4]
    assert usage.counts is counts  # which a checkpoint holds


def test_usage_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.tensor([0, 0, 7, 0])
    monkeypatch.setattr(codebook, "sum_over_processes", lambda mine: mine + other)
    usage = CodebookUsage((4,), torch.device("cpu"))
    usage.add(torch.tensor([0, 0]))
    usage.apply_update()
    assert usage.counts.tolist() == [2, 0, 7, 0]


# ---- draws from the latents


def test_drawn_latents_are_different_rows_of_the_pool() -> None:
    pool = rows(global_latents())
    vectors = draw_latents([global_latents()], 20, generator())
    assert vectors.shape == (20, D)
    where = (vectors[:, None] == pool).all(2)
    assert where.sum(1).tolist() == [1] * 20  # each is a row,
    assert where.sum(0).max() == 1  # and no row comes twice


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (47, 47), (48, 48), (1000, 48)])
def test_no_more_latents_are_drawn_than_there_are(asked: int, given: int) -> None:
    vectors = draw_latents([global_latents()], asked, generator())
    assert vectors.shape == (given, D)
    assert len(vectors.unique(dim=0)) == given


def test_every_latent_is_equally_likely() -> None:
    pool = rows(global_latents(2))
    draws = generator(3)
    vectors = torch.cat([draw_latents([global_latents(2)], 4, draws) for _ in range(900)])
    observed = (vectors[:, None] == pool).all(2).sum(0)
    assert observed.sum() == 3600
    assert chisquare(observed.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("processes", "rounds"), SHARDINGS)
@pytest.mark.parametrize("number", [5, 48])
def test_the_drawn_latents_do_not_depend_on_processes_and_rounds(
    processes: int, rounds: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = global_latents()
    expected = draw_latents([latents], number, generator())
    partials = []
    for process in range(processes):
        pretend_to_be(process, processes, monkeypatch)
        partials.append(draw_latents(shard(latents, process, processes, rounds), number, generator()))
    assert torch.equal(torch.stack(partials).sum(0), expected)
    filled = torch.stack([partial.any(1) for partial in partials])
    assert filled.sum(0).tolist() == [1] * number  # each vector by one process


def test_other_seeds_draw_other_latents() -> None:
    assert not torch.equal(*(draw_latents([global_latents()], 20, generator(seed)) for seed in (0, 1)))


def test_half_precision_latents_are_drawn_as_float32() -> None:
    half = global_latents().bfloat16()
    vectors = draw_latents([half], 5, generator())
    assert torch.equal(vectors, draw_latents([half.float()], 5, generator()))


# ---- draws from the codes in use


def test_used_codes_are_drawn_in_proportion_to_their_use() -> None:
    vectors = 10 * torch.eye(D)
    counts = torch.tensor([0, 1, 2, 7, 0, 10])
    drawn = draw_used_codes(vectors, counts, 10_000, generator())
    observed = torch.bincount(distances(drawn, vectors).argmin(1), minlength=D)
    assert not observed[counts == 0].any()
    used = counts > 0
    assert chisquare(observed[used].numpy(), (10_000 * counts[used] / 20).numpy()).pvalue > 1e-3


def test_copies_of_used_codes_are_perturbed_by_a_hundredth_of_their_spread_and_never_exact() -> None:
    vectors = torch.randn(K, D, generator=generator(1)) * torch.tensor([0.01, 0.1, 1, 10, 100, 1000])
    counts = torch.arange(K) % 3
    drawn = draw_used_codes(vectors, counts, 6000, generator())
    sources = vectors[counts > 0]
    scale = sources.std(0, correction=0)
    nearest = distances(drawn / scale, sources / scale).argmin(1)
    difference = (drawn - sources[nearest]) / scale
    torch.testing.assert_close(difference.std(0), torch.full((D,), 0.01), rtol=0.05, atol=0)
    assert difference.mean(0).abs().max() < 0.001
    assert not (drawn[:, None] == vectors).all(2).any()
    assert len(drawn.unique(dim=0)) == len(drawn)


@pytest.mark.parametrize(
    "size",
    [0.01, 10.0],
)
def test_copies_of_the_only_code_in_use_are_no_exact_copies(size: float) -> None:
    vectors = size * torch.randn(K, D, generator=generator(1))
    drawn = draw_used_codes(vectors, torch.eye(K)[3].long(), K - 1, generator())
    assert not (drawn == vectors[3]).all(1).any()
    assert len(drawn.unique(dim=0)) == K - 1


def test_no_used_codes_are_drawn_where_none_is_needed() -> None:
    assert draw_used_codes(torch.randn(K, D), torch.ones(K), 0, generator()).shape == (0, D)


# ---- the optimizer's memory


def test_forgetting_zeroes_the_moments_of_those_rows_and_of_nothing_else() -> None:
    torch.manual_seed(0)
    quantizer, other = StandardQuantizer(K, D, 0.25), torch.nn.Parameter(torch.randn(K, D))
    optimizer = AdamW([quantizer.codebook, other], lr=0.1, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        (quantizer.codebook.sin().sum() + other.cos().sum()).backward()
        optimizer.step()
    before = {
        p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in (quantizer.codebook, other)
    }
    assert before[quantizer.codebook]["exp_avg"].abs().min() > 0
    codes = torch.tensor([2, 11])
    rest = torch.ones(K, dtype=torch.bool).index_fill(0, codes, False)
    forget_moments(quantizer, optimizer, codes)
    for moment in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[quantizer.codebook][moment]
        assert not state[codes].any()
        assert torch.equal(state[rest], before[quantizer.codebook][moment][rest])
        assert torch.equal(optimizer.state[other][moment], before[other][moment])
    assert optimizer.state[quantizer.codebook]["step"] == 2

    vectors = quantizer.codebook.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # without a gradient, memory alone moves a code
    moved = (quantizer.codebook.detach() != vectors).any(1)
    assert not moved[codes].any() and moved[rest].all()


@each_codebook
def test_forgetting_is_harmless_before_the_first_step_and_without_a_trained_codebook(name: str) -> None:
    quantizer = BUILDERS[name]()
    optimizer = AdamW([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(1))])
    forget_moments(quantizer, optimizer, torch.tensor([1]))
    assert not optimizer.state


# ---- end to end


def quantizer_with_dead_codes(name: str, latents: Tensor) -> tuple[CodebookQuantizer, CodebookUsage, AdamW]:
    """One step has been taken; 4 codes are among the latents, 20 far away from them."""
    torch.manual_seed(0)
    quantizer = BUILDERS[name]()
    vectors = torch.cat([rows(latents)[:4] + 0.1 * torch.randn(4, D), 50 + torch.randn(K - 4, D)])
    with torch.no_grad():
        (quantizer.sums if isinstance(quantizer, EMAQuantizer) else quantizer.codebook).copy_(vectors)
    optimizer = AdamW([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1e-3, weight_decay=0)
    output = quantizer(latents.clone().requires_grad_())
    torch.autograd.backward(output.loss)
    optimizer.step()
    for parameter in quantizer.parameters():  # what is left of a time when all codes were in use
        optimizer.state[parameter]["exp_avg"] += 1
        optimizer.state[parameter]["exp_avg_sq"] += 1
    quantizer.apply_update()
    usage = CodebookUsage((K,), torch.device("cpu"))
    usage.add(output.codes)
    usage.apply_update()
    assert rarely_used(usage.counts, 0).tolist() == list(range(4, K))
    return quantizer, usage, optimizer


@each_codebook
def test_codes_revived_from_latents_are_chosen_for_the_latents_that_they_came_from(name: str) -> None:
    latents = global_latents()
    quantizer, usage, optimizer = quantizer_with_dead_codes(name, latents)
    used = quantizer.codebook_vectors().detach()[:4].clone()
    number = reinitialise_rare(quantizer, optimizer, usage, [latents], FROM_LATENTS, seed=5)
    assert number == K - 4
    torch.testing.assert_close(quantizer.codebook_vectors()[:4].detach(), used, rtol=1e-5, atol=0)
    sources = distances(quantizer.codebook_vectors().detach()[4:], rows(latents)).min(1)
    assert sources.values.max() < 1e-5
    codes = quantizer.eval()(latents).codes.flatten()
    assert codes[sources.indices].tolist() == list(range(4, K))
    for parameter in quantizer.parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[parameter][moment][4:].any()
            assert optimizer.state[parameter][moment][:4].all()


@each_codebook
def test_codes_revived_from_used_codes_take_tokens_from_them(name: str) -> None:
    latents = global_latents(64)
    quantizer, usage, optimizer = quantizer_with_dead_codes(name, latents)
    used = quantizer.codebook_vectors().detach()[:4].clone()
    assert reinitialise_rare(quantizer, optimizer, usage, [latents], FROM_USED, seed=5) == K - 4
    vectors = quantizer.codebook_vectors().detach()
    assert distances(vectors[4:], used).amin(1).max() < 0.2  # each near a code in use,
    assert not (vectors[4:, None] == used).all(2).any()  # none upon it
    codes = quantizer.eval()(latents).codes
    assert len(codes.unique()) > K / 2


@each_codebook
def test_a_pool_too_small_revives_the_first_unused_codes_only(name: str) -> None:
    latents = global_latents(2)  # 12 vectors for 20 codes
    quantizer, usage, optimizer = quantizer_with_dead_codes(name, latents)
    before = quantizer.codebook_vectors().detach().clone()
    assert reinitialise_rare(quantizer, optimizer, usage, [latents], FROM_LATENTS, seed=5) == 12
    torch.testing.assert_close(quantizer.codebook_vectors()[16:].detach(), before[16:], rtol=1e-4, atol=0)
    assert sorted(quantizer.eval()(latents).codes.flatten().tolist()) == list(range(4, 16))


@each_codebook
@pytest.mark.parametrize("reinit", [FROM_LATENTS, FROM_USED])
def test_where_every_code_is_used_nothing_changes(name: str, reinit: Reinit) -> None:
    quantizer = BUILDERS[name]()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))])
    number = reinitialise_rare(
        quantizer,
        optimizer,
        usage_of(*[1] * K),
        [global_latents()],
        reinit,
        5,
    )
    assert number == 0
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@each_codebook
@pytest.mark.parametrize("reinit", [FROM_LATENTS, FROM_USED])
def test_the_same_seed_gives_the_same_codebook_whatever_the_global_random_state(name: str, reinit: Reinit) -> None:
    books = []
    for seed in (5, 5, 6):
        quantizer, usage, optimizer = quantizer_with_dead_codes(name, global_latents())
        torch.manual_seed(len(books))
        state = torch.get_rng_state()
        reinitialise_rare(quantizer, optimizer, usage, [global_latents()], reinit, seed)
        assert torch.equal(torch.get_rng_state(), state)
        books.append(quantizer.codebook_vectors().detach())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_an_ema_code_that_dies_again_after_many_epochs_can_be_revived_again() -> None:
    latents = global_latents()
    quantizer, usage, optimizer = quantizer_with_dead_codes("ema", latents)
    for epoch in range(3):
        for _ in range(40):  # unused codes' counts fall to 0.9^40 = 0.015
            quantizer.train()(latents[:1])
            quantizer.apply_update()
        usage.reset()
        usage.add(quantizer.eval()(latents[:1]).codes)
        usage.apply_update()
        assert reinitialise_rare(quantizer, optimizer, usage, [latents], FROM_LATENTS, seed=epoch) > 0
        assert quantizer.codebook_vectors().isfinite().all()
        sources = distances(quantizer.codebook_vectors()[rarely_used(usage.counts, 0)], rows(latents)).amin(1)
        assert sources.max() < 1e-4
    assert math.isfinite(quantizer.eval()(latents).loss.item())
