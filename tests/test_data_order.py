from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqgan_accel.data.order import TrainingOrder, epoch_order, global_index, steps_per_epoch

# processes P, rounds k, images b of a micro-batch, images beyond one global batch
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))


def keys(num_images, batch, rounds, process=0, processes=1, start=0, total=6, seed=3):
    return list(TrainingOrder(seed, num_images, batch, rounds, process, processes, start, total))


@given(SHAPES, st.integers(1, 3), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_each_epoch_visits_each_image_at_most_once_and_all_but_the_last_incomplete_batch(shape, epochs, seed):
    processes, rounds, local, extra = shape
    batch = processes * rounds * local
    num_images = batch + extra
    steps = num_images // batch
    seen = [
        key
        for process in range(processes)
        for micro_batch in keys(num_images, batch, rounds, process, processes, total=epochs * steps, seed=seed)
        for key in micro_batch
    ]
    assert len(seen) == len(set(seen)) == epochs * steps * batch
    for epoch in range(epochs):
        visited = {index for at, index in seen if at == epoch}
        assert visited == set(epoch_order(seed, epoch, num_images)[: steps * batch].tolist())


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_what_a_round_contains_does_not_depend_on_the_number_of_processes(shape):
    processes, rounds, local, extra = shape
    batch = processes * rounds * local
    one = keys(batch + extra, batch, rounds)
    many = [keys(batch + extra, batch, rounds, process, processes) for process in range(processes)]
    for i, whole in enumerate(one):
        interleaved = itertools.chain(*zip(*(shard[i] for shard in many), strict=True))
        assert list(interleaved) == whole


@given(SHAPES, st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_resumed_order_is_the_tail_of_the_uninterrupted_one(shape, start):
    processes, rounds, local, extra = shape
    batch = processes * rounds * local
    whole = keys(batch + extra, batch, rounds, processes - 1, processes)
    assert keys(batch + extra, batch, rounds, processes - 1, processes, start=start) == whole[start * rounds :]


def test_the_length_counts_the_micro_batches_that_are_left():
    order = TrainingOrder(0, 100, 24, 3, 1, 2, start_step=2, total_steps=9)
    assert len(order) == len(list(order)) == 21
    assert {len(micro_batch) for micro_batch in order} == {4}
    assert len(TrainingOrder(0, 100, 24, 3, 1, 2, start_step=9, total_steps=9)) == 0


@pytest.mark.parametrize(("processes", "rounds", "local"), [(1, 1, 5), (2, 3, 4), (3, 2, 2)])
def test_sample_g_goes_to_round_g_mod_k_and_process_g_div_k_mod_P(processes, rounds, local):
    where = {}
    for round, process in itertools.product(range(rounds), range(processes)):
        for g in global_index(np.arange(local), round, process, processes, rounds).tolist():
            where[g] = (round, process)
    assert where == {g: (g % rounds, g // rounds % processes) for g in range(processes * rounds * local)}
    assert global_index(1, 0, 0, processes, rounds) == processes * rounds


def test_the_order_is_a_permutation_that_seed_and_epoch_decide():
    order = epoch_order(7, 2, 1000)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, np.random.default_rng((1, 7, 2)).permutation(1000))
    assert not np.array_equal(order, epoch_order(7, 3, 1000))
    assert not np.array_equal(order, epoch_order(8, 2, 1000))


def test_impossible_batch_sizes_are_refused_with_the_numbers_and_keys():
    assert steps_per_epoch(1000, 256) == 3
    with pytest.raises(ValueError, match=r"100 images, fewer than training.total_batch_size 256; lower .*train_split"):
        TrainingOrder(0, 100, 256, 1, 0, 1, 0, 10)
