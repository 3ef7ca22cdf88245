"""`init` of a codebook: k-means beside scikit-learn's, on any number of processes and rounds, and in a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_same_bits, tensors, train_until
from sklearn.cluster import KMeans
from tiny import KEPT, tiny_config, tiny_quantizer
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.models.quantizers import CodebookQuantizer, StandardQuantizer
from vqgan_accel.models.quantizers.base import initial_codebook
from vqgan_accel.randomness import CODE_INIT, position_seed
from vqgan_accel.training import codebook, upkeep
from vqgan_accel.training.codebook import KMEANS_STEPS, draw_latents, initialise_by_kmeans, lloyd_step
from vqgan_accel.training.loop import train

K, D = 9, 4


def blobs(batch: int = 8) -> Tensor:
    """(batch, D, 4, 4): latents around 12 places"""
    draw = torch.Generator().manual_seed(1)
    places = 3 * torch.randn(12, D, generator=draw)
    tokens = places[torch.randint(12, (batch * 16,), generator=draw)] + torch.randn(batch * 16, D, generator=draw)
    return tokens.view(batch, 4, 4, D).permute(0, 3, 1, 2)


def flat(latents: Tensor) -> Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, D)


def build(kind: str = "standard", **settings: Any) -> CodebookQuantizer:
    quantizer = tiny_quantizer(kind, num_codes=K, embedding_dim=D, init="kmeans", **settings).build()
    assert isinstance(quantizer, CodebookQuantizer)
    return quantizer


def first_centres(seed: int = 3) -> Tensor:
    return draw_latents([blobs()], K, torch.Generator().manual_seed(seed))


# ---- the centres


def test_centres_are_those_of_scikit_learn_from_the_same_start() -> None:
    quantizer = build()
    initialise_by_kmeans(quantizer, [blobs()], seed=3)
    start = first_centres().double().numpy()
    assert KMEANS_STEPS == 10
    reference = KMeans(K, init=start, n_init=1, algorithm="lloyd", max_iter=10, tol=0)
    reference.fit(flat(blobs()).double().numpy())
    np.testing.assert_allclose(quantizer.codebook_vectors().detach().numpy(), reference.cluster_centers_, rtol=1e-5)
    assert reference.n_iter_ > 3


def test_a_step_moves_each_centre_to_the_mean_of_its_latents_and_leaves_one_without_any() -> None:
    centres = torch.cat([first_centres()[:4], torch.full((1, D), 99.0)])
    owner = torch.cdist(flat(blobs()), centres).argmin(1)
    moved = lloyd_step(list(blobs().split(4)), centres)
    for code in range(4):
        mine = [z for z, k in zip(flat(blobs()).double(), owner, strict=True) if k == code]
        torch.testing.assert_close(moved[code].double(), sum(mine) / len(mine), rtol=1e-6, atol=1e-7)
    assert torch.equal(moved[4], centres[4])


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_each_quantizer_has_the_centres_of_what_it_compares(kind: str, l2_normalize: bool) -> None:
    quantizer = build(kind, l2_normalize=l2_normalize)
    before = quantizer.codebook_vectors().detach().clone()
    initialise_by_kmeans(quantizer, [blobs()], seed=3)
    compared = F.normalize(blobs(), dim=1) if l2_normalize else blobs()
    centres = F.normalize(first_centres(), dim=1) if l2_normalize else first_centres()
    for _ in range(10):
        owner = torch.cdist(flat(compared), centres).argmin(1)
        centres = torch.stack([flat(compared)[owner == code].mean(0) for code in range(K)])
        centres = F.normalize(centres, dim=1) if l2_normalize else centres
    torch.testing.assert_close(quantizer.codebook_vectors().detach(), centres, rtol=1e-4, atol=1e-5)
    assert (centres - before).norm(dim=1).min() > 0.1
    assert len(quantizer.eval().choose(blobs()).unique()) == K


def test_other_seeds_begin_with_other_latents() -> None:
    one, other, again = build(), build(), build()
    for quantizer, seed in ((one, 3), (other, 4), (again, 3)):
        initialise_by_kmeans(quantizer, [blobs()], seed=seed)
    assert torch.equal(one.codebook_vectors(), again.codebook_vectors())
    assert not torch.equal(one.codebook_vectors(), other.codebook_vectors())


def on_processes(number: int, work: Callable[[int], Tensor], patch: pytest.MonkeyPatch) -> list[Tensor]:
    """What `work` makes on each of several processes, which are threads that sum up what they hold."""
    mine, barrier, parts = threading.local(), threading.Barrier(number), [torch.empty(0)] * number
    results: list[Tensor] = [torch.empty(0)] * number

    def summed(partial: Tensor) -> Tensor:
        parts[mine.process] = partial
        barrier.wait()
        total = torch.stack(parts).sum(0)
        barrier.wait()
        return total

    def process(index: int) -> None:
        mine.process = index
        results[index] = work(index)

    patch.setattr(codebook, "num_processes", lambda: number)
    patch.setattr(codebook, "process_index", lambda: mine.process)
    patch.setattr(codebook, "sum_over_processes", summed)
    threads = [threading.Thread(target=process, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize(("processes", "rounds"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_centres_are_equal_on_every_process_and_those_of_one_process_but_for_rounding(
    processes: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build()
    initialise_by_kmeans(expected, [blobs()], seed=3)

    def work(process: int) -> Tensor:
        mine = [[g for g in range(8) if g % rounds == r and g // rounds % processes == process] for r in range(rounds)]
        quantizer = StandardQuantizer(K, D, 0.25)
        initialise_by_kmeans(quantizer, [blobs()[indices] for indices in mine], seed=3)
        return quantizer.codebook_vectors().detach()

    found = on_processes(processes, work, monkeypatch)
    assert all(torch.equal(each, found[0]) for each in found)
    torch.testing.assert_close(found[0], expected.codebook_vectors().detach(), rtol=1e-6, atol=1e-6)


# ---- in a run

KMEANS = {"type": "ema", "num_codes": 8, "init": "kmeans"}


@pytest.mark.seconds
def test_a_run_begins_with_the_centres_of_its_first_batch_in_all_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int, int]] = []

    def watched(quantizer: Any, latents: list[Tensor], seed: int) -> None:
        initialise_by_kmeans(quantizer, latents, seed)
        given.append((len(latents), sum(len(part) for part in latents), seed))
        vectors = quantizer.codebook_vectors()
        distances = torch.cat([torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 8), vectors) for z in latents])
        assert len(distances.argmin(1).unique()) == 8

    monkeypatch.setattr(upkeep, "initialise_by_kmeans", watched)
    training = {"gradient_accumulation_steps": 2, "max_steps": 3}
    train(tiny_config(tmp_path, seed=7, quantizer=KMEANS, training=training))
    assert given == [(2, 4, position_seed(CODE_INIT, 7))]  # once, before the first step


@pytest.mark.seconds
def test_a_resumed_run_with_kmeans_is_the_uninterrupted_one(tmp_path: Path) -> None:
    training = {"max_steps": 4, "ema_decay": 0.9}
    whole = train(tiny_config(tmp_path / "whole", quantizer=KMEANS, training=training))
    config = tiny_config(tmp_path / "parts", quantizer=KMEANS, training=training)
    with pytest.raises(BaseException) as stopped:
        train_until(config, 1)
    assert "resume" in str(stopped.value) or stopped.typename == "SystemExit"
    assert_same_bits(whole / "checkpoints" / "latest", train(config, resume=True) / "checkpoints" / "latest")


@pytest.mark.seconds
def test_a_codebook_that_came_with_a_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kmeans = KMEANS | {"type": "standard"}
    first = train(tiny_config(tmp_path / "first", quantizer=kmeans | {"init": "normal"}))
    monkeypatch.setattr(upkeep, "initialise_by_kmeans", lambda *arguments: pytest.fail("asked for"))
    start = str(first / "checkpoints" / "latest" / "tokenizer")
    second = train(tiny_config(tmp_path, quantizer=kmeans, training={"init_from": start, "max_steps": 1}))
    name = "tokenizer/diffusion_pytorch_model.safetensors:quantizer.codebook"
    before, after = (tensors(run / "checkpoints" / "latest")[name] for run in (first, second))
    assert 0 < (after - before).abs().max() < 0.01


def test_too_few_latents_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """4 images of 4 x 4 latents are 64."""
    tiny_config(tmp_path, quantizer={"num_codes": 64, "init": "kmeans"})
    with pytest.raises(ValueError) as error:
        tiny_config(tmp_path, quantizer={"num_codes": 65, "init": "kmeans"})
    for words in ("init kmeans finds 65 centres", "which are 64", "training.total_batch_size", "num_codes smaller"):
        assert words in str(error.value)


# ---- the other first codes


@pytest.mark.parametrize("dimension", [2, 8])
def test_codes_on_the_sphere_are_unit_vectors_in_all_directions(dimension: int) -> None:
    torch.manual_seed(0)
    vectors = initial_codebook(20_000, dimension, "sphere")
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(20_000))
    assert vectors.mean(0).abs().max() < 0.02
    torch.testing.assert_close(vectors.T @ vectors / 20_000, torch.eye(dimension) / dimension, rtol=0, atol=0.01)
    # on the circle all angles are alike; where coordinates were uniform, diagonals had more
    if dimension == 2:
        angles = torch.atan2(vectors[:, 1], vectors[:, 0])
        shares = torch.histc(angles, 8, -torch.pi, torch.pi) / 20_000
        assert (shares - 1 / 8).abs().max() < 0.01


def test_normal_codes_are_normal_and_kmeans_has_uniform_ones_until_it_has_found_its_own() -> None:
    torch.manual_seed(0)
    normal = initial_codebook(5000, 8, "normal")
    assert normal.std().item() == pytest.approx(1, rel=0.02) and normal.abs().max() > 3
    for init in ("uniform", "kmeans"):
        assert initial_codebook(500, 8, init).abs().max() <= 1 / 500


@pytest.mark.parametrize("kind", KEPT)
def test_every_section_passes_its_init_on(kind: str) -> None:
    vectors = tiny_quantizer(kind, init="sphere").build().code_vectors()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(16), rtol=1e-5, atol=0)
    assert tiny_quantizer(kind).build().code_vectors().abs().max() <= 1 / 16 + 1e-6
