"""Which image is seen when: a pure function of (seed, optimizer step, round, process); to resume takes no state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from vqgan_accel.randomness import EPOCH_ORDER, generator

IntOrArray = TypeVar("IntOrArray", int, NDArray[np.int64])
Key = tuple[int, int]  # (epoch, index of the image): what a training view depends on, beside the seed


def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """(num_images,) int64: the permutation in which an epoch visits the images."""
    return generator(EPOCH_ORDER, seed, epoch).permutation(num_images)


def global_index(local: IntOrArray, round: int, process: int, num_processes: int, num_rounds: int) -> IntOrArray:
    """Where sample `local` of a process's micro-batch sits in the global batch.

    Sample g of the global batch goes to round g mod k, process (g div k) mod P: a round's content does not depend on P.
    """
    return (local * num_processes + process) * num_rounds + round


def steps_per_epoch(num_images: int, total_batch_size: int) -> int:
    """Optimizer steps per epoch; the last, incomplete global batch is dropped. ValueError where none is complete."""
    if num_images < total_batch_size:
        raise ValueError(
            f"the training split has {num_images} images, fewer than training.total_batch_size {total_batch_size}; "
            "lower training.total_batch_size, or give more images (data.path, data.train_split)"
        )
    return num_images // total_batch_size


class TrainingOrder(Sampler[list[Key]]):
    """A batch sampler: one process's micro-batches of the steps start_step .. total_steps - 1, across epochs.

    Each step gives num_rounds lists of total_batch_size / (num_processes * num_rounds) keys (epoch, index).
    Raises ValueError where the images do not fill one global batch.
    """

    def __init__(
        self,
        seed: int,
        num_images: int,
        total_batch_size: int,
        num_rounds: int,
        process_index: int,
        num_processes: int,
        start_step: int,
        total_steps: int,
    ) -> None:
        assert total_batch_size % (num_processes * num_rounds) == 0  # training.plan tells the user
        assert 0 <= process_index < num_processes and 0 <= start_step <= total_steps
        self.seed = seed
        self.num_images = num_images
        self.total_batch_size = total_batch_size
        self.num_rounds = num_rounds
        self.process_index = process_index
        self.num_processes = num_processes
        self.start_step = start_step
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch(num_images, total_batch_size)

    @property
    def batch_size(self) -> int:
        """Images per micro-batch."""
        return self.total_batch_size // (self.num_processes * self.num_rounds)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.num_rounds

    def states_at(self, step: int) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def __iter__(self) -> Iterator[list[Key]]:
        local = np.arange(self.batch_size)
        order_of = -1  # the epoch that `order` belongs to
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = epoch_order(self.seed, epoch, self.num_images), epoch
            batch = order[step_in_epoch * self.total_batch_size :][: self.total_batch_size]
            for round in range(self.num_rounds):
                mine = global_index(local, round, self.process_index, self.num_processes, self.num_rounds)
                yield [(epoch, int(index)) for index in batch[mine]]
