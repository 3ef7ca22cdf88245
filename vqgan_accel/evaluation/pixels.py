"""What pixel metrics see of an image and its reconstruction, and SSIM, as each laboratory's code has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqgan_accel.data.protocols import Levels, Protocol, Ssim

K1, K2 = 0.01, 0.03  # of SSIM's two constants (Wang et al. 2004)
STRIP = 2**17  # pixels of which SSIM's maps are held at a time

# ---- 8 bits


def rounded(images: Tensor) -> Tensor:
    """To the nearest of 256 levels."""
    return ((images + 1) / 2 * 255).round().byte()


def rounded_half_up(images: Tensor) -> Tensor:
    """127.5 x + 128, truncated (ADM, LlamaGen, LightningDiT)."""
    return (127.5 * images + 128).clamp(0, 255).byte()


def truncated(images: Tensor) -> Tensor:
    """255 (x + 1) / 2, truncated: half a level darker, on average."""
    return ((images + 1) / 2 * 255).byte()


def truncated_again(images: Tensor) -> Tensor:
    """Of images that were 8-bit: as SEED-Voken truncates them from float32, in which 95 of the 256 levels come out one
    lower."""
    levels = rounded(images).double()
    return truncated((levels / 127.5 - 1).float())


# what images (B, 3, H, W) in [-1, 1] become as uint8, of originals and of reconstructions
LEVELS: dict[Levels, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "round": (rounded, rounded),
    "half_up": (rounded_half_up, rounded_half_up),
    "truncate": (rounded, truncated),
    "truncate_both": (truncated_again, truncated),
}


class Pixels(NamedTuple):
    """Of a batch of originals and of their reconstructions, (B, 3, H, W)."""

    x: Tensor  # in [-1, 1]
    y: Tensor
    x_levels: Tensor  # uint8, for feature networks that count
    y_levels: Tensor

    def seen(self, eight_bit: bool) -> tuple[Tensor, Tensor]:
        """In [0, 1], float64."""
        if eight_bit:
            return self.x_levels.double() / 255, self.y_levels.double() / 255
        return (self.x.double() + 1) / 2, (self.y.double() + 1) / 2


def pixels_of(protocol: Protocol, images: Tensor, reconstructions: Tensor) -> Pixels:
    """Both (B, 3, H, W) in [-1, 1]."""
    of_originals, _ = LEVELS[protocol.levels]
    return Pixels(images, reconstructions, of_originals(images), reconstruction_levels(protocol, reconstructions))


def reconstruction_levels(protocol: Protocol, reconstructions: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) of what a network made, clipped to [-1, 1]"""
    return LEVELS[protocol.levels][1](reconstructions.clamp(-1, 1))


# ---- SSIM


class SsimRule(NamedTuple):
    """Of Wang et al. 2004, what implementations do not agree on."""

    side: int  # pixels of the window
    sigma: float | None  # of its Gaussian; None: all pixels count alike
    data_range: float  # that the two constants are made with
    reflected: bool = False  # whether the border, mirrored, is measured too
    signed: bool = False  # whether pixels are in [-1, 1]
    unbiased: bool = False  # variances over n^2 - 1

    def window(self, device: torch.device) -> Tensor:
        """(n,) along each side, of sum 1"""
        places = torch.arange(self.side, device=device, dtype=torch.float64) - (self.side - 1) / 2
        weights = torch.exp(-(places**2) / (2 * self.sigma**2)) if self.sigma else torch.ones_like(places)
        return weights / weights.sum()


SSIM: dict[Ssim, SsimRule] = {
    "gaussian": SsimRule(11, 1.5, 1, reflected=True),  # Wang et al. 2004; torchmetrics, MaskBit
    "gaussian_signed": SsimRule(11, 1.5, 2, reflected=True, signed=True),  # torchmetrics, data_range=(-1, 1)
    "uniform": SsimRule(7, None, 1, unbiased=True),  # scikit-image's default
    "uniform_range_2": SsimRule(7, None, 2, unbiased=True),  # the same with data_range=2 on pixels in [0, 1]: LlamaGen
}


def ssim(x: Tensor, y: Tensor, rule: SsimRule) -> Tensor:
    """Both (B, 3, H, W) in [0, 1], at least as large as the window -> (B,) float64: the SSIM map's mean over positions
    and channels."""
    return torch.stack([_mean_ssim(a.double(), b.double(), rule) for a, b in zip(x, y, strict=True)])


def _mean_ssim(x: Tensor, y: Tensor, rule: SsimRule) -> Tensor:
    """Both (3, H, W) -> (). Strip by strip, for the maps of a whole photograph would take gigabytes."""
    size = rule.side
    if rule.reflected:
        x, y = (F.pad(image, (size // 2,) * 4, mode="reflect") for image in (x, y))
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1  # of the map
    total = x.new_zeros(())
    for start in range(0, height, max(1, STRIP // width)):
        rows = slice(start, min(start + max(1, STRIP // width), height) + size - 1)
        total += _ssim_map(x[:, rows], y[:, rows], rule).sum()
    return total / (len(x) * height * width)


def _ssim_map(x: Tensor, y: Tensor, rule: SsimRule) -> Tensor:
    """Both (3, H, W) -> (3, H - n + 1, W - n + 1)"""
    if rule.signed:
        x, y = 2 * x - 1, 2 * y - 1
    size, window = rule.side, rule.window(x.device)
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # (15, 1, H, W)
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, 1, size)), window.view(1, 1, size, 1))
    mean_x, mean_y, xx, yy, xy = maps[:, 0].unflatten(0, (5, -1))
    scale = size**2 / (size**2 - 1) if rule.unbiased else 1.0
    var_x, var_y, cov = scale * (xx - mean_x**2), scale * (yy - mean_y**2), scale * (xy - mean_x * mean_y)
    c1, c2 = (K1 * rule.data_range) ** 2, (K2 * rule.data_range) ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
