"""Streaming: every image once a pass, the same whatever the processes and workers, and resumed at any row."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import noise
from runs import assert_same_bits, metrics, train_until
from tiny import tiny_config

from vqgan_accel.config import DataConfig, parse_config, save_config
from vqgan_accel.data.background import ahead
from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.data.hub import image_rows
from vqgan_accel.data.lanes import Lane, StreamOrder, lanes_of
from vqgan_accel.data.opening import evaluation_loader, open_source, training_loader, training_order
from vqgan_accel.data.stream import MAX_ROWS, StreamSource
from vqgan_accel.data.transforms import training_view
from vqgan_accel.data.views import Batch
from vqgan_accel.interruption import TrainingInterruptedError
from vqgan_accel.training.loop import train

REPOSITORY = Path(__file__).parent.parent
SIZE, SEED = 16, 3
ROWS = (5, 7, 4, 6)  # of each shard
TOTAL = sum(ROWS)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(20, 16, seed=seed).save(file, "PNG")
    return file.getvalue()


def write_parquet(
    folder: Path, split: str = "train", rows: tuple[int, ...] = ROWS, broken: tuple[int, ...] = ()
) -> Path:
    """Row r of shard s shows noise of seed 100 s + r."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, number in enumerate(rows):
        seeds = [100 * shard + row for row in range(number)]
        cells = [{"bytes": b"no image" if seed in broken else png(seed), "path": None} for seed in seeds]
        table = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"train-{shard:05}.parquet")
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("stream") / "parquet")


def config(path: Path, **options: Any) -> DataConfig:
    given = {"path": str(path), "backend": "hub", "streaming": True, "image_size": SIZE, "workers": 0}
    return DataConfig.model_validate(given | {"shuffle_buffer": 8} | options)


def source_of(path: Path, **options: Any) -> StreamSource:
    source = open_source(config(path, **options), "train")
    assert isinstance(source, StreamSource)
    return source


def batches(
    path: Path,
    shape: tuple[int, int, int, int, int, int] = (4, 1, 0, 1, 0, 9),
    states: dict[str, Any] | None = None,
    **options: Any,
) -> list[Batch]:
    """`shape`: total batch, rounds, process, processes, first step, steps."""
    source, data = source_of(path, **options), config(path, **options)
    names = ("total_batch_size", "num_rounds", "process_index", "num_processes", "start_step", "total_steps")
    order = training_order(source, data, states, seed=SEED, **dict(zip(names, shape, strict=True)))
    with closing(iter(training_loader(source, data, order, pin_memory=False))) as loaded:
        return list(loaded)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a["image"], b["image"]) and torch.equal(a["index"], b["index"]) and a["skipped"] == b["skipped"]


def seed_of(number: int) -> int:
    return 100 * (number // MAX_ROWS) + number % MAX_ROWS


EVERY_ROW = sorted(shard * MAX_ROWS + row for shard, rows in enumerate(ROWS) for row in range(rows))

# ---- what is read


def test_each_view_is_the_one_of_its_seed_pass_and_row(parquet: Path) -> None:
    passes: dict[int, int] = {}
    for batch in batches(parquet, (4, 1, 0, 1, 0, 15)):
        for image, number in zip(batch["image"], batch["index"].tolist(), strict=True):
            epoch = passes.get(number, 0)
            passes[number] = epoch + 1
            expected = training_view(noise(20, 16, seed=seed_of(number)), SIZE, (0.7, 1.0), True, SEED, epoch, number)
            assert torch.equal(image, expected)
    assert set(passes) == set(EVERY_ROW) and max(passes.values()) > 1


@pytest.mark.seconds
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_lane_gives_each_row_of_its_shards_once_a_pass(parquet: Path, block: int, lanes: int, number: int) -> None:
    number %= lanes
    own = [row for row in EVERY_ROW if row // MAX_ROWS % lanes == number]
    rows = list(islice(Lane(source_of(parquet), SEED, number, lanes, block), 3 * len(own)))
    passes = [[row.number for row in rows[start : start + len(own)]] for start in range(0, len(rows), len(own))]
    assert all(sorted(one) == own for one in passes)
    assert [row.epoch for row in rows] == [epoch for epoch in range(3) for _ in own]
    if len(own) > 8 and block > 3:
        assert passes[0] != passes[1] != own


@pytest.mark.slow
@given(st.integers(1, 12), st.integers(0, 70))
@settings(max_examples=60, deadline=None)
def test_a_lane_resumes_at_any_row(parquet: Path, block: int, count: int) -> None:
    source = source_of(parquet)
    lane = Lane(source, SEED, 1, 2, block)
    rows = iter(lane)
    whole = [(row.epoch, row.number) for row in islice(rows, 90)]
    resumed = Lane(source, SEED, 1, 2, block, lane.state_at(count))
    again = iter(resumed)
    assert [(row.epoch, row.number) for row in islice(again, 90 - count)] == whole[count:]
    later = min(count + 7, 80)  # the resumed lane's own states are as good
    second = Lane(source, SEED, 1, 2, block, resumed.state_at(later))
    assert [(row.epoch, row.number) for row in islice(iter(second), 90 - later)] == whole[later:]


@pytest.mark.seconds
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_a_lane_resumed_with_another_buffer_still_gives_each_row_once_a_pass(
    parquet: Path, block: int, other: int, count: int
) -> None:
    source = source_of(parquet)
    lane = Lane(source, SEED, 0, 1, block)
    before = list(islice(iter(lane), count))
    after = list(islice(iter(Lane(source, SEED, 0, 1, other, lane.state_at(count))), 3 * TOTAL - count))
    for epoch in range(3):
        assert sorted(row.number for row in before + after if row.epoch == epoch) == EVERY_ROW


def test_blocks_are_shuffled_and_no_larger_than_asked(parquet: Path) -> None:
    first = [row.number for row in islice(Lane(source_of(parquet), SEED, 0, 1, 5), 5)]
    assert len({number // MAX_ROWS for number in first}) <= 2 and first != sorted(first)
    orders = {tuple(row.number for row in islice(Lane(source_of(parquet), seed, 0, 1, 22), 22)) for seed in range(4)}
    assert len(orders) == 4


# ---- processes, workers, resume


@pytest.mark.parametrize("rounds", [1, 2])
def test_processes_read_disjoint_shards_and_together_what_one_reads(parquet: Path, rounds: int) -> None:
    one = batches(parquet, (8, rounds, 0, 1, 0, 6))
    for processes in (2, 4):
        shards = [batches(parquet, (8, rounds, process, processes, 0, 6)) for process in range(processes)]
        for whole, parts in zip(one, zip(*shards, strict=True), strict=True):
            assert torch.equal(torch.stack([part["image"] for part in parts], 1).flatten(0, 1), whole["image"])
        files = [{number // MAX_ROWS for batch in shard for number in batch["index"].tolist()} for shard in shards]
        assert sum(map(len, files)) == len(set().union(*files)) == len(ROWS)


def test_batches_do_not_depend_on_workers(parquet: Path) -> None:
    assert all(map(same, batches(parquet, workers=2), batches(parquet)))


def test_a_stream_resumes_in_the_middle_on_any_number_of_processes(parquet: Path) -> None:
    whole = batches(parquet, (8, 1, 0, 1, 0, 9))
    source, states = source_of(parquet), {}
    for process in range(2):
        order = StreamOrder(source, SEED, 8, 1, process, 2, 0, 9, shuffle_buffer=8)
        with closing(iter(order)) as keys:
            list(islice(keys, 6))  # read ahead of step 5, where the checkpoint is
        states |= order.states_at(5)
    assert all(map(same, batches(parquet, (8, 1, 0, 1, 5, 9), states), whole[5:]))
    halves = [batches(parquet, (8, 1, process, 2, 5, 9), states) for process in range(2)]
    for both, parts in zip(whole[5:], zip(*halves, strict=True), strict=True):
        assert torch.equal(torch.stack([part["image"] for part in parts], 1).flatten(0, 1), both["image"])


def test_a_stream_resumed_with_another_batch_size_goes_on_where_it_was(parquet: Path) -> None:
    source = source_of(parquet)

    def read(batch: int, start: int, steps: int, states: dict[str, Any] | None) -> tuple[list[int], dict[str, Any]]:
        order = StreamOrder(source, SEED, batch, 1, 0, 1, start, steps, shuffle_buffer=8, states=states)
        with closing(iter(order)) as rows:
            numbers = [row.number for micro_batch in rows for row in micro_batch]
        return numbers, order.states_at(steps)

    whole, _ = read(4, 0, 11, None)
    first, states = read(4, 0, 3, None)
    second, states = read(8, 3, 5, states)
    third, _ = read(4, 5, 9, states)
    assert first + second + third == whole


def test_a_shard_that_cannot_be_read_on_is_told(tmp_path: Path) -> None:
    path = tars(tmp_path / "data")
    whole = (path / "train-1.tar").read_bytes()
    (path / "train-1.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"shard 1 cannot be read: .*; repair it"):
        batches(path, image_column="png")


def test_evaluation_shows_each_row_once_over_all_processes(parquet: Path) -> None:
    for processes in (1, 2, 5):
        seen: list[int] = []
        for process in range(processes):
            loader = evaluation_loader(source_of(parquet), config(parquet), 4, process, processes, pin_memory=False)
            for batch in loader:
                seen += batch["index"].tolist()
                views = [
                    evaluation_view(noise(20, 16, seed=seed_of(number)), SIZE) for number in batch["index"].tolist()
                ]
                assert torch.equal(batch["image"], torch.stack(views))
        assert sorted(seen) == EVERY_ROW


def test_lanes_are_the_largest_divisor_of_a_round_that_the_shards_allow() -> None:
    found = [lanes_of(*pair, 1) for pair in ((1, 8), (3, 8), (4, 8), (100, 8), (1000, 256), (7, 6))]
    assert found == [1, 2, 4, 8, 64, 6]


def test_lanes_are_a_multiple_of_the_processes_and_no_others_where_they_were_before() -> None:
    cases = ((48, 768, 48), (96, 768, 96), (128, 1024, 128), (1024, 4096, 1024), (3, 96, 48))
    for processes, round_size, lanes in cases:
        assert lanes_of(10_000, round_size, processes) == lanes
    for round_size in (8, 60, 256, 768, 1000):
        for shards in (4, 7, 64, 10_000):
            alone = lanes_of(shards, round_size, 1)
            for processes in range(1, min(shards, round_size) + 1):
                if round_size % processes == 0:
                    lanes = lanes_of(shards, round_size, processes)
                    assert lanes % processes == round_size % lanes == 0 and lanes <= shards
                    assert lanes == alone if alone % processes == 0 else lanes <= max(64, processes)


class Numbers:
    """As much of a StreamSource as the lanes ask for: of each shard, rows that are numbered."""

    title = "numbers"

    def __init__(self, num_shards: int, rows: int) -> None:
        self.num_shards = num_shards
        cells = [{"bytes": bytes([row]), "path": None} for row in range(rows)]
        self.rows = datasets.Dataset.from_dict({"image": cells}).to_iterable_dataset()

    def shard(self, number: int) -> Any:
        return self.rows.shard(num_shards=1, index=0)

    def cells(self, number: int, shard: Any) -> Iterator[dict[str, Any]]:
        return (row["image"] for row in shard)


def numbers_read(
    source: Any, processes: int, start: int, end: int, states: dict[str, Any] | None, images: int = 192
) -> tuple[list[list[int]], dict[str, Any]]:
    """Of each step, the numbers of a round's images in order; and the lanes' states after it."""
    parts, after = [], {}
    for process in range(processes):
        order = StreamOrder(source, SEED, images, 1, process, processes, start, end, 400, states)
        parts.append([[row.number for row in rows] for rows in order._rounds()])
        after |= order.states_at(end)
    return [np.array(round).T.flatten().tolist() for round in zip(*parts, strict=True)], after


@pytest.mark.seconds
@pytest.mark.parametrize("processes", [48, 96])
def test_any_number_of_processes_reads_what_those_that_divide_its_lanes_read(processes: int) -> None:
    source = Numbers(200, 6)
    _, begun = numbers_read(source, processes, 0, 0, None)  # how many lanes there are is decided at the beginning
    assert len(begun) == lanes_of(200, 192, processes)
    whole, ended = numbers_read(source, processes, 0, 5, None)
    assert sum(map(len, whole)) == len({number for round in whole for number in round}) == 5 * 192
    for others in (1, 3, processes):
        first, states = numbers_read(source, others, 0, 2, begun)
        second, states = numbers_read(source, processes // 2, 2, 5, states)
        assert first + second == whole and states == ended


def test_a_run_of_an_earlier_version_keeps_the_lanes_of_its_checkpoint(parquet: Path) -> None:
    """Whatever a run of this version would begin with."""
    source = source_of(parquet)
    lanes = {number: Lane(source, SEED, number, 2, 200) for number in range(2)}
    rows = {number: iter(lane) for number, lane in lanes.items()}
    read = [[next(rows[sample % 2]).number for sample in range(8)] for _ in range(6)]
    again = {number: Lane(source, SEED, number, 2, 200) for number in range(2)}
    for lane in again.values():
        list(islice(iter(lane), 12))
    states = {str(number): lane.state_at(12) for number, lane in again.items()}
    assert lanes_of(source.num_shards, 8, 1) == 4
    for processes in (1, 2):
        found, _ = numbers_read(source, processes, 3, 6, states, images=8)
        assert found == read[3:]


# ---- where the rows lie


def tree(folder: Path) -> Path:
    for index in range(6):
        target = folder / "train" / ("a", "b")[index % 2]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{index}.png").write_bytes(png(index))
    return folder


def tars(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for index in range(shard, 6, 2):
                entry = tarfile.TarInfo(f"{index:05}.png")
                entry.size = len(png(index))
                tar.addfile(entry, io.BytesIO(png(index)))
    return folder


def saved(folder: Path) -> Path:
    cells = [{"bytes": png(index), "path": None} for index in range(6)]
    rows = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    return folder


def arrow(folder: Path) -> Path:
    saved(folder.with_name("saved"))
    folder.mkdir()
    (file,) = (folder.with_name("saved") / "train").glob("*.arrow")
    file.rename(folder / "train-00000.arrow")
    return folder


def flat_parquet(folder: Path) -> Path:
    return write_parquet(folder, rows=(6,))


@pytest.mark.parametrize("write", [tree, tars, saved, arrow, flat_parquet])
def test_whatever_the_format_both_ways_of_reading_give_the_same_images(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "data")
    column = {"image_column": "png"} if write is tars else {}
    expected = sorted(evaluation_view(noise(20, 16, seed=index), SIZE).numpy().tobytes() for index in range(6))
    for streaming in (True, False):
        data = config(path, streaming=streaming, **column)
        loader = evaluation_loader(open_source(data, "train"), data, 4, 0, 1, pin_memory=False)
        found = [np.ascontiguousarray(image.numpy()).tobytes() for batch in loader for image in batch["image"]]
        assert sorted(found) == expected


def uneven_parquet(folder: Path, bytes_of_a_row: int) -> Path:
    """Row groups of 4, 7, 0, 2 and 5 rows."""
    folder.mkdir()
    rows = iter([{"bytes": bytes([row]) * bytes_of_a_row, "path": f"{row}"} for row in range(18)])
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "other": pa.int64()})
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for number in (4, 7, 0, 2, 5):
            cells = list(islice(rows, number))
            writer.write_table(pa.table({"image": cells, "other": [1] * number}, schema), row_group_size=100)
    return folder


def test_a_row_group_at_a_time_gives_the_rows_and_the_places_of_the_library_itself(tmp_path: Path) -> None:
    """A run of an earlier version stands where the library said that it does."""
    path = uneven_parquet(tmp_path / "data", 3)
    ours = source_of(path)
    builder = datasets.load_dataset_builder("parquet", data_files={"rows": [str(path / "train.parquet")]})
    theirs = image_rows(builder.as_streaming_dataset(split="rows"), "image", "")
    mine, places = ours.shard(0), []
    for row, other in zip(mine, theirs, strict=True):
        assert row == other
        assert mine.state_dict() == theirs.state_dict()
        places.append(theirs.state_dict())
    assert len(places) == 18
    for number, place in enumerate(places):
        later = ours.shard(0)
        later.load_state_dict(place)
        assert [row["image"]["path"] for row in later] == [str(row) for row in range(number + 1, 18)]


def test_of_an_open_parquet_file_one_row_group_is_in_memory(tmp_path: Path) -> None:
    size = 2**20
    source = source_of(uneven_parquet(tmp_path / "data", size))
    before, most = pa.total_allocated_bytes(), 0
    for _ in source.shard(0):
        time.sleep(0.01)  # in which Arrow's threads could read on
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 3 * 7 * size  # as stored, as read, as a table


def test_auto_finds_the_backend_and_streams(tmp_path: Path) -> None:
    assert isinstance(source_of(tars(tmp_path / "data"), backend="auto", image_column="png"), StreamSource)


# ---- broken rows and wrong settings


@pytest.mark.seconds
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_row_stops_the_run_or_is_replaced_and_counted(tmp_path: Path, workers: int) -> None:
    path = write_parquet(tmp_path / "data", broken=(102,))
    with pytest.raises(ValueError, match=r"cannot read image .*\[train\] shard 1 row 2: .*set data\.on_error=skip"):
        batches(path, (4, 1, 0, 1, 0, 6), workers=workers)
    whole = batches(write_parquet(tmp_path / "intact"), (4, 1, 0, 1, 0, 6))
    loaded = batches(path, (4, 1, 0, 1, 0, 6), on_error="skip", workers=workers)
    assert sum(batch["skipped"] for batch in loaded) == 1
    for batch, before in zip(loaded, whole, strict=True):
        numbers = before["index"].tolist()
        for place, number in enumerate(numbers):
            taken = (place + 1) % 4 if number == MAX_ROWS + 2 else place
            assert batch["index"][place] == numbers[taken]
            assert torch.equal(batch["image"][place], before["image"][taken])
    data = config(path, on_error="skip", workers=workers)
    evaluated = list(evaluation_loader(open_source(data, "train"), data, 4, 0, 1, pin_memory=False))
    assert sum(len(batch["index"]) for batch in evaluated) == TOTAL - 1
    assert sum(batch["skipped"] for batch in evaluated) == 1


def test_too_few_shards_for_the_processes_and_lanes_that_do_not_fit_are_told(parquet: Path) -> None:
    with pytest.raises(ValueError, match=r"4 shards, fewer than the 8 processes.* at least 8 files, use at most 4 "):
        batches(parquet, (8, 1, 0, 8, 0, 2))
    two, five = ({str(lane): {} for lane in range(number)} for number in (2, 5))
    assert batches(parquet, (8, 1, 0, 2, 0, 2), two)
    with pytest.raises(ValueError, match=r"stream is read in 5 lanes, and .* has 4 shards; resume with the same data"):
        batches(parquet, states=five)
    with pytest.raises(ValueError, match=r"2 lanes, which do not divide the 3 images of a round; .* multiple of 2"):
        batches(parquet, (3, 1, 0, 1, 0, 2), two)
    with pytest.raises(ValueError, match=r"2 lanes, which 4 processes cannot share out; resume on 1, 2 processes"):
        batches(parquet, (8, 1, 0, 4, 0, 2), two)


def test_shards_without_rows_are_told(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data", rows=(0, 0))
    with pytest.raises(ValueError, match=r"has no rows in the shards 0"):
        batches(path)


STEPS = {"validate_every": "3 steps", "checkpoint_every": "100 steps", "max_steps": 6, "log_every": 1}


def test_without_a_known_length_everything_must_be_given_in_steps(parquet: Path, tmp_path: Path) -> None:
    data = {"path": str(parquet), "backend": "hub", "streaming": True, "validation_split": "train"}
    with pytest.raises(ValueError) as error:
        train(tiny_config(tmp_path, data=data, training={"max_steps": 4}, quantizer={"reinit_every": "2 epochs"}))
    for words in ("validate_every is 1 epoch", "checkpoint_every is 1 epoch", "reinit_every is 2 epochs", "max_steps"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"training\.max_epochs is 2"):
        train(tiny_config(tmp_path, data=data, training=STEPS | {"max_epochs": 2.0}))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="streaming is for backend hub, not for folder"):
        DataConfig(streaming=True)


# ---- runs


def stream_config(folder: Path, parquet: Path, **data: Any) -> Any:
    given = {
        "path": str(parquet),
        "backend": "hub",
        "streaming": True,
        "validation_split": "train",
        "shuffle_buffer": 8,
    }
    return tiny_config(folder, data=given | data, training=STEPS)


@pytest.mark.slow
def test_an_interrupted_run_on_a_stream_goes_on_bit_for_bit(parquet: Path, tmp_path: Path) -> None:
    whole = train(stream_config(tmp_path / "a", parquet, workers=2))
    interrupted = stream_config(tmp_path / "b", parquet, workers=2)
    with pytest.raises(TrainingInterruptedError):
        train_until(interrupted, 4)
    resumed = train(interrupted, resume=True)
    assert_same_bits(whole / "checkpoints" / "latest", resumed / "checkpoints" / "latest")
    assert (whole / "metrics.jsonl").read_text() == (resumed / "metrics.jsonl").read_text()
    assert "epoch" not in metrics(whole)[0] and metrics(whole)[0]["total"] > 0


@pytest.mark.seconds
def test_a_run_on_a_stream_of_unknown_length_replaces_codes_in_steps(parquet: Path, tmp_path: Path) -> None:
    config = stream_config(tmp_path, parquet)
    quantizer = {"type": "ema", "num_codes": 64, "embedding_dim": 8, "reinit_every": "2 steps", "reinit_below": 0.1}
    config = parse_config(config.model_dump(mode="json") | {"quantizer": quantizer})
    lines = {line["step"]: line for line in metrics(train(config)) if "total" in line}
    assert [step for step, line in lines.items() if "recent_codebook_usage" in line] == [2, 4, 6]
    assert all(0 < lines[step]["reinitialised_codes"] < 64 for step in (2, 4, 6))


@pytest.mark.slow
def test_two_real_processes_train_what_one_trains_and_save_the_lanes_of_both(parquet: Path, tmp_path: Path) -> None:
    one = train(stream_config(tmp_path / "one", parquet))
    config = stream_config(tmp_path / "two", parquet)
    save_config(config, tmp_path / "two.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, REPOSITORY / "train.py", tmp_path / "two.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert "processes          2 on cpu" in ended.stdout
    two = Path(config.output_dir)
    totals = [[line["total"] for line in metrics(run) if "total" in line] for run in (one, two)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    lanes = [json.loads((run / "checkpoints" / "latest" / "stream.json").read_text()) for run in (one, two)]
    assert lanes[0] == lanes[1] and len(lanes[0]) == len(ROWS)


# ---- the thread that reads ahead


def test_items_made_ahead_are_the_same_and_errors_reach_who_waits() -> None:
    assert list(ahead(iter(range(100)), 3)) == list(range(100))

    def failing() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("while reading")

    items = ahead(failing(), 3)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="while reading"):
        next(items)


def test_no_more_items_are_made_than_asked_for_and_closing_ends_the_thread() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    items = ahead(numbers(), 3)
    assert made == [] and next(items) == 0
    while len(made) < 5:  # one given, three waiting, one in the hand of the thread
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(made) == 5
    items.close()
    assert threading.active_count() == before
