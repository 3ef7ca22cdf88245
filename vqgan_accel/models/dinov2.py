"""DINOv2's ViT-L/14 (Oquab et al. 2023, arXiv 2304.07193): the class token of uint8 images, seen as torch-fidelity's
extractor sees them, with the names of the published weights. The authors' own code is a download that is executed.
"""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from torch.nn import functional as F

from vqgan_accel.models.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FixedModule,
    downloading,
    fit_state,
    freeze,
    load_state,
)

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SIZE, PATCH, TRAINED_SIDE = 224, 14, 37  # pixels, pixels, patches a side of the published positions (518 px)
POSITION_OFFSET = 0.1  # the authors': their interpolation of positions is of (16 + 0.1) / 37


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(FixedModule):
    """uint8 (B, 3, H, W) -> (B, D); random until `load`."""

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.num_features = width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of its training
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_SIDE**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        freeze(self)

    def load(self, file: str | None) -> None:
        fit_state(self, published(file), "weights.dinov2", file)

    def positions(self) -> Tensor:
        """(1, 256, D) of the patches of 224 px"""
        square = self.pos_embed[:, 1:].unflatten(1, (TRAINED_SIDE, TRAINED_SIDE)).permute(0, 3, 1, 2)
        scale = (SIZE // PATCH + POSITION_OFFSET) / TRAINED_SIDE
        return F.interpolate(square, scale_factor=(scale, scale), mode="bicubic").flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        # (Here, for its package brings scipy.)
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        pixels = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIZE, SIZE), align_corners=False)
        patches = self.patch_embed["proj"]((pixels - self.mean) / self.std).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([first, patches + self.positions()], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def published(file: str | None) -> dict[str, Tensor]:
    """The published state dict, from `file` or, where None, a download of 1.2 GB."""
    if file is not None:
        return load_state(Path(file), "weights.dinov2")
    try:
        with downloading(URL):
            return load_state_dict_from_url(URL, map_location="cpu", progress=False, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"DINOv2's weights could not be downloaded from {URL} ({error}); fetch that file elsewhere and give its "
            "path as weights.dinov2=FILE, or leave 'fd_dinov2' out of the metrics"
        ) from None


def load_dinov2(file: str | None) -> DINOv2:
    network = DINOv2()
    network.load(file)
    return network
