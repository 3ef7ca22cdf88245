"""The fault harness in its quick form: see faults/__main__.py, which prints the table of what was injected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FAULTS = Path(__file__).parent / "faults"
NUMBER = 19  # one of each kind; by hand, more


def test_runs_survive_what_is_injected_and_end_with_the_bits_of_an_undisturbed_one() -> None:
    command = [sys.executable, FAULTS, "--many", str(NUMBER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{NUMBER} of {NUMBER} survived" in done.stdout
