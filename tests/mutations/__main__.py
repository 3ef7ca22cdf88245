"""Wrong lines, planted one at a time: is there a test that sees each?

    python tests/mutations [--only TEXT] [--skip N] [--jobs 1] [--table docs/mutations.md]

For each entry of audit.py and own.py the line is changed in a clone of the last commit, and the fast tests that are
named for its file run there until one fails. A mutant that lives is printed as SURVIVED, and the exit status is 1. An
entry whose line is not there any more, or is there twice, is an error: put it right with the code. It takes about ten
seconds a mutant; nothing runs it but people.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from audit import AUDIT
from mutant import Mutant, tests_of
from own import OWN

REPOSITORY = Path(__file__).parent.parent.parent


class Outcome(NamedTuple):
    mutant: Mutant
    killed_by: str | None  # the first test that failed


def plant(mutant: Mutant, clone: Path) -> Outcome:
    file = clone / "vqgan_accel" / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.line) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.line)} times: {mutant.line}")
    file.write_text(text.replace(mutant.line, mutant.wrong), encoding="utf-8")
    try:
        return Outcome(mutant, first_failure(mutant, clone))
    finally:
        file.write_text(text, encoding="utf-8")


def first_failure(mutant: Mutant, clone: Path) -> str | None:
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", *(f"tests/{name}" for name in tests_of(mutant))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(clone)}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 and found is None:
        raise RuntimeError(f"{mutant.file}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr}")
    return found[1] if found else "?"


def outcomes(mutants: list[Mutant], jobs: int) -> Iterator[Outcome]:
    """In the order of the mutants; each job has a clone of its own."""
    with tempfile.TemporaryDirectory() as folder:
        clones: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            clone = Path(folder) / str(number)
            subprocess.run(["git", "clone", "--quiet", "--shared", str(REPOSITORY), str(clone)], check=True)
            clones.put(clone)

        def one(mutant: Mutant) -> Outcome:
            clone = clones.get()
            try:
                return plant(mutant, clone)
            finally:
                clones.put(clone)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(one, mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants with this text in their file or their effect")
    parser.add_argument("--skip", type=int, default=0, help="as many of them, from the first on")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", type=Path, help="write the outcome as a Markdown table")
    options = parser.parse_args()
    mutants = [mutant for mutant in [*AUDIT, *OWN] if options.only in f"{mutant.file} {mutant.effect}"]
    mutants = mutants[options.skip :]
    rows, survived = [], 0
    for mutant, killed_by in outcomes(mutants, options.jobs):
        survived += killed_by is None
        print(f"{mutant.file:32} {mutant.effect:70} {killed_by or 'SURVIVED'}", flush=True)
        test = f"`{killed_by.removeprefix('test_')}`" if killed_by else "**survived**"
        rows.append(f"| `{mutant.file}` | {mutant.effect} | {test} |")
    print(f"{len(mutants) - survived} of {len(mutants)} killed")
    if options.table:
        head = ["# Wrong lines that a test sees", "", *(__doc__ or "").splitlines()[2:], ""]
        head += [f"{len(mutants) - survived} of {len(mutants)} were killed.", ""]
        lines = [*head, "| file | what is wrong | killed by |", "| --- | --- | --- |", *rows]
        options.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
