"""Checkpoints that the Lightning trainer itself wrote, imported: its codes, its reconstructions, its YAML."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import GOLDEN, load_golden
from safetensors.torch import load_file

from vqgan_accel.cli import main
from vqgan_accel.config import EMAQuantizerConfig, GumbelQuantizerConfig, load_config
from vqgan_accel.interop.lightning import import_lightning
from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator
from vqgan_accel.models.finding import find_tokenizer
from vqgan_accel.models.quantizers import EMAQuantizer
from vqgan_accel.models.tokenizer import ImageTokenizer

CASES = [
    f"{quantizer}_{revision}" for quantizer in ("standard", "ema", "gumbel", "entropy") for revision in ("old", "head")
]
LOSS = {
    "l1_weight": 0.1,
    "l2_weight": 1.0,
    "perc_weight": 0.2,
    "adversarial_params": {
        "start_epoch": 1,
        "loss_type": "non-saturating",
        "g_weight": 0.8,
        "use_adaptive": True,
        "r1_reg_weight": 10.0,
        "r1_reg_every": 16,
    },
}


def files(case: str) -> tuple[Path, Path]:
    return GOLDEN / f"lightning_{case}.ckpt", GOLDEN / f"lightning_{case}.yaml"


def edited(case: str, folder: Path, loss: dict[str, Any] | None = None, **more: torch.Tensor) -> tuple[Path, Path]:
    """The golden files with a loss section and more tensors."""
    checkpoint, config = (folder / file.name for file in files(case))
    values = yaml.safe_load(files(case)[1].read_text())
    config.write_text(yaml.safe_dump(values | ({"loss": loss} if loss else {})))
    found = torch.load(files(case)[0], weights_only=True)
    found["state_dict"] |= more
    torch.save(found, checkpoint)
    return checkpoint, config


@pytest.mark.parametrize("case", CASES)
def test_codes_are_identical_and_reconstructions_the_trainers_own(case: str, tmp_path: Path) -> None:
    import_lightning(*files(case), tmp_path / "imported")
    folder, config = find_tokenizer(tmp_path / "imported")
    assert config == tmp_path / "imported" / "config.yaml"
    tokenizer, golden = ImageTokenizer.from_pretrained(folder), load_golden(f"lightning_{case}.expected")
    images = 2 * golden["in.images_0_1"] - 1
    codes = tokenizer.encode(images)
    assert torch.equal(codes.flatten(1), golden["out.codes"])
    reconstruction = (tokenizer.decode(codes) + 1) / 2
    expected = golden["out.reconstruction_0_1"].clamp(0, 1)
    assert (reconstruction - expected).abs().max() <= 2e-3
    tokenizer.train()(images)  # and it trains on


def test_an_ema_codebook_is_the_one_it_quantizes_with_whatever_its_counts(tmp_path: Path) -> None:
    counts = torch.linspace(0, 40, 32)  # a code that nothing was counted for among them
    import_lightning(*edited("ema_head", tmp_path, **{"quantizer.ema_count": counts}), tmp_path / "imported")
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "imported" / "tokenizer")
    golden = load_golden("lightning_ema_head.expected")
    assert torch.equal(tokenizer.encode(2 * golden["in.images_0_1"] - 1).flatten(1), golden["out.codes"])
    assert isinstance(tokenizer.quantizer, EMAQuantizer) and torch.equal(tokenizer.quantizer.counts, counts)


@pytest.mark.parametrize("case", CASES)
def test_the_yaml_becomes_a_config_that_builds_the_same_tokenizer(case: str, tmp_path: Path) -> None:
    import_lightning(*files(case), tmp_path / "imported")
    config = load_config(tmp_path / "imported" / "config.yaml")
    saved = ImageTokenizer.from_pretrained(tmp_path / "imported" / "tokenizer").settings
    assert (config.autoencoder, config.quantizer) == (saved.autoencoder_config, saved.quantizer_config)
    assert config.autoencoder.upsample_conv == case.endswith("head")
    assert config.training.total_batch_size == 256 and config.training.base_lr == 3e-4
    assert str(config.training.lr_decay) == "150 epochs" and config.training.max_epochs == 150
    assert config.discriminator is None and config.losses.perceptual_weight == 0 and config.losses.l2_weight == 1
    if isinstance(config.quantizer, EMAQuantizerConfig):
        assert (config.quantizer.decay, config.quantizer.epsilon) == (0.95, 1e-5)
    if isinstance(config.quantizer, GumbelQuantizerConfig):
        assert (config.quantizer.temperature_end, str(config.quantizer.kl_warmup)) == (0.0625, "0.24 epochs")


@pytest.mark.seconds
def test_the_discriminator_comes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = StyleGAN2Discriminator(image_size=32)
    weights = {f"criterion.discriminator.{name}": tensor for name, tensor in theirs.state_dict().items()}
    weights["criterion.discriminator.b32.conv1.resample_filter"] = torch.ones(4, 4)
    weights["criterion.perceptual_loss.net.layers.0.weight"] = torch.ones(1)
    lines = import_lightning(*edited("standard_old", tmp_path, LOSS, **weights), tmp_path / "imported")
    assert lines[-1] == "with its discriminator"
    ours = load_file(tmp_path / "imported" / "discriminator.safetensors")
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())
    config = load_config(tmp_path / "imported" / "config.yaml")
    d = config.discriminator
    assert d is not None and (d.loss, d.weight, d.adaptive_weight, str(d.start)) == (
        "non_saturating",
        0.8,
        True,
        "1 epoch",
    )
    assert (d.r1_weight, d.r1_every) == (10.0, 16)
    losses = config.losses
    assert (losses.l1_weight, losses.l2_weight, losses.perceptual_weight) == (0.1, 1.0, 0.2)
    assert losses.perceptual_network == "lpips_vgg"


def test_the_older_keys_of_the_adversarial_weight_and_the_loss_without_a_discriminator(tmp_path: Path) -> None:
    older = {key: value for key, value in LOSS["adversarial_params"].items() if key not in ("g_weight", "use_adaptive")}
    loss = LOSS | {"adversarial_params": older | {"adaptive_weight": 0.1}}
    import_lightning(*edited("ema_old", tmp_path, loss), tmp_path / "older")
    d = load_config(tmp_path / "older" / "config.yaml").discriminator
    assert d is not None and (d.weight, d.adaptive_weight) == (0.1, True)
    import_lightning(*edited("ema_old", tmp_path, LOSS | {"adversarial_params": None}), tmp_path / "none")
    config = load_config(tmp_path / "none" / "config.yaml")
    assert config.discriminator is None and config.losses.perceptual_network == "lpips_alex"


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("writer", ["torch.save", "pickle"])
def test_a_pickle_that_wants_more_than_tensors_is_refused_and_nothing_of_it_is_executed(
    writer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, executed = tmp_path / "evil.ckpt", tmp_path / "executed"
    found = torch.load(files("ema_old")[0], weights_only=True) | {"callbacks": Malicious(executed)}
    if writer == "pickle":
        checkpoint.write_bytes(pickle.dumps(found))
    else:
        torch.save(found, checkpoint)
    arguments = ["import", "lightning", str(checkpoint), "--config", str(files("ema_old")[1])]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "evil.ckpt is not a file of weights that can be read safely" in capsys.readouterr().err
    assert not executed.exists() and not (tmp_path / "out").exists()
    torch.load(checkpoint, weights_only=False) if writer == "torch.save" else pickle.loads(checkpoint.read_bytes())
    assert executed.exists()  # the file is as malicious as it looks


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (
            "autoencoder.channel_multipliers",
            None,
            "'autoencoder.channel_multipliers' is None, which",
        ),
        ("autoencoder.channel_multipliers", 3, "'autoencoder.channel_multipliers' is 3"),
        ("training.betas", ["a", 1], r"'training.betas' is \['a', 1\], which is no numbers"),
        ("training.betas", 5, "'training.betas' is 5"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(key: str, value: object, reason: str, tmp_path: Path) -> None:
    values = yaml.safe_load(files("ema_old")[1].read_text())
    section, name = key.split(".")
    values[section][name] = value
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=rf"wrong\.yaml: {reason}"):
        import_lightning(files("ema_old")[0], tmp_path / "wrong.yaml", tmp_path / "out")


def test_what_does_not_fit_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    checkpoint, config = files("standard_old")
    output = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.ckpt"):
        import_lightning(tmp_path / "nowhere.ckpt", config, output)
    with pytest.raises(FileNotFoundError, match=r"no YAML file at .*nowhere\.yaml"):
        import_lightning(checkpoint, tmp_path / "nowhere.yaml", output)
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("commitment_cost", "commitment"))
    with pytest.raises(ValueError, match=r"other\.yaml .* no 'quantizer\.params\.commitment_cost'"):
        import_lightning(checkpoint, other, output)
    other.write_text(config.read_text().replace("num_embeddings: 32", "num_embeddings: 64"))
    with pytest.raises(ValueError, match=r"standard_old\.ckpt holds the weights of another network: .*codebook"):
        import_lightning(checkpoint, other, output)
    other.write_text(config.read_text().replace("num_embeddings: 32", "num_embeddings: many"))
    with pytest.raises(ValueError, match=r"'quantizer\.num_embeddings' is 'many'"):
        import_lightning(checkpoint, other, output)
    torch.save({"state_dict": {"layer.weight": torch.ones(1)}}, tmp_path / "classifier.ckpt")
    with pytest.raises(ValueError, match=r"classifier\.ckpt has no weights 'encoder\.norm\.weight'"):
        import_lightning(tmp_path / "classifier.ckpt", config, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.ckpt", "other.yaml"]
    output.mkdir()
    with pytest.raises(ValueError, match=r"out is there already"):
        import_lightning(checkpoint, config, output)
    shutil.rmtree(output)
    import_lightning(checkpoint, config, output)
