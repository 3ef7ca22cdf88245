"""The encoder and decoder against golden numbers, the unbiased norm against its formula, and the published sizes."""

from __future__ import annotations

import pytest
import torch
from helpers import load_golden, relative_error
from torch import Tensor, nn

from vqgan_accel.config import MaskGITConfig
from vqgan_accel.models.autoencoder import Decoder, Encoder, UnbiasedGroupNorm

VARIANTS = {
    "old": MaskGITConfig(
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        upsample_conv=False,
        norm_eps=1e-5,
        output_activation="none",
    ),
    "head": MaskGITConfig(
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        upsample_conv=True,
        norm_eps=1e-6,
        norm_variance="unbiased",
        output_activation="tanh",
    ),
}


def load_weights(module: nn.Module, golden: dict[str, Tensor], prefix: str) -> None:
    """Strictly; the seed's norm weights at head are (1, C, 1, 1)."""
    weights = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    module.load_state_dict({key: value.flatten() if "norm" in key else value for key, value in weights.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_reconstructions_and_gradients_equal_the_golden_numbers(variant: str, dtype: torch.dtype) -> None:
    golden, config = load_golden(f"autoencoder_{variant}"), VARIANTS[variant]
    encoder, decoder = Encoder(config, out_channels=16), Decoder(config, in_channels=16)
    load_weights(encoder, golden, "encoder.")
    load_weights(decoder, golden, "decoder.")
    encoder, decoder = encoder.to(dtype), decoder.to(dtype)
    latents = encoder(golden["in.image"].to(dtype))
    reconstruction, _ = decoder(latents)
    reconstruction.square().sum().backward()
    ours = {
        "out.latent": latents,
        "out.reconstruction": reconstruction,
        "grad.decoder.conv_out.weight": decoder.conv_out.weight.grad,
        "grad.encoder.conv_in.weight": encoder.conv_in.weight.grad,
    }
    assert set(ours) == {key for key in golden if key.startswith(("out.", "grad."))}
    for key, value in ours.items():
        assert relative_error(value, golden[key]) <= 1e-5, key


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
def test_the_biased_and_the_unbiased_norm_are_told_apart_by_the_golden_numbers(variance: str) -> None:
    golden = load_golden("autoencoder_head")
    encoder = Encoder(VARIANTS["head"].model_copy(update={"norm_variance": variance}), out_channels=16)
    load_weights(encoder, golden, "encoder.")
    error = relative_error(encoder(golden["in.image"]), golden["out.latent"])
    assert error <= 1e-5 if variance == "unbiased" else error > 1e-4


@pytest.mark.parametrize("eps", [1e-6, 0.3])  # the second so large that a misplaced factor of it shows
def test_the_unbiased_norm_equals_a_plain_division_by_n_minus_1(eps: float) -> None:
    torch.manual_seed(0)
    norm = UnbiasedGroupNorm(4, 8, eps=eps).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 + 0.5 * torch.randn(2, 8, 3, 3, dtype=torch.float64)).requires_grad_()
    groups = x.view(2, 4, 2, 3, 3)
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=1, keepdim=True)
    normalised = ((groups - mean) / (variance + eps).sqrt()).view_as(x)
    expected = normalised * norm.weight.view(8, 1, 1) + norm.bias.view(8, 1, 1)
    actual = norm(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(x)
    inputs = [x, norm.weight, norm.bias]
    ours, theirs = (torch.autograd.grad((y * direction).sum(), inputs) for y in (actual, expected))
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


def test_the_published_sizes_are_20_739_648_and_14_818_499_parameters() -> None:
    config = MaskGITConfig(
        channels=64, channel_multipliers=(1, 2, 4, 8), num_res_blocks=2, upsample_conv=False, norm_eps=1e-5
    )
    with torch.device("meta"):
        encoder, decoder = Encoder(config, out_channels=256), Decoder(config, in_channels=256)
    assert sum(p.numel() for p in encoder.parameters()) == 20_739_648
    assert sum(p.numel() for p in decoder.parameters()) == 14_818_499


@pytest.mark.parametrize("multipliers", [(1,), (2, 1, 3)])
def test_the_stride_is_a_factor_of_two_a_level_and_the_decoder_undoes_it(multipliers: tuple[int, ...]) -> None:
    config = MaskGITConfig(channels=32, channel_multipliers=multipliers, num_res_blocks=1)
    encoder, decoder = Encoder(config, out_channels=5), Decoder(config, in_channels=7)
    assert config.stride == 2 ** len(multipliers)
    assert encoder(torch.randn(2, 3, 24, 16)).shape == (2, 5, 24 // config.stride, 16 // config.stride)
    assert decoder(torch.randn(2, 7, 3, 2))[0].shape == (2, 3, 3 * config.stride, 2 * config.stride)


def test_the_decoder_is_its_last_layer_of_its_features() -> None:
    torch.manual_seed(0)
    decoder = Decoder(VARIANTS["head"], in_channels=4)
    latents = torch.randn(1, 4, 2, 2)
    pixels, features = decoder(latents)
    assert torch.equal(pixels, decoder.last_layer(features))
    assert torch.equal(pixels, torch.tanh(decoder.conv_out(features)))
