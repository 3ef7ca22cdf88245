"""evaluation.reference and the files for it: other people's statistics and samples, ours, and another data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_tokenizer
from PIL import Image
from test_evaluation import SmallFeatures, overrides, pixels_of, rebuilt
from tiny import SIZE, write_images
from torch import Tensor

from vqgan_accel.cli import main
from vqgan_accel.config import Metric, StandardQuantizerConfig
from vqgan_accel.evaluation.evaluate import evaluate
from vqgan_accel.evaluation.measures.frechet import Gaussian, frechet_distance
from vqgan_accel.evaluation.measures.samples import covered
from vqgan_accel.evaluation.reference import statistics
from vqgan_accel.training.setup import open_run

STANDARD = StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8)
FRECHET: tuple[Metric, ...] = ("rfid", "fd_mobilenet")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for network in ("mobilenet_features", "inception"):
        monkeypatch.setattr(f"vqgan_accel.evaluation.networks.{network}", SmallFeatures)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tiny_tokenizer(STANDARD, image_size=SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those that are reconstructed."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "validation", 12)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    write_images(folder / "validation", 15, seed=7)
    return folder


def bytes_in(folder: Path) -> Tensor:
    return pixels_of(sorted((folder / "validation").iterdir()))


def features_of(pixels: Tensor) -> Tensor:
    return SmallFeatures()(pixels).double()


def fitted(features: Tensor) -> Gaussian:
    return Gaussian(features.mean(0), torch.from_numpy(np.cov(features.numpy(), rowvar=False)))


def made_of(saved: Path, pixels: Tensor) -> Tensor:
    """What the tokenizer makes of them, uint8"""
    return ((rebuilt(saved, pixels)[1].clamp(-1, 1) + 1) * 127.5).round().byte()


@pytest.fixture
def distance(saved: Path, images: Path, others: Path) -> float:
    """Between the others and reconstructions of the images, by another way."""
    made = fitted(features_of(made_of(saved, bytes_in(images))))
    return frechet_distance(fitted(features_of(bytes_in(others))), made)


def measured(saved: Path, images: Path, output: Path, reference: Path, *more: str, metrics: Any = FRECHET) -> Any:
    settings = overrides(images, f"evaluation.reference={reference}", *more, metrics=metrics)
    return evaluate(saved, overrides=settings, output=output)


@pytest.mark.seconds
def test_another_data_set_is_what_reconstructions_are_compared_with(
    saved: Path, images: Path, others: Path, distance: float, tmp_path: Path
) -> None:
    metrics: tuple[Metric, ...] = ("rfid", "precision_recall", "psnr")
    report = measured(saved, images, tmp_path, others, metrics=metrics)
    own = evaluate(saved, overrides=overrides(images, metrics=metrics), output=tmp_path / "own")
    assert report["results"]["rfid"] == pytest.approx(distance, rel=1e-6)
    assert report["results"]["psnr"] == own["results"]["psnr"]
    made, real = features_of(made_of(saved, bytes_in(images))), features_of(bytes_in(others))
    assert report["results"]["precision"] == pytest.approx(covered(made, real), rel=1e-6)
    assert report["results"]["recall"] == pytest.approx(covered(real, made), rel=1e-6)
    assert report["protocol"]["reference"]["num_images"] == 15 and own["protocol"]["reference"] is None
    hashed = evaluate(saved, overrides=overrides(others, metrics=("psnr",)), output=tmp_path / "others")
    assert report["protocol"]["reference"]["images_hash"] == hashed["protocol"]["images_hash"]
    assert report["fingerprint"] != own["fingerprint"]


def test_a_reference_that_no_metric_looks_at_is_not_opened(saved: Path, images: Path, tmp_path: Path) -> None:
    report = measured(saved, images, tmp_path, tmp_path / "nowhere", metrics=("psnr",))
    assert report["protocol"]["reference"] is None


def test_statistics_that_we_wrote_give_what_the_data_set_gives(
    saved: Path, images: Path, others: Path, distance: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["data.image_size=16", "data.workers=0", "evaluation.metrics=[rfid,fd_mobilenet]"]
    assert main(["statistics", str(others), f"--output={tmp_path / 's.npz'}", *settings]) == 0
    assert "inception, mobilenet_v2 of 15 images" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert {*arrays.files} == {"protocol", "mu", "sigma", "mu_mobilenet_v2", "sigma_mobilenet_v2"}
        expected = fitted(features_of(bytes_in(others)))
        np.testing.assert_allclose(arrays["mu"], expected.mean, rtol=1e-12)
        np.testing.assert_allclose(arrays["sigma"], expected.covariance, rtol=0, atol=1e-12)
        assert json.loads(str(arrays["protocol"]))["num_images"] == 15
    report = measured(saved, images, tmp_path / "out", tmp_path / "s.npz")
    assert report["results"]["rfid"] == pytest.approx(distance, rel=1e-6)
    assert report["results"]["fd_mobilenet"] == pytest.approx(distance, rel=1e-6)
    assert report["protocol"]["reference"].keys() == {"statistics_sha256"}
    with pytest.raises(ValueError, match="must be the name of a new"):
        statistics(others, output=tmp_path / "s.npz", overrides=settings)
    with pytest.raises(ValueError, match="no Frechet distance"):
        statistics(others, output=tmp_path / "t.npz", overrides=[*settings[:2], "evaluation.metrics=[psnr]"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("data.image_size=20", "image_size 16 and here it is 20"),
        ("evaluation.protocol=adm", "levels round and here it is half_up"),
        ("evaluation.protocol=lightningdit", "resize_filter"),
    ],
)
def test_statistics_of_another_protocol_are_refused_with_the_reason(
    change: str, reason: str, saved: Path, images: Path, others: Path, tmp_path: Path
) -> None:
    settings = ["data.image_size=16", "data.workers=0", "evaluation.metrics=[rfid]"]
    statistics(others, output=tmp_path / "s.npz", overrides=settings)
    with pytest.raises(ValueError, match=f"made with another protocol: .*{reason}"):
        measured(saved, images, tmp_path / "out", tmp_path / "s.npz", change, metrics=("rfid",))


def test_statistics_of_other_weights_are_refused(
    saved: Path, images: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["data.image_size=16", "data.workers=0", "evaluation.metrics=[rfid]"]
    statistics(others, output=tmp_path / "s.npz", overrides=settings)

    def other(weights: object) -> SmallFeatures:
        network = SmallFeatures()
        network.weight.data.mul_(2)
        return network

    monkeypatch.setattr("vqgan_accel.evaluation.networks.inception", other)
    with pytest.raises(ValueError, match="another protocol: weights of inception"):
        measured(saved, images, tmp_path / "out", tmp_path / "s.npz", metrics=("rfid",))


@pytest.mark.seconds
def test_adms_files_of_statistics_and_samples_are_read(
    saved: Path, images: Path, others: Path, distance: float, tmp_path: Path
) -> None:
    """As guided-diffusion's VIRTUAL_imagenet256_labeled.npz: mu and sigma where these do, arr_0 for the rest."""
    pixels = bytes_in(others)
    found = fitted(features_of(pixels))
    samples = pixels.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", mu=found.mean.numpy(), sigma=found.covariance.numpy(), arr_0=samples)
    np.savez(tmp_path / "mar.npz", mu=found.mean.numpy(), sigma=found.covariance.numpy())
    np.savez(tmp_path / "samples.npz", samples)
    for name, metrics in (("adm", (*FRECHET, "kid")), ("mar", ("rfid",)), ("samples", FRECHET)):
        report = measured(saved, images, tmp_path / name, tmp_path / f"{name}.npz", metrics=metrics)
        assert report["results"]["rfid"] == pytest.approx(distance, rel=1e-6)
        if "fd_mobilenet" in metrics:
            assert report["results"]["fd_mobilenet"] == pytest.approx(distance, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"neither statistics of mobilenet_v2 nor samples \(arr_0\), which fd_mobilenet"
    ):
        measured(saved, images, tmp_path / "no", tmp_path / "mar.npz")
    with pytest.raises(ValueError, match=r"arr_0 in .* \(15, 16, 16, 3\), and images of data.image_size 20"):
        measured(saved, images, tmp_path / "no", tmp_path / "samples.npz", "data.image_size=20")


@pytest.mark.parametrize("content", ["nothing", "text", "objects", "shapes", "missing"])
def test_a_file_that_is_no_reference_is_named(content: str, saved: Path, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    match content:
        case "nothing":
            file.touch()
        case "text":
            file.write_text("<html>")
        case "objects":
            np.savez(file, mu=np.array([{}], dtype=object), sigma=np.zeros(2))
        case "shapes":
            np.savez(file, mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"evaluation\.reference: .*{file.name}"):
        measured(saved, images, tmp_path / "out", file, metrics=("rfid",))


def test_a_validation_after_the_first_shows_the_images_to_no_network_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import tiny_config

    from vqgan_accel.interruption import StopRequest

    passes: list[int] = []
    forward = SmallFeatures.forward

    def counted(self: SmallFeatures, pixels: Tensor) -> Tensor:
        passes.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(SmallFeatures, "forward", counted)
    config = tiny_config(tmp_path, training={"validation_metrics": ["rfid", "kid"], "best_metric": "rfid"})
    with open_run(config) as run:
        results, seen = [], []
        for _ in range(3):
            results.append(run.validation.measure(run.networks.best_tokenizer, StopRequest()).results)
            seen.append(sum(passes))
    assert seen == [6, 9, 12] and results[0] == results[1] == results[2]  # of 3 images


# ---- reconstructions for other evaluators


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_reconstructions_are_written_in_the_order_of_the_split(
    kind: str, saved: Path, images: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # the second in place of the first
        settings = overrides(images, f"evaluation.save_reconstructions={kind}", metrics=("psnr",), batch_size=5)
        evaluate(saved, overrides=settings, output=tmp_path)
    expected = made_of(saved, bytes_in(images)).permute(0, 2, 3, 1).numpy()
    if kind == "npz":
        with np.load(tmp_path / "reconstructions.npz", allow_pickle=False) as arrays:
            written = arrays["arr_0"]
    else:
        files = sorted((tmp_path / "reconstructions").iterdir())
        assert [file.suffix for file in files] == [".png"] * 12
        written = np.stack([np.asarray(Image.open(file)) for file in files])
    assert written.dtype == np.uint8 and written.shape == (12, SIZE, SIZE, 3)
    assert abs(written.astype(int) - expected).max() <= 1  # rounding, after a network that saw another batch
    names = {
        "metrics.json",
        "reconstructions.png",
        "codebook.png",
        "reconstructions" + (".npz" if kind == "npz" else ""),
    }
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.seconds
def test_reconstructions_that_we_wrote_are_a_reference_of_distance_zero(
    saved: Path, images: Path, tmp_path: Path
) -> None:
    settings = overrides(images, "evaluation.save_reconstructions=npz", metrics=("psnr",))
    evaluate(saved, overrides=settings, output=tmp_path)
    report = measured(saved, images, tmp_path / "out", tmp_path / "reconstructions.npz", metrics=("rfid",))
    assert report["results"]["rfid"] == pytest.approx(0, abs=1e-9)


def test_reconstructions_are_complete_or_absent(saved: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data" / "validation", 4)
    (tmp_path / "data" / "validation" / "003.png").write_bytes(b"no image")
    settings = overrides(tmp_path / "data", "evaluation.save_reconstructions=npz", metrics=("psnr",))
    with pytest.raises(ValueError, match="cannot read image"):
        evaluate(saved, overrides=settings, output=tmp_path / "out")
    assert not (tmp_path / "out" / "reconstructions.npz").exists()
