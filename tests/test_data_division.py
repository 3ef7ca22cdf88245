"""data.validation_fraction: which images are for validation is a function of their names alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import noise
from tiny import tiny_config, write_images

from vqgan_accel.config import DataConfig, load_config, parse_config
from vqgan_accel.data.content import content_sum
from vqgan_accel.data.division import divided, place_of
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.info import data_info
from vqgan_accel.data.make_beton import BetonOptions, make_betons
from vqgan_accel.data.opening import open_indexed
from vqgan_accel.tokens.write import tokenize
from vqgan_accel.training.loop import train

NAMES = [
    *(f"ein Album/Bild {number}.png" for number in range(12)),
    *(f"日本/x/{number}.png" for number in range(9)),
    *(f"a.b-c/{number}.JPG" for number in range(9)),
    *(f"{number}.png" for number in range(10)),
]
SIDES = ("train", "validation")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """All of NAMES, all different, below a folder of that kind of name itself."""
    for number, name in enumerate(NAMES):
        file = tmp_path / "my pictures [1]" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(16, 20, seed=number).save(file)
    return tmp_path / "my pictures [1]"


def config(path: Path, fraction: float | None = 0.4, **options: object) -> DataConfig:
    values = {"path": str(path), "train_split": ".", "validation_fraction": fraction, "image_size": 16, "workers": 0}
    return DataConfig.model_validate(values | options)


class Names:
    """As much of an ImageSource as a division asks for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def file_name(self, index: int) -> str:
        return self.names[index]


def sides(names: list[str], fraction: float, group: str) -> tuple[list[str], list[str]] | None:
    """The names on either side, None where one would be empty."""
    try:
        parts = [divided(Names(names), names, fraction, group, side) for side in SIDES]
    except ValueError:
        return None
    return tuple([part.file_name(index) for index in range(len(part))] for part in parts)


# ---- the rule


@pytest.mark.parametrize("group", ["file", "folder"])
def test_an_image_is_for_validation_where_the_first_64_bits_of_its_names_sha256_say_so(group):
    chosen = []
    for name in NAMES:
        key = name if group == "file" or "/" not in name else name[: name.rindex("/")]
        if int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) < 0.4 * 2**64:
            chosen.append(name)
    assert 0 < len(chosen) < len(NAMES)
    assert sides(NAMES, 0.4, group) == ([name for name in NAMES if name not in chosen], chosen)


def test_the_rule_does_not_change_between_versions():
    """Numbers that were written down: another rule would move the images of every run that is to be resumed."""
    assert place_of("a/b.png", "file") == 0.5350330158861486  # printf a/b.png | sha256sum
    assert place_of("a/b.png", "folder") == place_of("a/c.png", "folder") == 0.7913742705223816
    assert place_of("b.png", "folder") == place_of("b.png", "file")


letters = st.characters(codec="utf-8", exclude_characters="/\0") | st.just("\udce9")  # the last is no UTF-8 on disk
parts = st.text(letters, min_size=1, max_size=4)
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
libraries = st.lists(paths, min_size=2, max_size=40, unique=True)
fractions = st.floats(0.02, 0.98)


@given(libraries, fractions, st.sampled_from(["file", "folder"]))
def test_the_sides_are_disjoint_and_complete_in_the_order_of_the_whole_and_cut_no_folder(names, fraction, group):
    found = sides(names, fraction, group)
    if found is None:
        return
    train, validation = found
    assert sorted(train + validation) == sorted(names) and not set(train) & set(validation)
    assert train == [name for name in names if name in set(train)]
    if group == "folder":
        folders = [{name.rpartition("/")[0] for name in side if "/" in name} for side in found]
        assert not folders[0] & folders[1]


@pytest.mark.seconds
@given(libraries, libraries, fractions, st.sampled_from(["file", "folder"]))
def test_images_that_are_added_move_none_of_the_old_ones(old, new, fraction, group):
    before, after = sides(old, fraction, group), sides(sorted({*old, *new}), fraction, group)
    if before and after:
        for side_before, side_after in zip(before, after, strict=True):
            assert set(side_before) == set(side_after) & set(old)


@settings(max_examples=20)
@given(fractions)
def test_about_that_share_is_for_validation(fraction):
    names = [f"photo {number}.jpg" for number in range(4000)]
    validation = sides(names, fraction, "file")[1]
    assert abs(len(validation) / len(names) - fraction) < 5 * (fraction * (1 - fraction) / len(names)) ** 0.5


# ---- where the images come from


@pytest.mark.parametrize("group", ["file", "folder"])
@pytest.mark.parametrize("split", [".", "my album"])
def test_folder_and_hub_give_the_same_images_in_the_same_order(split, group, tree, tmp_path):
    if split != ".":
        shutil.move(tree, tmp_path / "outer" / split)
        tree = tmp_path / "outer"
    for side in SIDES:
        plain, hub = (
            open_indexed(config(tree, backend=backend, validation_group=group, train_split=split), side)
            for backend in ("folder", "hub")
        )
        assert 0 < len(plain) == len(hub) < len(NAMES)
        assert [plain.stored(i) for i in range(len(plain))] == [hub.stored(i) for i in range(len(hub))]
        assert plain.file_name(0) in NAMES and hub.file_name(0).startswith("row ")
        assert plain.fingerprint().startswith(f"{len(plain)} of 40 images, names ")
        assert plain.fingerprint().endswith(f"; validation_fraction 0.4 by {group}")
        assert hub.fingerprint() == f"{len(hub)} of 40 images; validation_fraction 0.4 by {group}"


def test_the_stored_path_is_the_name_of_a_row_in_parquet_and_its_number_where_there_is_none(tree, tmp_path):
    cells = [
        {"bytes": (tree / name).read_bytes(), "path": name if number % 2 else None} for number, name in enumerate(NAMES)
    ]
    rows = datasets.Dataset.from_dict({"image": [*cells, None]}).cast_column("image", datasets.Image(decode=False))
    rows.to_parquet(tmp_path / "train.parquet")
    part = open_indexed(config(tmp_path / "train.parquet", backend="hub", train_split="train"), "validation")
    called = [name if number % 2 else f"row {number}" for number, name in enumerate(NAMES)] + ["row 40"]
    expected = [number for number, name in enumerate(called) if place_of(name, "file") < 0.4]
    assert [part.file_name(index) for index in range(len(part))] == [f"row {number}" for number in expected]


@pytest.mark.slow
def test_labels_content_and_data_info_are_of_the_part(tree, tmp_path):
    shutil.rmtree(tree / "日本")
    for number in range(10):
        (tree / f"{number}.png").unlink()
    data = config(tree)
    whole, train, validation = FolderSource(tree, "."), *(open_indexed(data, side) for side in SIDES)
    for part in (train, validation):
        names = [part.labels().names[number] for number in part.labels().numbers]
        assert names == [part.file_name(index).split("/")[0] for index in range(len(part))]
    assert content_sum(train, 2) + content_sum(validation, 2) == content_sum(whole, 2)
    lines = "\n".join(data_info(data, tmp_path / "info", with_hash=True))
    assert f"train       {len(train)} images, 0 of them broken" in lines
    assert f"validation  {len(validation)} images, 0 of them broken" in lines


def test_betons_are_written_divided_and_another_division_is_refused(tree, tmp_path):
    options = BetonOptions(64, "raw", 95)
    make_betons(config(tree), tmp_path / "betons", options)
    for side in SIDES:
        part = open_indexed(config(tree), side)
        beton = open_indexed(DataConfig(backend="beton", path=str(tmp_path / "betons")), side)
        assert len(part) == len(beton)
        for index in range(len(part)):
            assert np.array_equal(np.asarray(part.open(index)), np.asarray(beton.open(index)))
    make_betons(config(tree), tmp_path / "betons", options)
    for other in ({"validation_fraction": 0.41}, {"validation_group": "folder"}, {"validation_fraction": None}):
        with pytest.raises(
            ValueError, match=r"train\.beton is there already and was made otherwise \(images .*0\.4 by"
        ):
            make_betons(config(tree, **other), tmp_path / "betons", options)


# ---- runs


@pytest.mark.seconds
def test_a_run_trains_validates_and_resumes_on_a_flat_folder(tmp_path, capsys):
    write_images(tmp_path / "flat", 24)
    data = {"path": str(tmp_path / "flat"), "train_split": ".", "validation_fraction": 0.3}
    run = train(tiny_config(tmp_path, data=data))
    train(tiny_config(tmp_path, data=data, training={"max_steps": 4}), resume=True)
    part = open_indexed(load_config(run / "config.yaml").data, "validation")
    said = capsys.readouterr().out
    assert f"{24 - len(part)} training images" in said
    assert "validation is 0.3 of data.train_split ., by a hash of each file's name" in said
    assert f"step 4: validation on {len(part)} images" in said
    assert "are not those that the run began with" not in said
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    for side in SIDES:
        settings = ["data.workers=0", f"evaluation.split={side}"]
        manifest = tokenize(run, output=tmp_path / side, overrides=settings)
        assert manifest["rows"] == (len(part) if side == "validation" else 24 - len(part))
    assert (tmp_path / "validation" / "data" / "validation-00000-of-00001.parquet").is_file()


@pytest.mark.seconds
def test_another_division_of_a_resumed_run_is_said(tmp_path, capsys):
    write_images(tmp_path / "flat", 24)
    data = {"path": str(tmp_path / "flat"), "train_split": ".", "validation_fraction": 0.3}
    train(tiny_config(tmp_path, data=data))
    other = tiny_config(tmp_path, data=data | {"validation_fraction": 0.5}, training={"max_steps": 3})
    train(other, resume=True)
    assert "the training images are not those that the run began with" in capsys.readouterr().out


# ---- refusals


@pytest.mark.parametrize(("fraction", "side"), [(0.001, "validation"), (0.999, "training")])
def test_an_empty_side_names_the_key_the_numbers_and_what_would_be_right(fraction, side, tree):
    with pytest.raises(ValueError) as error:
        open_indexed(config(tree, fraction), "train")
    sentence = str(error.value)
    assert sentence.startswith(f"data.validation_fraction {fraction} by file leaves none of the 40 images for {side}; ")
    better = float(sentence.split(" than ")[1].split(",")[0])
    better += 1e-6 if side == "validation" else -1e-6
    assert all(len(open_indexed(config(tree, better), one)) for one in SIDES)


def test_betons_keep_no_names_and_streams_know_none(tree, tmp_path):
    make_betons(config(tree), tmp_path / "betons", BetonOptions(64, "raw", 95))
    for backend in ("beton", "ffcv", "auto"):
        with pytest.raises(ValueError, match=r"^data\.validation_fraction 0\.4 goes by .* give it to make-beton"):
            open_indexed(config(tmp_path / "betons", backend=backend, train_split="train"), "train")
    values = {"data": {"path": "x", "backend": "hub", "streaming": True}, "training": {"max_steps": 1}}
    with pytest.raises(ValueError, match=r"validation_fraction needs the names .*train\[:95%\].* streaming=false"):
        parse_config(values, ["data.validation_fraction=0.1"])
    for wrong in ("0", "1", "-0.1", "nan", "5%"):
        with pytest.raises(ValueError, match=r"data\.validation_fraction"):
            parse_config({"training": {"max_steps": 1}}, [f"data.validation_fraction={wrong}"])


def test_the_test_split_and_runs_without_a_fraction_are_as_they_were(tmp_path):
    for split in ("train", "validation", "test"):
        write_images(tmp_path / split, 9)
    cut = config(tmp_path, train_split="train", validation_split="nowhere")
    assert open_indexed(cut, "test").fingerprint() == FolderSource(tmp_path, "test").fingerprint()
    assert len(open_indexed(cut, "train")) + len(open_indexed(cut, "validation")) == 9
    plain = open_indexed(config(tmp_path, None, train_split="train"), "train")
    assert plain.fingerprint() == FolderSource(tmp_path, "train").fingerprint()
