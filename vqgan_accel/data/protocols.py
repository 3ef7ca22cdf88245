"""The crops, roundings and windows with which published numbers were made. A new one is an entry here and, where it
crops as no other does, a function in data/crops.py.

Plain names and words, for the config: what they stand for is in data/crops.py and evaluation/pixels.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Crop = Literal["square", "adm", "bicubic", "bilinear", "opencv", "tensor"]  # a key of data.crops.CROPS
Levels = Literal["round", "half_up", "truncate", "truncate_both"]  # a key of evaluation.pixels.LEVELS
Ssim = Literal["gaussian", "gaussian_signed", "uniform", "uniform_range_2"]  # a key of evaluation.pixels.SSIM


class Protocol(NamedTuple):
    """All that may differ between two laboratories' numbers of the same reconstructions."""

    crop: Crop
    levels: Levels  # how pixels become 8 bits
    eight_bit_psnr: bool  # whether l2 and psnr see those; else they see the network's own output, and the exact image
    eight_bit_ssim: bool
    ssim: Ssim


# evaluation.protocol -> what it is. docs/evaluation.md says which code each was read from.
PROTOCOLS = {
    "ours": Protocol("square", "round", False, False, "gaussian"),
    # guided-diffusion's crop; the rest is LlamaGen's reconstruction_vq_ddp.py
    "adm": Protocol("adm", "half_up", True, True, "uniform_range_2"),
    # 1d-tokenizer: webdataset_reader.py, train_utils.py
    "titok": Protocol("bicubic", "round", True, True, "gaussian"),
    # webdataset_reader.py, evaluator.py
    "maskbit": Protocol("bilinear", "truncate", False, False, "gaussian"),
    # SEED-Voken: data/imagenet.py, evaluation_image.py
    "taming": Protocol("opencv", "truncate_both", True, True, "uniform"),
    # evaluate_tokenizer.py
    "lightningdit": Protocol("tensor", "half_up", True, False, "gaussian_signed"),
}
