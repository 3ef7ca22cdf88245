"""What can go wrong with a run, each kind with its random points, and what must come of it."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from images import truncate
from ranks import RANKS, Rank

from vqgan_accel.data.order import epoch_order
from vqgan_accel.interruption import EXIT_INTERRUPTED, ONE_REQUEST
from vqgan_accel.run_folder import checkpoints
from vqgan_accel.training import loop
from vqgan_accel.training.adversary import Adversary
from vqgan_accel.training.learner import Learner

IMAGES, BATCH, STEPS = 24, 4, 12  # 6 steps an epoch
SEED = 5  # of the runs
STEP_POINTS: dict[str, Any] = {  # name of a function -> where the loop finds it
    "to_float": loop,
    "tokenizer_backward": loop,
    "learn": Adversary,
    "clip": Learner,
    "global_values": loop,
}
SAVE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.scandir", "shutil.rmtree")
USER_ERROR = 2  # the command line's status after a sentence
LOST = "another process of this run has stopped"  # what the others of a dead rank say

Arm = Callable[[Rank, Path], None]  # called in every rank's process before it starts, with the run's folder


@dataclass
class Fault:
    kind: str
    point: str  # for the table
    arm: Arm
    codes: list[set[int]]  # the exit statuses that each rank may have
    says: str = ""  # a regular expression that the output must match
    repair: Callable[[Path, random.Random], str] = lambda run, rng: ""  # between the two starts; what the next says
    overrides: list[str] = field(default_factory=list)
    same_result: bool = True  # as the run without a fault


GOES_ON = [{0}] * RANKS
STOPS = [{USER_ERROR}] * RANKS
STOPS_IN_ORDER = [{EXIT_INTERRUPTED}] * RANKS


# ---- ways to be at a point


def at_call(target: Any, name: str, call: int, action: Callable[[], None]) -> None:
    """Do `action` just before the call-th call of target.name."""
    original, calls = getattr(target, name), iter(range(1, 10**9))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            action()
        return original(*arguments, **options)

    setattr(target, name, wrapped)


def at_file_event(run: Path, matches: Callable[[str, str], bool], call: int, action: Callable[[], None]) -> None:
    """Do `action` just before the call-th file operation (event, path) below checkpoints/ that matches."""
    calls = iter(range(1, 10**9))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in SAVE_EVENTS:
            return
        path = str(arguments[1] if event in ("os.rename", "os.symlink") else arguments[0])
        if path.startswith(f"{run}/checkpoints/") and matches(event, path) and next(calls) == call:
            action()

    sys.addaudithook(hook)


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def kill_all(number: int = signal.SIGKILL) -> None:
    os.killpg(os.getpgrp(), number)


def random_step_point(rng: random.Random) -> tuple[str, int, str]:
    name, call = rng.choice(list(STEP_POINTS)), rng.randint(1, STEPS - 2)  # never in the last step, which ends the run
    return name, call, f"before {name}, call {call}"


def dies(rank: int) -> list[set[int]]:
    return [{-signal.SIGKILL} if r == rank else {USER_ERROR} for r in range(RANKS)]


def mostly_no_workers(rng: random.Random) -> list[str]:
    """A dead rank's data workers keep its connections open until they notice, up to 5 s later: a rare treat."""
    return ["data.workers=0"] if rng.random() < 0.75 else []


# ---- the kinds


def kill_one_in_a_step(rng: random.Random) -> Fault:
    victim, (name, call, point) = rng.randrange(RANKS), random_step_point(rng)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == victim:
            at_call(STEP_POINTS[name], name, call, kill)

    point = f"rank {victim} {point}"
    return Fault("SIGKILL to one rank in a step", point, arm, dies(victim), LOST, overrides=mostly_no_workers(rng))


def kill_all_in_a_step(rng: random.Random) -> Fault:
    trigger, (name, call, point) = rng.randrange(RANKS), random_step_point(rng)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == trigger:
            at_call(STEP_POINTS[name], name, call, kill_all)

    return Fault("SIGKILL to all in a step", f"rank {trigger} {point}", arm, [{-signal.SIGKILL}] * RANKS)


def kill_in_a_save(rng: random.Random, everyone: bool) -> Fault:
    call = rng.randint(1, 200)  # a run's saves have about 250 events

    def arm(me: Rank, run: Path) -> None:
        if me.rank == 0:
            at_file_event(run, lambda event, path: True, call, kill_all if everyone else kill)

    codes = [{-signal.SIGKILL}] * RANKS if everyone else dies(0)
    who = "all" if everyone else "one rank"
    point = f"file operation {call}"
    return Fault(f"SIGKILL to {who} in a save", point, arm, codes, overrides=mostly_no_workers(rng))


def kill_between_renames(rng: random.Random) -> Fault:
    name, call = rng.choice(["latest", "best"]), rng.randint(1, 3)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == 0:
            ours = f"{run}/checkpoints/{name}"
            at_file_event(run, lambda event, path: event == "os.rename" and path == ours, call, kill_all)

    point = f"save {call}, before {name} is renamed"
    return Fault("SIGKILL between two renames", point, arm, [{-signal.SIGKILL}] * RANKS)


def full_disk(rng: random.Random) -> Fault:
    limit, step = round(10 ** rng.uniform(2.5, 5.7)), rng.randint(1, STEPS)  # the largest file has 1.1 MB

    def arm(me: Rank, run: Path) -> None:
        if me.rank == 0:
            at_call(loop, "tokenizer_backward", step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))

    return Fault("full disk", f"files of {limit:,} bytes from step {step}", arm, STOPS, "cannot be written")


def damaged_checkpoint(rng: random.Random, how: str) -> Fault:
    step = rng.randint(7, STEPS)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == 0:
            at_call(loop, "tokenizer_backward", step, kill_all)

    def damage(run: Path, rng: random.Random) -> str:
        newest = checkpoints(run)[-1]
        file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        if how == "truncated":
            os.truncate(file, rng.randrange(file.stat().st_size))
        elif how == "missing":
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        return f"{newest.name} is damaged"

    codes = [{-signal.SIGKILL}] * RANKS
    return Fault(f"{how} file in the newest checkpoint", f"after a kill in step {step}", arm, codes, repair=damage)


def broken_image(rng: random.Random, how: str, on_error: str) -> Fault:
    epoch = rng.randrange(2)
    step = epoch * 6 + rng.randint(4, 5)  # later than what a worker has loaded when it is broken, in the same epoch
    position = rng.randrange(BATCH)
    index = int(epoch_order(SEED, epoch, IMAGES)[step % 6 * BATCH + position])

    def file(run: Path) -> Path:
        return run.parent / "images" / "train" / f"{index:03}.png"

    def spoil(run: Path) -> None:
        os.link(file(run), run.parent / "original.png")
        if how == "truncated":
            content = file(run).read_bytes()
            file(run).unlink()
            file(run).write_bytes(content)
            truncate(file(run))
        else:
            file(run).unlink()

    def arm(me: Rank, run: Path) -> None:
        if me.rank == 0:
            at_call(loop, "tokenizer_backward", max(1, epoch * 6), lambda: spoil(run))

    def restore(run: Path, rng: random.Random) -> str:
        os.replace(run.parent / "original.png", file(run))
        return ""

    point = f"image of step {step + 1}"
    kind, overrides = f"{how} image, on_error={on_error}", [f"data.on_error={on_error}"]
    if on_error == "skip":
        return Fault(kind, point, arm, GOES_ON, rf"skipping image .*{index:03}\.png", restore, overrides, False)
    return Fault(kind, point, arm, STOPS, rf"cannot read image .*{index:03}\.png", restore, overrides)


def nan_batch(rng: random.Random) -> Fault:
    victim, step = rng.randrange(RANKS), rng.randint(1, STEPS)

    def arm(me: Rank, run: Path) -> None:
        if me.rank != victim:
            return
        original, calls = loop.to_float, iter(range(1, 10**9))
        loop.to_float = lambda images: original(images) * (float("nan") if next(calls) == step else 1)

    point, says = f"rank {victim}, step {step}", f"step {step} skipped, for not all of its values are finite"
    return Fault("NaN in one rank's batch", point, arm, GOES_ON, says, same_result=False)


def dead_worker(rng: random.Random) -> Fault:
    victim, (name, call, point) = rng.randrange(RANKS), random_step_point(rng)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == victim:
            at_call(STEP_POINTS[name], name, call, lambda: multiprocessing.active_children()[0].kill())

    return Fault("data worker killed", f"rank {victim} {point}", arm, STOPS, "a data worker died")


def failing_tracker(rng: random.Random) -> Fault:
    call = rng.randint(1, STEPS)

    def fail() -> None:
        raise ConnectionError("the service is down")

    def arm(me: Rank, run: Path) -> None:
        from accelerate.tracking import TensorBoardTracker

        at_call(TensorBoardTracker, "log", call, fail)

    says = r"tracker tensorboard failed and is left out from here on \(the service is down\)"
    return Fault("tracker raises", f"log {call}", arm, GOES_ON, says, overrides=["tracking.trackers=[tensorboard]"])


def stop_signal(rng: random.Random) -> Fault:
    number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    everyone, victim, (name, call, point) = rng.random() < 0.5, rng.randrange(RANKS), random_step_point(rng)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == victim:
            at_call(STEP_POINTS[name], name, call, lambda: kill_all(number) if everyone else kill(number))

    who = "all" if everyone else f"rank {victim}"
    return Fault(f"{number.name}", f"to {who} {point}", arm, STOPS_IN_ORDER, r"stopped by .* after step \d+ of 12")


def stop_signal_in_a_save(rng: random.Random) -> Fault:
    number, call = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]), rng.randint(1, 150)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == 0:
            at_file_event(run, lambda event, path: True, call, lambda: kill(number))

    point = f"file operation {call}"
    return Fault(f"{number.name} in a save", point, arm, STOPS_IN_ORDER, r"stopped by .* after step \d+ of 12")


def second_signal(rng: random.Random) -> Fault:
    """Rank 1 stops coming; rank 0, which waits for it in an all-reduce, is signalled twice and must not wait on."""
    number, call = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]), rng.randint(1, STEPS - 1)

    def signal_until_gone(leader: int) -> None:
        time.sleep(0.2)
        for _ in range(20):  # two are enough, where the machine is not so busy that they seem one request
            try:
                os.kill(leader, number)
            except ProcessLookupError:
                return
            time.sleep(ONE_REQUEST + 0.2)

    def arm(me: Rank, run: Path) -> None:
        if me.rank == 1:
            at_call(loop, "global_values", call, lambda: signal_until_gone(me.leader))

    codes = [{128 + number}, {USER_ERROR}]
    point = f"step {call}"
    return Fault(f"{number.name} twice to a rank that waits", point, arm, codes, LOST, overrides=mostly_no_workers(rng))


KINDS: tuple[Callable[[random.Random], Fault], ...] = (
    kill_one_in_a_step,
    kill_all_in_a_step,
    partial(kill_in_a_save, everyone=False),
    partial(kill_in_a_save, everyone=True),
    kill_between_renames,
    full_disk,
    partial(damaged_checkpoint, how="truncated"),
    partial(damaged_checkpoint, how="bit-flipped"),
    partial(damaged_checkpoint, how="missing"),
    partial(broken_image, how="deleted", on_error="raise"),
    partial(broken_image, how="deleted", on_error="skip"),
    partial(broken_image, how="truncated", on_error="raise"),
    partial(broken_image, how="truncated", on_error="skip"),
    nan_batch,
    dead_worker,
    failing_tracker,
    stop_signal,
    stop_signal_in_a_save,
    second_signal,
)


def faults(number: int, seed: int) -> list[Fault]:
    """`number` faults, the kinds in turn, their points at random."""
    return [KINDS[index % len(KINDS)](random.Random(f"{seed}/{index}")) for index in range(number)]
