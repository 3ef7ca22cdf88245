"""`vqgan-accel codebook`: the numbers behind its pictures, and the pictures drawn from them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_tokenizer
from PIL import Image
from sklearn.decomposition import PCA
from tiny import write_images
from torch import Tensor

from vqgan_accel.cli import main
from vqgan_accel.config import EMAQuantizerConfig, GumbelQuantizerConfig, QuantizerConfig, StandardQuantizerConfig
from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.evaluation.codebook import nearest_others, principal_components
from vqgan_accel.evaluation.figures import codebook_map, neighbour_histogram
from vqgan_accel.models.quantizers import StandardQuantizer

SIZE = {"num_codes": 64, "embedding_dim": 8}


def vectors(number: int = 2500, dim: int = 5) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(3))


def test_the_nearest_other_code_is_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgan_accel.evaluation.codebook.MAX_DISTANCES", 2500 * 700)
    codes = vectors()
    codes[2200] = codes[7]  # an exact copy, in another block
    distances, nearest = nearest_others(codes)
    expected = np.linalg.norm(codes.numpy()[:, None] - codes.numpy()[None], axis=2)
    np.fill_diagonal(expected, np.inf)
    assert np.array_equal(nearest.numpy(), expected.argmin(1))
    np.testing.assert_allclose(distances.numpy(), expected.min(1), rtol=1e-5)
    assert distances[7] == distances[2200] == 0 and nearest[7] == 2200


@pytest.mark.parametrize("kind", ["far away", "in pairs", "of unit length", "of many sizes"])
def test_the_nearest_other_code_is_that_of_the_differences_however_much_cancels(kind: str) -> None:
    codes = vectors(600, 32)
    if kind == "far away":
        codes += 1000
    elif kind == "in pairs":
        codes[300:] = codes[:300] * (1 + 2e-7)
    elif kind == "of unit length":
        codes = torch.nn.functional.normalize(codes, dim=1)
    else:
        codes *= torch.logspace(-6, 4, 600)[:, None]
    distances, nearest = nearest_others(codes)
    exact = codes.double()
    expected = (exact[:, None] - exact[None]).norm(dim=2).fill_diagonal_(torch.inf).min(1)
    assert torch.equal(nearest, expected.indices)
    torch.testing.assert_close(distances.double(), expected.values, rtol=1e-6, atol=0)


def test_principal_components_are_those_of_scikit_learn() -> None:
    codes = vectors(300) * torch.tensor([5.0, 1, 3, 0.5, 0.1])
    points, explained = principal_components(codes)
    theirs = PCA(2).fit(codes.double().numpy())
    np.testing.assert_allclose(np.abs(points.numpy()), np.abs(theirs.transform(codes.double().numpy())), atol=1e-9)
    assert explained == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-9)


def test_one_dimension_and_equal_codes_have_a_map_too() -> None:
    points, explained = principal_components(vectors(dim=1))
    assert not points[:, 1].any() and explained == pytest.approx(1.0)
    points, explained = principal_components(torch.ones(4, 3))
    assert not points.any() and explained == 0.0


def test_the_map_has_a_point_for_every_code_and_its_colour_is_its_use() -> None:
    points, counts = vectors(10, 2), torch.tensor([0, 1, 2, 3, 0, 5, 6, 7, 8, 9])
    axes = codebook_map(points, 0.5, counts).axes[0]
    unused, used = axes.collections
    np.testing.assert_allclose(unused.get_offsets(), points[counts == 0].numpy())
    np.testing.assert_allclose(used.get_offsets(), points[counts > 0].numpy())
    assert np.array_equal(used.get_array(), counts[counts > 0].numpy())
    codebook_map(points, 0.5, torch.zeros(10, dtype=torch.int64))


def test_the_histogram_of_neighbours_counts_every_code_once() -> None:
    distances, counts = torch.linspace(0, 1, 20), torch.arange(20) % 3
    axes = neighbour_histogram(distances, counts).axes[0]
    heights = [sum(bar.get_height() for bar in container) for container in axes.containers]  # type: ignore[attr-defined]
    assert heights == [13, 7]
    neighbour_histogram(torch.zeros(4), torch.zeros(4))  # equal codes


@pytest.mark.seconds
@pytest.mark.parametrize(
    "quantizer",
    [
        StandardQuantizerConfig(type="standard", l2_normalize=True, **SIZE),
        EMAQuantizerConfig(type="ema", **SIZE),
        GumbelQuantizerConfig(type="gumbel", **SIZE),
    ],
    ids=lambda config: config.type,
)
def test_the_table_counts_the_codes_of_the_split(
    quantizer: QuantizerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer(quantizer).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = write_images(tmp_path / "images" / "validation", 5, size=24)
    command = ["codebook", str(tmp_path / "tokenizer"), f"--output={tmp_path / 'out'}", "data.workers=0"]
    assert main([*command, f"--data={tmp_path / 'images'}", "evaluation.batch_size=2"]) == 0
    views = torch.stack([evaluation_view(Image.open(file).convert("RGB"), 16) for file in files])
    counts = torch.bincount(tokenizer.encode(views / 127.5 - 1).flatten(), minlength=64)
    with (tmp_path / "out" / "codebook.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [int(row["uses"]) for row in rows] == counts.tolist()
    assert [int(row["code"]) for row in rows] == list(range(64))
    codes = tokenizer.quantizer.codes_to_latents(torch.arange(64).view(1, 8, 8)).detach().flatten(2)[0].T
    row = rows[9]
    expected = (codes[9] - codes[int(row["nearest_code"])]).norm().item()
    assert float(row["distance"]) == pytest.approx(expected, rel=1e-4)
    said = capsys.readouterr().out
    assert f"{100 * (counts > 0).double().mean():.1f} % of 64 codes used" in said and "of 80 tokens" in said
    for name in ("usage", "neighbours", "pca"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width > 400
    capsys.readouterr()
    assert main([*command, f"--data={tmp_path / 'nowhere'}"]) == 2
    assert f"{tmp_path / 'out'} is there already" in capsys.readouterr().err


def test_a_tokenizer_that_has_diverged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer(StandardQuantizerConfig(type="standard", **SIZE))
    assert isinstance(tokenizer.quantizer, StandardQuantizer)
    tokenizer.quantizer.codebook.data[3, 1] = torch.nan
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_images(tmp_path / "images" / "validation", 2)
    for command in ("codebook", "tokenize"):
        arguments = [str(tmp_path / "tokenizer"), f"--data={tmp_path / 'images'}", f"--output={tmp_path / 'out'}"]
        assert main([command, *arguments, "data.train_split=validation"]) == 2
        assert "nan or infinite (quantizer.codebook)" in capsys.readouterr().err and not (tmp_path / "out").exists()
