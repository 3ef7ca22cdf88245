"""What a run folder keeps of how the run came about."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import DISCRIMINATOR

from vqgan_accel.config import Config, load_config, parse_config
from vqgan_accel.training import record
from vqgan_accel.training.plan import make_plan
from vqgan_accel.training.state import Progress


def config_of(folder: Path, **sections: Any) -> Config:
    training = {"max_steps": 9, "total_batch_size": 8} | sections.pop("training", {})
    return parse_config({"output_dir": str(folder), "data": {"image_size": 16}, "training": training, **sections})


def write_leftovers(folder: Path) -> list[str]:
    """What a run leaves beside its checkpoints."""
    names = ["metrics.jsonl", "clock.jsonl", "starts.jsonl", "validation.json", "wandb_id", "images/step_00000004.png"]
    (folder / "images").mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("{}\n")
    return names


def test_a_new_run_begins_without_what_another_has_left(tmp_path: Path) -> None:
    write_leftovers(tmp_path)
    config = config_of(tmp_path)
    record.record_config(tmp_path, config, resuming=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.yaml", "images"]
    assert load_config(tmp_path / "config.yaml") == config


def test_a_resumed_run_keeps_it_and_says_what_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.record_config(tmp_path, config_of(tmp_path, training={"max_steps": 5}), resuming=False)
    names = write_leftovers(tmp_path)
    config = config_of(tmp_path, seed=3)
    record.record_config(tmp_path, config, resuming=True)
    assert capsys.readouterr().out.splitlines() == [
        "config changed since the run began: seed: 0 -> 3",
        "config changed since the run began: training.max_steps: 5 -> 9",
    ]
    assert all((tmp_path / name).is_file() for name in names)
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "no config file at "), ("training: [", ""), ("of_another_version: 1\n", "")]
)
def test_a_config_that_is_lost_or_no_longer_read_is_no_reason_not_to_go_on(
    text: str | None, reason: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    (change,) = record.changes_since_the_beginning(tmp_path, config_of(tmp_path))
    assert change.startswith(f"in what way is not known ({reason}")


def test_of_a_section_of_another_type_its_type_alone_is_told(tmp_path: Path) -> None:
    old = config_of(tmp_path, quantizer={"type": "ema", "decay": 0.5, "num_codes": 64})
    new = config_of(tmp_path, quantizer={"type": "gumbel", "num_codes": 32}, discriminator=DISCRIMINATOR)
    assert record.config_changes(old, new) == [
        "discriminator.type: None -> stylegan2",
        "quantizer.num_codes: 64 -> 32",
        "quantizer.type: ema -> gumbel",
    ]
    assert record.config_changes(old, old) == []


def test_a_start_is_a_line_with_what_decides_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XST-11")  # eleven hours ahead of UTC
    time.tzset()
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 4, 2, 0)))
    plan = make_plan(config_of(tmp_path), 64, num_processes=4)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    try:
        for step in (0, 5):
            progress = Progress(step=step, training_images="8 images")
            record.record_start(accelerator, plan, progress, "3 images")
    finally:
        monkeypatch.undo()
        time.tzset()
    first, second = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    versions, device = second.pop("versions"), second.pop("device")
    assert second == {
        "step": 5,
        "total_steps": 9,
        "time": "2026-01-02T03:04:05Z",
        "processes": 4,
        "mixed_precision": "bf16",  # of which the config may say "auto"
        "training_images": "8 images",
        "validation_images": "3 images",
    }
    assert first["step"] == 0 and device.endswith(f", {torch.get_num_threads()} threads")
    assert versions["torch"] == torch.__version__ and {"vqgan_accel", "python", "accelerate"} <= versions.keys()


def test_a_processor_has_its_models_name_or_that_of_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "Path", lambda name: tmp_path / "cpuinfo")
    assert record.processor_name() == os.uname().machine
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Chip @ 2 GHz \nflags\t: fpu\n")
    assert record.processor_name() == "A Chip @ 2 GHz"
    assert record.device_name(torch.device("cpu")).startswith("A Chip @ 2 GHz, ")
    assert record.device_name(torch.device("meta")) == "meta"
