"""Runs that begin with weights of another: all of them, the decoder alone, with a discriminator that warms up first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, TAMING, mostly_slow
from runs import metrics, tensors
from safetensors.torch import load_file
from tiny import DISCRIMINATOR, QUANTIZERS, tiny_config, write_splits
from torch import Tensor

from vqgan_accel.config import Config
from vqgan_accel.interop.lightning import import_lightning
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.training.loop import train
from vqgan_accel.training.setup import open_run

ADVERSARIAL = DISCRIMINATOR | {"weight": 0.5, "adaptive_weight": True}


def first_state(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The networks of a run before its first step."""
    with open_run(config) as run:
        adversary = run.networks.adversary
        discriminator = adversary.discriminator.network.state_dict() if adversary else None
        return run.networks.tokenizer.network.state_dict(), discriminator


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.seconds
def test_a_run_begins_with_the_average_and_the_discriminator_of_another_and_resumes_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tiny_config(tmp_path / "first", discriminator=ADVERSARIAL, training={"ema_decay": 0.5}))
    checkpoint = first / "checkpoints" / "latest"
    config = tiny_config(tmp_path / "second", discriminator=ADVERSARIAL, training={"init_from": str(first)})
    tokenizer, discriminator = first_state(config)
    assert_equal(tokenizer, load_file(checkpoint / "tokenizer_ema" / "diffusion_pytorch_model.safetensors"))
    assert discriminator is not None
    assert_equal(discriminator, load_file(checkpoint / "discriminator.safetensors"))
    said = capsys.readouterr().out
    assert f"beginning with the tokenizer of {checkpoint.resolve() / 'tokenizer_ema'}\n" in said
    assert f"beginning with the discriminator of {checkpoint.resolve() / 'discriminator.safetensors'}\n" in said

    train(config)
    first.rename(tmp_path / "gone")
    train(config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 3})}), resume=True)


@pytest.mark.seconds
@pytest.mark.parametrize("saved", ["run without one", "save_pretrained", "import"])
def test_where_there_is_no_discriminator_it_is_the_fresh_one_of_the_seed(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {"discriminator": ADVERSARIAL}
    if saved == "import":
        source = tmp_path / "imported"
        import_lightning(GOLDEN / "lightning_ema_head.ckpt", GOLDEN / "lightning_ema_head.yaml", source)
        write_splits(tmp_path / "images", size=32)
        more["data"] = {"path": str(tmp_path / "images"), "image_size": 32}
        more["quantizer"] = {"type": "ema", "num_codes": 32, "embedding_dim": 16}
        more["autoencoder"] = {"channel_multipliers": [1, 2], "norm_variance": "unbiased"}
    else:
        source = train(tiny_config(tmp_path / "first"))
        if saved == "save_pretrained":
            source = tmp_path / "tokenizer"
            ImageTokenizer.from_pretrained(tmp_path / "first/run/checkpoints/latest/tokenizer").save_pretrained(source)
    config = tiny_config(tmp_path / "second", training={"init_from": str(source)}, **more)
    _, fresh = first_state(tiny_config(tmp_path / "third", **more))
    _, discriminator = first_state(config)
    assert discriminator is not None and fresh is not None
    assert_equal(discriminator, fresh)
    said = capsys.readouterr().out
    assert "with a fresh discriminator\n" in said and "beginning with the discriminator" not in said
    train(config)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("quantizer", "architecture"),
    mostly_slow([*((kind, "maskgit") for kind in QUANTIZERS), ("ema", "taming")], ("standard", "maskgit")),
)
def test_decoder_only_changes_the_decoder_and_no_code(quantizer: str, architecture: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"quantizer": {"type": quantizer}, "discriminator": ADVERSARIAL}
    if architecture == "taming":
        settings["autoencoder"] = TAMING
    first = train(tiny_config(tmp_path / "first", **settings))
    training = {"init_from": str(first), "decoder_only": True, "max_steps": 3, "base_lr": 1e-2, "ema_decay": 0.5}
    second = train(tiny_config(tmp_path / "second", training=training, **settings))
    before, after = (run / "checkpoints" / "latest" / "tokenizer" for run in (first, second))
    old, new = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (before, after))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    decoder = {name for name in old if name.startswith("decoder.")}
    without_gradient = {name for name in decoder if name.endswith("to_k.bias")}  # attention's softmax cancels it
    assert decoder - without_gradient <= changed <= decoder
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    a, b = (ImageTokenizer.from_pretrained(folder) for folder in (before, after))
    assert torch.equal(a.encode(images), b.encode(images))
    moments = [name for name in tensors(second / "checkpoints" / "latest") if ":tokenizer/" in name]
    assert len(moments) == 3 * len(decoder)  # two moments and a step of every tensor that learns


@pytest.mark.seconds
def test_while_the_discriminator_warms_up_it_learns_and_the_tokenizer_learns_as_without_it(tmp_path: Path) -> None:
    training = {"max_steps": 4, "log_every": 1}
    alone = metrics(train(tiny_config(tmp_path / "alone", training=training)))
    warm = ADVERSARIAL | {"start": "1 step", "warmup": "2 steps", "r1_weight": 1.0, "r1_every": 2}
    warmed = metrics(train(tiny_config(tmp_path / "warmed", discriminator=warm, training=training)))
    steps = [line for line in warmed if "l1" in line]
    assert [line.get("adversarial_weight", -1) > 0 for line in steps] == [False, False, False, True]
    assert ["discriminator" in line for line in steps] == [False, True, True, True]
    assert steps[1]["grad_norm_discriminator"] > 0 and steps[1]["logits_fake"] != steps[2]["logits_fake"]
    for plain, line in zip([line for line in alone if "l1" in line][:3], steps[:3], strict=True):
        for name in ("l1", "l2", "total", "grad_norm_tokenizer"):
            assert line[name] == plain[name], name
    assert steps[3]["grad_norm_tokenizer"] != [line for line in alone if "l1" in line][3]["grad_norm_tokenizer"]


@pytest.mark.parametrize("theirs", ["standard", "gumbel"])
@pytest.mark.parametrize("ours", ["ema", "gumbel"])
def test_another_quantizer_is_named(ours: str, theirs: str, tmp_path: Path) -> None:
    source = train(tiny_config(tmp_path / "first", quantizer={"type": theirs}))
    config = tiny_config(tmp_path / "second", quantizer={"type": ours}, training={"init_from": str(source)})
    if ours == theirs:
        train(config)
        return
    with pytest.raises(ValueError, match=rf"has another quantizer\.type \({theirs}\)"):
        train(config)


def test_another_epsilon_of_an_ema_codebook_is_another_codebook(tmp_path: Path) -> None:
    source = train(tiny_config(tmp_path / "first", quantizer={"type": "ema"}))
    settings = {"init_from": str(source), "decoder_only": True}
    config = tiny_config(tmp_path / "second", quantizer={"type": "ema", "epsilon": 0.5}, training=settings)
    with pytest.raises(ValueError, match=r"has another quantizer\.epsilon \(1e-05\)"):
        train(config)


@pytest.mark.seconds
def test_a_layout_may_be_written_in_two_ways(tmp_path: Path) -> None:
    source = train(tiny_config(tmp_path / "a", quantizer={"type": "gumbel"}))
    written = {"type": "gumbel", "hidden_channels": 16}
    train(tiny_config(tmp_path / "b", quantizer=written, training={"init_from": str(source)}))
    source = train(tiny_config(tmp_path / "first", autoencoder=TAMING | {"attention_levels": [2, 0]}))
    layout = TAMING | {"attention_levels": [0, -1]}
    train(tiny_config(tmp_path / "second", autoencoder=layout, training={"init_from": str(source)}))


@pytest.mark.seconds
def test_what_cannot_be_begun_with_is_named(tmp_path: Path) -> None:
    run = train(tiny_config(tmp_path / "first"))
    for training, sentence in (
        ({"init_from": str(tmp_path / "nowhere")}, r"training\.init_from: there is no run, checkpoint .*/nowhere"),
        ({"init_from": str(tmp_path)}, r"training\.init_from: .* holds no tokenizer"),
    ):
        with pytest.raises(FileNotFoundError, match=sentence):
            train(tiny_config(tmp_path / "second", training=training))
    for other, sentence in (
        ({"autoencoder": {"channels": 64}}, r"has another autoencoder\.channels \(32\)"),
        ({"quantizer": {"num_codes": 8}}, r"has another quantizer\.num_codes \(16\)"),
        ({"quantizer": {"type": "ema"}}, r"has another quantizer\.type \(standard\)"),
        (
            {"autoencoder": {"channels": 64}, "quantizer": {"num_codes": 8}},
            r"has another autoencoder\.channels \(32\), quantizer\.num_codes \(16\); give this run the same",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(tiny_config(tmp_path / "second", training={"init_from": str(run)}, **other))
    with pytest.raises(ValueError, match=r"training: decoder_only keeps an encoder as it is: say in init_from whose"):
        tiny_config(tmp_path, training={"decoder_only": True})
    with pytest.raises(ValueError, match=r"reinit_every=1 epoch would change"):
        training = {"decoder_only": True, "init_from": "run"}
        tiny_config(tmp_path, training=training, quantizer={"reinit_every": "1 epoch"})
    assert not (tmp_path / "second" / "run").exists()
