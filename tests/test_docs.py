"""The scripts under docs/ run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_config

from vqgan_accel.training.loop import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_from_another_trainers_checkpoint_to_the_data_set_of_a_second_stage(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "docs" / "second_stage.py"), str(tmp_path / "out")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "standard quantizer, 32 codes, revision head",
        "256 x 256 px: PSNR ",
        "32 grids of [8, 8] codes below 32",
        "features: ['codes', 'label', 'file_name', 'index', 'view']",
        "a code takes 5.00 bits, and ",
        "decoded.png: astronaut from their codes",
    ):
        assert said in done.stdout, done.stdout
    with Image.open(tmp_path / "out" / "decoded.png") as picture:
        assert picture.height == 2 * 32 + 2
    assert len(list((tmp_path / "out" / "reconstructions").rglob("*.png"))) == 16


def test_from_a_run_without_classes_to_the_data_set_of_a_second_stage(tmp_path: Path) -> None:
    run = train(tiny_config(tmp_path))
    script = [sys.executable, str(ROOT / "docs" / "second_stage.py"), str(tmp_path / "out"), "--run", str(run)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 grids of [4, 4] codes below 16" in done.stdout
    assert "decoded.png: 000.png, 001.png, 002.png, 003.png from their codes" in done.stdout
    with Image.open(tmp_path / "out" / "decoded.png") as picture:
        assert picture.height == 2 * 16 + 2
