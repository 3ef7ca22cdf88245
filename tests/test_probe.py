"""A probe's loss is known in closed form for codes of known structure, and its files are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer
from PIL import Image
from tiny import write_images
from torchvision import models as tv

from vqgan_accel.cli import main
from vqgan_accel.config import StandardQuantizerConfig
from vqgan_accel.evaluation.probe import (
    HELD_OUT,
    bits_per_token,
    code_losses,
    draw,
    entropy,
    fit,
    linear_classifier,
    probe,
)
from vqgan_accel.tokens.write import tokenize

CPU = torch.device("cpu")
SHARES = torch.tensor([0.5, 0.25, 0.125, 0.125])  # an entropy of 1.75 bits


def independent(number: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(SHARES.expand(number, -1), 8, replacement=True, generator=generator)


def chain(number: int, seed: int) -> torch.Tensor:
    """Each of five codes says which one follows: c -> 5 c + 3 mod 8, a cycle through all of them."""
    codes = [torch.randint(8, (number,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(4):
        codes.append((5 * codes[-1] + 3) % 8)
    return torch.stack(codes, 1)


@pytest.mark.slow
def test_of_independent_codes_it_is_their_entropy() -> None:
    model = fit(independent(4000, 0), 4, 40, 0, CPU)
    codes = independent(2000, 1)
    assert entropy(codes, 4) == pytest.approx(1.75, abs=0.02)
    assert entropy(codes, 4) - 0.01 < bits_per_token(model, codes) < entropy(codes, 4) + 0.03


@pytest.mark.slow
def test_of_a_deterministic_chain_it_is_what_the_first_code_costs() -> None:
    model = fit(chain(2000, 0), 8, 60, 0, CPU)
    codes = chain(500, 1)
    assert entropy(codes, 8) == pytest.approx(3, abs=0.01)
    assert 3 / 5 - 0.01 < bits_per_token(model, codes) < 3 / 5 + 0.03
    losses = code_losses(model, codes).detach().mean(0) / math.log(2)
    assert losses[0] == pytest.approx(3, abs=0.05) and losses[1:].max() < 0.03
    drawn = draw(model, 100, 5, seed=0)
    follows = drawn[:, 1:] == (5 * drawn[:, :-1] + 3) % 8
    assert follows.float().mean() > 0.98 and len(drawn[:, 0].unique()) > 6


@pytest.mark.seconds
def test_the_same_seed_gives_the_same_model_and_another_one_does_not() -> None:
    codes = chain(100, 0)
    first, same, other = (bits_per_token(fit(codes, 8, 3, seed, CPU), codes) for seed in (0, 0, 1))
    assert first == same != other


def test_it_sees_no_code_before_it_is_given() -> None:
    model = fit(chain(100, 0), 8, 3, 0, CPU)
    codes = chain(10, 1)
    changed = codes.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 8
    before, after = code_losses(model, codes), code_losses(model, changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_a_linear_classifier_finds_classes_that_a_plane_divides() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 5, generator=generator).double(), torch.randn(300, 5, generator=generator).double()
    planes = torch.randn(5, 3, generator=generator).double()
    labels, expected = (x @ planes).argmax(1), (y @ planes).argmax(1)
    assert (linear_classifier(x, y, labels) == expected).double().mean() > 0.95
    mixed = labels[torch.randperm(400, generator=generator)]
    assert (linear_classifier(x, y, mixed) == expected).double().mean() < 0.6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and tokens of 40 images of two classes."""
    folder = tmp_path_factory.mktemp("probe")
    tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=4)).save_pretrained(
        folder / "tokenizer"
    )
    for number, name in enumerate(("ant", "bee")):
        write_images(folder / "images" / "train" / name, 20, seed=number)
    overrides = ["evaluation.split=train", "data.workers=0"]
    tokenize(folder / "tokenizer", data=folder / "images", output=folder / "tokens", overrides=overrides)
    return folder


@pytest.mark.seconds
def test_the_command_writes_numbers_and_a_grid(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["probe", str(made / "tokenizer"), "--tokens", str(made / "tokens"), "--steps", "3", "--samples", "9"]
    torch.save(tv.mobilenet_v2(weights=None).state_dict(), tmp_path / "mobilenet_v2.pth")
    asked = ["evaluation.metrics=[psnr, fd_mobilenet]", f"weights.mobilenet_v2={tmp_path / 'mobilenet_v2.pth'}"]
    assert main([*command, "--output", str(tmp_path / "out"), *asked]) == 0
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    settings = found.pop("settings")
    assert settings["images"] == 40 - 40 // HELD_OUT and settings["steps"] == 3
    assert set(found) == {
        "sample_fd_mobilenet",
        "sample_fd_mobilenet_std",
        "bits_per_token",
        "entropy",
        "bits_per_pixel",
        "label_accuracy",
        "most_frequent_label",
    }
    assert found["bits_per_pixel"] == pytest.approx(found["bits_per_token"] * 16 / 256)  # 4 x 4 codes of 16 x 16 pixels
    assert found["most_frequent_label"] == 50 and 0 <= found["label_accuracy"] <= 100
    assert f"bits_per_token {found['bits_per_token']:>17.5g}".split() == capsys.readouterr().out.split()[:2]
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (8 * 18 - 2, 2 * 18 - 2)


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "sentence"),
    [
        ("other", "tokens", "holds codes of another tokenizer than"),
        ("tokenizer", "nothing", "holds no tokens"),
        ("tokenizer", "few", "holds codes of 12 images; a probe needs at least 20"),
    ],
)
def test_what_cannot_be_probed_is_told(made: Path, tmp_path: Path, tokenizer: str, tokens: str, sentence: str) -> None:
    other = tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=8, embedding_dim=4))
    other.save_pretrained(tmp_path / "other")
    write_images(tmp_path / "images" / "train", 12)
    overrides = ["evaluation.split=train", "data.workers=0"]
    tokenize(made / "tokenizer", data=tmp_path / "images", output=tmp_path / "few", overrides=overrides)
    places = {"tokenizer": made / "tokenizer", "tokens": made / "tokens"}
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        probe(
            places.get(tokenizer, tmp_path / tokenizer),
            tokens=places.get(tokens, tmp_path / tokens),
            output=tmp_path / "out",
            steps=1,
        )
    assert not (tmp_path / "out").exists()
