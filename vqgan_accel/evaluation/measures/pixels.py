"""Of pixels in [0, 1], which evaluation.protocol may have rounded to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from vqgan_accel.evaluation.measures.base import Collected, Mean, MeanOverImages, Measure, Seen, Setting
from vqgan_accel.evaluation.pixels import SSIM as SSIM_RULES
from vqgan_accel.evaluation.pixels import ssim

MIN_MSE = 1e-10  # a perfect reconstruction counts as 100 dB


def mse_of_images(seen: Seen) -> Tensor:
    x, y = seen.pixels.seen(seen.protocol.eight_bit_psnr)
    return (x - y).square().mean((1, 2, 3))


def psnr(mse: Tensor) -> Tensor:
    """Decibels, for pixels in [0, 1]."""
    return -10 * mse.clamp_min(MIN_MSE).log10()


class L2(MeanOverImages):
    def of_images(self, seen: Seen) -> Tensor:
        return mse_of_images(seen)


class PSNR(Measure):
    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.mse, self.per_image = Mean(setting.device), Mean(setting.device)

    def update(self, seen: Seen) -> None:
        mse = mse_of_images(seen)
        self.mse.add(mse)
        self.per_image.add(psnr(mse))

    def results(self, collected: Collected) -> dict[str, float]:
        return {"psnr": float(psnr(self.mse.value())), "psnr_per_image": float(self.per_image.value())}

    def reset(self) -> None:
        self.mse.reset()
        self.per_image.reset()


class SSIM(MeanOverImages):
    def of_images(self, seen: Seen) -> Tensor:
        return ssim(*seen.pixels.seen(seen.protocol.eight_bit_ssim), SSIM_RULES[seen.protocol.ssim])


class MSSSIM(MeanOverImages):
    """Wang et al. 2003, "Multi-scale structural similarity for image quality assessment", with its five weights."""

    def of_images(self, seen: Seen) -> Tensor:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # takes seconds

        x, y = seen.pixels.seen(seen.protocol.eight_bit_ssim)
        pairs = zip(x.split(1), y.split(1), strict=True)  # or a batch would take gigabytes
        values = [multiscale_structural_similarity_index_measure(made, image, data_range=1.0) for image, made in pairs]
        return torch.stack(values)
