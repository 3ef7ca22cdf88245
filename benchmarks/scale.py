"""What grows with the number of images: seconds and memory of listing, starting, an epoch, resuming, evaluating.

    python benchmarks/scale.py [--images 10000 100000] [--workers 2]
                               [--parts listing start epoch order steps evaluate tokenize data-info]

The images are links to a few JPEG files of 16 px in 1000 folders, named as ImageNet's are; networks are as small as
they may be: what is measured is the program around them. Each part runs in a process of its own. Seconds are the
processor's, of all of the part's processes, where nothing else is said. "growth" is the last column over the one before
it: 10 is in proportion to the images, 1 does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

FOLDERS = 1000
LINKS = 30_000  # to a file; ext4 has no more than 65,000
SEED, BATCH, SIZE = 0, 256, 16  # pixels
STEPS = 5000  # of a training
Numbers = dict[str, float]


def write_images(folder: Path, number: int) -> None:
    """folder/train: `number` images."""
    rng = np.random.default_rng(SEED)
    for place in range(FOLDERS):
        (folder / "train" / f"n{place:08}").mkdir(parents=True)
    for index in range(number):
        if index % LINKS == 0:
            original = folder / f"{index}.jpg"
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(original)
        os.link(original, folder / "train" / f"n{index % FOLDERS:08}" / f"n{index % FOLDERS:08}_{index:08}.JPEG")


def settings(folder: Path, workers: int) -> dict[str, dict[str, object]]:
    return {
        "data": {"path": str(folder), "image_size": SIZE, "workers": workers, "validation_split": "train"},
        "evaluation": {"split": "train", "metrics": ["psnr", "codebook"], "batch_size": BATCH},
    }


# ---- the parts: each runs in a process of its own, and says its numbers


def listing(folder: Path, workers: int) -> Numbers:
    """Wall time: it is the disk's more than the processor's."""
    from vqgan_accel.data.folder import FolderSource

    numbers, memory = {}, megabytes(os.getpid(), "Pss")
    for which in ("first", "second"):
        start = time.perf_counter()
        source = FolderSource(folder, "train")
        numbers[f"listing, {which} time, s (wall)"] = time.perf_counter() - start
    numbers["listing, kept in memory, MB"] = megabytes(os.getpid(), "Pss") - memory
    start = time.perf_counter()
    source.fingerprint()
    source.labels()
    numbers["fingerprint and classes, s (wall)"] = time.perf_counter() - start
    return numbers


def start(folder: Path, workers: int) -> Numbers:
    """To the first batch, of a folder whose listing is kept."""
    began = time.perf_counter()
    loader = training_batches(folder, workers)[0]
    with closing(iter(loader)) as batches:
        next(batches)
        seconds = time.perf_counter() - began
        return {
            "start to the first batch, s (wall)": seconds,
            "main process after it, MB": megabytes(os.getpid(), "Pss"),
        }


def epoch(folder: Path, workers: int) -> Numbers:
    """Of the worker that grows most: from its third batch to its last."""
    loader, steps = training_batches(folder, workers)
    with closing(iter(loader)) as batches:
        for _ in range(2 * workers + 1):
            next(batches)
        pids = [worker.pid for worker in loader._iterator._workers]
        before = [megabytes(pid, *KINDS) for pid in pids]
        for _ in range(2 * workers + 1, steps):
            next(batches)
        growth = max(megabytes(pid, *KINDS) - first for pid, first in zip(pids, before, strict=True))
        return {
            "a worker's own memory, MB more after an epoch": growth,
            "a worker, PSS after an epoch, MB": max(megabytes(pid, "Pss") for pid in pids),
        }


def order(folder: Path, workers: int) -> Numbers:
    """Of the images' number alone."""
    from vqgan_accel.data.folder import FolderSource
    from vqgan_accel.data.order import TrainingOrder, epoch_order

    number = len(FolderSource(folder, "train"))
    began = time.process_time()
    epoch_order(SEED, 0, number)
    drawn = time.process_time()
    steps = number // BATCH
    next(iter(TrainingOrder(SEED, number, BATCH, 1, 0, 1, 7 * steps + steps // 2, 10 * steps)))
    return {"an epoch's order, s": drawn - began, "resuming in its middle, s": time.process_time() - drawn}


def steps(folder: Path, workers: int) -> Numbers:
    """Of a training, from the steps after its first 1,000 to its last: nothing in it may grow."""
    from vqgan_accel.interruption import StopRequest
    from vqgan_accel.training.loop import report_step, take_step
    from vqgan_accel.training.setup import open_run
    from vqgan_accel.training.upkeep import look_after_codes

    training = {"max_steps": STEPS, "total_batch_size": 8, "log_every": 10}
    config = config_of(folder, workers, training=training, output_dir=str(folder.parent / "run"))
    ends, memory = [time.perf_counter()], []
    with open_run(config) as run:
        for step in range(1, STEPS + 1):
            taken = take_step(run, StopRequest())
            report_step(run, taken.values | look_after_codes(run, taken.rounds), taken.sound)
            if step % 1000 == 0:
                ends.append(time.perf_counter())
                memory.append(megabytes(os.getpid(), *KINDS))
    return {
        "steps 1,001 to 2,000, ms each (wall)": ends[2] - ends[1],
        f"the last 1,000 of {STEPS:,}, ms each (wall)": ends[-1] - ends[-2],
        "main process, MB more from step 1,000 to the last": memory[-1] - memory[0],
    }


def evaluate(folder: Path, workers: int) -> Numbers:
    from vqgan_accel import evaluate as measure

    model, overrides = tokenizer(folder), as_overrides(folder, workers)
    return used("evaluate", lambda: measure(model, overrides=overrides))


def tokenize(folder: Path, workers: int) -> Numbers:
    from vqgan_accel import tokenize as encode

    model, overrides = tokenizer(folder), as_overrides(folder, workers)
    with tempfile.TemporaryDirectory() as output:
        return used("tokenize", lambda: encode(model, output=Path(output) / "tokens", overrides=overrides))


def data_info(folder: Path, workers: int) -> Numbers:
    from vqgan_accel.data.info import data_info as look

    data = config_of(folder, workers).data
    with tempfile.TemporaryDirectory() as output:
        return used("data-info", lambda: look(data, Path(output)))


PARTS: dict[str, Callable[[Path, int], Numbers]] = {
    "listing": listing,
    "start": start,
    "epoch": epoch,
    "order": order,
    "steps": steps,
    "evaluate": evaluate,
    "tokenize": tokenize,
    "data-info": data_info,
}

# ---- what they share

KINDS = ("Private_Clean", "Private_Dirty")  # memory that a process has for itself


def megabytes(pid: int, *kinds: str) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file if line.split(":")[0] in kinds)
    return sum(int(size.split()[0]) for size in lines.values()) / 1024


def config_of(folder: Path, workers: int, **more: object):  # type: ignore[no-untyped-def]
    from vqgan_accel.config import parse_config

    networks = {
        "autoencoder": {"channels": 32, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1},
        "quantizer": {"type": "standard", "num_codes": 64, "embedding_dim": 8},
        "losses": {"perceptual_weight": 0},
        "training": {"max_steps": 1},
    }
    return parse_config(settings(folder, workers) | networks | more)


def as_overrides(folder: Path, workers: int) -> list[str]:
    given = settings(folder, workers)
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in given.items() for key, value in keys.items()]


def training_batches(folder: Path, workers: int):  # type: ignore[no-untyped-def]
    """(loader, steps) of one epoch on one process."""
    from vqgan_accel.data.opening import open_source, training_loader, training_order

    config = config_of(folder, workers).data
    source = open_source(config, "train")
    steps = len(source) // BATCH
    position = {"num_rounds": 1, "process_index": 0, "num_processes": 1, "start_step": 0, "total_steps": steps}
    given = training_order(source, config, seed=SEED, total_batch_size=BATCH, **position)
    return training_loader(source, config, given, pin_memory=False), steps


def tokenizer(folder: Path) -> Path:
    from vqgan_accel.models.build import build_tokenizer

    place = folder / "tokenizer"
    if not place.exists():
        build_tokenizer(config_of(folder, 0)).save_pretrained(place)
    return place


def used(name: str, work: Callable[[], object]) -> Numbers:
    def seconds() -> float:
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, WHOSE))

    before = seconds()
    work()
    return {
        f"{name}, s": seconds() - before,
        f"{name}, peak of its largest process, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


WHOSE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def measured(part: str, folder: Path, workers: int) -> Numbers:
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--workers", str(workers)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{part} failed:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def table(found: dict[int, Numbers]) -> str:
    sizes = sorted(found)
    names = dict.fromkeys(name for size in sizes for name in found[size])
    lines = [f"{'':54}" + "".join(f"{f'{size:,}':>12}" for size in sizes) + f"{'growth':>9}"]
    for name in names:
        values = [found[size].get(name) for size in sizes]
        line = f"{name:54}" + "".join(f"{'' if value is None else f'{value:.4g}':>12}" for value in values)
        *_, one, two = [None, *values]
        lines.append(line + (f"{two / one:>9.1f}" if one and two and one > 0.005 else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.folder, arguments.workers)))
        return
    found: dict[int, Numbers] = {}
    for number in sorted(arguments.images):
        with tempfile.TemporaryDirectory() as name:
            os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
            folder = Path(name) / "images"
            write_images(folder, number)
            time.sleep(3)  # a listing of a folder that was just changed is not kept
            found[number] = {}
            for part in arguments.parts:
                found[number] |= measured(part, folder, arguments.workers)
                print(f"{number:,} {part}", file=sys.stderr, flush=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.workers} workers, {FOLDERS} folders\n")
    print(table(found))


if __name__ == "__main__":
    main()
