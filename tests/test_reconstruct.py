"""`vqgan-accel reconstruct`: any size and aspect, tiles without seams, a table whose numbers are the tokenizer's."""

from __future__ import annotations

import csv
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from images import noise
from PIL import Image
from torch import Tensor

from vqgan_accel.cli import main
from vqgan_accel.config import StandardQuantizerConfig, WeightFiles
from vqgan_accel.evaluation import reconstruct as module
from vqgan_accel.evaluation.reconstruct import (
    GAP,
    OVERLAP,
    TABLE,
    Reconstruction,
    reconstruct,
    reconstruct_image,
    reconstruct_whole,
    tile_starts,
)
from vqgan_accel.models.tokenizer import ImageTokenizer

STANDARD = StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8)


def random_image(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return tiny_tokenizer(STANDARD).eval()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 30), (5, 3), (1, 9)])
def test_any_size_is_padded_to_the_stride_and_cut_back(height: int, width: int, tokenizer: ImageTokenizer) -> None:
    image = random_image(height, width)
    made = reconstruct_whole(tokenizer, image)
    stride = tokenizer.stride
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    assert made.image.shape == image.shape and made.num_codes == rows * columns
    padded = image[..., [min(y, height - 1) for y in range(rows * stride)], :]
    padded = padded[..., [min(x, width - 1) for x in range(columns * stride)]]
    assert torch.equal(made.image, tokenizer.decode(tokenizer.encode(padded))[..., :height, :width])


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 2000), tile=st.integers(2 * OVERLAP, 600))
def test_tiles_cover_a_side_overlap_by_at_least_the_fade_and_end_with_it(length: int, tile: int) -> None:
    starts = tile_starts(length, tile)
    assert starts[0] == 0 and min(starts[-1] + tile, length) == length and len(set(starts)) == len(starts)
    assert all(0 < b - a <= tile - OVERLAP for a, b in pairwise(starts))


@settings(deadline=None, max_examples=15)
@given(height=st.integers(100, 400), width=st.integers(100, 400), tile=st.integers(2 * OVERLAP, 300))
def test_tiles_whose_reconstruction_is_perfect_give_the_image_back(height: int, width: int, tile: int) -> None:
    image = random_image(height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "reconstruct_whole", lambda _, part: Reconstruction(part, part[0, 0].numel()))
        made = reconstruct_image(tiny_tokenizer(STANDARD), image, tile)
    torch.testing.assert_close(made.image, image, rtol=0, atol=1e-5)
    assert made.num_codes >= height * width


def test_from_one_tile_to_the_next_a_reconstruction_fades(tokenizer: ImageTokenizer) -> None:
    levels = iter([0.0, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "reconstruct_whole", lambda _, part: Reconstruction(torch.full_like(part, next(levels)), 0)
        )
        row = reconstruct_image(tokenizer, random_image(100, 2 * 128 - OVERLAP), tile=128).image[0, 0, 0]
    assert torch.all(row[: 128 - OVERLAP] == 0) and torch.all(row[128:] == 1)
    steps = row.diff()[128 - OVERLAP - 1 : 128]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / (OVERLAP + 1)))


def test_the_command_writes_pictures_and_the_numbers_of_each_image(
    tmp_path: Path, tokenizer: ImageTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    noise(40, 24, seed=1).save(tmp_path / "photos" / "a.png")
    noise(8, 10, seed=2).save(tmp_path / "photos" / "deep" / "small.png")
    noise(20, 20, seed=3).save(tmp_path / "single.bmp")
    arguments = ["reconstruct", str(tmp_path / "tokenizer"), str(tmp_path / "photos"), str(tmp_path / "single.bmp")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "40 x 24 px, bits_per_pixel 0.25, psnr" in capsys.readouterr().out
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"a.png", "deep/small.png", "single.png", TABLE}

    with (tmp_path / "out" / TABLE).open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [Path(row["file"]).name for row in rows] == ["a.png", "small.png", "single.bmp"]
    assert [(row["width"], row["height"], row["codes"]) for row in rows] == [
        ("40", "24", "60"),
        ("8", "10", "6"),
        ("20", "20", "25"),
    ]
    assert float(rows[1]["bits_per_pixel"]) == 6 * 4 / 80  # 16 codes: 4 bits
    assert rows[0]["ssim"] and rows[1]["ssim"] == ""  # smaller than its window

    picture = np.array(Image.open(tmp_path / "out" / "a.png")).astype(float)
    assert picture.shape == (24, 40 + GAP + 40, 3)
    original, made = picture[:, :40], picture[:, 40 + GAP :]
    assert np.array_equal(original, np.array(Image.open(tmp_path / "photos" / "a.png").convert("RGB")))
    psnr = -10 * math.log10(np.square((original - made) / 255).mean())
    assert float(rows[0]["psnr"]) == pytest.approx(psnr, abs=0.02)  # the picture is rounded to 8 bits


@pytest.mark.seconds
def test_what_is_wrong_is_named_and_nothing_is_left_behind(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        noise(8, 8, seed=0).save(tmp_path / name / "same.png")
    for inputs, error, sentence in (
        (["nowhere"], FileNotFoundError, "no image or folder of images at .*nowhere"),
        (["empty"], ValueError, "no images below .*empty"),
        (["x/same.png", "y"], ValueError, r"x/same\.png and .*y/same\.png would both become same\.png"),
        (["x", "broken.png"], ValueError, r"broken\.png cannot be read as an image"),
    ):
        with pytest.raises(error, match=sentence):
            reconstruct(
                tmp_path / "tokenizer", inputs=[tmp_path / name for name in inputs], output=tmp_path / "out", tile=256
            )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "empty", "tokenizer", "x", "y"]
    weights = WeightFiles(vgg16=str(tmp_path / "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"^weights\.vgg16: there is no file .*nowhere"):
        reconstruct(
            tmp_path / "tokenizer",
            inputs=[tmp_path / "x"],
            output=tmp_path / "out",
            tile=256,
            metrics=("psnr", "lpips"),
            weights=weights,
        )
    with pytest.raises(ValueError, match="tiles of 100 px are too small"):
        reconstruct_image(tokenizer, random_image(200, 200), tile=100)
