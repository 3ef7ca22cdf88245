"""evaluate(): one answer whatever points to the tokenizer, in whatever batches and on however many processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_tokenizer
from matplotlib.figure import Figure
from PIL import Image
from skimage.metrics import structural_similarity
from tiny import SIZE, SPLITS, tiny_config, write_images
from torch import Tensor, nn
from torch.distributed.run import main as torchrun
from torchvision import models as tv

from vqgan_accel.cli import main
from vqgan_accel.config import METRIC_RESULTS, EvaluationConfig, Metric, StandardQuantizerConfig, WeightFiles
from vqgan_accel.data.crops import CROPS
from vqgan_accel.data.protocols import PROTOCOLS
from vqgan_accel.data.views import Batch, to_float
from vqgan_accel.evaluation.evaluate import Evaluation, evaluate, evaluate_tokenizer
from vqgan_accel.evaluation.figures import codebook_histogram
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.models.tokenizer import ImageTokenizer, load_tokenizer
from vqgan_accel.models.weights import state_hash
from vqgan_accel.training.loop import train

REPOSITORY = Path(__file__).parent.parent
STANDARD = StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8)
METRICS: tuple[Metric, ...] = ("l2", "psnr", "ssim", "codebook")
RESULTS = [
    "l2",
    "psnr",
    "psnr_per_image",
    "ssim",
    "perplexity",
    "codebook_usage",
    "bits_per_token",
    "bits_per_pixel",
    "quantization_error",
]
CPU = torch.device("cpu")
# SSIM is a mean of values up to 1 that cancel: here -0.0097, of which older torch moves 4e-8 with the batch size
SSIM = 1e-7


def overrides(data: Path, *more: str, metrics: tuple[Metric, ...] = METRICS, batch_size: int = 2) -> list[str]:
    settings = [f"data.path={data}", "data.workers=0", f"evaluation.batch_size={batch_size}"]
    return [*settings, f"evaluation.metrics=[{','.join(metrics)}]", *more]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tiny_tokenizer(STANDARD, image_size=SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 7 validation images of the tokenizer's size."""
    folder = tmp_path_factory.mktemp("seven")
    write_images(folder / "validation", 7)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with averaged weights and three checkpoints; `best` leads to the second."""
    settings = {"max_steps": 3, "checkpoint_every": "1 step", "ema_decay": 0.5, "base_lr": 1e-2, "lr_scaling": "none"}
    folder = train(tiny_config(tmp_path_factory.mktemp("trained"), training=settings))
    best = folder / "checkpoints" / "best"
    best.unlink(missing_ok=True)
    best.symlink_to("step_00000002")
    return folder


@pytest.fixture(scope="module", autouse=True)
def blank_histogram() -> Iterator[None]:
    """Drawing it takes longer than all else in these evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vqgan_accel.evaluation.evaluate.codebook_histogram", lambda *drawn: Figure(figsize=(1, 1)))
        yield


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where a test has its results written."""
    return tmp_path / "results"


# ---- the numbers


def pixels_of(files: list[Path]) -> Tensor:
    """uint8 (B, 3, S, S)"""
    return torch.stack([torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) for file in files])


def rebuilt(folder: Path, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions in [-1, 1] of a saved tokenizer."""
    tokenizer = ImageTokenizer.from_pretrained(folder)
    codes = tokenizer.encode(to_float(pixels))
    return codes, tokenizer.decode(codes)


def as_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3), by numpy"""
    return np.rint((images.numpy().astype(np.float64) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def test_a_saved_tokenizer_without_a_run_is_measured_on_the_data_that_is_named(
    saved: Path, seven: Path, here: Path
) -> None:
    report = evaluate(saved, overrides=overrides(seven), output=here)
    pixels = pixels_of(sorted((seven / "validation").iterdir()))
    codes, reconstructions = rebuilt(saved, pixels)
    x, y = pixels.numpy() / 255, (reconstructions.numpy().astype(np.float64) + 1) / 2
    mse = ((x - y) ** 2).mean((1, 2, 3))
    counts = np.bincount(codes.numpy().ravel(), minlength=16)
    p = counts[counts > 0] / counts.sum()
    tokenizer = load_tokenizer(saved)
    with torch.no_grad():
        z = tokenizer.latents(pixels / 127.5 - 1).double()
    e = tokenizer.quantizer.codebook.detach().double()[codes].movedim(-1, 1)
    error = float((z - e).square().sum() / z.square().sum())
    ssim = []
    for images in zip(x, y, strict=True):
        padded = [np.pad(image, ((0, 0), (5, 5), (5, 5)), mode="reflect") for image in images]
        ssim.append(structural_similarity(*padded, data_range=1.0, gaussian_weights=True, sigma=1.5,
                                          use_sample_covariance=False, channel_axis=0))  # fmt: skip
    expected = {
        "l2": mse.mean(),
        "psnr": -10 * np.log10(mse.mean()),
        "psnr_per_image": (-10 * np.log10(mse)).mean(),
        "ssim": pytest.approx(np.mean(ssim), abs=2e-5),
        "perplexity": np.exp(-(p * np.log(p)).sum()),
        "codebook_usage": 100 * len(p) / 16,
        "bits_per_token": -(p * np.log2(p)).sum(),
        "bits_per_pixel": -(p * np.log2(p)).sum() * codes[0].numel() / SIZE**2,
        "quantization_error": error,
    }
    assert list(report["results"]) == RESULTS == list(expected)
    for name, value in expected.items():
        assert report["results"][name] == (pytest.approx(value, rel=1e-6) if name != "ssim" else value), name
    assert len(p) > 3  # or the codes would say little


def test_without_a_run_the_data_must_be_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        evaluate(saved)


@pytest.mark.parametrize("batch_size", [3, 7, 32])
def test_results_and_fingerprint_do_not_depend_on_the_batch_size(
    batch_size: int, saved: Path, seven: Path, here: Path
) -> None:
    expected, report = (
        evaluate(saved, overrides=overrides(seven, batch_size=batch), output=here / str(batch))
        for batch in (1, batch_size)
    )
    assert report["results"] == pytest.approx(expected["results"], rel=1e-6, abs=SSIM)
    assert report["fingerprint"] == expected["fingerprint"]


def test_a_saved_tokenizer_is_measured_at_its_own_image_size(tmp_path: Path, seven: Path, here: Path) -> None:
    tiny_tokenizer(STANDARD, image_size=20).save_pretrained(tmp_path / "tokenizer")  # its stride is 4
    assert evaluate(tmp_path / "tokenizer", overrides=overrides(seven), output=here)["protocol"]["image_size"] == 20


def test_an_image_size_that_the_tokenizer_cannot_take_is_refused(tmp_path: Path, seven: Path) -> None:
    tiny_tokenizer(STANDARD, image_size=32, channel_multipliers=(1,) * 5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"data\.image_size 16 .*32, the stride"):
        evaluate(tmp_path, overrides=overrides(seven, "data.image_size=16"))


# ---- what points to the tokenizer


def test_a_run_is_its_latest_checkpoint_whatever_leads_there(run: Path, here: Path) -> None:
    newest = run / "checkpoints" / "step_00000003"
    ways = [run, newest, run / "checkpoints" / "latest", newest / "tokenizer_ema"]
    reports = [evaluate(path, output=here) for path in ways]
    for report in reports:
        assert report["results"] == reports[0]["results"]
        assert report["fingerprint"] == reports[0]["fingerprint"]
        assert Path(report["checkpoint"]).samefile(newest / "tokenizer_ema")


def test_the_best_link_is_the_checkpoint_that_it_leads_to(run: Path, here: Path) -> None:
    best, second, latest = (
        evaluate(run / "checkpoints" / name, output=here) for name in ("best", "step_00000002", "latest")
    )
    assert best["results"] == second["results"] != latest["results"]
    assert best["tokenizer_sha256"] == second["tokenizer_sha256"] != latest["tokenizer_sha256"]
    assert best["fingerprint"] == latest["fingerprint"]  # the protocol says nothing about the tokenizer


def test_averaged_weights_are_taken_where_the_checkpoint_has_them(run: Path, tmp_path: Path, here: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000003"
    plain, averaged = (ImageTokenizer.from_pretrained(checkpoint / name) for name in ("tokenizer", "tokenizer_ema"))
    report = evaluate(checkpoint, output=here)
    assert report["tokenizer_sha256"] == state_hash(averaged) != state_hash(plain)
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003" / "tokenizer_ema")
    report = evaluate(tmp_path / "run", output=here)
    assert report["tokenizer_sha256"] == state_hash(plain)


def test_evaluate_gives_what_validation_gave_in_training(run: Path, here: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["step"] == 3 and "validation/l2" in line]
    results = evaluate(run, output=here)["results"]
    assert results == {name: last[f"validation/{name}"] for name in RESULTS}


def test_a_tokenizer_that_is_taken_out_of_its_run_gives_the_same(run: Path, tmp_path: Path, here: Path) -> None:
    folder = shutil.copytree(run / "checkpoints" / "step_00000003" / "tokenizer_ema", tmp_path / "a" / "b" / "c" / "d")
    expected = evaluate(run, output=here)
    report = evaluate(folder, overrides=overrides(run.parent / "images"), output=here)
    for name in ("results", "fingerprint", "tokenizer_sha256"):
        assert report[name] == expected[name], name


def test_the_data_that_is_named_takes_the_place_of_the_runs_own(run: Path, tmp_path: Path, here: Path) -> None:
    write_images(tmp_path / "a: b" / "validation", 5)
    settings = ["data.workers=0", "evaluation.metrics=[l2, psnr]"]
    expected = evaluate(run, output=here, overrides=[f"data.path='{tmp_path / 'a: b'}'", *settings])
    report = evaluate(run, data=tmp_path / "a: b", output=here / "called", overrides=settings)
    command = ["evaluate", str(run), f"--data={tmp_path / 'a: b'}", f"--output={here / 'commanded'}", *settings]
    assert main(command) == 0
    assert report == expected == json.loads((here / "commanded" / "metrics.json").read_text())
    assert report["protocol"]["num_images"] == 5


def test_results_of_other_images_do_not_take_the_place_of_those_of_the_runs_own(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    write_images(tmp_path / "other" / "validation", 4)
    for data in (None, tmp_path / "other"):
        evaluate(copy, data=data, overrides=["data.workers=0", "evaluation.metrics=[l2]", "evaluation.grid_images=0"])
    found = {file.parent.name: json.loads(file.read_text()) for file in copy.glob("evaluation/*/metrics.json")}
    assert {name: report["protocol"]["num_images"] for name, report in found.items()} == {
        "validation": SPLITS["validation"],
        "other_validation": 4,
    }


# ---- what is written


def test_metrics_json_holds_the_results_and_all_that_decided_them(run: Path, here: Path) -> None:
    report = evaluate(run, overrides=["evaluation.split=test"], output=here)
    assert json.loads((here / "metrics.json").read_text()) == report
    tokenizer = run / "checkpoints" / "step_00000003" / "tokenizer_ema"
    protocol = report["protocol"]
    canonical = json.dumps(protocol, sort_keys=True).encode()
    assert report == {
        "results": report["results"],
        "checkpoint": str(tokenizer),
        "tokenizer_sha256": state_hash(ImageTokenizer.from_pretrained(tokenizer)),
        "skipped_images": 0,
        "protocol": protocol,
        "fingerprint": hashlib.sha256(canonical).hexdigest()[:16],
    }
    assert protocol == {
        "num_images": 3,
        "image_size": SIZE,
        "crop": CROPS["square"].crop,
        "resize_filter": CROPS["square"].resize_filter,
        "levels": "round",
        "psnr_in_8_bits": False,
        "ssim_in_8_bits": False,
        "ssim": "gaussian",
        "arithmetic": "float32, IEEE",
        "images_hash": protocol["images_hash"],
        "metrics": list(METRICS),
        "lpips_network": None,
        "pfid": None,
        "reference": None,
        "feature_networks_sha256": {},
        "torchmetrics": protocol["torchmetrics"],
    }
    assert set(report["results"]) == set(RESULTS)
    assert all(type(value) is float for value in report["results"].values())


def test_another_laboratorys_protocol_is_another_fingerprint_with_other_pixels(run: Path, here: Path) -> None:
    smaller = ["data.image_size=12", "evaluation.metrics=[psnr]"]  # as they are, these images need no resize
    reports = {
        name: evaluate(run, overrides=[f"evaluation.protocol={name}", *smaller], output=here / name)
        for name in PROTOCOLS
    }
    found = {name: report["protocol"] for name, report in reports.items()}
    assert len({report["fingerprint"] for report in reports.values()}) == len(PROTOCOLS)
    # of 20 x 16 pixels ours and MaskBit's crop are the same, and so are ADM's and TiTok's
    assert len({protocol["images_hash"] for protocol in found.values()}) == 4
    assert (found["adm"]["levels"], found["adm"]["ssim"]) == ("half_up", "uniform_range_2")
    assert found["lightningdit"]["resize_filter"] == "torch bilinear, antialiased, float32"


@pytest.mark.seconds
def test_the_protocol_names_the_networks_of_the_metrics(saved: Path, seven: Path, here: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(tv.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    settings = ["evaluation.lpips_network=squeeze", f"weights.squeezenet={tmp_path / 'squeezenet.pth'}"]
    report = evaluate(
        saved, overrides=overrides(seven, *settings, "data.image_size=32", metrics=("lpips", "codebook")), output=here
    )
    protocol = report["protocol"]
    assert (protocol["metrics"], protocol["lpips_network"]) == (["lpips", "codebook"], "squeeze")
    weights = WeightFiles(squeezenet=str(tmp_path / "squeezenet.pth"))
    metrics = Metrics(["lpips"], (16,), EvaluationConfig(lpips_network="squeeze"), weights, CPU)
    assert protocol["feature_networks_sha256"] == metrics.network_hashes()
    assert list(report["results"]) == ["lpips", *RESULTS[4:]]


@pytest.mark.seconds
def test_results_go_beside_the_runs_config_or_into_the_tokenizers_folder_or_where_they_are_wanted(
    run: Path, saved: Path, seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"metrics.json", "reconstructions.png", "codebook.png"}
    evaluate(run / "checkpoints" / "best", overrides=["evaluation.split=train"])
    assert {path.name for path in (run / "evaluation" / "train").iterdir()} == files
    folder = shutil.copytree(saved, tmp_path / "tokenizer")
    evaluate(folder, overrides=overrides(seven))
    assert {path.name for path in (folder / "evaluation" / "validation").iterdir()} == files
    shutil.rmtree(run / "evaluation")
    monkeypatch.setattr("vqgan_accel.evaluation.evaluate.codebook_histogram", codebook_histogram)  # not blank
    evaluate(run, output=tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == files
    assert not (run / "evaluation").exists()
    with Image.open(tmp_path / "new" / "folder" / "codebook.png") as picture:
        assert picture.size == (720, 360) and len(np.unique(np.asarray(picture))) > 2


def expected_grid(folder: Path, files: list[Path]) -> np.ndarray:
    """One row of originals of 16 x 16 pixels over one of reconstructions, with gaps of 2 white pixels."""
    pixels = pixels_of(files)
    rows = [pixels.permute(0, 2, 3, 1).numpy(), as_uint8(rebuilt(folder, pixels)[1])]
    canvas = np.full((2 * SIZE + 2, len(files) * (SIZE + 2) - 2, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, tile in enumerate(row):
            canvas[top * (SIZE + 2) :, left * (SIZE + 2) :][:SIZE, :SIZE] = tile
    return canvas


@pytest.mark.parametrize(("wanted", "shown"), [(3, 3), (1, 1), (8, 7)])
def test_the_grid_shows_the_splits_first_images_over_their_reconstructions(
    wanted: int, shown: int, saved: Path, seven: Path, here: Path
) -> None:
    evaluate(saved, overrides=overrides(seven, f"evaluation.grid_images={wanted}"), output=here)
    picture = np.asarray(Image.open(here / "reconstructions.png")).astype(int)
    expected = expected_grid(saved, sorted((seven / "validation").iterdir())[:shown])
    assert picture.shape == expected.shape
    assert np.array_equal(picture[:SIZE], expected[:SIZE])
    assert abs(picture - expected).max() <= 1  # rounding, after a network that saw another batch


def test_no_grid_is_written_where_none_is_wanted(saved: Path, seven: Path, here: Path) -> None:
    evaluate(saved, overrides=overrides(seven, "evaluation.grid_images=0"), output=here)
    assert {path.name for path in here.iterdir()} == {"metrics.json", "codebook.png"}


def test_the_table_says_what_was_measured_and_where_it_is(
    saved: Path, seven: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(saved, overrides=overrides(seven), output=here)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{saved} on 7 images"
    assert [line.split()[0] for line in lines[1:-2]] == RESULTS
    for line, value in zip(lines[1:-2], report["results"].values(), strict=True):
        assert float(line.split()[1]) == pytest.approx(value, rel=1e-4)
    assert lines[-2].split() == ["protocol", report["fingerprint"]] and lines[-1] == f"written to {here}"


def assert_same_grid(folder: Path, other: Path) -> None:
    """Up to rounding, after a network that saw other batches."""
    pictures = [np.asarray(Image.open(path / "reconstructions.png")).astype(int) for path in (folder, other)]
    assert pictures[0].shape == pictures[1].shape
    assert abs(pictures[0] - pictures[1]).max() <= 1


# ---- the fingerprint


@pytest.fixture(scope="module")
def usual(saved: Path, seven: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the seven images under the usual overrides."""
    return evaluate(saved, overrides=overrides(seven), output=tmp_path_factory.mktemp("usual"))["fingerprint"]


@pytest.fixture
def fingerprint_of(saved: Path, here: Path) -> Callable[..., str]:
    def of(data: Path, *more: str, tokenizer: Path = saved, **settings: Any) -> str:
        return evaluate(tokenizer, overrides=overrides(data, *more, **settings), output=here)["fingerprint"]

    return of


@pytest.mark.seconds
def test_the_same_protocol_has_the_same_fingerprint(
    fingerprint_of: Callable[..., str], usual: str, seven: Path, tmp_path: Path
) -> None:
    assert fingerprint_of(seven) == usual
    assert fingerprint_of(seven, "evaluation.grid_images=1", "data.workers=1", "seed=5", batch_size=1) == usual
    images = sorted((seven / "validation").iterdir())
    (tmp_path / "data" / "held_out").mkdir(parents=True)
    for index, path in enumerate(reversed(images)):  # other names, another order, another format
        Image.open(path).save(tmp_path / "data" / "held_out" / f"image {index}.bmp")
    assert fingerprint_of(tmp_path / "data", "data.validation_split=held_out") == usual
    other = tiny_tokenizer(STANDARD, image_size=SIZE)
    other.decoder.conv_out.weight.data.mul_(0.5)
    other.save_pretrained(tmp_path / "other")
    assert fingerprint_of(seven, tokenizer=tmp_path / "other") == usual


@pytest.mark.parametrize("change", ["pixel", "one image less", "one image twice", "image size", "metrics"])
def test_another_protocol_has_another_fingerprint(
    change: str, fingerprint_of: Callable[..., str], usual: str, seven: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(seven, tmp_path / "data")
    file, more, metrics = data / "validation" / "003.png", [], METRICS
    match change:
        case "pixel":
            pixels = np.asarray(Image.open(file)).copy()
            pixels[7, 9, 1] ^= 1
            Image.fromarray(pixels).save(file)
        case "one image less":
            file.unlink()
        case "one image twice":
            shutil.copy(file, file.with_name("again.png"))
        case "image size":
            more = ["data.image_size=32"]
        case "metrics":
            metrics = METRICS[1:]
    assert fingerprint_of(data, *more, metrics=metrics) != usual


@pytest.mark.seconds
def test_other_weights_of_a_feature_network_have_another_fingerprint_and_another_file_of_the_same_has_not(
    fingerprint_of: Callable[..., str], seven: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = tv.mobilenet_v2(weights=None).state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save(dict(reversed(state.items())), tmp_path / "same.pth")
    state["features.18.0.weight"][0, 0] += 1e-3
    torch.save(state, tmp_path / "b.pth")
    a, same, b = (
        fingerprint_of(seven, f"weights.mobilenet_v2={tmp_path / name}.pth", metrics=("mobilenet_distance",))
        for name in ("a", "same", "b")
    )
    assert a == same != b


# ---- images that cannot be read


@pytest.fixture(params=["000.png", "005.png"])
def broken(request: pytest.FixtureRequest, seven: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The data set with one broken image, and the same without that image."""
    data, without = shutil.copytree(seven, tmp_path / "broken"), shutil.copytree(seven, tmp_path / "without")
    (data / "validation" / request.param).write_bytes(b"no image")
    (without / "validation" / request.param).unlink()
    return data, without


def test_a_broken_image_is_left_out_and_counted_where_the_config_says_so(
    broken: tuple[Path, Path], saved: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, without = broken
    expected = evaluate(saved, overrides=overrides(without), output=here / "without")
    capsys.readouterr()
    report = evaluate(saved, overrides=overrides(data, "data.on_error=skip"), output=here)
    assert (report["protocol"]["num_images"], report["skipped_images"]) == (6, 1)
    assert expected["skipped_images"] == 0
    assert report["results"] == pytest.approx(expected["results"], rel=1e-6, abs=1e-7)
    assert report["fingerprint"] == expected["fingerprint"]
    assert "  1 unreadable images were left out" in capsys.readouterr().out.splitlines()


def test_a_broken_image_stops_the_evaluation_by_default(broken: tuple[Path, Path], saved: Path, here: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read image .*00[05]\.png"):
        evaluate(saved, overrides=overrides(broken[0]), output=here)
    assert not (here / "metrics.json").exists()


def test_a_broken_image_leaves_no_hole_in_the_grid(broken: tuple[Path, Path], saved: Path, here: Path) -> None:
    data, without = broken
    evaluate(saved, overrides=overrides(without), output=here / "without")
    evaluate(saved, overrides=overrides(data, "data.on_error=skip"), output=here)
    assert_same_grid(here, here / "without")


def random_mobilenet(folder: Path) -> str:
    """The override that names a file of random weights."""
    torch.save(tv.mobilenet_v2(weights=None).state_dict(), folder / "mobilenet_v2.pth")
    return f"weights.mobilenet_v2={folder / 'mobilenet_v2.pth'}"


def test_a_frechet_distance_of_one_image_is_refused(saved: Path, tmp_path: Path, here: Path) -> None:
    write_images(tmp_path / "data" / "validation", 1)
    settings = overrides(tmp_path / "data", random_mobilenet(tmp_path), metrics=("psnr", "fd_mobilenet"))
    with pytest.raises(ValueError, match="a Frechet distance needs at least 2 images and the split has 1"):
        evaluate(saved, overrides=settings, output=here)
    assert not here.exists()


@pytest.mark.seconds
def test_a_frechet_distance_of_one_readable_image_is_refused(saved: Path, tmp_path: Path, here: Path) -> None:
    write_images(tmp_path / "data" / "validation", 1)
    (tmp_path / "data" / "validation" / "broken.png").touch()
    settings = [random_mobilenet(tmp_path), "data.on_error=skip"]
    with pytest.raises(ValueError, match="a Frechet distance needs at least 2 images"):
        evaluate(saved, overrides=overrides(tmp_path / "data", *settings, metrics=("fd_mobilenet",)), output=here)


def test_training_refuses_to_validate_a_frechet_distance_on_one_image_before_it_begins(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", 4)
    write_images(tmp_path / "images" / "validation", 1)
    settings: dict[str, Any] = {
        "data": {"path": str(tmp_path / "images")},
        "training": {"validation_metrics": ["psnr", "fd_mobilenet"], "max_steps": 1},
        "weights": {"mobilenet_v2": random_mobilenet(tmp_path).split("=")[1]},
    }
    with pytest.raises(ValueError, match="at least 2 images"):
        train(tiny_config(tmp_path, **settings))


def test_a_tokenizer_whose_output_is_not_a_number_writes_no_results(saved: Path, seven: Path, tmp_path: Path) -> None:
    tokenizer = ImageTokenizer.from_pretrained(saved)
    tokenizer.decoder.conv_out.weight.data.fill_(float("nan"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="nan"):
        evaluate(tmp_path / "tokenizer", overrides=overrides(seven), output=tmp_path / "results")
    assert not (tmp_path / "results" / "metrics.json").exists()


# ---- evaluate_tokenizer, as training calls it


def batches_of(pixels: Tensor, sizes: tuple[int, ...]) -> Iterator[Batch]:
    indices = torch.arange(len(pixels)).split(list(sizes))
    yield from ({"image": pixels[index], "index": index, "skipped": 0} for index in indices)


def measured(tokenizer: ImageTokenizer, pixels: Tensor, *sizes: int, metrics: Metrics | None = None) -> Evaluation:
    metrics = metrics or Metrics(METRICS, (16,), EvaluationConfig(), WeightFiles(), CPU)
    return evaluate_tokenizer(tokenizer, batches_of(pixels, sizes), metrics, CPU, SIZE, grid_images=4)


def assert_same_evaluation(a: Evaluation, b: Evaluation) -> None:
    assert a.results == pytest.approx(b.results, rel=1e-6, abs=SSIM)
    assert (a.num_images, a.skipped_images, a.pixels_hash) == (b.num_images, b.skipped_images, b.pixels_hash)
    assert torch.equal(a.code_counts, b.code_counts) and torch.equal(a.originals, b.originals)
    torch.testing.assert_close(a.reconstructions, b.reconstructions, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pixels(seven: Path) -> Tensor:
    return pixels_of(sorted((seven / "validation").iterdir()))


def test_neither_the_batch_size_nor_an_empty_batch_changes_an_evaluation(pixels: Tensor) -> None:
    tokenizer = tiny_tokenizer(STANDARD)
    whole = measured(tokenizer, pixels, 7)
    assert (whole.num_images, whole.originals.shape) == (7, (4, 3, SIZE, SIZE))
    assert torch.equal(whole.originals, to_float(pixels[:4]))
    for sizes in ((1,) * 7, (0, 4, 0, 3, 0), (6, 1)):
        assert_same_evaluation(measured(tokenizer, pixels, *sizes), whole)


def test_the_same_metrics_serve_one_evaluation_after_another(pixels: Tensor) -> None:
    tokenizer, metrics = tiny_tokenizer(STANDARD), Metrics(METRICS, (16,), EvaluationConfig(), WeightFiles(), CPU)
    first = measured(tokenizer, pixels[:4], 4, metrics=metrics)
    measured(tokenizer, pixels[4:], 3, metrics=metrics)
    assert_same_evaluation(measured(tokenizer, pixels[:4], 4, metrics=metrics), first)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_tokenizer_and_the_random_state_as_they_were(training: bool, pixels: Tensor) -> None:
    tokenizer = tiny_tokenizer(STANDARD).train(training)
    before, random_state = state_hash(tokenizer), torch.get_rng_state()
    evaluation = measured(tokenizer, pixels, 7)
    assert {module.training for module in tokenizer.modules()} == {training}
    assert state_hash(tokenizer) == before and torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    assert not evaluation.reconstructions.requires_grad


def test_nothing_to_evaluate_is_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        measured(tiny_tokenizer(STANDARD), pixels[:0], 0, 0)


# ---- one process and many


class SmallFeatures(nn.Module):
    """uint8 (B, 3, H, W) -> 4 features: a distance whose matrices have full rank with 7 images."""

    num_features = 4

    def __init__(self, weights: WeightFiles | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 4, generator=generator), requires_grad=False)
        self.fc = nn.Linear(4, 5, bias=False)
        self.fc.weight = nn.Parameter(torch.randn(5, 4, generator=generator), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1) @ self.weight


@pytest.fixture(scope="module")
def small_features() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for network in ("mobilenet_features", "inception"):
            patch.setattr(f"vqgan_accel.evaluation.networks.{network}", SmallFeatures)
        yield


@contextmanager
def unchanged_signals() -> Iterator[None]:
    """torchrun's launcher puts in its own handlers and leaves them there."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


SCRIPT = r"""
import sys
from pathlib import Path
from vqgan_accel.distributed import leaving_process_group
from vqgan_accel.evaluation.evaluate import evaluate
import torch.distributed as dist
*arguments, _, output = sys.argv[1:]
with leaving_process_group():
    evaluate(Path(arguments[0]), overrides=arguments[1:], output=Path(output))
    sys.stdout.write(f"RANK {dist.get_rank()} OF {dist.get_world_size()} {dist.get_backend()}\n")
"""


@pytest.mark.slow
def test_two_processes_under_torchrun_give_the_results_of_one(
    saved: Path, seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    arguments = [str(saved), *overrides(seven), "--output", str(tmp_path / "two")]
    with unchanged_signals():  # torchrun's own main, in a process that has imported torch
        torchrun(["--standalone", "--nproc_per_node", "2", str(script), *arguments])
    lines = capfd.readouterr().out.splitlines()
    ranks = sorted(line for line in lines if line.startswith("RANK"))
    assert ranks == ["RANK 0 OF 2 gloo", "RANK 1 OF 2 gloo"]
    assert [line for line in lines if "images" in line] == [f"{saved} on 7 images"]  # one table
    one = evaluate(saved, overrides=overrides(seven), output=tmp_path / "one")
    assert_same_report(json.loads((tmp_path / "two" / "metrics.json").read_text()), one)
    assert_same_grid(tmp_path / "two", tmp_path / "one")


def assert_same_report(report: dict[str, Any], one: dict[str, Any]) -> None:
    assert report["results"] == pytest.approx(one["results"], rel=1e-6, abs=1e-6)
    assert {**report, "results": None} == {**one, "results": None}  # the fingerprint among the rest


Arguments = tuple[Path, list[str], Path]  # of evaluate()


TURNS = """
import json, sys
from pathlib import Path
import torch.distributed as dist
import vqgan_accel.evaluation.networks as networks
from test_evaluation import SmallFeatures
from vqgan_accel.distributed import leaving_process_group
from vqgan_accel.evaluation.evaluate import evaluate
networks.mobilenet_features = networks.inception = SmallFeatures
folder = Path(sys.argv[1])
calls = json.loads((folder / "calls.json").read_text())
with leaving_process_group():
    reports = [evaluate(Path(path), overrides=settings, output=Path(output)) for path, settings, output in calls]
    told = {"rank": dist.get_rank(), "size": dist.get_world_size(), "backend": dist.get_backend(), "reports": reports}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
"""


def launched(number: int, calls: list[Arguments], folder: Path) -> list[list[dict[str, Any]]]:
    """Each process's reports of all calls."""
    (folder / "turns.py").write_text(TURNS)
    (folder / "calls.json").write_text(json.dumps([[str(path), s, str(output)] for path, s, output in calls]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [*command, str(folder / "turns.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(number)]
    assert [(t["rank"], t["size"], t["backend"]) for t in told] == [(rank, number, "gloo") for rank in range(number)]
    return [t["reports"] for t in told]


INCEPTION: tuple[Metric, ...] = ("rfid", "pfid", "kid", "inception_score")  # precision and recall need 4 images
ALL: tuple[Metric, ...] = (*METRICS, "fd_mobilenet", *INCEPTION)
PFID = ["evaluation.pfid_neighbours=4"]
CASES = ("7 images", "2 images", "7 images, of which the second process can read none", "no grid", "a reference")


@pytest.fixture(scope="module")
def three(
    small_features: None, saved: Path, seven: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Arguments, list[dict[str, Any]]]]:
    """Case -> the arguments of evaluate() and the reports of three processes."""
    folder = tmp_path_factory.mktemp("three")
    write_images(folder / "2" / "validation", 2)
    holes = shutil.copytree(seven, folder / "holes")
    for index in (1, 4):
        (holes / "validation" / f"00{index}.png").write_bytes(b"no image")
    write_images(folder / "others" / "validation", 5, seed=3)
    reference = [f"evaluation.reference={folder / 'others'}", "evaluation.save_reconstructions=npz"]
    settings = [
        overrides(seven, *PFID, metrics=(*ALL, "precision_recall")),
        overrides(folder / "2", *PFID, metrics=ALL),
        overrides(holes, *PFID, "data.on_error=skip", metrics=ALL),
        overrides(seven, *PFID, "evaluation.grid_images=0", metrics=ALL),
        overrides(seven, *PFID, *reference, metrics=ALL),
    ]
    calls = [(saved, values, folder / f"case {index}") for index, values in enumerate(settings)]
    by_rank = launched(3, calls, folder)
    return {case: (calls[i], [rank[i] for rank in by_rank]) for i, case in enumerate(CASES)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_processes_give_the_results_of_one_on_each_of_them(
    case: str, three: dict[str, tuple[Arguments, list[dict[str, Any]]]], small_features: None, here: Path
) -> None:
    (path, settings, output), reports = three[case]
    one = evaluate(path, overrides=settings, output=here)
    assert list(one["results"]) == [result for name in one["protocol"]["metrics"] for result in METRIC_RESULTS[name]]
    for report in reports:
        assert report == reports[0]
        assert_same_report(report, one)
    assert json.loads((output / "metrics.json").read_text()) == reports[0]
    if case != "no grid":
        assert_same_grid(output, here)
    if case == "a reference":
        three_made, made = (np.load(path / "reconstructions.npz")["arr_0"].astype(int) for path in (output, here))
        assert len(made) == 7 and abs(three_made - made).max() <= 1
