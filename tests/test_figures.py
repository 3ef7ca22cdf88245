"""Pictures: every pixel where it belongs, and a histogram that draws the numbers it was given."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from torch import Tensor

from vqgan_accel.data.views import to_float
from vqgan_accel.evaluation.figures import codebook_histogram, reconstruction_grid, to_uint8
from vqgan_accel.evaluation.measures.codes import codebook_usage, perplexity


def images(number: int, height: int = 4, width: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, height, width), generator=generator, dtype=torch.uint8)


# ---- to_uint8


def test_all_256_values_survive_the_way_to_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_uint8(to_float(every)), every.permute(0, 2, 3, 1).numpy())


def test_pixels_are_rounded_to_the_nearest_value_and_clipped_to_the_displayable_range() -> None:
    levels = [100, 100.4, 100.6, 0.4, 254.6, -1, -1e6, 256, 1e6, float("inf"), float("-inf"), 255]
    pixels = (torch.tensor(levels) / 127.5 - 1).view(1, 3, 2, 2)
    expected = np.array([100, 100, 101, 0, 255, 0, 0, 255, 255, 255, 0, 255], np.uint8)
    result = to_uint8(pixels)
    assert result.dtype == np.uint8 and result.shape == (1, 2, 2, 3)
    assert np.array_equal(result.transpose(0, 3, 1, 2).ravel(), expected)


def test_channels_come_last_and_nothing_is_turned() -> None:
    pixels = images(2, height=3, width=5)
    assert np.array_equal(to_uint8(to_float(pixels)), np.moveaxis(pixels.numpy(), 1, -1))


# ---- the grid


def tiles(picture: Image.Image, rows: int, columns: int, height: int, width: int, gap: int) -> np.ndarray:
    """(rows, columns, height, width, 3); asserts that the picture is those tiles with white gaps, and nothing else."""
    pixels = np.asarray(picture)
    assert pixels.shape == (rows * height + (rows - 1) * gap, columns * width + (columns - 1) * gap, 3)
    white = np.ones(pixels.shape[:2], bool)
    found = np.zeros((rows, columns, height, width, 3), np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + gap), column * (width + gap)
        found[row, column] = pixels[top : top + height, left : left + width]
        white[top : top + height, left : left + width] = False
    assert (pixels[white] == 255).all()
    return found


@pytest.mark.parametrize(
    ("number", "columns", "gap", "rows", "used_columns"),
    [(1, 8, 2, 1, 1), (3, 8, 2, 1, 3), (8, 8, 2, 1, 8), (9, 8, 2, 2, 8), (5, 2, 0, 3, 2), (4, 1, 3, 4, 1)],
)
def test_each_original_stands_above_its_reconstruction(
    number: int, columns: int, gap: int, rows: int, used_columns: int
) -> None:
    height, width = 3, 5
    originals, rebuilt = images(number, height, width, seed=1), images(number, height, width, seed=2)
    picture = reconstruction_grid(to_float(originals), to_float(rebuilt), columns, gap)
    found = tiles(picture, 2 * rows, used_columns, height, width, gap)
    for index in range(rows * used_columns):
        row, column = divmod(index, used_columns)
        pair = found[2 * row : 2 * row + 2, column]
        if index < number:
            expected = torch.stack([originals[index], rebuilt[index]]).permute(0, 2, 3, 1).numpy()
            assert np.array_equal(pair, expected), index
        else:
            assert (pair == 255).all(), index


def test_a_grid_clips_what_lies_outside_of_the_displayable_range() -> None:
    picture = np.asarray(reconstruction_grid(torch.full((1, 3, 2, 2), 3.0), torch.full((1, 3, 2, 2), -3.0), gap=0))
    assert (picture[:2] == 255).all() and (picture[2:] == 0).all()


# ---- the histogram


def test_the_histogram_draws_each_codes_share_most_used_first_and_the_even_share() -> None:
    counts = torch.tensor([0, 6, 1, 0, 3])
    figure = codebook_histogram(counts, perplexity(counts), codebook_usage(counts))
    (axes,) = figure.axes
    (area,) = axes.collections[0].get_paths()
    for code, share in ((0.1, 0.6), (1, 0.3), (2, 0.1)):
        assert area.contains_point((code, share - 0.001)) and not area.contains_point((code, share + 0.001)), code
    assert not area.contains_point((3, 0.001)) and axes.get_xlim() == (0, 4)
    (even,) = axes.lines
    assert set(even.get_ydata()) == {0.2}
    assert axes.get_title() == "60.0 % of codes used, perplexity 2.5"  # exp(0.898) = 2.455
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["even share, 1/5"]


@pytest.mark.parametrize("counts", [torch.zeros(4, dtype=torch.int64), torch.tensor([7, 0]), torch.ones(1024)])
def test_a_histogram_of_any_counts_can_be_written(counts: Tensor) -> None:
    figure = codebook_histogram(counts, perplexity(counts), codebook_usage(counts))
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    assert Image.open(file).size == (300, 150)


def test_figures_leave_no_trace_in_pyplot() -> None:
    before = pyplot.get_fignums()
    codebook_histogram(torch.ones(4), 4.0, 100.0)
    assert pyplot.get_fignums() == before
