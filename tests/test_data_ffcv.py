"""FFCV's own loader, driven by our order: the images, crops and flips of every other backend.

Skipped where FFCV is not installed (bash launch/install_ffcv.sh VENV)."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import noise, write_images
from PIL import Image
from runs import assert_same_bits, train_until
from skimage import data as photographs
from tiny import tiny_config
from torch import Tensor

from vqgan_accel.config import DataConfig
from vqgan_accel.data import make_beton
from vqgan_accel.data.beton import FIELD, HEADER, BetonSource
from vqgan_accel.data.make_beton import BetonOptions, WriteMode, make_betons
from vqgan_accel.data.opening import open_source, training_loader
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.views import Batch
from vqgan_accel.interruption import TrainingInterruptedError
from vqgan_accel.training.loop import train

pytest.importorskip("ffcv", reason="bash launch/install_ffcv.sh VENV", exc_type=ImportError)

SIZE, SEED, COUNT = 16, 11, 13


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images as files, as a raw beton and as a JPEG beton. Their shapes differ; none is resized in them."""
    root = tmp_path_factory.mktemp("data")
    write_images(root / "folder" / "train", COUNT)
    for mode in ("raw", "jpg"):
        make_betons(DataConfig(path=str(root / "folder"), workers=0), root / mode, BetonOptions(64, mode, 95))
    return {name: root / name for name in ("folder", "raw", "jpg")}


def batches(path: Path, backend: str, shape: tuple[int, ...] = (4, 1, 0, 1, 0, 7), **options: Any) -> list[Batch]:
    """`shape`: total batch, rounds, process, processes, first step, steps."""
    config = DataConfig.model_validate(
        {"path": str(path), "backend": backend, "image_size": SIZE, "workers": 2, **options}
    )
    source = open_source(config, "train")
    with closing(iter(training_loader(source, config, TrainingOrder(SEED, len(source), *shape), False))) as loaded:
        return list(loaded)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a["image"], b["image"]) and torch.equal(a["index"], b["index"]) and a["skipped"] == b["skipped"]


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, of uint8."""
    return 10 * np.log10(255**2 / max((a.double() - b.double()).square().mean().item(), 1e-9))


# ---- the same images, crops and flips


def test_raw_betons_give_the_tensors_of_the_folder_where_nothing_is_resized(tmp_path: Path) -> None:
    (tmp_path / "folder" / "train").mkdir(parents=True)
    for index in range(COUNT):  # one side is SIZE, so that the central square is as large as the view
        image = noise(SIZE + 5 * (index % 2), SIZE + 3 * ((index + 1) % 2), seed=index)
        image.save(tmp_path / "folder" / "train" / f"{index:02}.png")
    make_betons(DataConfig(path=str(tmp_path / "folder"), workers=0), tmp_path / "raw", BetonOptions(64, "raw", 95))
    files, betons = (
        batches(path, backend, crop_scale=None)
        for path, backend in ((tmp_path / "folder", "folder"), (tmp_path / "raw", "ffcv"))
    )
    assert all(map(same, files, betons)) and len(files) == len(betons)
    plain = batches(tmp_path / "raw", "ffcv", crop_scale=None, horizontal_flip=False)
    views = [torch.cat([batch["image"] for batch in some]) for some in (betons, plain)]
    kinds = {(torch.equal(view, other), torch.equal(view, other.flip(-1))) for view, other in zip(*views, strict=True)}
    assert kinds == {(True, False), (False, True)}


def test_crops_and_flips_are_those_of_the_folder_up_to_the_resize_filter(folders: dict[str, Path]) -> None:
    for a, b in zip(batches(folders["folder"], "folder"), batches(folders["raw"], "ffcv"), strict=True):
        assert torch.equal(a["index"], b["index"])
        for x, y in zip(a["image"], b["image"], strict=True):
            assert psnr(x, y) > 25  # noise, of which two filters keep different parts; another crop gives 9 dB


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina")


@pytest.mark.parametrize(("mode", "least"), [("raw", 38.0), ("jpg", 35.0)])
def test_photographs_differ_by_the_resize_filter_and_the_jpeg_error_alone(
    tmp_path: Path, mode: Any, least: float
) -> None:
    (tmp_path / "folder" / "train").mkdir(parents=True)
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(photographs, name)())
        image.thumbnail((300, 300))
        image.save(tmp_path / "folder" / "train" / f"{name}.png")
    make_betons(DataConfig(path=str(tmp_path / "folder"), workers=0), tmp_path / "b", BetonOptions(300, mode, 95))
    shape = (len(PHOTOGRAPHS), 1, 0, 1, 0, 2)
    for a, b in zip(
        batches(tmp_path / "folder", "folder", shape, image_size=128),
        batches(tmp_path / "b", "ffcv", shape, image_size=128),
        strict=True,
    ):
        measured = [psnr(x, y) for x, y in zip(a["image"], b["image"], strict=True)]
        print(mode, [f"{value:.1f} dB" for value in measured])
        assert min(measured) > least


# ---- position decides


def test_order_does_not_depend_on_threads_or_on_where_the_run_was_resumed(folders: dict[str, Path]) -> None:
    whole = batches(folders["raw"], "ffcv")
    assert len(whole) == 7 and [len(batch["image"]) for batch in whole] == [4] * 7
    assert all(map(same, batches(folders["raw"], "ffcv", workers=0), whole))
    assert all(map(same, batches(folders["raw"], "ffcv", (4, 1, 0, 1, 4, 7)), whole[4:]))  # within the second epoch
    epochs = [torch.cat([batch["index"] for batch in whole[start : start + 3]]).tolist() for start in (0, 3)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and epochs[0] != epochs[1]


def test_two_processes_in_two_rounds_load_disjoint_shards_of_what_one_does(folders: dict[str, Path]) -> None:
    one = batches(folders["raw"], "ffcv", (8, 2, 0, 1, 0, 3))
    two = zip(*(batches(folders["raw"], "ffcv", (8, 2, process, 2, 0, 3)) for process in range(2)), strict=True)
    for whole, shards in zip(one, two, strict=True):
        assert torch.equal(torch.stack([shard["image"] for shard in shards], 1).flatten(0, 1), whole["image"])
        assert len(set(whole["index"].tolist())) == 4


def test_a_batch_stays_what_it_was_when_later_ones_have_come(folders: dict[str, Path]) -> None:
    config = DataConfig(path=str(folders["raw"]), backend="ffcv", image_size=SIZE, workers=2)
    source = open_source(config, "train")
    loader = training_loader(source, config, TrainingOrder(SEED, COUNT, 4, 1, 0, 1, 0, 30), False)
    held, copies = [], []
    with closing(iter(loader)) as loaded:
        for batch in loaded:
            held.append(batch["image"])
            copies.append(batch["image"].clone())
    assert all(map(torch.equal, held, copies))


# ---- what FFCV leaves open


def test_torch_keeps_its_number_of_threads_and_numpy_its_state(folders: dict[str, Path]) -> None:
    before = np.random.get_state()[1].tolist()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        batches(folders["raw"], "ffcv", workers=3 - threads)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert np.random.get_state()[1].tolist() == before


def test_more_workers_than_cores_are_no_error(folders: dict[str, Path]) -> None:
    assert len(batches(folders["raw"], "ffcv", workers=1000)) == 7


def test_leaving_early_ends_the_thread(folders: dict[str, Path]) -> None:
    config = DataConfig(path=str(folders["raw"]), backend="ffcv", image_size=SIZE, workers=2)
    source = open_source(config, "train")
    loader = training_loader(source, config, TrainingOrder(SEED, COUNT, 4, 1, 0, 1, 0, 10**6), False)
    before = threading.active_count()
    loaded = iter(loader)
    next(loaded)
    assert threading.active_count() == before + 1
    loaded.close()
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_who_waits_for_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqgan_accel.data import ffcv

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(ffcv, "draw_view", fail)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        batches(folders["raw"], "ffcv")


def damaged(folders: dict[str, Path], tmp_path: Path, mode: str, index: int, how: str) -> Path:
    shutil.copytree(folders[mode], tmp_path / "damaged")
    file = tmp_path / "damaged" / "train.beton"
    source = BetonSource(folders[mode], "train")
    content = bytearray(file.read_bytes())
    row = HEADER.itemsize + FIELD.itemsize + index * source.rows.dtype.itemsize
    match how:
        case "pointer":
            content[row + source.rows.dtype.fields["pointer"][1] + 6] = 1
        case "size":
            content[row + source.rows.dtype.fields["width"][1] + 1] = 200
        case "jpeg":
            start = int(source.rows["pointer"][index])
            content[start : start + 40] = bytes(40)
    file.write_bytes(content)
    return tmp_path / "damaged"


@pytest.mark.parametrize(
    ("mode", "how"), [("raw", "pointer"), ("raw", "size"), ("jpg", "pointer"), ("jpg", "size"), ("jpg", "jpeg")]
)
def test_a_damaged_sample_stops_the_run_or_is_replaced_as_everywhere_else(
    folders: dict[str, Path], tmp_path: Path, mode: str, how: str
) -> None:
    folder = damaged(folders, tmp_path, mode, 5, how)
    with pytest.raises(ValueError, match=r"cannot read image .*train\.beton sample 5: .*set data\.on_error=skip"):
        batches(folder, "ffcv")
    loaded, whole = batches(folder, "ffcv", on_error="skip"), batches(folders[mode], "ffcv")
    assert sum(batch["skipped"] for batch in loaded) == sum(5 in batch["index"] for batch in whole) >= 1
    with_pillow = batches(folder, "beton", on_error="skip")
    for batch, other, before in zip(loaded, with_pillow, whole, strict=True):
        assert torch.equal(batch["index"], other["index"])
        for place, index in enumerate(before["index"].tolist()):
            expected = other if index == 5 else before
            assert torch.equal(batch["image"][place], expected["image"][place])


# ---- a run


def test_a_run_that_was_interrupted_within_an_epoch_goes_on_bit_for_bit(tmp_path: Path) -> None:
    tiny_config(tmp_path)  # writes the images
    source = DataConfig(path=str(tmp_path / "images"), workers=0)
    make_betons(source, tmp_path / "betons", BetonOptions(64, "jpg", 95))
    options = {"data": {"path": str(tmp_path / "betons"), "backend": "auto", "workers": 2}}
    training = {"max_steps": 7, "total_batch_size": 3, "checkpoint_every": "100 steps", "log_every": 1}
    whole = train(tiny_config(tmp_path / "a", training=training, **options))
    assert "backend: auto" in (whole / "config.yaml").read_text()

    config = tiny_config(tmp_path / "b", training=training, **options)
    with pytest.raises(TrainingInterruptedError):
        train_until(config, 3)
    resumed = train(config, resume=True)
    assert_same_bits(whole / "checkpoints" / "latest", resumed / "checkpoints" / "latest")
    assert (whole / "metrics.jsonl").read_text() == (resumed / "metrics.jsonl").read_text()
    assert json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])["total"] > 0


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcvs_own_decoder_reads_what_make_beton_wrote(
    tmp_path: Path, mode: WriteMode, os_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffcv.loader import Loader, OrderOption

    monkeypatch.setattr(make_beton, "page_size", lambda resolution: 4096)  # so that there are several pages
    for index in range(9):
        (tmp_path / "images" / "train").mkdir(parents=True, exist_ok=True)
        noise(24, 20, seed=index).save(tmp_path / "images" / "train" / f"{index}.png")
    make_betons(DataConfig(path=str(tmp_path / "images"), workers=0), tmp_path, BetonOptions(64, mode, 95))
    loader = Loader(str(tmp_path / "train.beton"), 9, 1, os_cache=os_cache, order=OrderOption.SEQUENTIAL)
    ((images,),) = [[images.numpy().reshape(9, 20, 24, 3) for images in batch] for batch in loader]
    torch.set_num_threads(1)
    source = BetonSource(tmp_path, "train")
    expected = np.stack([np.asarray(source.open(index)) for index in range(9)]).astype(int)
    assert np.abs(images - expected).mean() <= (0 if mode == "raw" else 2)
