# PYTHON_ARGCOMPLETE_OK
"""The `vqgan-accel` command; train.py and evaluate.py call it too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from vqgan_accel.arguments import build_parser
from vqgan_accel.files import FolderHeldError
from vqgan_accel.interruption import EXIT_INTERRUPTED, TrainingInterruptedError

# Told in a sentence; anything else is our bug and shows its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or what `status` has found; 2 after an error told in one sentence (`--debug` shows
    its traceback); 75 (EXIT_INTERRUPTED) where training stopped on a signal and can go on with --resume, or could not
    go on yet, because another process still holds the run's folder."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell that wants to know what could follow
        import argcomplete

        argcomplete.autocomplete(parser)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positional after an option; overrides may stand anywhere
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    try:
        outcome = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has had enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python flushes once more at its end
        return 128 + signal.SIGPIPE
    except (*USER_ERRORS, RuntimeError) as error:
        sentence = explain(error)
        if options.debug or sentence is None:
            raise
        rank = os.environ.get("RANK")
        where = f" (process {rank})" if rank is not None and os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"error{where}: {sentence}", file=sys.stderr, flush=True)
        # a requeued job whose former self is still at work: not an end, but a reason to start again later
        return EXIT_INTERRUPTED if isinstance(error, FolderHeldError) and getattr(options, "resume", False) else 2
    except TrainingInterruptedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return outcome or 0


def explain(error: Exception) -> str | None:
    """The sentence for the user; None for an error that is ours and not theirs."""
    if isinstance(error, RuntimeError):
        from vqgan_accel.failures import known_failure

        return known_failure(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
