"""Pictures: originals over their reconstructions, how evenly the codes are used, and where they lie."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clipped -> (B, H, W, 3) uint8"""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def reconstruction_grid(images: Tensor, reconstructions: Tensor, columns: int = 8, gap: int = 2) -> Image.Image:
    """Both (B, 3, H, W) in [-1, 1] -> rows of originals, each above the row of its reconstructions."""
    columns = min(columns, len(images))
    rows = [part for pair in zip(images.split(columns), reconstructions.split(columns), strict=True) for part in pair]
    return _grid(rows, columns, gap)


def image_grid(images: Tensor, columns: int = 8, gap: int = 2) -> Image.Image:
    """(B, 3, H, W) in [-1, 1], row by row"""
    columns = min(columns, len(images))
    return _grid(list(images.split(columns)), columns, gap)


def _grid(rows: list[Tensor], columns: int, gap: int) -> Image.Image:
    """Rows of up to `columns` images (B, 3, H, W), `gap` white pixels apart."""
    height, width = rows[0].shape[2:]
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for row, images in enumerate(rows):
        top = row * (height + gap)
        for column, image in enumerate(to_uint8(images)):
            left = column * (width + gap)
            canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def grid_tiles(grid: Image.Image, size: int, gap: int = 2) -> list[tuple[Image.Image, Image.Image]]:
    """(original, reconstruction) of every image of size x size pixels in what reconstruction_grid drew. ValueError
    where the picture is none of that size."""
    step = size + gap
    if (grid.width + gap) % step or (grid.height + gap) % (2 * step):
        raise ValueError(f"a picture of {grid.width} x {grid.height} px is no grid of images of {size} px")
    tiles = []
    for top in range(0, grid.height, 2 * step):
        for left in range(0, grid.width, step):
            pair = [grid.crop((left, y, left + size, y + size)).convert("RGB") for y in (top, top + step)]
            if any(tile.getextrema() != ((255, 255),) * 3 for tile in pair):  # where images end the canvas is white
                tiles.append((pair[0], pair[1]))
    return tiles


def codebook_histogram(counts: Tensor, perplexity: float, usage: float) -> Figure:
    """counts (K,) -> each code's share of all tokens, most used first, beside the even share 1/K."""
    share = np.sort(counts.cpu().numpy().astype(float))[::-1] / max(1, int(counts.sum()))
    figure = Figure(figsize=(6, 3))  # every validation draws one: to find the margins takes as long as to draw
    axes = figure.subplots(gridspec_kw={"left": 0.15, "right": 0.98, "bottom": 0.16, "top": 0.9})
    axes.fill_between(np.arange(len(share)), share, step="mid")
    axes.axhline(1 / len(share), color="black", linewidth=0.8, linestyle=":", label=f"even share, 1/{len(share)}")
    axes.set(xlabel="codes, most used first", ylabel="share of tokens", xlim=(0, len(share) - 1), ylim=(0, None))
    axes.set_title(f"{usage:.1f} % of codes used, perplexity {perplexity:.1f}", fontsize=10)
    axes.legend(frameon=False)
    return figure


def picture_of(figure: Figure) -> Image.Image:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return Image.open(file).convert("RGB")


def neighbour_histogram(distances: Tensor, counts: Tensor) -> Figure:
    """Each code's distance to the nearest other one (K,), of used and unused codes apart; counts (K,)"""
    values, used = distances.cpu().numpy(), counts.cpu().numpy() > 0
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, float(values.max()) or 1.0, 50).tolist()
    labels = [f"{used.sum()} used", f"{(~used).sum()} unused"]
    axes.hist([values[used], values[~used]], bins, stacked=True, label=labels)
    axes.set(xlabel="distance to the nearest other code", ylabel="codes", xlim=(0, bins[-1]))
    axes.legend(frameon=False)
    return figure


def codebook_map(points: Tensor, explained: float, counts: Tensor) -> Figure:
    """points (K, 2): the codes on their first two principal components, which carry `explained` of their variance;
    counts (K,) colour them."""
    places, uses = points.cpu().numpy(), counts.cpu().numpy()
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    used = uses > 0
    (x, y), (other_x, other_y) = places[used].T, places[~used].T
    label = f"{(~used).sum()} unused"
    axes.scatter(other_x, other_y, s=12, color="tab:red", marker="x", linewidth=0.8, zorder=3, label=label)
    if used.any():
        shown = axes.scatter(x, y, s=14, c=uses[used], norm=LogNorm(), label=f"{used.sum()} used")
        figure.colorbar(shown, label="tokens")
    axes.set(xlabel="first principal component", ylabel="second")
    axes.set_title(f"{100 * explained:.0f} % of the codes' variance", fontsize=10)
    axes.legend(frameon=False)
    return figure
