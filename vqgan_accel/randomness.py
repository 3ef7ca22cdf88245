"""Randomness as a function of position: nothing in training draws from a global random state.

Every purpose has its own stream, so that equal positions in two of them share nothing.
"""

from __future__ import annotations

import numpy as np

EPOCH_ORDER = 1  # (seed, epoch)
AUGMENTATION = 2  # (seed, epoch, index of the image)
QUANTIZER_NOISE = 3  # (seed, optimizer step, index in the global batch)
CODE_REINIT = 4  # (seed, optimizer step)
STREAM_ORDER = 5  # (seed, lane, pass): of a stream's files
STREAM_BLOCK = 6  # (seed, lane, pass, number of the block): of the images in a shuffle buffer
CODE_INIT = 8  # (seed): the centres that k-means begins with
PERTURBATION = 7  # (position in the split): of the codes of pFID


def generator(stream: int, *position: int) -> np.random.Generator:
    """A fresh generator for one position (non-negative integers) of a stream."""
    return np.random.default_rng((stream, *position))


def position_seed(stream: int, *position: int) -> int:
    """The same for torch's generators: a well-mixed seed in [0, 2^63)."""
    return int(np.random.SeedSequence((stream, *position)).generate_state(1, np.uint64)[0] >> np.uint64(1))
