"""ImageTokenizer: one answer to "which codes?" however it is asked, the pixels' border, and the form on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from helpers import TAMING, tiny_tokenizer
from tiny import QUANTIZERS, tiny_quantizer
from torch import Tensor

from vqgan_accel.models.quantizers import EMAQuantizer
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.sections import Duration


def places(quantizer: str) -> tuple[int, ...]:
    """What a position's codes add to their shape."""
    sizes = QUANTIZERS[quantizer].codebook_sizes
    return (len(sizes),) if len(sizes) > 1 else ()


each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


def images(batch: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1


@each_quantizer
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_shapes_types_and_ranges_of_every_output(quantizer: str, mode: str) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS[quantizer]).train(mode == "train")
    assert tokenizer(images()).last_features is None
    output = tokenizer(images(), keep_features=True)
    assert output.reconstruction.shape == (3, 3, 16, 24)
    assert output.quantizer.quantized.shape == (3, QUANTIZERS[quantizer].embedding_dim, 4, 6)
    assert output.latents.shape == (3, tokenizer.quantizer.input_channels, 4, 6)
    assert output.last_features.shape == (3, 32, 16, 24)
    assert output.quantizer.loss.shape == ()
    assert output.reconstruction.requires_grad and output.quantizer.loss.requires_grad == (quantizer != "fsq")
    assert not output.latents.requires_grad and not output.last_features.requires_grad
    assert not any(value.requires_grad or value.shape for value in output.quantizer.metrics.values())
    codes = output.quantizer.codes
    assert codes.dtype == torch.int64 and codes.shape == (3, *places(quantizer), 4, 6)
    assert codes.min() >= 0 and codes.max() < QUANTIZERS[quantizer].num_codes
    assert len(codes.unique()) > 3  # or the laws below would hold of a constant


@each_quantizer
def test_the_codes_of_forward_of_encode_and_of_encode_after_save_and_load_are_identical(
    quantizer: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS[quantizer]).eval()
    codes = tokenizer(images()).quantizer.codes
    assert torch.equal(tokenizer.encode(images()), codes)
    assert torch.equal(tokenizer.encode(images()), codes)
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    torch.manual_seed(99)
    loaded = ImageTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training
    assert loaded.settings == tokenizer.settings
    assert torch.equal(loaded.encode(images()), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


@each_quantizer
def test_every_tensor_survives_save_and_load(quantizer: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS[quantizer])
    if isinstance(tokenizer.quantizer, EMAQuantizer):  # counts that are not those of a new one
        tokenizer(images())
        tokenizer.quantizer.apply_update()
    tokenizer = tokenizer.to(memory_format=torch.channels_last)
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == tokenizer.state_dict().keys()
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@each_quantizer
@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_decoding_the_codes_gives_the_forward_reconstruction_clipped_to_the_displayable_range(
    quantizer: str, activation: str
) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS[quantizer], output_activation=activation).eval()
    tokenizer.decoder.conv_out.weight.data *= 3  # far enough that a linear output leaves [-1, 1]
    reconstruction = tokenizer(images()).reconstruction.detach()
    decoded = tokenizer.decode(tokenizer.encode(images()))
    assert not decoded.requires_grad
    torch.testing.assert_close(decoded, reconstruction.clamp(-1, 1), rtol=0, atol=2e-5)
    assert (reconstruction.abs().max() > 1) == (activation == "none")
    assert reconstruction.std() > 0.1


@each_quantizer
def test_encode_depends_on_no_other_image_of_the_batch(quantizer: str) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS[quantizer]).eval()
    whole = tokenizer.encode(images(4))
    for i in range(4):
        assert torch.equal(tokenizer.encode(images(4)[i : i + 1]), whole[i : i + 1])


def test_encoding_in_training_mode_draws_no_noise_and_gives_the_codes_of_eval_mode() -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["gumbel"]).train()
    assert torch.equal(tokenizer.encode(images()), tokenizer.eval().encode(images()))


def test_encoding_in_training_mode_leaves_the_ema_statistics_alone() -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["ema"]).train()
    tokenizer.encode(images())
    assert isinstance(tokenizer.quantizer, EMAQuantizer)
    assert not tokenizer.quantizer.new_counts.any()


def test_imagenet_statistics_stay_inside_and_the_border_is_minus_1_to_1() -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["standard"], pixel_statistics="imagenet", output_activation="none").eval()
    plain = tiny_tokenizer(QUANTIZERS["standard"], pixel_statistics="half", output_activation="none").eval()
    plain.load_state_dict(tokenizer.state_dict())  # the statistics are no part of the state
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of torchvision's models, for pixels in [0, 1]
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    unit = (images() + 1) / 2
    inside = plain((unit - mean) / std)
    output = tokenizer(images())
    torch.testing.assert_close(output.latents, inside.latents, rtol=0, atol=1e-4)
    assert torch.equal(output.quantizer.codes, inside.quantizer.codes)
    expected = (inside.reconstruction * std + mean) * 2 - 1
    torch.testing.assert_close(output.reconstruction, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(tokenizer.latents(images()), plain.latents(images()), atol=0.1)


def test_half_statistics_change_nothing() -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["standard"])
    assert torch.equal(tokenizer.latents(images()), tokenizer.encoder(images()))
    features = torch.randn(1, 32, 4, 4)
    assert torch.equal(tokenizer.last_layer(features), tokenizer.decoder.last_layer(features))


@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (1, 3, 18, 16), (1, 4, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_an_error_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        tiny_tokenizer(QUANTIZERS["standard"]).encode(torch.zeros(shape))
    assert str(error.value) == f"images are (B, 3, H, W) with H and W multiples of 4, not {shape}"


@each_quantizer
@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        (lambda k: torch.tensor([[[0, k]]]), "lie in [0, {k}), not in [0, {k}]"),
        (lambda k: torch.tensor([[[-1, 3]]]), "lie in [0, {k}), not in [-1, 3]"),
        (lambda k: torch.zeros(1, 2, 2).int(), "are int64 of shape {shape}, not torch.int32 of shape {given}"),
        (lambda k: torch.zeros(1, 2, 2), "are int64 of shape {shape}, not torch.float32 of shape {given}"),
        (lambda k: torch.zeros(1).long(), "are int64 of shape {shape}, not torch.int64 of shape {given}"),
    ],
    ids=["too large", "negative", "int32", "float", "flat"],
)
def test_codes_that_are_none_are_an_error(quantizer: str, codes: Callable[[int], Tensor], sentence: str) -> None:
    k, several = QUANTIZERS[quantizer].num_codes, places(quantizer)
    given = codes(k)
    if several and given.ndim > 1:  # as bad in the last codebook alone
        given = torch.stack([*[torch.zeros_like(given)] * (several[0] - 1), given], 1)
    with pytest.raises(ValueError) as error:
        tiny_tokenizer(QUANTIZERS[quantizer]).decode(given)
    shape = f"(B, {several[0]}, h, w)" if several else "(B, h, w)"
    assert str(error.value) == f"codes {sentence.format(k=k, shape=shape, given=tuple(given.shape))}"


def test_codes_of_one_codebook_are_not_those_of_several() -> None:
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=re.escape("shape (B, 3, h, w), not torch.int64 of shape (1, 4, 4)")):
        tiny_tokenizer(QUANTIZERS["residual"]).decode(codes)
    with pytest.raises(ValueError, match=re.escape("shape (B, 3, h, w), not torch.int64 of shape (1, 2, 4, 4)")):
        tiny_tokenizer(QUANTIZERS["residual"]).decode(codes[:, None].expand(1, 2, 4, 4))
    with pytest.raises(ValueError, match=re.escape("shape (B, h, w), not torch.int64 of shape (1, 1, 4, 4)")):
        tiny_tokenizer(QUANTIZERS["standard"]).decode(codes[:, None])


def test_the_first_and_the_last_code_and_an_empty_batch_decode() -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["standard"])
    assert tokenizer.decode(torch.tensor([[[0, 15]]])).shape == (1, 3, 4, 8)
    assert tokenizer.decode(torch.zeros(0, 2, 2, dtype=torch.int64)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("missing", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    tiny_tokenizer(QUANTIZERS["standard"]).save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        ImageTokenizer.from_pretrained(tmp_path)
    named = missing.replace("model.", "model*.") + ("*" if "model" in missing else "")  # it may be in several files
    expected = f"{tmp_path} is not a saved tokenizer: it has no {named}"
    if missing == "config.json":  # which is what tells a tokenizer from a run or an import
        expected = f"{tmp_path} holds no tokenizer: give a run folder, a checkpoint or a folder of save_pretrained"
    assert str(error.value) == expected


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["standard"])
    tokenizer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(ImageTokenizer.from_pretrained(tmp_path).encode(images()), tokenizer.encode(images()))


def test_half_precision_is_autocasts_and_not_the_weights(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["standard"]).eval()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^torch_dtype torch\.bfloat16: codes are decided in float32"):
        ImageTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^torch_dtype torch\.bfloat16: codes are decided in float32"):
        ImageTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = ImageTokenizer.from_pretrained(tmp_path, torch_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        codes = loaded.encode(images())
        decoded = loaded.decode(codes)
    assert (codes == tokenizer.encode(images())).float().mean() > 0.9
    assert decoded.dtype == torch.float32 and (decoded - tokenizer.decode(codes)).abs().max() < 0.1


def test_the_model_of_another_library_is_named(tmp_path: Path) -> None:
    VQModel(block_out_channels=(32,)).save_pretrained(tmp_path)
    reason = "but that of a VQModel; `vqgan-accel import diffusers` makes one of it"
    check_sentence(tmp_path, f"{tmp_path / 'config.json'} is not a tokenizer's config ", reason)


@pytest.mark.parametrize("layout", [{}, TAMING], ids=["maskgit", "taming"])
def test_an_empty_batch_has_no_codes_and_no_images(layout: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(QUANTIZERS["standard"], **layout)
    assert tokenizer.encode(torch.empty(0, 3, 16, 24)).shape == (0, 4, 6)
    assert tokenizer.decode(torch.empty(0, 4, 6, dtype=torch.int64)).shape == (0, 3, 16, 24)
    assert tokenizer.decode(torch.empty(2, 0, 6, dtype=torch.int64)).shape == (2, 3, 0, 24)
    for shape in ((0, 1, 16, 16), (0, 3, 18, 16), (0,)):
        with pytest.raises(ValueError, match="images are"):
            tokenizer.encode(torch.empty(shape))


def without_quantizer(text: str) -> str:
    values = json.loads(text)
    del values["quantizer_config"]
    return json.dumps(values)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], ""),
        (lambda text: "[]", ""),
        (lambda text: "", ""),
        (lambda text: text.replace('"standard"', '"nearest"'), "standard"),
        (lambda text: text.replace('"num_codes": 16', '"num_codes": "many"'), "num_codes"),
        (lambda text: text.replace('"channels": 32', '"channels": 20'), "20"),
        (without_quantizer, "quantizer"),
    ],
    ids=["cut", "list", "empty", "unknown type", "wrong value", "impossible width", "missing section"],
)
def test_a_config_that_is_none_is_named(damage: Callable[[str], str], reason: str, tmp_path: Path) -> None:
    tiny_tokenizer(QUANTIZERS["standard"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert damage(path.read_text()) != path.read_text()
    path.write_text(damage(path.read_text()))
    check_sentence(tmp_path, f"{path} is not a tokenizer's config: ", reason)


def test_a_config_in_another_encoding_is_named(tmp_path: Path) -> None:
    tiny_tokenizer(QUANTIZERS["standard"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe" + path.read_text().encode("utf-16-le"))
    check_sentence(tmp_path, f"{path} is not a tokenizer's config: ", "")


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:100], lambda data: data[:-4], lambda data: b"\xff" * 8 + data[8:]],
    ids=["empty", "cut header", "cut", "wild length"],
)
def test_weights_that_are_none_are_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    tiny_tokenizer(QUANTIZERS["standard"]).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    check_sentence(tmp_path, str(tmp_path), path.name)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"num_codes": 16', '"num_codes": 32', "quantizer.codebook"),
        ('"standard"', '"ema"', "quantizer.counts"),
        ('"channels": 32', '"channels": 64', "encoder.conv_in.weight"),
    ],
)
def test_a_config_of_another_shape_than_the_weights_is_named(old: str, new: str, reason: str, tmp_path: Path) -> None:
    tiny_tokenizer(QUANTIZERS["standard"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    check_sentence(
        tmp_path, f"{tmp_path / 'diffusion_pytorch_model.safetensors'} does not fit its config.json: ", reason
    )


def check_sentence(folder: Path, beginning: str, reason: str) -> None:
    """Loading fails with one line that begins so, says why, and is short enough to read."""
    with pytest.raises(ValueError) as error:
        ImageTokenizer.from_pretrained(folder)
    sentence = str(error.value)
    assert sentence.startswith(beginning)
    assert reason in sentence
    assert "\n" not in sentence


def test_a_long_list_of_mismatches_is_cut_to_a_sentence_that_can_be_read(tmp_path: Path) -> None:
    tiny_tokenizer(QUANTIZERS["standard"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"channels": 32', '"channels": 64'))
    with pytest.raises(ValueError) as error:
        ImageTokenizer.from_pretrained(tmp_path)
    assert len(str(error.value)) < len(str(tmp_path)) + 500


@pytest.mark.parametrize(
    "decay", [Duration(7.5, "epochs"), Duration(1_234_567, "steps"), Duration(1e-5, "epochs")], ids=str
)
def test_every_duration_of_a_gumbel_tokenizer_survives_save_and_load(decay: Duration, tmp_path: Path) -> None:
    config = tiny_quantizer("gumbel", temperature_decay=decay)
    tiny_tokenizer(config).save_pretrained(tmp_path)
    assert ImageTokenizer.from_pretrained(tmp_path).settings.quantizer_config == config
