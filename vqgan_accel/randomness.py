"""Seeds as a function of position: nothing in training draws from a global random state."""

from __future__ import annotations

import numpy as np

# One stream per purpose, so that equal positions never share their noise.
QUANTIZER_NOISE = 1  # (seed, QUANTIZER_NOISE, optimizer step, index in the global batch)
CODE_REINIT = 2  # (seed, CODE_REINIT, optimizer step)


def position_seed(*position: int) -> int:
    """A well-mixed seed in [0, 2^63) from a tuple of non-negative integers."""
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))
