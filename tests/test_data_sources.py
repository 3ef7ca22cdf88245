from __future__ import annotations

import os
import shutil
import sys
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from images import noise, write_images

from vqgan_accel.config import DataConfig
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.hub import HubSource
from vqgan_accel.data.listing import EXTENSIONS
from vqgan_accel.data.opening import evaluation_loader, open_source, training_loader
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.sources import SOURCES


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def config(path, **options):
    return DataConfig(path=str(path), image_size=16, workers=0, **options)


def names(root, split="train"):
    source = FolderSource(root, split)
    return [os.path.relpath(source.name(i), root / split) for i in range(len(source))]


def sentence(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- folders


def test_a_folder_is_searched_at_every_depth_in_any_letter_case_and_sorted(tmp_path):
    found = ["a/1.png", "a/b/c/2.JPG", "a/b/c/3.Jpeg", "B.bmp", "Zäune und Größe.WEBP", "b c/4 5.png", "日本.PNG"]
    for name in [*found, "notes.txt", "png", "c.gif", ".hidden.png", ".checkpoints/9.png", "a/._1.png"]:
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "train" / "folder.png").mkdir()
    assert names(tmp_path) == sorted(found)


def test_links_are_followed_once_and_loops_end(tmp_path):
    write_images(tmp_path / "elsewhere" / "deep", 2)
    write_images(tmp_path / "train" / "a", 2)
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "a" / "self").symlink_to("self")
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "linked_again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "photo.png").symlink_to(tmp_path / "elsewhere" / "deep" / "000.png")
    assert names(tmp_path) == ["a/000.png", "a/001.png", "linked/deep/000.png", "linked/deep/001.png", "photo.png"]


def test_ten_thousand_files_are_listed_in_well_under_a_second(tmp_path):
    for folder in range(20):
        (tmp_path / "train" / f"{folder}").mkdir(parents=True)
        for file in range(500):
            os.mknod(tmp_path / "train" / f"{folder}" / f"{file}.jpeg")
    start = time.perf_counter()
    assert len(FolderSource(tmp_path, "train")) == 10_000
    assert time.perf_counter() - start < 0.8  # 0.03 s on two cores


def test_images_with_any_name_are_opened(tmp_path):
    path = tmp_path / "train" / "ein Bild mit Ümlaut 写真.png"
    path.parent.mkdir()
    noise(9, 7).save(path)
    source = FolderSource(tmp_path, "train")
    assert source.name(0) == str(path)
    assert np.array_equal(np.asarray(source.open(0)), np.asarray(noise(9, 7)))


def test_a_missing_root_a_missing_split_and_an_empty_folder_say_what_would_be_right(tmp_path):
    for folder in ["images/train", "images/val", "images/empty", "flat"]:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images" / "a.parquet").touch()

    with pytest.raises(ValueError, match=r"^data.path is not set; give data.path=FOLDER$"):
        open_source(DataConfig(), "train")
    with pytest.raises(FileNotFoundError) as error:
        open_source(config(tmp_path / "imags"), "train")
    assert sentence(error) == f"no folder at data.path {tmp_path}/imags; did you mean {tmp_path}/images?"
    with pytest.raises(FileNotFoundError) as error:
        open_source(config("/nowhere/at/all"), "train")
    assert sentence(error) == "no folder at data.path /nowhere/at/all; give a folder that holds the folder 'train'"
    with pytest.raises(ValueError, match=r"is a file, not a folder of images; for a parquet file set data.backend=hub"):
        open_source(config(tmp_path / "images" / "a.parquet"), "train")
    with pytest.raises(FileNotFoundError) as error:
        open_source(config(tmp_path / "images"), "validation")
    assert sentence(error).startswith(f"no folder 'validation' in data.path {tmp_path}/images; ")
    assert sentence(error).endswith("; it has empty, train, val; set data.validation_split=val")
    with pytest.raises(FileNotFoundError, match=r"set data.test_split to one of empty, train, val$"):
        open_source(config(tmp_path / "images"), "test")
    with pytest.raises(FileNotFoundError, match=r"it has no folders; .* set data.train_split=\. to use .*flat itself"):
        open_source(config(tmp_path / "flat"), "train")
    with pytest.raises(ValueError) as error:
        open_source(config(tmp_path / "images", train_split="empty"), "train")
    assert sentence(error) == (
        f"no images below {tmp_path}/images/empty; put files there that end in "
        f"{', '.join(EXTENSIONS)} (any letter case)"
    )


def test_a_flat_folder_is_a_split_named_dot(tmp_path):
    write_images(tmp_path, 3)
    assert len(open_source(config(tmp_path, train_split="."), "train")) == 3


def test_users_of_folders_do_not_import_datasets(tmp_path, monkeypatch):
    write_images(tmp_path / "train", 1)
    monkeypatch.delitem(sys.modules, "vqgan_accel.data.hub")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(open_source(config(tmp_path), "train")) == 1
    with pytest.raises(ImportError):
        open_source(config(tmp_path, backend="hub"), "train")


# ---- Hugging Face datasets


def as_dataset(paths):
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    dataset = datasets.Dataset.from_dict({"image": images, "label": list(range(len(paths)))})
    return dataset.cast_column("image", datasets.Image())


def write_parquet(paths, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    as_dataset(paths).to_parquet(file)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "folder" / "train" / "a class", 4)
    write_images(tmp_path / "folder" / "train" / "b", 3)
    write_images(tmp_path / "folder" / "validation" / "b", 5)
    return tmp_path / "folder"


def paths_of(folder, split):
    return [folder / split / name for name in names(folder, split)]


def write_as(layout, folder, target):
    """The folder's files as one of the local layouts that backend hub reads; returns data.path."""
    train, validation = paths_of(folder, "train"), paths_of(folder, "validation")
    match layout:
        case "imagefolder":
            shutil.copytree(folder, target)
        case "save_to_disk":
            datasets.DatasetDict(train=as_dataset(train), validation=as_dataset(validation)).save_to_disk(target)
        case "save_to_disk with paths":
            dataset = datasets.Dataset.from_dict({"image": [str(path) for path in train]})
            datasets.DatasetDict(train=dataset, validation=as_dataset(validation)).save_to_disk(target)
        case "parquet shards":
            write_parquet(train[:4], target / "train-00000-of-00002.parquet")
            write_parquet(train[4:], target / "train-00001-of-00002.parquet")
            write_parquet(validation, target / "validation.parquet")
        case "parquet below data":
            write_parquet(train, target / "data" / "train-00000-of-00001.parquet")
            write_parquet(validation, target / "data" / "validation-00000-of-00001.parquet")
        case "parquet folders":
            write_parquet(train[:4], target / "train" / "0000.parquet")
            write_parquet(train[4:], target / "train" / "0001.parquet")
            write_parquet(validation, target / "validation" / "0000.parquet")
    return target


SAVED = ["save_to_disk", "save_to_disk with paths"]
PARQUET = ["parquet shards", "parquet below data", "parquet folders"]


@pytest.mark.parametrize("layout", ["imagefolder", *SAVED, *PARQUET])
def test_folder_and_hub_give_identical_tensors_for_the_same_files(layout, folder, tmp_path):
    # brackets in a path are patterns to `datasets`, not letters
    path = write_as(layout, folder, tmp_path / "größe [1] x")
    order = TrainingOrder(0, 7, 3, 1, 0, 1, 0, 4)
    for split, count in [("train", 7), ("validation", 5)]:
        plain, hub = open_source(config(folder), split), open_source(config(path, backend="hub"), split)
        assert isinstance(hub, HubSource) and len(hub) == len(plain) == count
        assert hub.name(2) == f"{path}[{split}] row 2"
        for source in (plain, hub):
            source.batches = list(evaluation_loader(source, config(folder), 4, 0, 1, pin_memory=False))
            if split == "train":
                source.batches += list(training_loader(source, config(folder), order, pin_memory=False))
        for a, b in zip(plain.batches, hub.batches, strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["index"], b["index"])


def test_a_single_parquet_file_serves_the_split_that_it_is_named_after_and_no_other(folder, tmp_path):
    write_parquet(paths_of(folder, "train"), tmp_path / "train-0001.parquet")
    path = tmp_path / "train-0001.parquet"
    assert len(open_source(config(path, backend="hub"), "train")) == 7
    with pytest.raises(ValueError) as error:
        open_source(config(path, backend="hub"), "validation")
    assert sentence(error) == f"no split 'validation' in data.path {path}; set data.validation_split to one of train"


def test_a_single_saved_dataset_serves_only_its_own_split(folder, tmp_path):
    as_dataset(paths_of(folder, "train")).save_to_disk(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"no split 'train' in data.path .*; set data.train_split to one of photos"):
        open_source(config(tmp_path / "photos", backend="hub"), "train")
    assert len(open_source(config(tmp_path / "photos", backend="hub", train_split="photos"), "train")) == 7


@pytest.mark.parametrize("layout", ["imagefolder", "parquet shards"])
def test_a_slice_of_a_split_is_a_split(layout, folder, tmp_path):
    path = write_as(layout, folder, tmp_path / "hub")
    both = config(path, backend="hub", train_split="train[:5]", validation_split="train[5:]")
    train, validation = open_source(both, "train"), open_source(both, "validation")
    assert (len(train), len(validation)) == (5, 2)
    assert np.array_equal(np.asarray(validation.open(0)), np.asarray(FolderSource(folder, "train").open(5)))


@pytest.mark.parametrize("layout", ["imagefolder", "save_to_disk", "parquet shards", "parquet folders"])
def test_an_unknown_split_is_refused_with_the_names_of_those_there_are(layout, folder, tmp_path):
    path = write_as(layout, folder, tmp_path / "hub")
    with pytest.raises(ValueError) as error:
        open_source(config(path, backend="hub", validation_split="val"), "validation")
    assert sentence(error).startswith(f"no split 'val' in data.path {path}; it has ")
    assert "train, validation" in sentence(error)
    assert sentence(error).endswith("; set data.validation_split=validation")


def test_an_unknown_or_imageless_column_is_refused_with_the_names_of_those_there_are(folder, tmp_path):
    path = write_as("save_to_disk", folder, tmp_path / "hub")
    for column in ["img", "pixels"]:
        with pytest.raises(ValueError) as error:
            open_source(config(path, backend="hub", image_column=column), "train")
        assert sentence(error) == (
            f"no column '{column}' in {path}[train], which has image, label; did you mean data.image_column=image?"
        )
    with pytest.raises(ValueError) as error:
        open_source(config(path, backend="hub", image_column="label"), "train")
    assert sentence(error) == (
        f"column 'label' of {path}[train] holds {datasets.Value('int64')}, not images; set another data.image_column"
    )


def test_parquet_from_other_tools_is_read_as_structs_and_as_plain_bytes(folder, tmp_path):
    contents = [path.read_bytes() for path in paths_of(folder, "train")]
    structs = pa.array([{"bytes": content, "path": None} for content in contents])
    for name, column in [("structs", structs), ("bytes", pa.array(contents))]:
        pq.write_table(pa.table({"image": column}), tmp_path / f"{name}.parquet")
        source = open_source(config(tmp_path / f"{name}.parquet", backend="hub", train_split=name), "train")
        assert np.array_equal(np.asarray(source.open(6)), np.asarray(FolderSource(folder, "train").open(6)))


def test_a_row_without_image_and_a_broken_row_are_named(tmp_path):
    rows = [{"bytes": None, "path": None}, None, {"bytes": b"no image", "path": "x.png"}]
    pq.write_table(pa.table({"image": pa.array(rows)}), tmp_path / "train.parquet")
    source = open_source(config(tmp_path / "train.parquet", backend="hub"), "train")
    for row, reason in enumerate(["the row holds no image"] * 2 + ["it is not an image that Pillow can identify"]):
        shard = evaluation_loader(source, config(tmp_path), 1, row, 3, pin_memory=False)
        with pytest.raises(ValueError) as error:
            next(iter(shard))
        assert sentence(error).startswith(f"cannot read image {tmp_path}/train.parquet[train] row {row}: {reason}; ")


def test_what_datasets_cannot_read_is_one_sentence_that_names_the_path(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"^data.path .*train.parquet cannot be read by .*: ") as error:
        open_source(config(tmp_path / "train.parquet", backend="hub"), "train")
    sentence(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^data.path .*empty cannot be read by the `datasets` library: ") as error:
        open_source(config(tmp_path / "empty", backend="hub"), "train")
    sentence(error)
    (tmp_path / "list.csv").touch()
    with pytest.raises(ValueError, match=r"list.csv is neither a file that ends in .*nor a folder"):
        open_source(config(tmp_path / "list.csv", backend="hub"), "train")
    with pytest.raises(FileNotFoundError, match=r"^no file or folder at data.path /nowhere; give one, or a name on"):
        open_source(config("/nowhere", backend="hub"), "train")
    with pytest.raises(ValueError, match=r"is local; unset data.subset and data.revision"):
        open_source(config(tmp_path / "empty", backend="hub", subset="a"), "train")


def test_a_hub_name_without_network_is_one_sentence():
    with pytest.raises(FileNotFoundError) as error:
        open_source(config("someone/photographs", backend="hub"), "train")
    assert sentence(error) == (
        "data.path someone/photographs is no local file or folder, and the Hugging Face hub cannot be reached to look "
        "for it there; give a folder, or connect to the network"
    )


def test_a_hub_name_that_the_hub_does_not_know_is_one_sentence(monkeypatch):
    def unknown(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset_builder", unknown)
    with pytest.raises(FileNotFoundError, match="nor a data set that the Hugging Face hub shows you; correct") as error:
        open_source(config("a/b", backend="hub"), "train")
    sentence(error)


def test_a_hub_name_passes_subset_and_revision_on(monkeypatch, folder):
    asked = []
    build = datasets.load_dataset_builder

    def local(*arguments, **options):
        asked.append((arguments, options))
        return build("imagefolder", data_dir=str(folder))

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    source = open_source(config("a/b", backend="hub", subset="small", revision="v1"), "train")
    assert asked == [(("a/b", "small"), {"revision": "v1"})]
    assert len(source) == 7 and source.name(3) == "a/b[train] row 3"


def test_loading_local_data_is_silent_and_leaves_the_bars_as_they_were(folder, tmp_path, capfd):
    path = write_as("parquet shards", folder, tmp_path / "hub")
    capfd.readouterr()
    datasets.enable_progress_bars()
    open_source(config(path, backend="hub"), "train")
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_data_on_disk_asks_nobody_on_the_network(tmp_path, monkeypatch):
    write_images(tmp_path / "train", 1)
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append(1))
    assert len(open_source(config(tmp_path, backend="hub"), "train")) == 1
    assert not asked


def test_class_folders_named_like_splits_stay_in_the_split_that_holds_them(tmp_path):
    for split in ("train", "validation"):
        for name in ("cat", "train", "test"):
            write_images(tmp_path / split / name, 1)
    for streaming in (False, True):
        data = config(tmp_path, backend="hub", streaming=streaming)
        for split in ("train", "validation"):
            loader = evaluation_loader(open_source(data, split), data, 4, 0, 1, pin_memory=False)
            assert sum(len(batch["index"]) for batch in loader) == 3


# ---- a source that is new

TOY = """
import numpy as np
from PIL import Image


def open_split(config, split, key):
    return Toy(f"{config.path}[{split}] by {key}")


class Toy:
    def __init__(self, title):
        self.title = title

    def __len__(self):
        return 20

    def name(self, index):
        return f"{self.title} {index}"

    def file_name(self, index):
        return f"{index}.png"

    def stored_names(self):
        return [f"{index}.png" for index in range(20)]

    def labels(self):
        return None

    def fingerprint(self):
        return "20 squares"

    def stored(self, index):
        return bytes([index])

    def open(self, index):
        return Image.fromarray(np.full((16, 16, 3), index, np.uint8))
"""


def test_a_new_source_is_one_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "toy_source.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SOURCES, "toy", "toy_source")
    toy = config("squares").model_copy(update={"backend": "toy"})
    assert open_source(toy, "test").name(3) == "squares[test] by data.test_split 3"
    (batch,) = evaluation_loader(open_source(toy, "train"), toy, 20, 0, 1, pin_memory=False)
    assert batch["image"][:, 0, 0, 0].tolist() == list(range(20))
    order = TrainingOrder(0, 20, 5, num_rounds=1, process_index=0, num_processes=1, start_step=0, total_steps=4)
    loader = training_loader(open_source(toy, "train"), toy, order, pin_memory=False)
    assert sorted(index for batch in loader for index in batch["index"].tolist()) == list(range(20))
    cut = toy.model_copy(update={"validation_fraction": 0.3})
    parts = [open_source(cut, split) for split in ("train", "validation")]
    assert sorted(part.file_name(index) for part in parts for index in range(len(part))) == sorted(
        f"{index}.png" for index in range(20)
    )
