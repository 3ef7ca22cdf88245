"""data-info: what is counted, what is named, what is drawn."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from images import noise, truncate
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data import info
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.info import GAP, THUMBNAIL, contact_sheet, data_info, decode_rate, split_info


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    noise(40, 20).save(folder / "a.png")
    noise(10, 90).convert("L").save(folder / "b.png")
    noise(30, 30).convert("CMYK").save(folder / "c.jpg")
    noise(30, 30).save(folder / "d.png")
    truncate(folder / "d.png")
    (folder / "e.png").write_bytes(b"no image")
    return folder.parent


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_modes_and_broken_images_are_those_of_the_files(images: Path, workers: int) -> None:
    found = split_info(FolderSource(images, "train"), workers, "train")
    assert (found.images, found.widths, found.heights) == (5, [40, 10, 30], [20, 90, 30])
    assert found.modes == {"RGB": 1, "L": 1, "CMYK": 1}
    assert [Path(name.split(": ")[0]).name for name in found.broken] == ["d.png", "e.png"]
    lines = found.lines(image_size=25)
    assert lines[:4] == [
        "5 images, 2 of them broken",
        "width 10 to 40 px (median 30), height 20 to 90 px (median 30)",
        "modes RGB 1, L 1, CMYK 1",
        "2 have a side below 25 px and are enlarged",
    ]
    assert lines[5].endswith("e.png: it is not an image that Pillow can identify")


def test_many_broken_images_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    for index in range(info.SHOWN_BROKEN + 2):
        (tmp_path / f"{index:02}.png").touch()
    lines = split_info(FolderSource(tmp_path, "."), 0, "").lines(16)
    assert lines[0] == "22 images, 22 of them broken"
    assert len(lines) == 22 and lines[-1] == "and 2 more"


def test_the_contact_sheet_shows_each_image_in_its_place_and_grey_for_a_broken_one(images: Path) -> None:
    sheet = np.asarray(contact_sheet(FolderSource(images, "train")))
    assert sheet.shape == (THUMBNAIL, 5 * (THUMBNAIL + GAP) - GAP, 3)
    squares = [sheet[:, place * (THUMBNAIL + GAP) :][:, :THUMBNAIL] for place in range(5)]
    assert [bool((square == 128).all()) for square in squares] == [False, False, False, True, True]
    a = noise(40, 20).crop((10, 0, 30, 20)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    assert np.array_equal(squares[0], np.asarray(a))
    assert (squares[1].max(2) == squares[1].min(2)).all()  # grey


def test_the_contact_sheet_of_a_large_split_shows_all_parts_of_it(tmp_path: Path) -> None:
    for index in range(180):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / f"{index:03}.png")
    sheet = np.asarray(contact_sheet(FolderSource(tmp_path, ".")))
    step = THUMBNAIL + GAP
    shown = sheet[THUMBNAIL // 2 :: step, THUMBNAIL // 2 :: step, 0].flatten()
    assert shown.tolist() == list(range(0, 180, 3))


def test_every_split_and_backend_is_told_of(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "RATE_SECONDS", 0.05)
    (images / "test").mkdir()
    noise(16, 16).save(images / "test" / "z.png")
    config = DataConfig(path=str(images), image_size=16, workers=0)
    lines = data_info(config, tmp_path / "output")
    assert lines[0] == "train       5 images, 2 of them broken"
    assert any(line.startswith("validation  no folder 'validation' in data.path") for line in lines)
    assert "test        1 images, 0 of them broken" in lines
    rates = {line.split()[0]: line for line in lines[-4:]}
    assert rates.keys() == {"folder", "hub", "ffcv", "beton"}
    assert rates["folder"].endswith(" images/s")
    assert "these are image files, for backend folder" in rates["hub"]
    assert all("cannot read it: no train.beton" in rates[backend] for backend in ("ffcv", "beton"))
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["test.png", "train.png"]


def test_image_files_are_not_handed_to_datasets_unless_the_config_says_so(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "RATE_SECONDS", 0.05)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for backend in ("folder", "auto"):
        data_info(DataConfig(path=str(images), image_size=16, workers=0, backend=backend), tmp_path / "output")
        assert not (tmp_path / "cache").exists() and "NOTE" not in capsys.readouterr().err
    lines = data_info(DataConfig(path=str(images), image_size=16, workers=0, backend="hub"), tmp_path / "output")
    assert next(line for line in lines if line.startswith("  hub")).endswith(" images/s")
    said = capsys.readouterr().err
    assert f"NOTE: data.path {images} is a folder of image files" in said and "data.backend=folder (or auto)" in said


def test_a_backend_that_cannot_read_the_data_says_why(images: Path) -> None:
    assert decode_rate(DataConfig(path=str(images), train_split="none")).startswith("cannot read it: no folder 'none'")
    for file in (images / "train").iterdir():
        file.write_bytes(b"")
    assert "none of the 5 images can be read" in decode_rate(DataConfig(path=str(images)))


def test_a_missing_training_split_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder at data"):
        data_info(DataConfig(path=str(tmp_path / "nowhere")), tmp_path / "output")
    assert not (tmp_path / "output").exists()
