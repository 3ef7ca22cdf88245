"""make-beton: what is written is what was read, whole or not at all, and never over another file."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import noise, truncate, write_images
from PIL import Image

from vqgan_accel.cli import main
from vqgan_accel.config import DataConfig
from vqgan_accel.data import make_beton
from vqgan_accel.data.beton import HEADER, JPG, RAW, BetonSource
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.make_beton import BetonOptions, encode, make_betons, page_size

RAW_64 = BetonOptions(64, "raw", 95)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images" / "train", 21)
    write_images(tmp_path / "images" / "validation", 3)
    return tmp_path / "images"


def config(images: Path, **options: object) -> DataConfig:
    return DataConfig.model_validate({"path": str(images), "workers": 0, **options})


def pixels(source: FolderSource | BetonSource) -> list[np.ndarray]:
    return [np.asarray(source.open(index)) for index in range(len(source))]


def test_raw_betons_hold_the_pixels_of_the_files_in_their_order(images: Path, tmp_path: Path) -> None:
    make_betons(config(images), tmp_path / "betons", RAW_64)
    for split in ("train", "validation"):
        written, read = (
            pixels(kind(root, split)) for kind, root in ((BetonSource, tmp_path / "betons"), (FolderSource, images))
        )
        assert all(map(np.array_equal, written, read)) and len(written) == len(read)
    assert not (tmp_path / "betons" / "test.beton").exists()


def test_the_bytes_do_not_depend_on_the_number_of_workers(images: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        make_betons(config(images, workers=workers), tmp_path / str(workers), BetonOptions(64, "jpg", 90))
    assert (tmp_path / "0" / "train.beton").read_bytes() == (tmp_path / "2" / "train.beton").read_bytes()


def test_classes_go_along_and_other_ones_are_another_beton(images: Path, tmp_path: Path) -> None:
    files = sorted((images / "train").rglob("*.png"))[:6]
    columns = {"image": [str(file) for file in files], "label": [3, 1, 2, 3, 1, 2], "fine": [0, 1, 2, 3, 4, 5]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "stored"))
    options = {"backend": "hub", "path": str(tmp_path / "stored"), "train_split": "stored"}
    make_betons(config(images, **options), tmp_path / "betons", RAW_64)
    found = BetonSource(tmp_path / "betons", "train").labels()
    assert found is not None and found.numbers.tolist() == [3, 1, 2, 3, 1, 2]
    with pytest.raises(ValueError, match=r"train\.beton is there already and was made otherwise \(labels "):
        make_betons(config(images, label_column="fine", **options), tmp_path / "betons", RAW_64)
    make_betons(config(images, label_column="fine", **options), tmp_path / "fine", RAW_64)
    found = BetonSource(tmp_path / "fine", "train").labels()
    assert found is not None and found.numbers.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="has no field 'coarse' of whole numbers"):
        BetonSource(tmp_path / "fine", "train", label_field="coarse").labels()
    with pytest.raises(ValueError, match="has no field 'image' of whole numbers"):
        BetonSource(tmp_path / "fine", "train", label_field="image").labels()


def test_jpg_betons_hold_pillows_jpeg_of_the_pixels(images: Path, tmp_path: Path) -> None:
    make_betons(config(images), tmp_path / "betons", BetonOptions(64, "jpg", 90))
    betons, files = BetonSource(tmp_path / "betons", "train"), FolderSource(images, "train")
    for written, original in zip(pixels(betons), pixels(files), strict=True):
        file = io.BytesIO()
        Image.fromarray(original).save(file, "JPEG", quality=90)
        assert np.array_equal(written, np.asarray(Image.open(file)))


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64), st.sampled_from(["raw", "jpg", "smart"]))
@settings(max_examples=60, deadline=None)
def test_no_side_is_longer_than_max_resolution_and_shapes_are_kept(
    width: int, height: int, most: int, mode: str
) -> None:
    encoded = encode(noise(width, height), BetonOptions(most, mode, 95))
    expected = (
        (width, height)
        if max(width, height) <= most
        else (
            max(1, round(width * most / max(width, height))),
            max(1, round(height * most / max(width, height))),
        )
    )
    assert (encoded.width, encoded.height) == expected
    assert len(encoded.data) <= page_size(most)
    if mode != "jpg":
        assert encoded.mode == RAW and len(encoded.data) == 3 * encoded.width * encoded.height


def test_smart_keeps_the_pixels_of_small_images_and_jpeg_of_large_ones() -> None:
    assert encode(noise(192, 192), BetonOptions(256, "smart", 95)).mode == RAW
    assert encode(noise(192, 193), BetonOptions(256, "smart", 95)).mode == JPG


def test_shrinking_by_two_averages_two_by_two_pixels() -> None:
    image = noise(16, 8)
    encoded = encode(image, BetonOptions(8, "raw", 95))
    averages = np.asarray(image).astype(float).reshape(4, 2, 8, 2, 3).mean((1, 3))
    shrunk = np.frombuffer(encoded.data, np.uint8).reshape(4, 8, 3)
    assert np.abs(shrunk - averages).max() <= 1  # rounded twice


def test_an_image_lies_within_one_page_and_a_page_holds_any_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_beton, "page_size", lambda resolution: 4096)
    write_images(tmp_path / "images" / "train", 20)
    make_betons(config(tmp_path / "images"), tmp_path / "betons", RAW_64)
    source = BetonSource(tmp_path / "betons", "train")
    first, last = source.pointers // 4096, (source.pointers + source.sizes - 1) // 4096
    assert np.array_equal(first, last) and len(set(first.tolist())) > 5
    assert all(map(np.array_equal, pixels(source), pixels(FolderSource(tmp_path / "images", "train"))))
    assert page_size(256) == 2**23 and page_size(make_beton.LARGEST_RESOLUTION) < 2**32
    noisy = encode(noise(256, 256), BetonOptions(256, "jpg", 100))
    assert len(noisy.data) < 4 * 256**2


# ---- never half, never over another


def test_the_same_command_keeps_what_is_complete_and_another_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "betons"
    assert [file.name for file in make_betons(config(images), output, RAW_64)] == ["train.beton", "validation.beton"]
    stamp = (output / "train.beton").stat().st_mtime_ns
    (output / "validation.beton").unlink()
    assert [file.name for file in make_betons(config(images), output, RAW_64)] == ["validation.beton"]
    assert (output / "train.beton").stat().st_mtime_ns == stamp
    assert "made of the same images with the same options" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"train\.beton is there already .*made otherwise \(quality 95, now 90\)"):
        make_betons(config(images), output, BetonOptions(64, "raw", 90))
    noise(9, 9).save(images / "train" / "more.png")
    with pytest.raises(ValueError, match=r"was made otherwise \(images 21 images.*now 22 images"):
        make_betons(config(images), output, RAW_64)
    (output / "train.beton").write_bytes(b"other")
    with pytest.raises(ValueError, match="was not written by make-beton; delete it, or give another --output"):
        make_betons(config(images), output, RAW_64)
    assert (output / "train.beton").read_bytes() == b"other"


def test_a_broken_image_is_named_and_leaves_no_beton(images: Path, tmp_path: Path) -> None:
    truncate(images / "train" / "005.png")
    with pytest.raises(ValueError, match=r"cannot read image .*005\.png: .*set data\.on_error=skip"):
        make_betons(config(images, workers=2), tmp_path / "betons", RAW_64)
    assert not (tmp_path / "betons" / "train.beton").exists()
    make_betons(config(images, on_error="skip"), tmp_path / "betons", RAW_64)
    written = pixels(BetonSource(tmp_path / "betons", "train"))
    assert len(written) == 20
    assert np.array_equal(written[5], np.asarray(Image.open(images / "train" / "006.png")))


def test_an_interrupted_beton_is_not_taken_for_one_and_is_written_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(make_beton, "_flush", power_cut)
        with pytest.raises(KeyboardInterrupt):
            make_betons(config(images), tmp_path / "betons", RAW_64)
    assert sorted(path.name for path in (tmp_path / "betons").iterdir()) == [".lock", ".train.beton.partial"]
    make_betons(config(images), tmp_path / "betons", RAW_64)
    assert len(BetonSource(tmp_path / "betons", "train")) == 21
    assert sorted(path.name for path in (tmp_path / "betons").iterdir()) == [".lock", "train.beton", "validation.beton"]


def test_until_its_last_bytes_are_written_a_beton_says_that_it_is_unfinished(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_beton, "encode", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_betons(config(images), tmp_path / "betons", RAW_64)
    partial = (tmp_path / "betons" / ".train.beton.partial").read_bytes()
    assert not any(partial[: HEADER.itemsize])


# ---- the command


def test_the_command_writes_from_parquet_too_and_says_what_it_wrote(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    files = FolderSource(images, "train")
    table = datasets.Dataset.from_dict({"picture": [files.name(index) for index in range(len(files))]})
    table = table.cast_column("picture", datasets.Image())
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    words = ["make-beton", "--source", str(tmp_path / "parquet"), "--output", str(tmp_path / "betons")]
    words += ["--max-resolution", "64", "--write-mode", "raw", "data.image_column=picture", "data.workers=0"]
    assert main(words) == 0
    assert "train: 21 images in" in capsys.readouterr().out
    assert all(map(np.array_equal, pixels(BetonSource(tmp_path / "betons", "train")), pixels(files)))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-resolution", "0"], "--max-resolution is 0; give 1 to 16384 pixels"),
        (["--max-resolution", "64", "--quality", "101"], "--quality is 101; give 1 to 100"),
        (["--max-resolution", "64", "data.worker=1"], "did you mean 'data.workers'?"),
    ],
)
def test_wrong_options_are_told(
    images: Path, tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make-beton", "--source", str(images), "--output", str(tmp_path / "betons"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "betons").exists()


def test_an_output_that_is_a_file_is_refused_and_kept(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"--output .*file is a file; give a folder"):
        make_betons(config(images), tmp_path / "file", RAW_64)
    assert (tmp_path / "file").read_text() == "kept"
