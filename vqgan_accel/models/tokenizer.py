"""ImageTokenizer: encoder + quantizer + decoder, a model of diffusers' kind on disk and on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from vqgan_accel.config import AutoencoderField, QuantizerField, sentences
from vqgan_accel.models.finding import find_tokenizer
from vqgan_accel.models.precision import ieee_float32
from vqgan_accel.models.quantizers import QuantizerOutput
from vqgan_accel.models.weights import IMAGENET_MEAN, IMAGENET_STD
from vqgan_accel.run_folder import TOKENIZER_CONFIG, WEIGHTS_PATTERN
from vqgan_accel.sections import Section

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

    from vqgan_accel.models.autoencoder import Decoder, Encoder
    from vqgan_accel.models.taming import TamingDecoder, TamingEncoder


class TokenizerOutput(NamedTuple):
    reconstruction: Tensor  # (B, 3, H, W), pixels where [-1, 1] is the displayable range
    quantizer: QuantizerOutput
    latents: Tensor  # (B, input_channels, h, w), the encoder's output, detached
    last_features: Tensor | None  # (B, channels, H, W), the last convolution's input, detached, where it was asked for


class TokenizerConfig(Section):
    """What config.json holds, beside diffusers' own entries."""

    autoencoder_config: AutoencoderField
    quantizer_config: QuantizerField
    image_size: int  # pixels it was trained at; other multiples of the stride work too


class ImageTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as diffusers' own models are
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / stride, W / stride) and back. H and W are multiples of the
    stride.

    A model of diffusers' kind: `from_pretrained` takes a folder or a name on the Hugging Face hub, `push_to_hub` and
    `save_pretrained` are diffusers' own. The arguments are the fields of TokenizerConfig as plain values; ValueError
    where they are none.

    >>> tokenizer = ImageTokenizer.from_pretrained("runs/first")
    >>> images = tokenizer.decode(tokenizer.encode(images))  # float32 in [-1, 1], both
    """

    pixel_mean: Tensor  # (3, 1, 1) of pixels in [-1, 1]
    pixel_std: Tensor
    encoder: Encoder | TamingEncoder
    decoder: Decoder | TamingDecoder

    # (Not `quantizer`: diffusers' models would answer with that entry where the network of this name is asked for.)
    @register_to_config
    def __init__(self, autoencoder_config: dict[str, Any], quantizer_config: dict[str, Any], image_size: int) -> None:
        super().__init__()
        self.settings = TokenizerConfig.model_validate(
            {
                "autoencoder_config": autoencoder_config,
                "quantizer_config": quantizer_config,
                "image_size": image_size,
            }
        )
        layout, codes = self.settings.autoencoder_config, self.settings.quantizer_config
        self.quantizer = codes.build()
        self.encoder, self.decoder = layout.build(self.quantizer.input_channels, codes.embedding_dim)
        mean, std = torch.zeros(3), torch.ones(3)
        if layout.pixel_statistics == "imagenet":
            mean, std = 2 * torch.tensor(IMAGENET_MEAN) - 1, 2 * torch.tensor(IMAGENET_STD)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    @property
    def stride(self) -> int:
        """Pixels per code along one side."""
        return self.settings.autoencoder_config.stride

    @property
    def code_places(self) -> torch.Size:
        """(), or (q,) where a position has codes of q codebooks."""
        sizes = self.quantizer.codebook_sizes
        return torch.Size([len(sizes)] if len(sizes) > 1 else [])

    def latents(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the encoder's output (B, input_channels, h, w)"""
        self.require_images(images)
        return self.encoder((images - self.pixel_mean) / self.pixel_std)

    def require_images(self, images: Tensor) -> None:
        stride = self.stride
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(f"images are (B, 3, H, W) with H and W multiples of {stride}, not {tuple(images.shape)}")

    def last_layer(self, features: Tensor) -> Tensor:
        """(B, channels, H, W) -> pixels (B, 3, H, W) where [-1, 1] is the displayable range, float32"""
        return self.to_public_range(self.decoder.last_layer(features))

    def to_public_range(self, pixels: Tensor) -> Tensor:
        return pixels.float() * self.pixel_std + self.pixel_mean

    def forward(
        self, images: Tensor, sample_seeds: Sequence[int] | None = None, keep_features: bool = False
    ) -> TokenizerOutput:
        """images (B, 3, H, W) in [-1, 1]; sample_seeds: see Quantizer.forward. (keep_features: Accelerate copies what
        is returned in bf16 to float32, and these are as large as the network's largest.)"""
        latents = self.latents(images)
        quantized = self.quantizer(latents, sample_seeds)
        pixels, features = self.decoder(quantized.quantized)
        kept = features.detach() if keep_features else None
        return TokenizerOutput(self.to_public_range(pixels), quantized, latents.detach(), kept)

    @torch.no_grad()
    @ieee_float32()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> codes (B, h, w) int64, or (B, q, h, w) where the quantizer has q codebooks;
        B may be 0. Without TF32, whatever is allowed."""
        self.require_images(images)
        if not images.numel():  # diffusers' attention knows no empty batch
            sides = [side // self.stride for side in images.shape[2:]]
            grid = [*self.code_places, *sides]
            return torch.empty(len(images), *grid, dtype=torch.int64, device=images.device)
        return self.quantizer.choose(self.latents(images))

    def decode(self, codes: Tensor) -> Tensor:
        """codes as `encode` returns them, int64 -> images (B, 3, h * stride, w * stride) clipped to [-1, 1]; B may be 0

        Raises ValueError for codes of another shape or outside [0, num_codes).
        """
        sizes, several = self.quantizer.codebook_sizes, self.code_places
        if codes.ndim != 3 + len(several) or codes.shape[1 : 1 + len(several)] != several or codes.dtype != torch.int64:
            shape = f"(B, {', '.join([*map(str, several), 'h', 'w'])})"
            raise ValueError(f"codes are int64 of shape {shape}, not {codes.dtype} of shape {tuple(codes.shape)}")
        for place, size in zip(codes.unbind(1) if several else [codes], sizes, strict=True):
            if place.numel() and not 0 <= int(place.min()) <= int(place.max()) < size:
                raise ValueError(f"codes lie in [0, {size}), not in [{place.min()}, {place.max()}]")
        return self.decode_own(codes)

    @torch.no_grad()
    @ieee_float32()
    def decode_own(self, codes: Tensor) -> Tensor:
        """`decode` of what `encode` has returned, without a look at it, for which a GPU keeps the host waiting."""
        if not codes.numel():
            return torch.empty(len(codes), 3, *(side * self.stride for side in codes.shape[-2:]), device=codes.device)
        pixels, _ = self.decoder(self.quantizer.codes_to_latents(codes))
        return self.to_public_range(pixels).clamp(-1, 1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **options: Any) -> Self:
        """Read a tokenizer, in eval mode on the CPU.

        pretrained_model_name_or_path: as `load_tokenizer` takes it: a run, a checkpoint, an import's folder, what
        `save_pretrained` wrote, or a name on the hub. options: diffusers' own, such as revision, subfolder, cache_dir,
        token. FileNotFoundError or ValueError says what is wrong; unlike diffusers, which fills the gaps at random,
        weights that do not fit are an error.

        >>> ImageTokenizer.from_pretrained("runs/first").decode(torch.zeros(1, 4, 4, dtype=torch.int64)).shape
        torch.Size([1, 3, 16, 16])
        """
        for dtype in (options.get("torch_dtype"), options.get("dtype")):  # diffusers knows both names
            if dtype not in (None, torch.float32):
                raise ValueError(
                    f"torch_dtype {dtype}: codes are decided in float32; load the tokenizer without it, "
                    "and encode and decode under torch.autocast"
                )
        place = Path(str(pretrained_model_name_or_path), options.get("subfolder") or "")
        if place.is_dir():
            place, _ = find_tokenizer(place)
            _check_folder(place)
            pretrained_model_name_or_path, options = place, options | {"subfolder": None}
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                use_safetensors=True,  # and never a pickle
                low_cpu_mem_usage=False,
                output_loading_info=True,
                **options,
            )
        except (RuntimeError, SafetensorError) as error:
            weights, reason = place / SAFETENSORS_WEIGHTS_NAME, " ".join(str(error).split())[:300]
            raise ValueError(f"{weights} does not fit its {TOKENIZER_CONFIG}: {reason}") from None
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{place} cannot be read as a tokenizer: {' '.join(str(error).split())[:500]}") from None
        tokenizer, found = loaded
        if wrong := [*found["missing_keys"], *found["unexpected_keys"]]:
            raise ValueError(
                f"{place / SAFETENSORS_WEIGHTS_NAME} does not fit its {TOKENIZER_CONFIG}: one of them has {wrong[:3]}"
            )
        return tokenizer


def load_tokenizer(model: str | os.PathLike) -> ImageTokenizer:
    """The tokenizer of a run (its newest checkpoint), a checkpoint, an import's folder, a folder of `save_pretrained`,
    or USER/NAME on the Hugging Face hub, whose files are downloaded once; in eval mode on the CPU, float32.

    Of a run or a checkpoint the averaged weights are taken where it has them. FileNotFoundError where there is none,
    ValueError where its files are damaged or do not fit each other.

    >>> tokenizer = load_tokenizer("runs/first")
    >>> codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, h, w) int64
    """
    folder, _ = find_tokenizer(Path(model))
    return ImageTokenizer.from_pretrained(folder)


def _check_folder(folder: Path) -> None:
    """FileNotFoundError or ValueError with our own sentence, where diffusers has none."""
    for pattern in (TOKENIZER_CONFIG, WEIGHTS_PATTERN):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(f"{folder} is not a saved tokenizer: it has no {pattern}")
    file = folder / TOKENIZER_CONFIG
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # of JSON, of UTF-8
        raise ValueError(f"{file} is not a tokenizer's config: {' '.join(str(error).split())}") from None
    kind = values.get("_class_name", ImageTokenizer.__name__)
    if kind != ImageTokenizer.__name__:
        hint = "; `vqgan-accel import diffusers` makes one of it" if kind == "VQModel" else ""
        raise ValueError(f"{file} is not a tokenizer's config but that of a {kind}{hint}")
    try:
        TokenizerConfig.model_validate({key: value for key, value in values.items() if not key.startswith("_")})
    except ValidationError as error:
        reason = "; ".join(sentences(error, TokenizerConfig).splitlines()[:3])
        raise ValueError(f"{file} is not a tokenizer's config: {reason}") from None
