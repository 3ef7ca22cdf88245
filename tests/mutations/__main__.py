"""Wrong lines, planted one at a time: is there a test that sees each?

    python tests/mutations [--only TEXT] [--skip N] [--new] [--jobs 1] [--table docs/mutations.md]

For each entry of the lists beside this file the line is changed in a clone of the last commit, and the tests that are
named for its file, but for those of minutes, run there until one fails; they have first to pass as nothing is changed.
A mutant that lives is printed as SURVIVED, and the exit status is 1. An entry whose line is not there any more, or is
there twice, is an error: put it right with the code. It takes about five seconds a mutant; nothing runs it but people.
In the table the rows of mutants that were not asked for stay as they are, and the test that a row names is tried first.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
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

import pytest
from audit import AUDIT
from codebooks import CODEBOOKS
from mutant import Mutant, tests_of
from own import OWN
from quantizers import QUANTIZERS

REPOSITORY = Path(__file__).parent.parent.parent
# What tests import for seconds is imported once: each mutant's tests run in a fork of this process.
SLOW_IMPORTS = ("accelerate", "diffusers.models.modeling_utils", "diffusers.models.attention_processor", "hypothesis")
SLOW_IMPORTS += ("lpips", "omegaconf", "pydantic", "safetensors.torch", "tensorboard", "torchmetrics")
SLOW_IMPORTS += ("torch.utils.flop_counter", "torchvision.models")
ALL = [*AUDIT, *OWN, *CODEBOOKS, *QUANTIZERS]
TIMEOUT = 900  # seconds
SURVIVED = "**survived**"
NEXT = "Next: [the first run on a GPU](gpu/2026-11-26_H200.md)."


class Outcome(NamedTuple):
    mutant: Mutant
    killed_by: str | None  # the first test that failed


def plant(mutant: Mutant, clone: Path, known: str | None) -> Outcome:
    """`known`: the test that has killed it before."""
    file = clone / "vqgan_accel" / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.line) != 1:
        raise ValueError(f"{mutant.file} has {text.count(mutant.line)} times: {mutant.line}")
    file.write_text(text.replace(mutant.line, mutant.wrong), encoding="utf-8")
    try:
        status, said = pytest_says([known], clone) if known else (0, "")
        killed_by = first_failure(said)
        if killed_by is None:
            status, said = pytest_says(list(tests_of(mutant)), clone)
            killed_by = first_failure(said)
        if killed_by is None and status != 0:  # a test file that cannot be imported has seen nothing
            raise RuntimeError(f"{mutant.file}: pytest ended with {status}\n{said[-3000:]}")
        return Outcome(mutant, killed_by)
    finally:
        file.write_text(text, encoding="utf-8")


def first_failure(said: str) -> str | None:
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+?::.+?)(?: - |$)", said, re.MULTILINE)
    return found[1] if found else None


def pytest_says(tests: list[str], clone: Path) -> tuple[int, str]:
    """Its exit status and all of its words, up to the first failure of a test that takes seconds at most."""
    arguments = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow or mutations"]
    arguments += [f"tests/{name}" for name in tests]
    with tempfile.NamedTemporaryFile("r+") as output:
        child = multiprocessing.get_context("fork").Process(target=run_pytest, args=(arguments, clone, output.fileno()))
        child.start()
        child.join(TIMEOUT)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise TimeoutError(f"tests took longer than {TIMEOUT} s: {' '.join(tests)}")
        return child.exitcode, Path(output.name).read_text(encoding="utf-8", errors="replace")


def run_pytest(arguments: list[str], clone: Path, output: int) -> None:
    """In a process of its own, with the clone's package. (`sys.exit` would wait for a pool that is not in it.)"""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(clone)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(clone)}
    sys.path[:] = [str(clone), *(path for path in sys.path if path != str(Path(__file__).parent))]
    sys.dont_write_bytecode = True
    status = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(status)


def require_green(tests: list[str], clone: Path) -> None:
    """A test that fails as it is would count as having seen each wrong line."""
    status, said = pytest_says(tests, clone)
    if status != 0:
        raise RuntimeError(f"the tests fail before a line is changed\n{said[-3000:]}")


def outcomes(mutants: list[Mutant], jobs: int, rows: dict[str, str]) -> Iterator[Outcome]:
    """In the order of the mutants; each job has a clone of its own. `rows`: the old table's."""
    known = {mutant: killer(rows.get(beginning(mutant), SURVIVED)) for mutant in mutants}
    with tempfile.TemporaryDirectory() as folder:
        clones: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            clone = Path(folder) / str(number)
            subprocess.run(["git", "clone", "--quiet", "--shared", str(REPOSITORY), str(clone)], check=True)
            clones.put(clone)
        require_green(sorted({name for mutant in mutants for name in tests_of(mutant)}), clone)

        def one(mutant: Mutant) -> Outcome:
            clone = clones.get()
            try:
                return plant(mutant, clone, known[mutant])
            finally:
                clones.put(clone)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(one, mutants)


def beginning(mutant: Mutant) -> str:
    """Of its row in the table."""
    return f"| `{mutant.file}` | {mutant.effect} | "


def old_rows(table: Path | None) -> dict[str, str]:
    """Beginning of a row -> its end."""
    text = table.read_text(encoding="utf-8") if table and table.is_file() else ""
    return {row[1]: row[2] for row in re.finditer(r"^(\| `.+?` \| .+? \| )(.+) \|$", text, re.MULTILINE)}


def killer(end: str) -> str | None:
    """The test that a row's end names."""
    return None if end == SURVIVED else f"test_{end.strip('`')}"


def write_table(table: Path, rows: dict[str, str]) -> None:
    """Of the mutants that there are, in their order, those that were run."""
    run = [start for start in map(beginning, ALL) if start in rows]
    killed = sum(rows[start] != SURVIVED for start in run)
    head = ["# Wrong lines that a test sees", "", *(__doc__ or "").splitlines()[2:], ""]
    head += [f"{killed} of {len(run)} were killed.", ""]
    head += ["| file | what is wrong | killed by |", "| --- | --- | --- |"]
    lines = [*head, *(f"{start}{rows[start]} |" for start in run), "", NEXT]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants with this text in their file or their effect")
    parser.add_argument("--skip", type=int, default=0, help="as many of them, from the first on")
    parser.add_argument(
        "--new", action="store_true", help="those of which the table does not say that they were killed"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", type=Path, help="write the outcome as a Markdown table")
    options = parser.parse_args()
    mutants = [mutant for mutant in ALL if options.only in f"{mutant.file} {mutant.effect}"]
    mutants, rows = mutants[options.skip :], old_rows(options.table)
    if options.new:
        mutants = [mutant for mutant in mutants if rows.get(beginning(mutant), SURVIVED) == SURVIVED]
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    survived = 0
    for mutant, killed_by in outcomes(mutants, options.jobs, dict(rows)):
        survived += killed_by is None
        print(f"{mutant.file:32} {mutant.effect:70} {killed_by or 'SURVIVED'}", flush=True)
        rows[beginning(mutant)] = f"`{killed_by.removeprefix('test_')}`" if killed_by else SURVIVED
        if options.table:
            write_table(options.table, rows)
    print(f"{len(mutants) - survived} of {len(mutants)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
