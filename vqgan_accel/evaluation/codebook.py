"""Where a tokenizer's codes lie and which of them a split of images uses: three pictures and a table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.data.opening import evaluation_loader, open_source, require_apart
from vqgan_accel.data.views import to_float
from vqgan_accel.evaluation.figures import codebook_histogram, codebook_map, neighbour_histogram
from vqgan_accel.evaluation.measures.codes import codebook_usage, perplexity
from vqgan_accel.files import require_absent, written_as_a_whole
from vqgan_accel.models.opening import open_tokenizer
from vqgan_accel.models.quantizers import count_all_codes
from vqgan_accel.models.weights import require_finite

TABLE = "codebook.csv"
DOUBTFUL = 1e-9  # d^2 / |a|^2: there float64 products have an error of 1e-6, as float32 has anyway
MAX_DISTANCES = 2**25  # between codes, of one block: 256 MB


@torch.no_grad()
def codebook(
    model: str | Path, *, data: str | Path | None = None, output: str | Path, overrides: Sequence[str] = ()
) -> list[str]:
    """Write output/usage.png (each code's share of the tokens), neighbours.png (how far codes lie from one another),
    pca.png (where they lie, and how often each is used) and codebook.csv (code, uses, nearest other code, its
    distance); of several codebooks in output/codebook_1 and so on. Returns lines that say what they show.

    model, data, overrides, errors: as evaluate's; uses are counted on `evaluation.split` of `data.path`.
    """
    output = Path(output)
    require_absent(output)  # before all images are encoded
    opened = open_tokenizer(model)
    tokenizer, config = opened.tokenizer, opened.config(overrides, data)
    source = open_source(config.data, config.evaluation.split)
    require_apart(output, config.data, "--output")
    device = start_accelerator("no", config.training.timeout_minutes).device
    require_finite(tokenizer, str(opened.folder))
    tokenizer.to(device)
    quantizer, crop = tokenizer.quantizer, config.evaluation.rules.crop
    sizes = quantizer.codebook_sizes
    counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    for batch in evaluation_loader(
        source, config.data, config.evaluation.batch_size, 0, 1, pin_memory=False, crop=crop
    ):
        codes = tokenizer.encode(to_float(batch["image"].to(device)))
        counts += count_all_codes(codes, sizes)
    with written_as_a_whole(output) as partial:
        if len(sizes) == 1:
            lines = describe_codes(counts, quantizer.code_vectors(), partial)
        else:
            lines = []
            for place, some in enumerate(counts.split(sizes)):
                folder = partial / f"codebook_{place + 1}"
                folder.mkdir()
                said = describe_codes(some, quantizer.code_vectors(place), folder)
                lines += [f"codebook {place + 1}: {line}" for line in said]
    return [*lines, f"written to {output}"]


def describe_codes(counts: Tensor, vectors: Tensor, folder: Path) -> list[str]:
    """Write the pictures and the table of one codebook, counts (K,) and vectors (K, D)."""
    distances, nearest = nearest_others(vectors)
    points, explained = principal_components(vectors)
    entropy, usage = perplexity(counts), codebook_usage(counts)
    codebook_histogram(counts, entropy, usage).savefig(folder / "usage.png", dpi=120)
    neighbour_histogram(distances, counts).savefig(folder / "neighbours.png", dpi=120)
    codebook_map(points, explained, counts).savefig(folder / "pca.png", dpi=120)
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["code", "uses", "nearest_code", "distance"])
        columns = (counts.tolist(), nearest.tolist(), distances.tolist())
        writer.writerows((code, *row) for code, row in enumerate(zip(*columns, strict=True)))
    return [
        f"{usage:.1f} % of {len(counts)} codes used, perplexity {entropy:.1f}, of {int(counts.sum()):,} tokens",
        f"distance to the nearest other code: median {distances.median():.4g}, smallest {distances.min():.4g}",
        f"two principal components carry {100 * explained:.0f} % of the codes' variance",
    ]


def nearest_others(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """vectors (K, D) -> each one's Euclidean distance to the nearest other one (K,), and which that is (K,)

    By matrix products, in float64 and about the mean, which take a twelfth of the time of all differences; where a
    distance is so small that it could be lost in what cancels there, by the differences.
    """
    exact = vectors.double()
    centred = exact - exact.mean(0)
    squares = centred.square().sum(1)

    def products(rows: Tensor) -> Tensor:
        """Squared distances less the row's own square."""
        return torch.addmm(squares, centred[rows], centred.T, alpha=-2)

    def differences(rows: Tensor) -> Tensor:
        return torch.cdist(exact[rows], exact, compute_mode="donot_use_mm_for_euclid_dist")

    at_once = max(1, MAX_DISTANCES // len(exact))
    found = smallest_but_own(products, torch.arange(len(exact), device=exact.device), at_once)
    distances = (exact - exact[found]).norm(dim=1)
    doubtful = ((distances > 0) & (distances.square() < DOUBTFUL * squares)).nonzero().flatten()
    found[doubtful] = smallest_but_own(differences, doubtful, at_once)
    return (exact - exact[found]).norm(dim=1).to(vectors.dtype), found


def smallest_but_own(distances: Callable[[Tensor], Tensor], rows: Tensor, at_once: int) -> Tensor:
    """distances: of rows (n,), to all codes (n, K) -> each row's nearest other code (N,)"""
    nearest = []
    for block in rows.split(at_once):
        nearest.append(distances(block).scatter_(1, block[:, None], torch.inf).argmin(1))
    return torch.cat(nearest)


def principal_components(vectors: Tensor) -> tuple[Tensor, float]:
    """vectors (K, D) -> (K, 2) on the first two principal components, and the share of the variance that these have"""
    vectors = vectors.double()
    centred = vectors - vectors.mean(0)
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    points = torch.zeros(len(vectors), 2, dtype=torch.float64, device=vectors.device)
    points[:, : len(directions[:2])] = centred @ directions[:2].T
    total = scales.square().sum()
    return points, float(scales[:2].square().sum() / total) if total else 0.0
