"""A run folder of revision 886bd5d (November 2026), cut after step 4 of 6, and what that revision made of it: losses
in its metrics.jsonl, and the averaged tokenizer of the end in golden/old_run_end.safetensors.

It has an average, an EMA codebook with re-initialisation, a discriminator with warm-up and R1, two rounds, clipping.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN
from runs import metrics
from safetensors.torch import load_file
from tiny import write_splits

from vqgan_accel import evaluate, load_config, load_tokenizer, train
from vqgan_accel.config import Config
from vqgan_accel.report import report


@pytest.fixture
def old(tmp_path: Path) -> Config:
    """The config of a copy of it."""
    shutil.copytree(GOLDEN / "old_run", tmp_path / "run", symlinks=True)
    images = write_splits(tmp_path / "images")
    return load_config(tmp_path / "run" / "config.yaml", [f"output_dir={tmp_path / 'run'}", f"data.path={images}"])


@pytest.mark.seconds
def test_it_goes_on_as_it_would_have(old: Config) -> None:
    """To rounding, for processors differ; on the machine that made it, bit for bit."""
    expected = metrics(GOLDEN / "old_run")
    run = train(old, resume=True)
    again = metrics(run)
    assert [line["step"] for line in again] == [line["step"] for line in expected]
    for line, old_line in zip(again, expected, strict=True):
        assert old_line.keys() <= line.keys()  # metrics have got more results since
        for name, value in old_line.items():
            assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (line["step"], name)
    progress = json.loads((run / "checkpoints" / "latest" / "progress.json").read_text())
    assert (progress["step"], progress["best_step"], progress["averaged_steps"]) == (6, 4, 6)
    tokenizer = load_tokenizer(run).state_dict()
    for name, tensor in load_file(GOLDEN / "old_run_end.safetensors").items():
        # (torch 2.4's rounding of a gradient near zero, which AdamW makes a step of, is worth 1.2e-4)
        torch.testing.assert_close(tokenizer[name], tensor, rtol=1e-3, atol=3e-4, msg=name)


def test_it_is_evaluated_and_looked_at(old: Config, tmp_path: Path) -> None:
    results = evaluate(old.output_dir, data=old.data.path, output=tmp_path / "results")["results"]
    (validated,) = [line for line in metrics(GOLDEN / "old_run") if "validation/psnr" in line and line["step"] == 4]
    assert results["psnr"] == pytest.approx(validated["validation/psnr"], rel=1e-4)
    assert results["codebook_usage"] == validated["validation/codebook_usage"]
    assert "psnr" in Path(report([Path(old.output_dir)])).read_text()
