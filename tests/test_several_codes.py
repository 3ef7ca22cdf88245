"""Quantizers of several codes a position: residual and product, alone and in all that has codes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative_error
from PIL import Image
from runs import metrics
from tiny import tiny_config, write_images
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel import evaluate, load_tokenizer, load_tokens, tokenize
from vqgan_accel.config import parse_config
from vqgan_accel.describe import describe, description_lines
from vqgan_accel.evaluation.codebook import TABLE, codebook
from vqgan_accel.evaluation.measures.codes import usage_metrics
from vqgan_accel.evaluation.probe import probe
from vqgan_accel.interop.diffusers import export_diffusers
from vqgan_accel.models.quantizers import EMAQuantizer, ProductQuantizer, ResidualQuantizer, StandardQuantizer
from vqgan_accel.models.quantizers.base import count_all_codes
from vqgan_accel.training.codebook import initialise_by_kmeans
from vqgan_accel.training.loop import train

K, D, DEPTH = 12, 6, 3


def layer(seed: int, scale: float = 1.0, kind: str = "standard") -> Any:
    torch.manual_seed(seed)
    made = StandardQuantizer(K, D, 0.25) if kind == "standard" else EMAQuantizer(K, D, 0.25, 0.9, 1e-5)
    with torch.no_grad():
        for name in ("codebook", "sums"):
            if hasattr(made, name):
                getattr(made, name).normal_().mul_(scale)
    return made


def residual(dropout: float = 0.0, kind: str = "standard") -> ResidualQuantizer:
    return ResidualQuantizer([layer(seed, 0.6**seed, kind) for seed in range(DEPTH)], DEPTH, dropout)


def latents(channels: int = D, batch: int = 5) -> Tensor:
    return torch.randn(batch, channels, 4, 2, generator=torch.Generator().manual_seed(5))


# ---- residual


def test_residual_codes_losses_and_gradients_are_those_of_a_plain_loop_over_tokens() -> None:
    quantizer, z = residual(), latents().requires_grad_()
    output = quantizer(z)
    books = [part.codebook.detach().double() for part in quantizer.parts]
    tokens = z.detach().double().permute(0, 2, 3, 1).reshape(-1, D)
    codes, sums, loss = [], [], 0.0
    book_gradients, pull = [torch.zeros(K, D).double() for _ in books], torch.zeros_like(tokens)
    for token in range(len(tokens)):
        left, total, mine = tokens[token].clone(), torch.zeros(D).double(), []
        for level, book in enumerate(books):
            nearest = min(range(K), key=lambda k: float((left - book[k]).square().sum()))
            mine.append(nearest)
            total += book[nearest]
            loss += 1.25 * float((tokens[token] - total).square().sum()) / tokens.numel()  # eq. 8, and the codebook's
            book_gradients[level][nearest] += 2 * (book[nearest] - left) / tokens.numel()
            left = left - book[nearest]
            pull[token] += 0.25 * 2 * left / tokens.numel()
        codes.append(mine)
        sums.append(total)
    assert output.codes.shape == (5, DEPTH, 4, 2)
    assert output.codes.permute(0, 2, 3, 1).reshape(-1, DEPTH).tolist() == codes
    assert relative_error(output.quantized.permute(0, 2, 3, 1).reshape(-1, D).double(), torch.stack(sums)) < 1e-6
    assert output.loss.item() == pytest.approx(loss, rel=1e-6)
    assert output.metrics["commitment_loss"].item() == pytest.approx(loss / 1.25, rel=1e-6)
    output.loss.backward()
    assert z.grad is not None and relative_error(z.grad.permute(0, 2, 3, 1).reshape(-1, D).double(), pull) < 1e-5
    for part, expected in zip(quantizer.parts, book_gradients, strict=True):
        assert relative_error(part.codebook.grad.double(), expected) < 1e-5


def test_the_gradient_of_the_sum_goes_straight_through() -> None:
    quantizer, z = residual(), latents().requires_grad_()
    direction = torch.randn(5, D, 4, 2)
    gradient, *books = torch.autograd.grad(
        (quantizer(z).quantized * direction).sum(), [z, *quantizer.parameters()], allow_unused=True
    )
    assert torch.equal(gradient, direction) and books == [None] * DEPTH


def test_one_level_is_its_quantizer_bit_for_bit() -> None:
    alone, one, z = layer(0), ResidualQuantizer([layer(0)], 1, 0.0), latents()
    expected, output = alone(z), one(z)
    assert torch.equal(output.codes[:, 0], expected.codes) and torch.equal(output.quantized, expected.quantized)
    assert torch.equal(output.loss, expected.loss)


def test_what_is_left_gets_shorter_from_level_to_level() -> None:
    """With codebooks that k-means has found, and then by the plain mean of squares."""
    quantizer, z = residual().requires_grad_(False), latents(batch=40)
    initialise_by_kmeans(quantizer, [z], seed=3)
    left = [float(part.square().mean()) for _, part in quantizer.descend(z)]
    assert left[0] == pytest.approx(float(z.square().mean()), rel=1e-6)
    assert left[2] < 0.8 * left[1] < 0.64 * left[0]


def test_a_shared_codebook_has_one_set_of_weights_and_learns_from_all_levels() -> None:
    shared = ResidualQuantizer([layer(0, kind="ema")], DEPTH, 0.0)
    assert len(list(shared.state_dict())) == 2
    z = latents()
    output = shared(z)
    counts = count_all_codes(output.codes, shared.codebook_sizes).view(DEPTH, K).sum(0)
    assert torch.equal(shared.parts[0].new_counts, counts.float()) and counts.sum() == 3 * 40
    [lookup] = shared.lookups(z)
    assert lookup.places == (0, 1, 2) and lookup.latents.shape == (5, D, 12, 2)
    second = z - shared.parts[0].codes_to_latents(output.codes[:, 0])
    torch.testing.assert_close(lookup.latents[:, :, 4:8], second)


def test_dropout_leaves_levels_out_by_the_samples_seed_alone() -> None:
    quantizer, whole, z = residual(dropout=0.6), residual(), latents(batch=400)
    seeds = list(range(400))
    output = quantizer.train()(z, seeds)
    full = whole(z)
    assert torch.equal(output.codes, full.codes) and torch.equal(output.loss, full.loss)  # all levels learn from all
    vectors = [part.codes_to_latents(codes) for part, codes in zip(quantizer.parts, full.codes.unbind(1), strict=True)]
    partial = [sum(vectors[: level + 1]) for level in range(DEPTH)]
    fits = torch.stack([(output.quantized - part).abs().amax((1, 2, 3)) < 1e-5 for part in partial], 1)
    assert (fits.sum(1) == 1).all()
    shares = fits.float().mean(0).tolist()
    # each number of levels with probability 0.2, and all of them with 0.4 more
    assert shares == pytest.approx([0.2, 0.2, 0.6], abs=4 * math.sqrt(0.25 / 400))
    alone = quantizer(z[7:8], [7]).quantized
    torch.testing.assert_close(alone, output.quantized[7:8], rtol=0, atol=1e-6)
    torch.testing.assert_close(quantizer.eval()(z, seeds).quantized, full.quantized, rtol=0, atol=1e-6)


# ---- product


def test_a_product_is_its_groups_side_by_side() -> None:
    groups = [layer(seed) for seed in range(2)]
    product, z = ProductQuantizer(groups), latents(2 * D).requires_grad_()
    output = product(z)
    parts = [group(chunk) for group, chunk in zip(groups, z.chunk(2, 1), strict=True)]
    assert output.codes.shape == (5, 2, 4, 2)
    for place, part in enumerate(parts):
        assert torch.equal(output.codes[:, place], part.codes)
        assert torch.equal(output.quantized[:, place * D : (place + 1) * D], part.quantized)
    # 1.25 times the mean over all elements
    assert output.loss.item() == pytest.approx(1.25 * F.mse_loss(output.quantized, z).item(), rel=1e-5)
    assert output.metrics["commitment_loss"].item() == pytest.approx(output.loss.item() / 1.25, rel=1e-6)
    assert torch.equal(product.code_vectors(1), groups[1].codebook)
    assert [lookup.places for lookup in product.lookups(z)] == [(0,), (1,)]


# ---- uses


@pytest.mark.parametrize("make", [ResidualQuantizer, ProductQuantizer])
def test_a_discarded_update_leaves_every_codebook_as_it_was(make: Any) -> None:
    layers = [layer(seed, kind="ema") for seed in range(2)]
    quantizer = make(layers) if make is ProductQuantizer else make(layers, 2, 0.0)
    before = {name: tensor.clone() for name, tensor in quantizer.named_buffers()}
    quantizer(latents(quantizer.input_channels))
    assert all(part.new_counts.sum() == 5 * 8 for part in layers)
    quantizer.discard_update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.named_buffers())


def test_uses_are_counted_and_summed_up_by_codebook() -> None:
    codes = torch.tensor([[[[0, 0]], [[1, 3]]], [[[0, 0]], [[3, 3]]]])  # (2, 2, 1, 2)
    counts = count_all_codes(codes, (2, 4))
    assert counts.tolist() == [4, 0, 0, 1, 0, 3]
    found = usage_metrics(counts, (2, 4))
    second = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert found == {
        "perplexity": pytest.approx(math.sqrt(second)),
        "codebook_usage": 50.0,
        "perplexity_1": pytest.approx(1.0),
        "perplexity_2": pytest.approx(second),
        "codebook_usage_1": 50.0,
        "codebook_usage_2": 50.0,
    }
    assert count_all_codes(codes[:, 1], (4,)).tolist() == [0, 1, 0, 3]


# ---- in all that has codes


def test_bits_are_those_of_all_places() -> None:
    config = parse_config(
        {
            "training": {"max_steps": 1},
            "quantizer": {"type": "residual", "depth": 3, "inner": {"num_codes": 16}},
        }
    )
    summary = describe(config)
    assert summary["bits_per_pixel"] == pytest.approx(3 * 4 / summary["image_size"] ** 2 * 16**2)
    assert "latent grid        16 x 16 x 3 = 768 codes of 16 (residual quantizer" in "\n".join(
        description_lines(summary)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    quantizer = {
        "type": "residual",
        "depth": 3,
        "inner": {
            "num_codes": 16,
            "embedding_dim": 8,
            "init": "kmeans",
            "reinit_every": "2 steps",
            "reinit_below": 0.5,
        },
    }
    training = {"max_steps": 4, "log_every": 1}
    return train(tiny_config(folder, quantizer=quantizer, training=training))


def test_a_run_says_the_use_of_each_codebook_and_replaces_rare_codes(run: Path) -> None:
    lines = metrics(run)
    told = [line for line in lines if "recent_perplexity" in line or "epoch_perplexity" in line]
    assert len(told) == 2
    for line in told:
        parts = [value for key, value in line.items() if "perplexity_" in key]
        assert len(parts) == 3 and all(1 <= value <= 16 for value in parts)
        assert line["reinitialised_codes"] > 0
    [validation] = [line for line in lines if "validation/perplexity" in line][-1:]
    assert {f"validation/codebook_usage_{place}" for place in (1, 2, 3)} <= validation.keys()


@pytest.mark.seconds
def test_evaluation_tokens_pictures_and_export_know_several_codes(run: Path, tmp_path: Path) -> None:
    report = evaluate(run, output=tmp_path / "evaluation")["results"]
    bits = math.log2(report["perplexity"])
    assert report["bits_per_token"] == pytest.approx(bits)
    assert report["bits_per_pixel"] == pytest.approx(3 * bits / 16)  # a position has 4 x 4 pixels
    manifest = tokenize(run, output=tmp_path / "tokens")
    assert (manifest["code_grid"], manifest["codebook_sizes"]) == ([3, 4, 4], [16, 16, 16])
    rows, tokenizer = load_tokens(tmp_path / "tokens").with_format("torch"), load_tokenizer(run)
    codes = torch.stack([row["codes"] for row in rows]).long().view(-1, *manifest["code_grid"])
    files = sorted((run.parent / "images" / "validation").iterdir())
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2)
    assert torch.equal(tokenizer.encode(pixels / 127.5 - 1), codes)
    assert codes.max() < 16 and len({tuple(place.flatten().tolist()) for place in codes.unbind(1)}) == 3
    write_images(run.parent / "images" / "many", 21)
    many = ["data.validation_split=many", "evaluation.metrics=[psnr]"]
    tokenize(run, output=tmp_path / "many", overrides=many)
    probed = probe(run, tokens=tmp_path / "many", output=tmp_path / "probe", steps=2, samples=2, overrides=many)
    assert probed["bits_per_pixel"] == pytest.approx(3 * probed["bits_per_token"] / 16)
    lines = codebook(run, output=tmp_path / "codebook")
    for place in (1, 2, 3):
        uses = [
            int(line.split(",")[1])
            for line in (tmp_path / "codebook" / f"codebook_{place}" / TABLE).open()
            if line[0] != "c"
        ]
        assert sum(uses) == len(rows) * 16
        assert any(line.startswith(f"codebook {place}: ") for line in lines)
    with pytest.raises(ValueError, match="maskgit architecture"):
        export_diffusers(run, output=tmp_path / "export")
    assert json.loads((tmp_path / "tokens" / "manifest.json").read_text())["codebook_sizes"] == [16, 16, 16]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            ["quantizer.type=residual", "quantizer.inner.type=residual"],
            "'quantizer.inner.type' is 'residual' but must be",
        ),
        (["quantizer.type=product", "quantizer.inner.type=gumbel"], "'quantizer.inner.type' is 'gumbel' but must be"),
        (["quantizer.type=residual", "quantizer.depth=1"], "'quantizer.depth' is 1: input should be greater than or"),
        (["quantizer.type=residual", "quantizer.inner.l2_normalize=true"], "inner.l2_normalize makes all of a level's"),
        (["quantizer.type=product", "quantizer.inner.nmu_codes=2"], "did you mean 'quantizer.inner.num_codes'?"),
        (
            ["quantizer.type=residual", "quantizer.inner.init=kmeans"],
            "init kmeans finds 1024 centres in the latents of",
        ),
    ],
)
def test_what_cannot_be_made_of_quantizers_is_one_sentence(override: list[str], sentence: str) -> None:
    values = {"training": {"max_steps": 1, "total_batch_size": 2}, "data": {"image_size": 32}}
    with pytest.raises(ValueError) as error:
        parse_config(values, override)
    assert sentence in str(error.value) and len(str(error.value).splitlines()) == 1


def test_another_type_of_a_section_in_a_section_begins_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "training": {"max_steps": 1},
        "quantizer": {"type": "product", "inner": {"type": "ema", "decay": 0.5, "num_codes": 8}},
    }
    config = parse_config(values, ["quantizer.inner.type=standard"])
    assert config.quantizer.inner.type == "standard" and config.quantizer.inner.num_codes == 8
    assert (
        "quantizer.inner.type=standard leaves out what config says of another type: decay 0.5"
        in capsys.readouterr().err
    )
