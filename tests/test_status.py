"""The word that a run leaves, and what `vqgan-accel status` makes of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import GOLDEN
from runs import StopIn, held_by_another
from tiny import tiny_config

from vqgan_accel.cli import main
from vqgan_accel.config import Config
from vqgan_accel.interruption import TrainingInterruptedError
from vqgan_accel.status import status
from vqgan_accel.training import loop
from vqgan_accel.training.setup import open_run


def stopped(config: Config, step: int, resume: bool = False) -> None:
    with pytest.raises(TrainingInterruptedError), open_run(config, resume) as run:
        loop.train_to_the_end(run, StopIn(run, step))


def asked(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    return main(["status", str(run)]), capsys.readouterr().out.strip()


@pytest.mark.seconds
def test_a_run_is_interrupted_goes_on_and_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, training={"max_steps": 3})
    stopped(config, 2)
    code, said = asked(tmp_path / "run", capsys)
    assert code == 75
    assert said.startswith("interrupted: saved up to step 2 of 3: stopped by") and said.endswith("go on with --resume")
    loop.train(config, resume=True)
    assert asked(tmp_path / "run", capsys) == (0, "finished: saved up to step 3 of 3")


def test_while_another_process_trains_there_it_is_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, training={"max_steps": 3})
    stopped(config, 1)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with held_by_another(tmp_path / "run"):
        assert asked(tmp_path / "run", capsys) == (3, "running: saved up to step 1 of 3")
    assert asked(tmp_path / "run", capsys)[0] == 75
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_run_that_was_killed_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last word is what it said at the beginning, and nobody holds its folder."""
    loop.train(tiny_config(tmp_path))
    word = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (word["status"], word["process"]) == ("finished", os.getpid())
    (tmp_path / "run" / "status.json").write_text(json.dumps(word | {"status": "running"}))
    code, said = asked(tmp_path / "run", capsys)
    assert code == 75 and "ended without a word" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            FloatingPointError("training stopped at step 2"),
            1,
            "failed: no checkpoint of 2: FloatingPointError: training",
        ),
        (OSError("checkpoint cannot be written"), 1, "failed: no checkpoint of 2: OSError: checkpoint cannot"),
        (RuntimeError("shapes differ"), 1, "failed: no checkpoint of 2: RuntimeError: shapes differ"),
        (dist.DistBackendError("remote process exited"), 75, "interrupted: no checkpoint of 2: another process"),
    ],
)
def test_an_error_is_a_failure_but_where_another_process_was_lost(
    error: Exception,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop, "take_step", broken)
    with pytest.raises(type(error)):
        loop.train(tiny_config(tmp_path))
    found, line = asked(tmp_path / "run", capsys)
    assert found == code and line.startswith(said)


def test_a_word_that_cannot_be_left_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(*_: object) -> None:
        monkeypatch.setattr("vqgan_accel.status.write_json", full)
        raise OSError("checkpoint cannot be written")

    monkeypatch.setattr(loop, "take_step", broken)
    with pytest.raises(OSError, match="checkpoint cannot be written"):
        loop.train(tiny_config(tmp_path))


def test_a_second_start_that_is_refused_does_not_change_the_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path)
    loop.train(config)
    with pytest.raises(ValueError, match="already holds a run"):
        loop.train(config)
    assert asked(tmp_path / "run", capsys)[0] == 0


def test_of_an_older_version_the_checkpoints_tell(tmp_path: Path) -> None:
    run = Path(shutil.copytree(GOLDEN / "old_run", tmp_path / "run", symlinks=True))
    found = status(run)  # cut after step 4 of 6
    assert (found.word, found.saved, found.total) == ("interrupted", 4, 6)
    start = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    (run / "starts.jsonl").write_text(json.dumps(start | {"total_steps": 4}) + "\n")
    assert status(run).word == "finished"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "asleep", "reason": ""}', '{"status": []}'])
def test_a_word_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(GOLDEN / "old_run", tmp_path / "run", symlinks=True))
    (run / "status.json").write_text(text)
    assert status(run).word == "interrupted"


def test_a_folder_without_a_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run" in capsys.readouterr().err
