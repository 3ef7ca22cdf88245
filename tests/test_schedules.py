"""Schedules as functions of the step: closed forms at the corners, laws everywhere."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqgan_accel.schedules import cosine, learning_rate

VALUES = st.floats(1e-6, 10)
STEPS = st.integers(1, 10_000)


def test_the_cosine_has_its_closed_form() -> None:
    assert [cosine(step, 3.0, 1.0, 4) for step in range(6)] == pytest.approx(
        [3, 2 + math.sqrt(0.5), 2, 2 - math.sqrt(0.5), 1, 1]
    )
    assert cosine(1, 0.0, 6.0, 3) == pytest.approx(6 * (1 - 0.75))  # cos(60 degrees) = 1/2


@given(VALUES, VALUES, STEPS, st.integers(0, 20_000))
def test_the_cosine_stays_between_its_ends_and_moves_only_towards_the_second(
    start: float, end: float, num_steps: int, step: int
) -> None:
    now, later = cosine(step, start, end, num_steps), cosine(step + 1, start, end, num_steps)
    rounding = 1e-12 * max(start, end)
    assert min(start, end) - rounding <= now <= max(start, end) + rounding
    assert abs(later - end) <= abs(now - end) + rounding


@given(VALUES, VALUES, STEPS)
def test_the_cosine_is_exact_at_both_ends_and_symmetric_about_its_middle(start: float, end: float, n: int) -> None:
    assert cosine(0, start, end, n) == pytest.approx(start, rel=1e-12, abs=1e-12)
    assert cosine(n, start, end, n) == cosine(n + 7, start, end, n) == end
    for step in (0, n // 3, n // 2, n):
        mirrored = cosine(step, start, end, n) + cosine(n - step, start, end, n)
        assert mirrored == pytest.approx(start + end, rel=1e-9)


def test_a_cosine_over_no_steps_is_its_end() -> None:
    assert cosine(0, 3.0, 1.0, 0) == 1.0


def test_the_learning_rate_has_its_closed_form() -> None:
    # Decay over 10 steps from 1.0 to 0.1; the first 4 steps at 1/4, 2/4, 3/4 and 4/4 of it.
    decay = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    expected = [rate * factor for rate, factor in zip(decay, [0.25, 0.5, 0.75, *[1.0] * 7], strict=True)]
    actual = [learning_rate(step, 1.0, 0.1, warmup_steps=4, decay_steps=10) for step in range(12)]
    assert actual == pytest.approx([*expected, 0.1, 0.1])


@given(VALUES, STEPS, st.integers(0, 20_000))
def test_without_warm_up_the_learning_rate_is_the_cosine(peak: float, decay_steps: int, step: int) -> None:
    rate = learning_rate(step, peak, peak / 10, warmup_steps=0, decay_steps=decay_steps)
    assert rate == cosine(step, peak, peak / 10, decay_steps)
    assert learning_rate(step, peak, peak / 10, 1, decay_steps) == rate  # one step of warm-up is none


@given(VALUES, st.integers(1, 500), st.integers(500, 10_000), st.integers(0, 10_500))
def test_the_learning_rate_is_positive_at_most_the_cosine_and_equal_to_it_after_the_warm_up(
    peak: float, warmup_steps: int, decay_steps: int, step: int
) -> None:
    rate, after = (learning_rate(step, peak, peak / 10, warmup, decay_steps) for warmup in (warmup_steps, 0))
    assert 0 < rate <= after <= peak * (1 + 1e-12)
    assert (rate == after) == (step >= warmup_steps - 1)
    if step < warmup_steps:
        assert rate == pytest.approx(after * (step + 1) / warmup_steps, rel=1e-12)
