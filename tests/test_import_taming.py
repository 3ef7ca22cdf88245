"""taming-transformers' and LlamaGen's tokenizers, in and out again as diffusers' VQModel."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from diffusers import VQModel
from helpers import GOLDEN, load_golden
from published import LLAMAGEN, TAMING, VQGAN
from tiny import write_splits
from torch import Tensor

from vqgan_accel.cli import main
from vqgan_accel.config import GumbelQuantizerConfig, StandardQuantizerConfig, TamingConfig, load_config
from vqgan_accel.interop.taming import import_llamagen, import_taming
from vqgan_accel.models.finding import find_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer

CHECKPOINT, YAML = GOLDEN / "taming_vqmodel.ckpt", GOLDEN / "taming_vqmodel.yaml"


def pixels(batch: int = 3, size: int = 32) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(7)) * 2 - 1


def gumbel_yaml(file: Path) -> Path:
    values: dict[str, Any] = yaml.safe_load(YAML.read_text())
    values["model"]["params"] |= {
        "kl_weight": 1e-8,
        "temperature_scheduler_config": {
            "params": {"lr_max": 0.9, "lr_min": 1e-6, "lr_start": 0.9, "max_decay_steps": 1000001, "warm_up_steps": 0}
        },
    }
    file.write_text(yaml.safe_dump(values))
    return file


def test_codes_are_identical_and_reconstructions_tamings_own(tmp_path: Path) -> None:
    lines = import_taming(CHECKPOINT, YAML, tmp_path / "imported")
    assert "standard quantizer, 64 codes, from step 1" in lines[0]
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "imported" / "tokenizer")
    golden = load_golden("taming_vqmodel.expected")
    images = golden["in.images_pm1"]
    codes = tokenizer.encode(images)
    assert torch.equal(codes.flatten(1), golden["out.codes"]) and len(codes.unique()) > 4
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.latents(images), golden["out.latent"], rtol=0, atol=1e-5)
        reconstruction = tokenizer(images).reconstruction
    assert (reconstruction - golden["out.reconstruction_pm1"]).abs().max() <= 1e-4
    assert (tokenizer.decode(codes) - golden["out.reconstruction_pm1"].clamp(-1, 1)).abs().max() <= 1e-4


def test_the_yaml_becomes_a_config_that_builds_the_same_tokenizer(tmp_path: Path) -> None:
    import_taming(CHECKPOINT, YAML, tmp_path / "imported")
    config = load_config(tmp_path / "imported" / "config.yaml")
    saved = ImageTokenizer.from_pretrained(tmp_path / "imported" / "tokenizer").settings
    assert (config.autoencoder, config.quantizer) == (saved.autoencoder_config, saved.quantizer_config)
    assert config.autoencoder == TamingConfig(
        channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), latent_channels=16
    )
    assert config.data.image_size == 32 and config.discriminator is None
    assert (config.losses.l1_weight, config.losses.l2_weight, config.losses.perceptual_weight) == (1.0, 0.0, 1.0)
    # 4.5e-6 an image, as its trainer multiplies it by all images of a step
    assert (config.training.base_lr, config.training.base_batch_size) == (4.5e-6, 1)


@pytest.mark.seconds
def test_the_imported_folder_is_a_recipe_that_goes_on_from_its_weights(tmp_path: Path) -> None:
    import_taming(CHECKPOINT, YAML, tmp_path / "imported")
    images = write_splits(tmp_path / "images", size=32)
    run = tmp_path / "run"
    settings = [
        f"output_dir={run}",
        f"data.path={images}",
        "data.workers=0",
        f"training.init_from={tmp_path / 'imported'}",
        "training.total_batch_size=4",
        "training.max_steps=1",
        "training.lr_warmup=1 step",  # so that the first step has a rate of zero, but for rounding
        "losses.perceptual_weight=0",
    ]
    assert main(["train", str(tmp_path / "imported" / "config.yaml"), *settings]) == 0
    folders = (find_tokenizer(folder)[0] for folder in (tmp_path / "imported", run))
    before, after = (ImageTokenizer.from_pretrained(folder).state_dict() for folder in folders)
    for name, tensor in before.items():
        assert (after[name] - tensor).abs().max() <= 1e-4, name
    assert main(["export", "diffusers", str(run), "--output", str(tmp_path / "exported")]) == 0


@pytest.mark.seconds
@pytest.mark.parametrize("attention", [(), (1,), (0, 2)], ids=str)
def test_every_layout_equals_a_second_implementation(attention: tuple[int, ...], tmp_path: Path) -> None:
    theirs = VQGAN(TAMING, multipliers=(1, 2, 2), attention=attention)
    latents = theirs.latents(pixels())
    codes, quantized = theirs.nearest(latents)
    check(tmp_path, theirs, {"state_dict": theirs.weights}, YAML, codes, theirs.pixels(quantized))
    config = load_config(tmp_path / "imported" / "config.yaml")
    assert isinstance(config.autoencoder, TamingConfig) and config.autoencoder.attention_levels == attention


@pytest.mark.seconds
def test_the_gumbel_variant(tmp_path: Path) -> None:
    theirs = VQGAN(TAMING, multipliers=(1, 2), attention=(1,))
    codes, quantized = theirs.most_likely(theirs.latents(pixels()))
    more = {"loss.discriminator.main.0.weight": torch.ones(1), "quantize.temperature": torch.ones(1)}
    yaml_file = gumbel_yaml(tmp_path / "gumbel.yaml")
    check(tmp_path, theirs, {"state_dict": more}, yaml_file, codes, theirs.pixels(quantized))
    quantizer = load_config(tmp_path / "imported" / "config.yaml").quantizer
    assert isinstance(quantizer, GumbelQuantizerConfig)
    assert (quantizer.hidden_channels, quantizer.straight_through, quantizer.kl_cost) == (8, True, 1e-8)
    assert (quantizer.temperature_start, quantizer.temperature_end) == (0.9, 1e-6)
    assert str(quantizer.temperature_decay) == "1000001 steps"


@pytest.mark.seconds
@pytest.mark.parametrize("place", ["model", "ema", "state_dict", "bare", "wrapped"])
def test_llamagens_tokenizer(place: str, tmp_path: Path) -> None:
    theirs = VQGAN(LLAMAGEN, multipliers=(1, 1, 2), attention=(2,))
    codes, quantized = theirs.nearest(theirs.latents(pixels()), unit=True)
    expected = theirs.pixels(quantized)
    weights = theirs.weights | {"quantize.codebook_used": torch.zeros(65536)}
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    found = weights if place == "bare" else {"model": other, place: weights, "steps": 5}
    if place == "wrapped":  # by DistributedDataParallel
        found = {"model": {f"module.{name}": tensor for name, tensor in weights.items()}}
    check(tmp_path, theirs, found, None, codes, expected)
    quantizer = load_config(tmp_path / "imported" / "config.yaml").quantizer
    assert isinstance(quantizer, StandardQuantizerConfig) and quantizer.l2_normalize
    assert not torch.equal(codes, theirs.nearest(theirs.latents(pixels()))[0])  # the lengths matter


def check(
    folder: Path, theirs: VQGAN, found: dict[str, Any], yaml_file: Path | None, codes: Tensor, expected: Tensor
) -> None:
    """`found` as a checkpoint, imported, gives the codes and the reconstruction; a state dict in it is completed."""
    if "state_dict" in found and yaml_file is not None:
        found["state_dict"] |= theirs.weights
    torch.save(found, folder / "their.ckpt")
    if yaml_file is None:
        import_llamagen(folder / "their.ckpt", folder / "imported")
    else:
        import_taming(folder / "their.ckpt", yaml_file, folder / "imported")
    tokenizer = ImageTokenizer.from_pretrained(folder / "imported" / "tokenizer")
    assert torch.equal(tokenizer.encode(pixels()), codes) and len(codes.unique()) > 8
    with torch.no_grad():
        reconstruction = tokenizer(pixels()).reconstruction
    assert (reconstruction - expected).abs().max() <= 1e-4 * expected.abs().max()
    tokenizer.train()(pixels()).reconstruction.sum().backward()  # and it trains on


def test_the_class_that_lightning_before_1_5_wrote_as_a_key_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[callback.__module__])["ModelCheckpoint"] = callback
    found = torch.load(CHECKPOINT, weights_only=True)
    torch.save(found | {"callbacks": {callback: {"best_model_score": torch.ones(())}}}, tmp_path / "old.ckpt")
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.ckpt", weights_only=True)
    import_taming(tmp_path / "old.ckpt", YAML, tmp_path / "imported")
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("form", ["other dicts", "extra state", "bare with an epoch", "compiled around DDP"])
def test_what_else_lies_in_a_checkpoint_does_not_matter(form: str, tmp_path: Path) -> None:
    weights = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    found: dict[str, Any] = {
        "other dicts": {"ema": {"decay": 0.999, "n": 1}, "state_dict": weights},
        "extra state": {"state_dict": weights | {"loss._extra_state": None, 7: torch.ones(1)}},
        "bare with an epoch": weights | {"epoch": 3},
        "compiled around DDP": {"state_dict": {f"_orig_mod.module.{name}": value for name, value in weights.items()}},
    }[form]
    torch.save(found, tmp_path / "a.ckpt")
    import_taming(tmp_path / "a.ckpt", YAML, tmp_path / "imported")
    tokenizer, golden = ImageTokenizer.from_pretrained(tmp_path / "imported" / "tokenizer"), "taming_vqmodel.expected"
    images = load_golden(golden)["in.images_pm1"]
    assert torch.equal(tokenizer.encode(images).flatten(1), load_golden(golden)["out.codes"])


@pytest.mark.seconds
def test_what_does_not_fit_is_named_and_nothing_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    weights = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    torch.save({"state_dict": {k: v for k, v in weights.items() if "mid" not in k}}, tmp_path / "x" / "part.ckpt")
    torch.save({"state_dict": {"quant_conv.weight": torch.ones(1)}}, tmp_path / "x" / "other.ckpt")
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "x" / "none.ckpt")
    short = tmp_path / "x" / "short.yaml"
    short.write_text("model: {params: {embed_dim: 8}}")

    def sentence(*arguments: object) -> str:
        assert main(["import", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        return capsys.readouterr().err

    part = sentence("taming", tmp_path / "x" / "part.ckpt", "--config", YAML)
    assert "part.ckpt holds the weights of another network" in part and "mid_block" in part
    assert "no weights 'encoder.down.0.block" in sentence("taming", tmp_path / "x" / "other.ckpt", "--config", YAML)
    assert "no weights 'quant_conv.weight'" in sentence("llamagen", tmp_path / "x" / "none.ckpt")
    # one program's checkpoint given to another's importer would be read with wrong codes
    assert "no weights 'encoder.conv_blocks.0" in sentence("llamagen", CHECKPOINT)
    lightning = GOLDEN / "lightning_standard_head"
    assert "no weights 'quant_conv.weight'" in sentence("taming", f"{lightning}.ckpt", "--config", YAML)
    assert "no weights 'encoder.norm.weight'" in sentence("lightning", CHECKPOINT, "--config", f"{lightning}.yaml")
    damaged = {
        "remapped codes": weights | {"quantize.used": torch.ones(3)},
        "encoder.quant_conv.bias": weights | {"quant_conv.bias": [1.0]},
        "no encoder of taming's": {k: v for k, v in weights.items() if "encoder.down.1.block.0.conv2" not in k},
        "quantizer.codebook": {k: v for k, v in weights.items() if not k.startswith("quantize.")},
    }
    for expected, state in damaged.items():
        torch.save({"state_dict": state}, tmp_path / "x" / "damaged.ckpt")
        assert expected in sentence("taming", tmp_path / "x" / "damaged.ckpt", "--config", YAML)
    theirs = VQGAN(LLAMAGEN, multipliers=(1, 2), attention=(1,))
    theirs.pixels(theirs.nearest(theirs.latents(pixels()))[1])
    torch.save(theirs.weights | {"quantize.embedding.weight": torch.ones(8)}, tmp_path / "x" / "flat.pt")
    assert "'quantize.embedding.weight' of shape (8,) is no codebook" in sentence(
        "llamagen", tmp_path / "x" / "flat.pt"
    )
    assert "it has no 'model.params.n_embed'" in sentence(
        "taming", CHECKPOINT, "--config", tmp_path / "x" / "short.yaml"
    )
    for settings, number in (({"act_fn": "relu"}, "act_fn relu"), ({"norm_num_groups": 16}, "16 groups")):
        shutil.rmtree(tmp_path / "x" / "model", ignore_errors=True)
        VQModel(block_out_channels=(32,), **settings).save_pretrained(tmp_path / "x" / "model")
        assert number in sentence("diffusers", tmp_path / "x" / "model")
    (tmp_path / "x" / "model" / "config.json").unlink()
    assert "model cannot be read as diffusers' VQModel" in sentence("diffusers", tmp_path / "x" / "model")
    assert "give --config=YAML" in sentence("taming", CHECKPOINT)
    assert "give --config=YAML" in sentence("llamagen", CHECKPOINT, "--config", YAML)


@pytest.mark.seconds
@pytest.mark.parametrize("unit", [False, True], ids=["taming", "llamagen"])
def test_diffusers_vqmodel_gives_our_reconstructions(unit: bool, tmp_path: Path) -> None:
    if unit:
        theirs = VQGAN(LLAMAGEN, multipliers=(1, 1, 2), attention=(2,))
        theirs.pixels(theirs.nearest(theirs.latents(pixels()), unit=True)[1])
        torch.save(theirs.weights, tmp_path / "their.pt")
        import_llamagen(tmp_path / "their.pt", tmp_path / "imported")
    else:
        import_taming(CHECKPOINT, YAML, tmp_path / "imported")
    assert main(["export", "diffusers", str(tmp_path / "imported"), "--output", str(tmp_path / "exported")]) == 0
    model = VQModel.from_pretrained(tmp_path / "exported")
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "imported" / "tokenizer")
    with torch.no_grad():
        ours, made = tokenizer(pixels()).reconstruction, model(pixels()).sample
    # VQModel rounds unit codes once more: its straight-through estimator adds and subtracts latents of any length
    assert (ours - made).abs().max() <= (1e-5 if unit else 1e-6)
    assert model.config.sample_size == tokenizer.settings.image_size
    assert main(["import", "diffusers", str(tmp_path / "exported"), "--output", str(tmp_path / "back")]) == 0
    back = ImageTokenizer.from_pretrained(tmp_path / "back" / "tokenizer")
    assert torch.equal(back.encode(pixels()), tokenizer.encode(pixels()))
    with torch.no_grad():
        assert torch.equal(back(pixels()).reconstruction, made)
    assert back.settings.autoencoder_config == tokenizer.settings.autoencoder_config


@pytest.mark.parametrize("case", ["standard_old", "gumbel"])
def test_what_vqmodel_cannot_be_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "gumbel":
        theirs = VQGAN(TAMING, multipliers=(1, 2), attention=(1,))
        theirs.pixels(theirs.most_likely(theirs.latents(pixels()))[1])
        torch.save(theirs.weights, tmp_path / "their.ckpt")
        import_taming(tmp_path / "their.ckpt", gumbel_yaml(tmp_path / "gumbel.yaml"), tmp_path / "imported")
    else:
        files = [str(GOLDEN / f"lightning_{case}.{ending}") for ending in ("ckpt", "yaml")]
        main(["import", "lightning", files[0], "--config", files[1], "--output", str(tmp_path / "imported")])
    capsys.readouterr()
    assert main(["export", "diffusers", str(tmp_path / "imported"), "--output", str(tmp_path / "out")]) == 2
    expected = "has a gumbel quantizer" if case == "gumbel" else "is of the maskgit architecture"
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()
