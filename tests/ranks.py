"""Real training on several processes: `train.py`'s own entry, gloo between them, nobody to help them.

The ranks are forked from a process that has imported everything, which takes a tenth of a second where torchrun takes
four. There is no launcher that would end the others when one has died: they must find out by themselves. A process
that has computed before must not fork them: a copy has what its threads hold locked, without the threads, and may wait
for ever (`from_a_new_process`).
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from vqgan_accel.cli import main

RANKS = 2
LIMIT = 60  # seconds: every rank has ended by then


class Rank(NamedTuple):
    """Where an armed process stands: all ranks are one process group, whose number is rank 0's pid."""

    rank: int
    leader: int


@dataclass
class Outcome:
    codes: list[int]  # exit status of each rank; -n: ended by signal n
    output: str  # of all ranks
    seconds: float

    @property
    def hung(self) -> bool:
        return self.seconds >= LIMIT


def run_ranks(arguments: list[str], arm: Callable[[Rank], None] | None = None, number: int = RANKS) -> Outcome:
    """`train.py ARGUMENTS` on `number` processes; `arm` is called in each before it starts."""
    read_end, write_end = os.pipe()  # not a file: a full disk would swallow the error sentence
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 2**20)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    processes: list[BaseProcess] = []
    for rank in range(number):
        process = multiprocessing.get_context("fork").Process(
            target=_rank, args=(rank, number, port, os.getpgrp(), write_end, arguments, arm)
        )
        process.start()
        processes.append(process)
        os.setpgid(process.pid or 0, processes[0].pid or 0)
    os.close(write_end)
    # Polled, for `join` would wait for a killed rank's data workers too, which notice within 5 s.
    while any(process.is_alive() for process in processes) and time.monotonic() < start + LIMIT:
        time.sleep(0.01)
    seconds = time.monotonic() - start
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    os.set_blocking(read_end, False)  # a killed rank's data workers hold the other end for some seconds
    with open(read_end, "rb") as reader:
        output = (reader.read() or b"").decode(errors="replace")
    return Outcome([process.exitcode or 0 for process in processes], output, seconds)


def from_a_new_process(arguments: list[str], arm: Callable[[Rank], None], number: int) -> Outcome:
    """`run_ranks` for pytest's own process; `arm` is a function of a module."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_ranks, arguments, arm, number).result()


def _rank(
    rank: int, number: int, port: int, group: int, output: int, arguments: list[str], arm: Callable[[Rank], None] | None
) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if number > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arm is not None:
        while os.getpgrp() == group:  # until the parent has moved it
            time.sleep(0.001)
        arm(Rank(rank, os.getpgrp()))
    sys.exit(main(["train", *arguments]))
