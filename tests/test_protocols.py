"""evaluation.protocol: other laboratories' crops, roundings and SSIM, each against their code or a second one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.transforms.functional import to_tensor

from vqgan_accel.config import EvaluationConfig, WeightFiles
from vqgan_accel.data.crops import CROPS, evaluation_view, opencv_linear, views_of
from vqgan_accel.data.protocols import PROTOCOLS, Crop
from vqgan_accel.data.views import to_float
from vqgan_accel.evaluation import pixels
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.evaluation.pixels import LEVELS, SSIM, ssim

GOLDEN = Path(__file__).parent / "golden" / "crops" / "adm.json"
SIDES = st.one_of(st.integers(1, 90), st.sampled_from([1, 2, 255, 256, 257, 512]))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- crops


def resized_sides(image: Image.Image, size: int) -> tuple[int, int]:
    """torchvision's: the long side is cut to a whole number."""
    width, height = image.size
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (S, S, 3), as torchvision rounds"""
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def by_pillow(image: Image.Image, size: int, resample: Image.Resampling) -> Tensor:
    resized = np.asarray(image.resize(resized_sides(image, size), resample))
    return torch.from_numpy(centre(resized, size).copy()).permute(2, 0, 1)


def by_opencv(image: Image.Image, size: int) -> Tensor:
    """albumentations 0.4.3's SmallestMaxSize and CenterCrop"""
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    resized = cv2.resize(np.asarray(image), (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = (height - size) // 2, (width - size) // 2
    return torch.from_numpy(resized[top : top + size, left : left + size].copy()).permute(2, 0, 1)


def by_torch(image: Image.Image, size: int) -> Tensor:
    width, height = resized_sides(image, size)
    pixels = to_tensor(image)[None]
    if image.size != (width, height):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    cropped = centre(pixels[0].permute(1, 2, 0).numpy(), size)
    return torch.from_numpy(cropped.copy()).permute(2, 0, 1).sub(0.5).div(0.5)


SECOND = {
    "bicubic": lambda image, size: by_pillow(image, size, Image.Resampling.BICUBIC),
    "bilinear": lambda image, size: by_pillow(image, size, Image.Resampling.BILINEAR),
    "opencv": by_opencv,
    "tensor": by_torch,
}


@pytest.mark.parametrize("crop", SECOND)
@given(width=SIDES, height=SIDES, size=st.sampled_from([4, 17, 64]))
@settings(max_examples=40, deadline=None)
def test_a_crop_is_to_the_last_bit_that_of_a_second_implementation(
    crop: Crop, width: int, height: int, size: int
) -> None:
    image = noise(width, height)
    assert torch.equal(evaluation_view(image, size, crop), SECOND[crop](image, size))


@pytest.mark.parametrize("crop", SECOND)
@pytest.mark.parametrize(("width", "height"), [(500, 375), (3000, 2001), (256, 256), (512, 512)])
def test_the_same_of_photographs_sizes(crop: Crop, width: int, height: int) -> None:
    image = noise(width, height)
    assert torch.equal(evaluation_view(image, 256, crop), SECOND[crop](image, 256))


def test_adms_crop_gives_what_the_authors_function_gives() -> None:
    """golden/crops/adm.json: sha256 of what center_crop_arr, as LlamaGen has it, makes of `noise`, the same with Pillow
    10.4 and 13.0. (Of 31 x 900 pixels to 16 these two give different ones.)"""
    golden = json.loads(GOLDEN.read_text())
    for case, expected in golden.items():
        width, height, size = map(int, case.split())
        view = evaluation_view(noise(width, height), size, "adm")
        assert view.shape == (3, size, size) and view.dtype == torch.uint8
        found = hashlib.sha256(view.permute(1, 2, 0).numpy().tobytes()).hexdigest()[:16]
        assert found == expected, case


@given(SIDES, SIDES, st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=100, deadline=None)
def test_opencvs_linear_resize_is_written_to_the_last_bit(width: int, height: int, wanted: int, other: int) -> None:
    image = np.asarray(noise(width, height))
    expected = cv2.resize(image, (wanted, other), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(opencv_linear(image, wanted, other), expected)


def test_every_crop_is_another_one_and_says_so() -> None:
    image = noise(90, 61)
    views = {crop: to_float(evaluation_view(image, 32, crop)) for crop in CROPS}
    found = list(views.values())
    assert all(not torch.equal(a, b) for place, a in enumerate(found) for b in found[:place])
    assert len({(rule.crop, rule.resize_filter) for rule in CROPS.values()}) == len(CROPS)
    assert {protocol.crop for protocol in PROTOCOLS.values()} == {*CROPS}


@pytest.mark.parametrize("crop", CROPS)
def test_mirrored_and_ten_views_are_of_the_same_crop(crop: Crop) -> None:
    image = noise(50, 40)
    plain, mirrored = views_of(image, 20, crop, "flip")
    assert torch.equal(plain, evaluation_view(image, 20, crop)) and torch.equal(mirrored, plain.flip(-1))
    assert torch.equal(views_of(image, 20, crop, "10crop")[0], evaluation_view(image, 22, crop)[:, :20, :20])


# ---- 8 bits


def levels(name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    originals, reconstructions = LEVELS[name]
    return originals(images), reconstructions(images)


@pytest.mark.parametrize("name", LEVELS)
def test_originals_keep_their_level_but_where_a_laboratory_loses_some(name: str) -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    originals, _ = levels(name, to_float(stored))
    if name != "truncate_both":
        return torch.testing.assert_close(originals, stored, rtol=0, atol=0)
    # as SEED-Voken has it: data/base.py makes image/127.5 - 1.0 in float32, evaluation_image.py truncates
    image = torch.from_numpy((np.arange(256, dtype=np.uint8) / 127.5 - 1.0).astype(np.float32))
    theirs = ((image + 1) / 2 * 255.0).to(torch.uint8)
    assert torch.equal(originals, theirs) and int((theirs != stored).sum()) == 95


def test_reconstructions_are_rounded_as_each_code_does() -> None:
    x = torch.tensor([-1.0, 1.0, 0.0, 100.5 / 127.5 - 1, 100.9 / 127.5 - 1, 100.1 / 127.5 - 1])
    expected = {
        "round": [0, 255, 128, 100, 101, 100],  # 127.5 and 100.5 to the even one
        "half_up": [0, 255, 128, 101, 101, 100],
        "truncate": [0, 255, 127, 100, 100, 100],
        "truncate_both": [0, 255, 127, 100, 100, 100],
    }
    assert {name: levels(name, x)[1].tolist() for name in LEVELS} == expected


# ---- SSIM


def pair(number: int = 2, size: int = 40) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) in [0, 1]"""
    x = torch.rand(number, 3, size, size + 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = F.avg_pool2d(x, 3, 1)
    return x, (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def by_torchmetrics(x: Tensor, y: Tensor, **settings: object) -> list[float]:
    return structural_similarity_index_measure(y, x, reduction="none", **settings).tolist()


def by_skimage(x: Tensor, y: Tensor, data_range: float) -> list[float]:
    images = zip(x.numpy(), y.numpy(), strict=True)
    return [structural_similarity(a, b, data_range=data_range, channel_axis=0) for a, b in images]


def test_ssim_is_torchmetrics_or_scikit_images() -> None:
    x, y = pair()
    found = {name: ssim(x, y, rule).tolist() for name, rule in SSIM.items()}
    assert found["gaussian"] == pytest.approx(by_torchmetrics(x, y, data_range=1.0), abs=1e-6)
    signed = by_torchmetrics(2 * x - 1, 2 * y - 1, data_range=(-1.0, 1.0))
    assert found["gaussian_signed"] == pytest.approx(signed, abs=1e-6)
    assert found["uniform"] == pytest.approx(by_skimage(x, y, 1.0), abs=1e-9)
    assert found["uniform_range_2"] == pytest.approx(by_skimage(x, y, 2.0), abs=1e-9)
    assert all(0.3 < value < 0.97 for values in found.values() for value in values)
    assert min(np.subtract(found["uniform_range_2"], found["uniform"])) > 0.02  # LlamaGen's range flatters


@pytest.mark.parametrize("name", SSIM)
def test_strips_do_not_change_ssim(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair()
    whole = ssim(x, y, SSIM[name])
    for strip in (1, 100, 500):
        monkeypatch.setattr(pixels, "STRIP", strip)
        torch.testing.assert_close(ssim(x, y, SSIM[name]), whole, rtol=1e-12, atol=0)


# ---- all of it


def measure(protocol: str, images: Tensor, reconstructions: Tensor) -> dict[str, float]:
    config = EvaluationConfig(protocol=protocol)
    metrics = Metrics(["psnr", "ssim"], (4,), config, WeightFiles(), torch.device("cpu"))
    metrics.update(
        images, reconstructions, torch.zeros(len(images), 1, 1, dtype=torch.int64), torch.arange(len(images))
    )
    return metrics.compute()


def test_psnr_and_ssim_are_what_the_authors_scripts_print() -> None:
    stored = torch.stack([evaluation_view(noise(60 + i, 50), 32) for i in range(3)])  # uint8
    images = to_float(stored)
    made = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)

    # LlamaGen: reconstruction_vq_ddp.py
    restored = torch.clamp(127.5 * made + 128.0, 0, 255).to(torch.uint8).float().div(255).numpy()
    truth = ((images + 1) / 2).numpy()
    both = list(zip(restored, truth, strict=True))
    found = measure("adm", images, made)
    expected = np.mean([peak_signal_noise_ratio(b, a, data_range=1) for a, b in both])
    assert found["psnr_per_image"] == pytest.approx(expected, abs=1e-4)
    expected = np.mean([structural_similarity(a, b, data_range=2.0, channel_axis=0) for a, b in both])
    assert found["ssim"] == pytest.approx(expected, abs=1e-5)

    # LightningDiT: evaluate_tokenizer.py
    levels = [torch.clamp(127.5 * x + 128.0, 0, 255).to(torch.uint8).float() for x in (images, made)]
    errors = [torch.mean((a - b) ** 2) for a, b in zip(*levels, strict=True)]
    found = measure("lightningdit", images, made)
    expected = np.mean([20 * torch.log10(255.0 / torch.sqrt(error)).item() for error in errors])
    assert found["psnr_per_image"] == pytest.approx(expected, abs=1e-4)
    expected = structural_similarity_index_measure(made, images, data_range=(-1.0, 1.0)).item()
    assert found["ssim"] == pytest.approx(expected, abs=1e-5)

    # SEED-Voken: evaluation_image.py, of images as its data/base.py makes them
    images32 = torch.from_numpy((stored.numpy() / 127.5 - 1.0).astype(np.float32))
    restored, truth = (((x + 1) / 2 * 255.0).to(torch.uint8).numpy().astype(np.float32) / 255 for x in (made, images32))
    both = list(zip(restored, truth, strict=True))
    found = measure("taming", images, made)
    assert found["psnr_per_image"] == pytest.approx(np.mean([peak_signal_noise_ratio(b, a) for a, b in both]), abs=1e-4)
    expected = np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in both])
    assert found["ssim"] == pytest.approx(expected, abs=1e-5)
