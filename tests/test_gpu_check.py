"""launch/gpu_check.sh on a CPU: every check completes, and one that does not leaves the others their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import QUANTIZER_SECTIONS

from vqgan_accel.config import load_config

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu_check import QUANTIZERS, Check, Place, Runner, tiny_config  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("checks", ["a,b train ema d,e,f,g", "c,d,h distributed"])
def test_every_check_completes_on_a_cpu(checks, tmp_path):
    result = subprocess.run(
        ["bash", REPOSITORY / "launch/gpu_check.sh", "--device", "cpu", "--only", checks, "--output", tmp_path],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name[0] for name in results} == {"p", *(name[0] for name in checks.split(","))}
    rows = {what: value for found in results.values() for what, value, _, _ in found["rows"]}
    if "b train ema d" in checks:
        assert rows["resumed from step 5"] == "equal bit for bit"
        assert 0 <= rows["bf16, with the real loader: waiting for images"] <= 100
    else:
        assert rows["in DDP beside without"] == "equal bit for bit"
        assert rows["codes unlike the CPU's, IEEE"].startswith("0 of ")
    assert (tmp_path / "gpu_check.md").read_text() in result.stdout


def test_every_quantizer_is_checked(tmp_path):
    place = Place("tiny", tmp_path, tmp_path, cuda=False)
    assert QUANTIZERS.keys() == QUANTIZER_SECTIONS.keys()
    for kind in QUANTIZERS:
        assert load_config(tiny_config(place, kind), [f"output_dir={tmp_path}"]).quantizer.type == kind


@pytest.mark.seconds
def test_a_check_that_fails_or_hangs_leaves_the_others_their_results(tmp_path):
    def good(place):
        place.record("a number", 1.5, "s", "2")

    def bad(place):
        place.record("before", "it failed")
        raise ValueError("on purpose")

    def slow(place):
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)

    (tmp_path / "work").mkdir()
    runner = Runner(tmp_path / "work", tmp_path, cuda=False, deadline=time.monotonic() + 60)
    runner.run([Check("x bad", bad, 30, 0), Check("y slow", slow, 1, 0), Check("z good", good, 30, 0)])
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [found["status"] for found in results.values()] == ["failed", "stopped: out of time", "ok"]
    assert results["x bad"]["rows"] == [["before", "it failed", "", ""]]
    assert results["x bad"]["error"][-1] == "ValueError: on purpose"
    table = (tmp_path / "gpu_check.md").read_text()
    assert "| | a number | 1.5 s | 2 |" in table and "ValueError: on purpose" in table
