"""What a run says while it goes on: its lines, its trackers, its bar."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from vqgan_accel.config import parse_config
from vqgan_accel.training import tracking
from vqgan_accel.training.tracking import IN_A_LINE, Tracking, check_trackers, log_line, start_trackers, wandb_id


class Tracker:
    """Notes what it is told."""

    def __init__(self, name: str, told: list[Any], failing: bool = False) -> None:
        self.name, self.told, self.failing = name, told, failing
        self.writer = SimpleNamespace(flush=lambda: told.append(f"{name} is flushed"))

    def log(self, values: dict[str, float], step: int) -> None:
        if self.failing:
            raise ConnectionError("the service\nis down")
        self.told.append((self.name, step, values))

    def log_images(self, pictures: dict[str, Any], step: int, **settings: Any) -> None:
        self.told.append((self.name, step, pictures, settings))

    def finish(self) -> None:
        self.told.append(f"{self.name} is finished")


def opened(folder: Path, *trackers: Tracker, main: bool = True, resumed: int = 0) -> Tracking:
    config = parse_config({"output_dir": str(folder), "training": {"max_steps": 9}})
    accelerator: Any = SimpleNamespace(is_main_process=main, trackers=list(trackers))
    return Tracking(accelerator, config, folder, resumed, total_steps=9)


def test_a_step_is_a_line_and_the_clock_has_one_of_its_own(tmp_path: Path) -> None:
    told: list[Any] = []
    log = opened(tmp_path, Tracker("wandb", told))
    log.log(3, {"total": float("nan"), "l1": 0.5, "r1": float("-inf")}, {"seconds": 2.0})
    log.log(4, {"l1": 0.25})
    lines = [{"step": 3, "total": "nan", "l1": 0.5, "r1": "-inf"}, {"step": 4, "l1": 0.25}]  # JSON has neither
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines
    assert (tmp_path / "clock.jsonl").read_text() == '{"step": 3, "seconds": 2.0}\n'
    assert [(name, step) for name, step, _ in told] == [("wandb", 3), ("wandb", 4)]
    assert told[0][2].keys() == {"total", "l1", "r1", "seconds"} and told[1][2] == {"l1": 0.25}


def test_only_the_main_process_writes_and_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = opened(tmp_path, main=False)
    other.log(1, {"l1": 0.5}, {"seconds": 2.0})
    other.say("hello")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    assert other.bar.disable


def test_a_tracker_that_fails_is_left_out_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Any] = []
    log = opened(tmp_path, Tracker("wandb", told, failing=True), Tracker("tensorboard", told))
    for step in (1, 2):
        log.log(step, {"l1": 0.5})
    assert [(name, step) for name, step, _ in told] == [("tensorboard", 1), ("tensorboard", 2)]
    assert capsys.readouterr().out == (
        f"tracker wandb failed and is left out from here on (the service is down); {tmp_path}/metrics.jsonl goes on\n"
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_each_tracker_gets_a_picture_in_its_own_form(tmp_path: Path) -> None:
    told: list[Any] = []
    picture = Image.new("RGB", (5, 4), (1, 2, 3))
    opened(tmp_path, Tracker("tensorboard", told), Tracker("wandb", told)).picture(7, "validation", picture)
    (_, step, pictures, settings), (_, _, others, _) = told
    assert step == 7 and settings == {"dataformats": "NHWC"} and others == {"validation": [picture]}
    assert pictures["validation"].shape == (1, 4, 5, 3) and np.unique(pictures["validation"][..., 2]) == [3]


def test_a_checkpoints_lines_are_durable_before_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(tracking, "sync", told.append)
    log = opened(tmp_path, Tracker("tensorboard", told), Tracker("wandb", told))
    log.sync()  # nothing was logged yet
    assert told == ["tensorboard is flushed"]
    (tmp_path / "metrics.jsonl").touch()
    log.sync()
    assert told[1:] == [tmp_path / "metrics.jsonl", "tensorboard is flushed"]
    log.close()
    assert told[3:] == ["tensorboard is finished", "wandb is finished"]


def test_the_bar_goes_on_where_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = opened(tmp_path, resumed=4)
    bar.advance({"loss": "0.5"})
    bar.close()
    assert "4/9" in sys.stderr.getvalue() and "5/9" in sys.stderr.getvalue() and "loss=0.5" in sys.stderr.getvalue()


def test_a_line_for_people_has_what_is_watched_and_no_more() -> None:
    values = {name: 0.123456 * (number + 1) for number, name in enumerate(IN_A_LINE)} | {"grad_norm_tokenizer": 1.0}
    assert log_line(20, 1000, values, {"step_time": 0.0}, "") == (
        "step 20 of 1,000: loss 0.1235, l1 0.2469, l2 0.3704, perceptual 0.4938, G 0.6173, D 0.7407, "
        "weight of G 0.8642, codes in use, % 0.9876, codes in use, % 1.111, replaced codes 1.235"
    )


# ---- where trackers begin


@pytest.mark.parametrize(("resumed", "purged"), [(0, {}), (4, {"purge_step": 5})])
def test_a_resumed_run_goes_on_in_its_curves(resumed: int, purged: dict[str, int], tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def init_trackers(project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        asked.update(project=project, config=config, **init_kwargs)

    accelerator: Any = SimpleNamespace(init_trackers=init_trackers)
    settings = {"trackers": ["tensorboard", "wandb"], "project": "trials", "wandb_mode": "offline"}
    config = tiny_config(tmp_path, data={"path": "x"}, tracking=settings)
    start_trackers(accelerator, config, tmp_path, resumed)
    assert asked["project"] == "trials" and asked["config"]["training.max_steps"] == 2
    assert asked["tensorboard"] == purged
    expected = {"id": wandb_id(tmp_path), "resume": "allow", "mode": "offline", "dir": str(tmp_path)}
    assert asked["wandb"] == expected | {"name": tmp_path.name}


def test_a_run_has_one_id_on_wandb(tmp_path: Path) -> None:
    first = wandb_id(tmp_path)
    assert len(first) == 16 and wandb_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert wandb_id(tmp_path / "other") != first


def test_a_tracker_whose_package_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"training": {"max_steps": 1}, "tracking": {"trackers": ["tensorboard", "wandb"]}}).tracking
    monkeypatch.setattr(tracking, "is_installed", lambda name: name == "tensorboard")
    with pytest.raises(ValueError, match=r"asks for wandb, which is not installed: pip install 'vqgan_accel\[wandb\]'"):
        check_trackers(config)
    monkeypatch.setattr(tracking, "is_installed", lambda name: True)
    check_trackers(config)
