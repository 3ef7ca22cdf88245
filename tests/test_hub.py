"""Tokenizers by their names on the Hugging Face hub, from a cache as its client leaves it, and repositories for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from tiny import DISCRIMINATOR, tiny_config

from vqgan_accel.cli import main
from vqgan_accel.config import load_config, parse_config
from vqgan_accel.evaluation.evaluate import evaluate
from vqgan_accel.interop.hub import export_hub, public
from vqgan_accel.models.finding import find_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.training.loop import train

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Put = Callable[[Path, str], None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Makes a folder the content of a repository that has been downloaded; there is no network."""
    cache = tmp_path / "hub_cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def copy(folder: Path, name: str) -> None:
        place = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(COMMIT)

    return copy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Trained for two steps and evaluated, and trained no further."""
    config = tiny_config(tmp_path, discriminator=DISCRIMINATOR, quantizer={"type": "ema"})
    folder = train(config)
    evaluate(folder)
    evaluate(folder, overrides=["evaluation.split=test"])
    return folder


def test_a_repository_holds_weights_recipe_measurements_and_a_card(run: Path, tmp_path: Path) -> None:
    other = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    other["tokenizer_sha256"] = "that of an earlier checkpoint"
    (run / "evaluation" / "test" / "metrics.json").write_text(json.dumps(other))
    lines = export_hub(run, output=tmp_path / "birds-f4")
    report = json.loads((run / "evaluation" / "validation" / "metrics.json").read_text())
    assert lines[1:] == [f"measured on validation: protocol {report['fingerprint']}"]
    names = {path.name for path in (tmp_path / "birds-f4").iterdir()}
    weights = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert names == weights | {"README.md", "config.yaml", "evaluation_validation.json"}

    card = ModelCard.load(tmp_path / "birds-f4" / "README.md")
    assert card.data.library_name == "vqgan_accel" and card.data.tags == ["image-tokenizer", "vq-gan", "ema"]
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert {name: result.metric_value for name, result in results.items()} == report["results"]
    assert {result.metric_args["protocol"] for result in results.values()} == {report["fingerprint"]}  # type: ignore[index]
    assert (tmp_path / "birds-f4" / "config.yaml").read_text().rstrip() in card.text
    assert f"| psnr | {report['results']['psnr']:.5g} dB |" in card.text and report["fingerprint"] in card.text

    recipe, original = load_config(tmp_path / "birds-f4" / "config.yaml"), load_config(run / "config.yaml")
    assert (recipe.output_dir, recipe.data.path) == ("run", "images")
    assert recipe.model_dump(exclude={"output_dir", "data"}) == original.model_dump(exclude={"output_dir", "data"})
    for file in (tmp_path / "birds-f4").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_tokenizer_that_was_never_measured_says_so(tmp_path: Path) -> None:
    folder = train(tiny_config(tmp_path))
    tokenizer = folder / "checkpoints" / "latest" / "tokenizer"
    shutil.copytree(tokenizer, tmp_path / "alone")  # away from its run
    assert export_hub(tmp_path / "alone", output=tmp_path / "out")[1:] == ["not measured: see evaluate.py"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not measured." in card and 'from_pretrained("USER/out")' in card
    export_hub(tmp_path / "alone", output=tmp_path / "named", repo="me/birds")
    assert 'from_pretrained("me/birds")' in (tmp_path / "named" / "README.md").read_text()


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    paths = {"data.path": "/secret/imgs", "output_dir": "../me/run", "training.init_from": "~/me/older"}
    config = parse_config({"training": {"max_steps": 1}}, [f"{key}={value}" for key, value in paths.items()])
    shown = public(config)
    assert (shown.data.path, shown.output_dir, shown.training.init_from) == ("imgs", "run", "older")
    plain = parse_config({"training": {"max_steps": 1}}, ["data.path=./some/imgs", "training.init_from=me/name"])
    assert (public(plain).data.path, public(plain).training.init_from) == ("./some/imgs", "me/name")


def test_a_config_of_another_tokenizer_is_not_taken_for_the_recipe(run: Path, tmp_path: Path) -> None:
    other = tiny_config(tmp_path / "other", quantizer={"type": "gumbel"})
    shutil.copytree(find_tokenizer(train(other))[0], run / "copied")
    with pytest.raises(
        ValueError,
        match=r"config\.yaml with the overrides is not the config .*gumbel",
    ):
        export_hub(run / "copied", output=tmp_path / "out")


@pytest.mark.parametrize("content", ["[", "[]", '{"results": {}}'])
def test_a_report_that_is_none_is_named(content: str, run: Path, tmp_path: Path) -> None:
    (run / "evaluation" / "test" / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"test/metrics\.json is not what evaluate\.py writes"):
        export_hub(run, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.seconds
def test_every_command_takes_a_name_on_the_hub(
    run: Path, tmp_path: Path, put: Put, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export_hub(run, output=tmp_path / "exported")
    put(tmp_path / "exported", "someone/birds-f4")
    original = ImageTokenizer.from_pretrained(find_tokenizer(run)[0])
    tokenizer = ImageTokenizer.from_pretrained("someone/birds-f4")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.encode(images), original.encode(images)) and not tokenizer.training

    folder, config = find_tokenizer(Path("someone/birds-f4"))
    assert config == folder / "config.yaml"
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["evaluate", "someone/birds-f4", f"data.path={tmp_path / 'images'}"]) == 0
    ours, theirs = (
        json.loads((place / "validation" / "metrics.json").read_text())
        for place in (tmp_path / "evaluation" / "someone" / "birds-f4", run / "evaluation")
    )
    assert ours["results"] == theirs["results"] and ours["fingerprint"] == theirs["fingerprint"]

    settings: dict[str, Any] = {"init_from": "someone/birds-f4", "max_steps": 1}
    train(tiny_config(tmp_path / "more", quantizer={"type": "ema"}, training=settings, discriminator=DISCRIMINATOR))
    said = capsys.readouterr().out
    assert f"beginning with the tokenizer of {folder}" in said and "with a fresh discriminator" in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("someone/else", "nor can that name be had from the Hugging Face hub"),
        ("some one/else", "nor can that name be had from the Hugging Face hub"),
        ("nowhere", "there is no run, checkpoint or saved tokenizer at nowhere"),
        ("runs/a/b", "there is no run, checkpoint or saved tokenizer at runs/a/b"),
        ("/runs/a", "there is no run, checkpoint or saved tokenizer at /runs/a"),
        (
            "here/a",
            "at here/a (and as the folder here is here",
        ),  # below a folder: no name on the hub
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(
    name: str,
    reason: str,
    put: Put,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", name]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
    config = tiny_config(tmp_path, training={"init_from": name})
    with pytest.raises(FileNotFoundError, match=r"^training\.init_from: there is no run, checkpoint or saved"):
        train(config)


def test_a_push_uploads_the_folder_and_a_refused_one_leaves_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **more: calls.append((repo, more)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **more: calls.append(("upload", more)))
    export = ["export", "hub", str(run), "--output"]
    assert main([*export, str(tmp_path / "a"), "--push", "me/a", "--private"]) == 0
    assert calls[0] == ("me/a", {"private": True, "exist_ok": True})
    assert calls[1][1]["repo_id"] == "me/a" and calls[1][1]["folder_path"] == tmp_path / "a"
    assert "pushed to https://huggingface.co/me/a" in capsys.readouterr().out

    def refuse(self: HfApi, *_: object, **__: object) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert main([*export, str(tmp_path / "b"), "--push", "me/b"]) == 2
    said = capsys.readouterr().err
    assert "could not be pushed to me/b (401 Unauthorized)" in said and f"hf upload me/b {tmp_path / 'b'}" in said
    assert (tmp_path / "b" / "README.md").is_file()
    assert main(["export", "diffusers", str(run), "--output", str(tmp_path / "c"), "--push", "me/c"]) == 2
    assert "--push is for `export hub`" in capsys.readouterr().err
