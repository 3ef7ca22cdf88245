"""Validations inside training: measured alike each time, and kept for the report."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Rank, from_a_new_process
from runs import assert_same_bits, metrics
from tiny import SIZE, tiny_config, write_splits

from vqgan_accel.config import Config, save_config
from vqgan_accel.data.views import Batch
from vqgan_accel.evaluation.figures import grid_tiles, to_uint8
from vqgan_accel.interruption import EXIT_INTERRUPTED, StopRequest, TrainingInterruptedError
from vqgan_accel.run_folder import checkpoints
from vqgan_accel.status import status
from vqgan_accel.training import validation as module
from vqgan_accel.training.loop import train, train_to_the_end
from vqgan_accel.training.setup import open_run


def test_a_second_validation_is_measured_as_the_first(tmp_path: Path) -> None:
    with open_run(tiny_config(tmp_path)) as run:
        validation, tokenizer = run.validation, run.networks.best_tokenizer
        first = validation.measure(tokenizer, StopRequest())
        protocol = validation.protocol
        assert protocol is not None and protocol["images_hash"] == first.pixels_hash
        second = validation.measure(tokenizer, StopRequest())
        assert validation.protocol == protocol and second.results == first.results


@pytest.mark.parametrize("number", [1, 2])
def test_its_picture_has_as_many_images_as_the_config_says_over_their_reconstructions(
    number: int, tmp_path: Path
) -> None:
    with open_run(tiny_config(tmp_path, evaluation={"grid_images": number})) as run:
        evaluation = run.validation.measure(run.networks.best_tokenizer, StopRequest())
        pictures = run.validation.record(tmp_path / "run", 7, evaluation)  # which trackers get
        run.validation.record(tmp_path / "run", 8, evaluation)
    assert pictures.keys() == {"codebook", "validation"}
    assert np.array_equal(np.asarray(pictures["codebook"]), np.asarray(Image.open(tmp_path / "run" / "codebook.png")))
    tiles = grid_tiles(pictures["validation"], SIZE)
    assert len(tiles) == number
    for index, (original, rebuilt) in enumerate(tiles):
        assert np.array_equal(np.asarray(original), to_uint8(evaluation.originals)[index])
        assert np.array_equal(np.asarray(rebuilt), to_uint8(evaluation.reconstructions)[index])
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir()) == [
        "step_00000007.png",
        "step_00000008.png",
    ]
    record: dict[str, Any] = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert record["step"] == 8 and torch.equal(torch.tensor(record["code_counts"]), evaluation.code_counts.long())


def test_without_images_to_show_there_is_no_picture(tmp_path: Path) -> None:
    with open_run(tiny_config(tmp_path, evaluation={"grid_images": 0})) as run:
        evaluation = run.validation.measure(run.networks.best_tokenizer, StopRequest())
        assert run.validation.record(tmp_path / "run", 7, evaluation).keys() == {"codebook"}
    assert not (tmp_path / "run" / "images").exists() and (tmp_path / "run" / "validation.json").is_file()


# ---- a stop, or a crash, in the middle of one


class AskedAfter(StopRequest):
    """A request that comes when it has been looked for so many times: once in a step, once before each batch of a
    validation and once at its end."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def __bool__(self) -> bool:
        self.times -= 1
        return self.times < 0


def validating(folder: Path) -> Config:
    """5 steps; validations of two batches after the second, the fourth and the last, checkpoints after the third and
    the last."""
    training = {"max_steps": 5, "validate_every": "2 steps", "checkpoint_every": "3 steps", "log_every": 1}
    data = {"path": str(folder.parent / "images")}
    return tiny_config(folder, data=data, training=training, quantizer={"type": "ema"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, undisturbed."""
    folder = tmp_path_factory.mktemp("validations") / "whole"
    write_splits(folder.parent / "images")
    return train(validating(folder))


NOT_THESE = [0, 1, 2, 4, 5, 7, 8, 9, 10, 11, 13]  # of the 14 places


def same_end(run: Path, whole: Path) -> None:
    assert status(run).word == "finished"
    assert_same_bits(run / "checkpoints" / "latest", whole / "checkpoints" / "latest")
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (run / "checkpoints" / "best").resolve().name == (whole / "checkpoints" / "best").resolve().name


@pytest.mark.seconds
@pytest.mark.parametrize("times", [3, 6, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in NOT_THESE)])
def test_wherever_it_is_asked_to_stop_it_stops_there_and_ends_as_the_undisturbed_run(times: int, whole: Path) -> None:
    config = validating(whole.parent.parent / f"asked-{times}")
    told = pytest.raises(TrainingInterruptedError, match=f"after step {STEPS[times]} of 5, which is saved")
    with told, open_run(config) as run:
        train_to_the_end(run, AskedAfter(times))
    assert status(run.folder).word == "interrupted"
    assert checkpoints(run.folder)[-1].name == f"step_0000000{STEPS[times]}"
    done = sum("validation/psnr" in line for line in metrics(run.folder))
    assert done == DONE[times]
    same_end(train(config, resume=True), whole)


# how often it was looked for -> the step that it stops after, and the validations that were done
STEPS = [1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5]
DONE = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_finished_run_that_is_resumed_does_nothing_again(whole: Path) -> None:
    log = (whole / "metrics.jsonl").read_bytes()
    same_end(train(validating(whole.parent), resume=True), whole)
    assert (whole / "metrics.jsonl").read_bytes() == log


class Breaking:
    """Batches of a validation, of which the second one does not come any more after `number` whole validations."""

    def __init__(self, batches: Iterable[Batch], number: int) -> None:
        self.batches, self.number = batches, number

    def __iter__(self) -> Iterator[Batch]:
        self.number -= 1
        for place, batch in enumerate(self.batches):
            if self.number < 0 and place == 1:
                raise KeyError("of a feature network")
            yield batch


@pytest.mark.seconds
@pytest.mark.parametrize(("number", "saved"), [(1, 3), (2, 5)])
def test_a_crash_in_a_validation_loses_no_checkpoint_that_was_due(number: int, saved: int, whole: Path) -> None:
    config = validating(whole.parent.parent / f"crash-{number}")
    with pytest.raises(KeyError), open_run(config) as run:
        run.validation.batches = Breaking(run.validation.batches, number)
        train_to_the_end(run, StopRequest())
    assert checkpoints(run.folder)[-1].name == f"step_0000000{saved}"
    same_end(train(config, resume=True), whole)


def stop_in_the_first_validation(me: Rank) -> None:
    """One of two processes is asked to stop, as by a job script that signals its own machine."""
    original = module.evaluate_tokenizer

    def evaluate_tokenizer(*arguments: Any, **settings: Any) -> Any:
        if me.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # until the thread that reads signals has it
        return original(*arguments, **settings)

    module.evaluate_tokenizer = evaluate_tokenizer


@pytest.mark.slow
def test_a_stop_of_one_process_ends_the_validation_of_all(tmp_path: Path) -> None:
    """Of shares that are not equal: two batches and one."""
    write_splits(tmp_path / "images")
    for name in ("stopped", "whole"):
        settings = {"evaluation": {"batch_size": 1}, "data": {"path": str(tmp_path / "images")}}
        training = {"max_steps": 3, "validate_every": "2 steps", "total_batch_size": 8}
        save_config(tiny_config(tmp_path / name, training=training, **settings), tmp_path / f"{name}.yaml")
    outcome = from_a_new_process([str(tmp_path / "stopped.yaml")], stop_in_the_first_validation, number=2)
    assert outcome.codes == [EXIT_INTERRUPTED] * 2, outcome.output
    assert "after step 2 of 3, which is saved" in outcome.output
    assert not any("validation/psnr" in line for line in metrics(tmp_path / "stopped" / "run"))
    for arguments in ([str(tmp_path / "stopped.yaml"), "--resume"], [str(tmp_path / "whole.yaml")]):
        assert from_a_new_process(arguments, unarmed, number=2).codes == [0, 0]
    same_end(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")


def unarmed(me: Rank) -> None:
    pass
