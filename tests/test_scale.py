"""benchmarks/scale.py: what grows with the number of images."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scale
from torch.utils.data import DataLoader, Dataset

from vqgan_accel.interruption import worker_options


def test_growth_is_the_last_column_over_the_one_before_it() -> None:
    found = {10: {"a": 1.0, "b": 2.0}, 100: {"a": 10.0, "b": 2.0, "c": 5.0}}
    _, a, b, c = (line.split() for line in scale.table(found).splitlines())
    assert (a, b, c) == (["a", "1", "10", "10.0"], ["b", "2", "2", "1.0"], ["c", "5"])


def test_memory_is_what_the_system_says_of_a_process() -> None:
    """Of pages asked of the system itself: an allocator may have some left over from another test."""
    before = scale.megabytes(os.getpid(), "Pss")
    with mmap.mmap(-1, 50 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(os.urandom(1024) * (50 * 1024))
        assert 45 < scale.megabytes(os.getpid(), "Pss") - before < 60
        assert scale.megabytes(os.getpid(), *scale.KINDS) >= 50


class Collected(Dataset[float]):
    """How much memory a worker has for itself (MB more) when it has looked for garbage."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        before = scale.megabytes(os.getpid(), *scale.KINDS)
        gc.collect()
        return scale.megabytes(os.getpid(), *scale.KINDS) - before


@pytest.mark.seconds
def test_a_worker_that_collects_garbage_goes_on_sharing_its_parents_objects() -> None:
    objects = [[number] for number in range(200_000)]  # 27 MB, in the hands of the collector
    (grown,) = DataLoader(Collected(), batch_size=None, **worker_options(1))
    assert grown < 10 and len(objects) == 200_000


@pytest.mark.slow
def test_every_part_says_its_numbers(tmp_path: Path) -> None:
    """Of 1,000 images, which are no burden: three batches."""
    parts = [part for part in scale.PARTS if part != "steps"]  # which takes minutes
    command = [sys.executable, scale.__file__, "--images", "1000", "--workers", "1", "--parts", *parts]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()[2:]
    numbers = {line[:54].strip(): float(line[54:]) for line in lines[1:]}
    assert len(numbers) == 16 and all(number >= 0 for name, number in numbers.items() if ", s" in name)
    assert numbers["a worker's own memory, MB more after an epoch"] < 30
