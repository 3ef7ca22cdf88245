"""The torch loader: workers, and batches of what they return, in an order that is given.

Accelerate does not prepare these loaders: the order already knows about processes.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from vqgan_accel.config import DataConfig
from vqgan_accel.data.views import Batch, Failure, Item
from vqgan_accel.interruption import worker_options


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises, in the main process, the failures that workers return.

    `views`: what the workers compute; `sampling`: DataLoader's own arguments that say which of them, and in which
    batches. Closing its iterator ends the workers.
    """

    def __init__(self, views: Dataset[Any], config: DataConfig, pin_memory: bool, **sampling: Any) -> None:
        super().__init__(
            views,
            **sampling,
            **worker_options(config.workers),
            persistent_workers=config.workers > 0,
            pin_memory=pin_memory,
            collate_fn=partial(collate, config.image_size),
            generator=torch.Generator(),  # else each iteration would draw a seed from torch's global state
        )

    def __iter__(self) -> Generator[Batch, None, None]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, Failure):
                    raise ValueError(batch.sentence)
                yield batch
        except BaseException:  # a failure, or GeneratorExit: closed before its end
            _pass_over_killed_workers(self._iterator)
            self._iterator = None  # ends the workers here and now; as garbage in a traceback each would take 5 s
            raise


def _pass_over_killed_workers(iterator: Any) -> None:
    """A worker that was killed may hold a lock that the iterator's usual end waits for, for ever (pytorch issue 39570):
    where one was, all are ended by force."""
    if any(worker.exitcode for worker in getattr(iterator, "_workers", ())):
        iterator._shutdown = True  # the usual end is over
        signal_handling._remove_worker_pids(id(iterator))  # or each death would be raised as an error of its own
        for worker in iterator._workers:
            worker.kill()
            worker.join()


def collate(image_size: int, items: list[Item | Failure]) -> Batch | Failure:
    """The batch of those that are there, which may be none; the first failure where there is one."""
    indices: list[int] = []
    images: list[Tensor] = []  # (S, S, 3), as they lie in memory
    skipped = 0
    for item in items:
        if isinstance(item, Failure):
            return item
        skipped += item.skipped
        if item.image is not None:
            indices.append(item.index)
            images.append(item.image.permute(1, 2, 0))
    stacked = default_collate(images) if images else torch.empty(0, image_size, image_size, 3, dtype=torch.uint8)
    return {
        "image": stacked.permute(0, 3, 1, 2),
        "index": torch.tensor(indices, dtype=torch.int64),
        "skipped": skipped,
    }
