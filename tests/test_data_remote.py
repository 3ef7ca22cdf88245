"""data.path as a URL: what lies on object storage, read through fsspec (here memory:// and file://)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from images import noise
from runs import assert_same_bits, train_until
from tiny import tiny_config

from vqgan_accel.config import DataConfig
from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.data.hub import HubSource
from vqgan_accel.data.opening import backend_of, evaluation_loader, open_indexed, open_source
from vqgan_accel.data.stream import StreamSource
from vqgan_accel.interruption import TrainingInterruptedError
from vqgan_accel.training.loop import train

SIZE = 16
IMAGES = {"train": range(7), "validation": range(10, 13)}  # split -> the seeds of its noise


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(20, 16, seed=seed).save(file, "PNG")
    return file.getvalue()


def parquet_of(seeds: list[int]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]}), file)
    return file.getvalue()


def tar_of(seeds: list[int]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for seed in seeds:
            entry = tarfile.TarInfo(f"{seed:05}.png")
            entry.size = len(png(seed))
            tar.addfile(entry, io.BytesIO(png(seed)))
    return file.getvalue()


def written(place: str, ending: str, in_folders: bool = False) -> str:
    """Two files a split at the URL `place`, which it returns."""
    system, root = fsspec.core.url_to_fs(place)
    for split, seeds in IMAGES.items():
        for shard in range(2):
            name = f"{root}/{split}/{shard}{ending}" if in_folders else f"{root}/{split}-{shard:05}{ending}"
            system.makedirs(name.rpartition("/")[0], exist_ok=True)
            system.pipe_file(name, {".parquet": parquet_of, ".tar": tar_of}[ending]([*seeds][shard::2]))
    return place


@pytest.fixture(autouse=True)
def storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    yield
    memory = fsspec.filesystem("memory")
    for name in memory.ls("/", detail=False):
        memory.rm(name, recursive=True)


def config(path: str, **options: Any) -> DataConfig:
    column = {"image_column": "png"} if "tar" in path else {}
    return DataConfig.model_validate(
        {"path": path, "backend": "hub", "image_size": SIZE, "workers": 0} | column | options
    )


def shown(data: DataConfig, split: Any) -> list[bytes]:
    loader = evaluation_loader(open_source(data, split), data, 4, 0, 1, pin_memory=False)
    return sorted(np.ascontiguousarray(image.numpy()).tobytes() for batch in loader for image in batch["image"])


@pytest.mark.parametrize("ending", [".parquet", ".tar"])
@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("in_folders", [False, True])
def test_a_url_gives_the_images_that_lie_there_in_a_stream_and_by_index(
    ending: str, kind: str, in_folders: bool, tmp_path: Path
) -> None:
    root = "memory://bucket" if kind == "memory" else f"file://{tmp_path}"
    place = written(f"{root}/images of {ending[1:]} [1]", ending, in_folders)
    for streaming in (True, False):
        data = config(place, streaming=streaming)
        assert isinstance(open_source(data, "train"), StreamSource if streaming else HubSource)
        for split, seeds in IMAGES.items():
            expected = [evaluation_view(noise(20, 16, seed=seed), SIZE).numpy().tobytes() for seed in seeds]
            assert shown(data, split) == sorted(expected)


def test_one_file_is_a_split_and_auto_knows_a_url() -> None:
    place = written("memory://one", ".parquet")
    data = config(f"{place}/validation-00001.parquet", streaming=True)
    assert len(shown(data, "validation")) == 1
    assert backend_of(config(place, backend="auto")) == "hub"
    cut = config(place, validation_fraction=0.4)
    parts = [open_indexed(cut, split) for split in ("train", "validation")]
    assert sum(map(len, parts)) == len(IMAGES["train"])


def test_what_is_wrong_with_a_url_is_one_sentence() -> None:
    place = written("memory://bucket", ".tar")
    for path, options, sentence in [
        (
            "memory://nothing",
            {},
            r"^no files that end in \.parquet, \.tar, \.arrow at data\.path memory://nothing, nor",
        ),
        ("nosuch://bucket", {}, r"^data\.path nosuch://bucket cannot be listed: .*nosuch"),
        (
            place,
            {"backend": "folder", "streaming": False},
            r"^data\.path memory://bucket is a URL; set data\.backend=hub",
        ),
        (place, {"subset": "a"}, r"^data\.path memory://bucket is a URL; unset data\.subset and data\.revision"),
        (place, {"train_split": "training"}, r"^no split 'training' in data\.path memory://bucket; it has train, val"),
    ]:
        for streaming in (True, False):
            with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
                open_source(config(path, **({"streaming": streaming} | options)), "train")
            assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_on_a_url_is_stopped_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    place = written(f"file://{tmp_path}/parquet", ".parquet")
    data = {"path": place, "backend": "auto", "streaming": True, "shuffle_buffer": 8}
    steps = {"max_steps": 4, "log_every": 1, "validate_every": "4 steps", "checkpoint_every": "100 steps"}
    whole = train(tiny_config(tmp_path / "whole", data=data, training=steps))
    stopped = tiny_config(tmp_path / "stopped", data=data, training=steps)
    with pytest.raises(TrainingInterruptedError):
        train_until(stopped, 2)
    resumed = train(stopped, resume=True)
    assert_same_bits(whole / "checkpoints" / "latest", resumed / "checkpoints" / "latest")
