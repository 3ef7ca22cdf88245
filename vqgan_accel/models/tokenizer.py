"""ImageTokenizer: encoder + quantizer + decoder, and its form on disk (config.json + model.safetensors)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqgan_accel.config import AutoencoderConfig, QuantizerConfig, Section
from vqgan_accel.models.autoencoder import Decoder, Encoder
from vqgan_accel.models.quantizers import QuantizerOutput, build_quantizer

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


class TokenizerOutput(NamedTuple):
    reconstruction: Tensor  # (B, 3, H, W), pixels where [-1, 1] is the displayable range
    quantizer: QuantizerOutput
    latents: Tensor  # (B, input_channels, h, w), the encoder's output, detached
    last_features: Tensor  # (B, channels, H, W), the last convolution's input, detached: what the adaptive weight needs


class TokenizerConfig(Section):
    """What config.json holds."""

    autoencoder: AutoencoderConfig
    quantizer: QuantizerConfig = Field(discriminator="type")
    image_size: int  # pixels it was trained at; other multiples of the stride work too


class ImageTokenizer(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / stride, W / stride) and back. H and W are multiples of the
    stride."""

    pixel_mean: Tensor  # (3, 1, 1) of pixels in [-1, 1]
    pixel_std: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = Encoder(config.autoencoder, self.quantizer.input_channels)
        self.decoder = Decoder(config.autoencoder, config.quantizer.embedding_dim)
        mean, std = torch.zeros(3), torch.ones(3)
        if config.autoencoder.pixel_statistics == "imagenet":
            mean, std = 2 * torch.tensor(IMAGENET_MEAN) - 1, 2 * torch.tensor(IMAGENET_STD)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    def latents(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the encoder's output (B, input_channels, h, w)"""
        stride = self.config.autoencoder.stride
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(f"images are (B, 3, H, W) with H and W multiples of {stride}, not {tuple(images.shape)}")
        return self.encoder((images - self.pixel_mean) / self.pixel_std)

    def last_layer(self, features: Tensor) -> Tensor:
        """(B, channels, H, W) -> pixels (B, 3, H, W) where [-1, 1] is the displayable range, float32"""
        return self.to_public_range(self.decoder.last_layer(features))

    def to_public_range(self, pixels: Tensor) -> Tensor:
        return pixels.float() * self.pixel_std + self.pixel_mean

    def forward(self, images: Tensor, sample_seeds: Tensor | None = None) -> TokenizerOutput:
        """images (B, 3, H, W) in [-1, 1]; sample_seeds (B,) int64: see Quantizer.forward."""
        latents = self.latents(images)
        quantized = self.quantizer(latents, sample_seeds)
        pixels, features = self.decoder(quantized.quantized)
        return TokenizerOutput(self.to_public_range(pixels), quantized, latents.detach(), features.detach())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> codes (B, h, w) int64"""
        return self.quantizer.choose(self.latents(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 -> images (B, 3, h * stride, w * stride) clipped to [-1, 1]

        Raises ValueError for codes of another shape or outside [0, num_codes).
        """
        if codes.ndim != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes are int64 of shape (B, h, w), not {codes.dtype} of shape {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.quantizer.num_codes:
            raise ValueError(f"codes lie in [0, {self.quantizer.num_codes}), not in [{codes.min()}, {codes.max()}]")
        pixels, _ = self.decoder(self.quantizer.codes_to_latents(codes))
        return self.to_public_range(pixels).clamp(-1, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageTokenizer:
        """Read what `save_pretrained` wrote, in eval mode on the CPU. FileNotFoundError or ValueError names what is
        wrong."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a saved tokenizer: it has no {name}")
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tokenizer = cls(TokenizerConfig.model_validate(values))
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise ValueError(
                f"{folder / 'config.json'} is not a tokenizer's config: {' '.join(str(error).split())[:300]}"
            ) from None
        try:
            tokenizer.load_state_dict(load_file(folder / "model.safetensors"))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: {reason}") from None
        return tokenizer.eval()
