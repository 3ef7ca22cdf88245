"""How a run stands: running, finished, interrupted (and can go on), or failed.

Launchers hide the exit status of what they start, so a run leaves a word in its folder, and `vqgan-accel status` turns
it into an exit status that a job script can act on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from vqgan_accel.files import is_locked, read_lines, write_json
from vqgan_accel.interruption import ANOTHER_HAS_STOPPED, EXIT_INTERRUPTED, TrainingInterruptedError
from vqgan_accel.run_folder import CONFIG, STARTS, STATUS, checkpoints, step_of
from vqgan_accel.words import now

Word = Literal["running", "finished", "interrupted", "failed"]
EXIT: dict[Word, int] = {"finished": 0, "failed": 1, "running": 3, "interrupted": EXIT_INTERRUPTED}
NO_WORD = "ended without a word (killed, or its machine was lost); go on with --resume"


class Status(NamedTuple):
    word: Word
    saved: int | None  # the newest checkpoint's step
    total: int | None  # steps; None for a run that never began
    reason: str  # empty where the word says all

    def __str__(self) -> str:
        saved = "no checkpoint" if self.saved is None else f"saved up to step {self.saved:,}"
        total = "" if self.total is None else f" of {self.total:,}"
        return f"{self.word}: {saved}{total}{f': {self.reason}' if self.reason else ''}"


def status(run: str | Path) -> Status:
    """Of the training in the folder `run`. FileNotFoundError where there is none.

    >>> print(status("runs/first"))
    finished: saved up to step ...
    """
    run = Path(run)
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {CONFIG}")
    saved = step_of(found[-1]) if (found := checkpoints(run)) else None
    starts = [line for line in read_lines(run / STARTS) if "total_steps" in line]
    total = starts[-1]["total_steps"] if starts else None
    if is_locked(run):
        return Status("running", saved, total, "")
    word, reason = _last_word(run)  # which is left before the lock is
    if word == "running":
        return Status("interrupted", saved, total, NO_WORD)
    if word is None:  # of a version that left none
        done = saved is not None and saved == total
        return Status("finished" if done else "interrupted", saved, total, "" if done else NO_WORD)
    return Status(word, saved, total, reason)


def _last_word(run: Path) -> tuple[Word | None, str]:
    try:
        found = json.loads((run / STATUS).read_text(encoding="utf-8"))
        return (found["status"], str(found["reason"])) if found["status"] in EXIT else (None, "")
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None, ""


@contextmanager
def leaving_a_word(run: Path, finished: Callable[[], bool]) -> Iterator[None]:
    """Around a training that holds the folder's lock; one process calls it. `finished` is asked at its end."""
    _leave(run, "running", "")
    try:
        yield
    except TrainingInterruptedError as error:
        _leave(run, "interrupted", str(error))
        raise
    except Exception as error:
        if _is_loss_of_another(error):
            _leave(run, "interrupted", f"{ANOTHER_HAS_STOPPED}; go on with --resume")
        else:
            _leave(run, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
    if finished():
        _leave(run, "finished", "")


def _is_loss_of_another(error: Exception) -> bool:
    """This process has done nothing wrong: what has befallen the other may not come again."""
    from vqgan_accel.failures import known_failure  # with torch, which `vqgan-accel status` does without

    return isinstance(error, RuntimeError) and known_failure(error) == ANOTHER_HAS_STOPPED


def _leave(run: Path, word: Word, reason: str) -> None:
    """On a full disk the run says why it ends, and not that it could not say so here."""
    with suppress(OSError):
        write_json(run / STATUS, {"status": word, "reason": reason, "time": now(), "process": os.getpid()})
