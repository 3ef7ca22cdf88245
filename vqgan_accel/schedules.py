"""Everything that changes with the optimizer step, as pure functions of it: resuming needs no scheduler state."""

from __future__ import annotations

import math


def cosine(step: int, start: float, end: float, num_steps: int) -> float:
    """From `start` at step 0 along half a cosine to `end` at `num_steps`, then constant."""
    if step >= num_steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def learning_rate(step: int, peak: float, final: float, warmup_steps: int, decay_steps: int) -> float:
    """Linear warm-up to the cosine from `peak` at step 0 to `final` at `decay_steps`.

    The first warm-up step already learns: its factor is 1 / warmup_steps.
    """
    rate = cosine(step, peak, final, decay_steps)
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate
