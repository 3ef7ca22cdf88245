"""Validations inside training: measured alike each time, and kept for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_config

from vqgan_accel.evaluation.figures import grid_tiles, to_uint8
from vqgan_accel.training.setup import open_run


def test_a_second_validation_is_measured_as_the_first(tmp_path: Path) -> None:
    with open_run(tiny_config(tmp_path)) as run:
        validation, tokenizer = run.validation, run.networks.best_tokenizer
        first = validation.measure(tokenizer)
        protocol = validation.protocol
        assert protocol is not None and protocol["images_hash"] == first.pixels_hash
        second = validation.measure(tokenizer)
        assert validation.protocol == protocol and second.results == first.results


@pytest.mark.parametrize("number", [1, 2])
def test_its_picture_has_as_many_images_as_the_config_says_over_their_reconstructions(
    number: int, tmp_path: Path
) -> None:
    with open_run(tiny_config(tmp_path, evaluation={"grid_images": number})) as run:
        evaluation = run.validation.measure(run.networks.best_tokenizer)
        picture = run.validation.record(tmp_path / "run", 7, evaluation)
        run.validation.record(tmp_path / "run", 8, evaluation)
    assert picture is not None  # which trackers get
    tiles = grid_tiles(picture, SIZE)
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
        evaluation = run.validation.measure(run.networks.best_tokenizer)
        assert run.validation.record(tmp_path / "run", 7, evaluation) is None
    assert not (tmp_path / "run" / "images").exists() and (tmp_path / "run" / "validation.json").is_file()
