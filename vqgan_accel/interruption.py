"""Signals that ask a run to stop in good order: the step is finished on every process, saved, and the run can go on
later as if nothing had happened.

SIGTERM (preemption, torchrun, a service manager), SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning before the time limit).
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANOTHER_HAS_STOPPED = "another process of this run has stopped; its own message says why"
EXIT_INTERRUPTED = 75  # sysexits.h's EX_TEMPFAIL: start the same command again with --resume
PR_SET_PDEATHSIG = 1  # of prctl(2)
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "torch.distributed.run", "torch.distributed.launch")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST = 1.0  # seconds in which repeated signals are one request: launchers pass on what a process got already


class TrainingInterruptedError(Exception):
    """Training stopped as it was asked to; its last step is saved."""


class StopRequest:
    """What the signals so far ask for."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first one
        self.time = 0.0  # when it came

    def __bool__(self) -> bool:
        return self.signal is not None

    def receive(self, number: int) -> None:
        """The first request is noted; a second one ends the process here and now."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.time = signal.Signals(number), now
        elif now - self.time > ONE_REQUEST:
            os._exit(128 + number)


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """While it is open, stop signals are noted instead of obeyed. A second one, a second or more later, is obeyed at
    once, even where the process waits for others that are gone.

    Outside of the main thread, where Python allows no handlers, nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Python runs a handler between two bytecodes, and a process that waits inside a collective comes to none. What the
    # interpreter writes to the wake-up descriptor is there at once, and a thread reads it.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def listen() -> None:
        while number := os.read(read_end, 1)[0]:
            if number in STOP_SIGNALS:  # the descriptor also tells of other signals, such as a child's end
                request.receive(number)

    listener = threading.Thread(target=listen, name="stop signals", daemon=True)
    listener.start()
    end_with_launcher()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(write_end, b"\0")  # ends the listener; closing does not, where a data worker inherited this end
        listener.join()
        os.close(read_end)
        os.close(write_end)


def parent_command() -> list[str]:
    """The words with which this process's parent was started; none where the system does not tell."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    except OSError:
        return []


def started_by_launcher(command: Sequence[str]) -> bool:
    """Whether these are the words of `accelerate launch` or torchrun."""
    return any(Path(word).name in LAUNCHERS for word in command[:3])  # behind python, and its -m


def end_with_launcher() -> None:
    """The end of this process's launcher, however it goes, is a SIGTERM to this process.

    `accelerate launch` of one process dies of SIGTERM and passes nothing on, and what is killed by SIGKILL cannot: the
    training would go on, unseen, and hold its folder. Another parent's end, such as a shell's, is no reason to stop.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not started_by_launcher(parent_command()):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was quicker
        os.kill(os.getpid(), signal.SIGTERM)


def worker_options(workers: int) -> dict[str, Any]:
    """A DataLoader's, for `workers` of them.

    Forked: from Python 3.14 on the default is another, under which their parent is not the training process, whose
    signals and whose end they must know.
    """
    return {
        "num_workers": workers,
        "worker_init_fn": shield_data_worker,
        "multiprocessing_context": "fork" if workers else None,
    }


def shield_data_worker(worker: int) -> None:
    """A DataLoader's worker_init_fn: the training process needs its workers until the step is done, so they obey
    nobody else, and end when it is gone, however it went. (torch looks for that every 5 s.)

    Ctrl-C and torchrun signal the whole process group, SLURM every process of the job.
    """
    gc.freeze()  # or a full collection would write to all objects that the parent has: 70 MB no longer shared
    os.setpgrp()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)  # the parent's: a worker's signals are not its own
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, name="SIGTERM", daemon=True).start()


def _obey_parent() -> None:
    """torch sends SIGTERM to a worker that does not end by itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
