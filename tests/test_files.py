"""Writing on disks that cannot do all that a local one can, and one process after the other."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import held_by_another
from tiny import tiny_config

from vqgan_accel import load_tokenizer
from vqgan_accel.files import followed, one_at_a_time, point, sync
from vqgan_accel.models.weights import cached, downloading
from vqgan_accel.training import loop


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)


def test_a_link_moves_at_one_stroke(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point(tmp_path / "latest", name)
        assert os.readlink(tmp_path / "latest") == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]


@pytest.mark.seconds
def test_without_links_a_run_trains_goes_on_and_is_read_by_its_names(tmp_path: Path, no_links: None) -> None:
    settings = {"checkpoint_every": "1 step", "validate_every": "1 step"}
    run = loop.train(tiny_config(tmp_path, training={**settings, "max_steps": 2}))
    loop.train(tiny_config(tmp_path, training={**settings, "max_steps": 3}), resume=True)
    latest, best = (run / "checkpoints" / name for name in ("latest", "best"))
    assert latest.read_text() == "step_00000003\n" and followed(latest).name == "step_00000003"
    assert followed(best).is_dir()
    for link in (latest, best):
        weights, expected = (load_tokenizer(path).state_dict() for path in (link, followed(link)))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["model.ckpt", "latest"])
def test_a_file_that_is_no_link_is_told_as_what_it_is_not(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no such step" if name == "latest" else b"\xff\xfe weights of another program")
    with pytest.raises(FileNotFoundError, match="there is no run, checkpoint or saved tokenizer at"):
        load_tokenizer(tmp_path / name)


def test_another_error_than_a_lack_of_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(OSError, match="No space left"):
        point(tmp_path / "latest", "a")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced_stops_nothing_and_a_file_does(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(file)
    if number == errno.EIO:  # not a lack, but a failing disk
        with pytest.raises(OSError, match="Input/output error"):
            sync(tmp_path)
    else:
        sync(tmp_path)


def download(folder: Path) -> None:
    with one_at_a_time(folder):
        if not (folder / "weights").exists():
            with (folder / "downloads").open("a") as log:
                log.write("one\n")
            time.sleep(0.3)
            (folder / "weights").touch()


@pytest.mark.seconds
def test_what_one_process_downloads_the_others_find(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=download, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "downloads").read_text() == "one\n"


def test_where_nothing_can_be_written_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with one_at_a_time(tmp_path / "file" / "folder"):
        pass


def test_nobody_waits_for_a_download_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://somewhere/weights-12345678.pth"
    with downloading(url):
        assert (tmp_path / "checkpoints" / ".lock").is_file()
    cached(url).touch()
    with held_by_another(tmp_path / "checkpoints"), downloading(url):  # which would have waited for ever
        pass
