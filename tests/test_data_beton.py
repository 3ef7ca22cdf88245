"""Betons that FFCV 1.0.2 wrote (golden/ffcv_*.beton.gz: five images of noise and a label), read without FFCV."""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers import GOLDEN
from images import noise
from PIL import Image
from tiny import tiny_config

from vqgan_accel.config import DataConfig
from vqgan_accel.data.beton import ALLOCATION, FIELD, HEADER, BetonSource
from vqgan_accel.data.opening import backend_of, evaluation_loader, open_source
from vqgan_accel.training.loop import train

SIZES = ((24, 16), (16, 23), (31, 31), (8, 8), (40, 9))  # width, height
ROWS = HEADER.itemsize + 2 * FIELD.itemsize  # where the samples' rows begin


def golden(mode: str) -> bytearray:
    return bytearray(gzip.decompress((GOLDEN / f"ffcv_{mode}.beton.gz").read_bytes()))


@pytest.fixture(params=["raw", "jpg"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(folder: Path, content: bytes, name: str = "train.beton") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def original(index: int) -> Image.Image:
    return noise(*SIZES[index], seed=index)


def test_raw_images_are_the_pixels_that_were_written(tmp_path: Path) -> None:
    source = BetonSource(written(tmp_path, golden("raw")), "train")
    assert len(source) == len(SIZES)
    for index in range(len(SIZES)):
        assert np.array_equal(np.asarray(source.open(index)), np.asarray(original(index)))


def test_jpg_images_are_those_pixels_as_jpeg_keeps_them(tmp_path: Path) -> None:
    source = BetonSource(written(tmp_path, golden("jpg")), "train")
    for index in range(len(SIZES)):
        file = BytesIO()
        original(index).save(file, "jpeg", quality=95)
        as_jpeg = np.asarray(Image.open(file)).astype(int)
        assert source.open(index).size == SIZES[index]
        # another encoder, the same loss: noise is what JPEG keeps worst, by 46 levels on average
        assert np.abs(np.asarray(source.open(index)) - as_jpeg).mean() < 3


def test_a_worker_that_is_not_forked_opens_the_file_itself(tmp_path: Path, mode: str) -> None:
    source = BetonSource(written(tmp_path, golden(mode)), "train")
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).fingerprint() == source.fingerprint()


def test_other_images_have_another_fingerprint(tmp_path: Path) -> None:
    written(tmp_path, golden("jpg"))
    written(tmp_path, golden("raw"), "test.beton")
    assert BetonSource(tmp_path, "train").fingerprint() != BetonSource(tmp_path, "test").fingerprint()


@pytest.mark.seconds
def test_a_run_trains_from_betons_what_it_trains_from_files(tmp_path: Path) -> None:
    written(tmp_path / "betons", golden("raw"))
    shutil.copy(tmp_path / "betons" / "train.beton", tmp_path / "betons" / "validation.beton")
    for split in ("train", "validation"):
        (tmp_path / "files" / split).mkdir(parents=True)
        for index in range(len(SIZES)):
            original(index).save(tmp_path / "files" / split / f"{index}.png")
    logs = []
    for backend, path in (("beton", tmp_path / "betons"), ("folder", tmp_path / "files")):
        data = {"backend": backend, "path": str(path)}
        run = train(tiny_config(tmp_path / backend, data=data, training={"log_every": 1}))
        logs.append((run / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]


# ---- what is wrong is told


def refused(folder: Path, content: bytes) -> str:
    with pytest.raises(ValueError) as caught:
        BetonSource(written(folder, content), "train")
    assert str(folder / "train.beton") in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_no_finished_beton_is_refused(tmp_path: Path, mode: str) -> None:
    content = golden(mode)
    assert "is no beton: it has 3 bytes" in refused(tmp_path, b"abc")
    assert "is no beton: it has 0 bytes" in refused(tmp_path, b"")
    table = int.from_bytes(content[16:24], "little")
    assert "was not written to its end" in refused(tmp_path, content[:table])
    for offset, value in ((4, bytes(4)), (2, b"\xff\xff"), (25, b"\xff")):  # page size, fields, a name
        assert "is damaged" in refused(tmp_path, content[:offset] + value + content[offset + len(value) :])
    assert "no beton of format version 2" in refused(tmp_path, b"\xff" * 5000)
    unfinished = content.copy()
    unfinished[16:24] = bytes(8)
    assert "was not written to its end" in refused(tmp_path, unfinished)
    assert "was not written to its end" in refused(tmp_path, content[:-1])
    assert "was not written to its end" in refused(tmp_path, content[: len(content) // 2])
    empty = content.copy()
    empty[8:16] = bytes(8)
    assert "holds no images" in refused(tmp_path, empty)
    many = content.copy()
    many[8:16] = (10**9).to_bytes(8, "little")
    assert "its 1000000000 samples do not fit" in refused(tmp_path, many)


@pytest.mark.parametrize(("types", "reason"), [((1, 1), "0 of them of images"), ((2, 2), "2 of them"), ((2, 9), "[9]")])
def test_a_beton_without_one_field_of_images_is_refused(tmp_path: Path, types: tuple[int, int], reason: str) -> None:
    content = golden("raw")
    for number, kind in enumerate(types):
        content[HEADER.itemsize + number * FIELD.itemsize] = kind
    sentence = refused(tmp_path, content)
    assert reason in sentence and "has the fields image, label" in sentence


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"\x05", "its mode 5"),
        (1, b"\xff\xff", "bytes are not those of 65535 x 16 px"),
        (5, b"\x07", "nothing was allocated at 7"),
    ],
)
def test_a_damaged_row_is_a_broken_image_and_its_neighbours_are_not(
    tmp_path: Path, offset: int, value: bytes, reason: str
) -> None:
    content = golden("raw")
    content[ROWS + offset : ROWS + offset + len(value)] = value
    if offset == 5:
        content[ROWS + 6 : ROWS + 13] = bytes(7)
    source = BetonSource(written(tmp_path, content), "train")
    with pytest.raises(ValueError, match=reason):
        source.open(0)
    assert np.array_equal(np.asarray(source.open(1)), np.asarray(original(1)))


def test_a_jpeg_of_another_size_is_a_broken_image(tmp_path: Path) -> None:
    content = golden("jpg")
    content[ROWS + 1] = 25
    source = BetonSource(written(tmp_path, content), "train")
    with pytest.raises(ValueError, match="its JPEG is of 24 x 16 px, not of 25 x 16"):
        source.open(0)


def test_the_allocation_table_is_found_by_pointer_and_not_by_order(tmp_path: Path) -> None:
    content = golden("raw")
    table = int.from_bytes(content[16:24], "little")
    records = np.frombuffer(bytes(content[table:]), ALLOCATION)
    content[table:] = records[::-1].tobytes()
    source = BetonSource(written(tmp_path, content), "train")
    assert np.array_equal(np.asarray(source.open(2)), np.asarray(original(2)))


def test_to_find_an_image_takes_no_copy_of_the_allocation_table(tmp_path: Path, mode: str) -> None:
    """Beside a number of another type numpy would convert all of it, for each image."""
    source = BetonSource(written(tmp_path, golden(mode)), "train")
    before = source.stored(0)
    many = 100_000
    source.pointers = np.append(source.pointers, int(source.pointers[-1]) + np.arange(1, many, dtype=np.uint64))
    source.sizes = np.append(source.sizes, np.ones(many - 1, np.uint64))
    tracemalloc.start()
    try:
        assert source.stored(0) == before
        assert tracemalloc.get_traced_memory()[1] < many  # bytes; a copy would take eight times as many
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    config = DataConfig(backend="beton", path=str(tmp_path / "betons"))
    with pytest.raises(FileNotFoundError, match=r"no folder at data\.path .*give the one that holds train\.beton"):
        open_source(config, "train")
    (tmp_path / "betons").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train\.beton in data\.path .*it has no \.beton files"):
        open_source(config, "train")
    written(tmp_path / "betons", golden("raw"), "val.beton")
    with pytest.raises(FileNotFoundError, match=r"it has val; set data\.validation_split=val"):
        open_source(config, "validation")


def test_without_ffcv_its_backend_evaluates_and_training_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "betons", golden("raw"))
    written(folder, golden("raw"), "validation.beton")
    monkeypatch.setitem(sys.modules, "ffcv", None)  # an import fails as where it is not installed
    for name in [name for name in sys.modules if name.startswith(("ffcv.", "vqgan_accel.data.ffcv"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("vqgan_accel.data.ffcv", raising=False)
    config = DataConfig(backend="ffcv", path=str(folder), image_size=16, workers=0)
    source = open_source(config, "train")
    loader = evaluation_loader(source, config, 2, 0, 1, pin_memory=False)
    assert sum(len(batch["image"]) for batch in loader) == len(SIZES)
    words = r"bash launch/install_ffcv\.sh VENV.* or set data\.backend=beton"
    with pytest.raises(ValueError, match=words):
        train(tiny_config(tmp_path, data={"backend": "ffcv", "path": str(folder)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("files", "backend"),
    [
        (["train/a.png"], "folder"),
        (["train.beton"], "beton"),
        (["data/train-0.parquet"], "hub"),
        (["train-0.tar"], "hub"),
        (["dataset_dict.json"], "hub"),
    ],
)
def test_auto_is_the_backend_of_what_is_there(
    tmp_path: Path, files: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr("vqgan_accel.data.opening.is_installed", lambda name: False)
    assert backend_of(DataConfig(backend="auto", path=str(tmp_path))) == backend
    monkeypatch.setattr("vqgan_accel.data.opening.is_installed", lambda name: True)
    assert backend_of(DataConfig(backend="auto", path=str(tmp_path))) == backend.replace("beton", "ffcv")
    assert backend_of(DataConfig(backend="auto", path="owner/name")) == "hub"
    assert backend_of(DataConfig(backend="beton", path=str(tmp_path))) == "beton"
