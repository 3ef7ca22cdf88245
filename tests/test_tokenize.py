"""Codes of whole data sets: the same as `encode` gives, each image once, whatever killed the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import TAMING, tiny_tokenizer
from images import truncate
from PIL import Image
from pyarrow import parquet
from runs import held_by_another
from tiny import write_images
from torchvision.transforms import TenCrop

from vqgan_accel import load_tokens
from vqgan_accel.cli import main
from vqgan_accel.config import GumbelQuantizerConfig, StandardQuantizerConfig
from vqgan_accel.data.crops import CROPS, evaluation_view
from vqgan_accel.data.protocols import Crop
from vqgan_accel.files import lock
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.tokens import write as module

CLASSES = {"ant": 5, "bee": 4, "cat": 2}  # images


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tmp_path: Path) -> ImageTokenizer:
    made = tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8)).eval()
    made.save_pretrained(tmp_path / "tokenizer")
    return made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, (name, number) in enumerate(CLASSES.items()):
        write_images(tmp_path / "images" / "train" / name, number, size=24, seed=seed)
    return tmp_path / "images"


def command(images: Path, *more: str) -> list[str]:
    folder = images.parent
    arguments = ["tokenize", str(folder / "tokenizer"), f"--data={images}", f"--output={folder / 'tokens'}"]
    return [*arguments, "data.workers=0", "evaluation.batch_size=2", *more]


def codes_of(tokenizer: ImageTokenizer, file: Path, crop: Crop = "square") -> list[int]:
    view = evaluation_view(Image.open(file).convert("RGB"), 16, crop)
    return tokenizer.encode(view[None] / 127.5 - 1).flatten().tolist()


def files(images: Path) -> list[Path]:
    return sorted((images / "train").rglob("*.png"))


def shards(tokens: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((tokens / "data").iterdir())}


def test_every_image_has_the_codes_that_encode_gives(
    images: Path, tokenizer: ImageTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(images, "--shard-images", "4")) == 0
    tokens = images.parent / "tokens"
    assert capsys.readouterr().out == f"{tokens}: 11 x 4 x 4 codes in 3 shards, with labels\n"
    rows = load_tokens(tokens)
    assert rows.column_names == ["codes", "label", "file_name", "index", "view"]
    expected = [codes_of(tokenizer, file) for file in files(images)]
    assert rows["codes"][:] == expected and len({code for row in expected for code in row}) > 8
    assert rows["file_name"][:] == [str(file.relative_to(images / "train")) for file in files(images)]
    assert rows["index"][:] == list(range(11))
    assert rows.features["label"].names == ["ant", "bee", "cat"]
    assert rows["label"][:] == [0] * 5 + [1] * 4 + [2] * 2
    assert set(rows["view"]) == {"center"}
    codes = rows.features["codes"]
    assert (codes.length, codes.feature.dtype) == (16, "uint16")
    manifest = json.loads((tokens / "manifest.json").read_text())
    assert (manifest["complete"], manifest["rows"], manifest["num_codes"]) == (True, 11, 16)
    assert [parquet.read_metadata(tokens / "data" / name).num_rows for name in shards(tokens)] == [4, 4, 3]
    # what `datasets` makes of the folder by itself
    plain = datasets.load_dataset(str(tokens), split="train")
    assert plain["codes"][:] == expected and plain.features == rows.features


def test_the_crop_is_that_of_the_evaluations_protocol(images: Path, tokenizer: ImageTokenizer) -> None:
    """As second stages that are compared by ADM's statistics need it."""
    assert main(command(images, "evaluation.protocol=adm")) == 0
    tokens = images.parent / "tokens"
    manifest = json.loads((tokens / "manifest.json").read_text())
    assert (manifest["crop"], manifest["resize_filter"]) == CROPS["adm"][:2]
    assert load_tokens(tokens)["codes"][:] == [codes_of(tokenizer, file, "adm") for file in files(images)]


def test_codes_above_65536_are_int32(images: Path) -> None:
    big = GumbelQuantizerConfig(type="gumbel", num_codes=70_000, embedding_dim=2, hidden_channels=4)
    tiny_tokenizer(big).save_pretrained(images.parent / "tokenizer")
    assert main(command(images)) == 0
    rows = load_tokens(images.parent / "tokens")
    assert rows.features["codes"].feature.dtype == "int32"
    assert max(max(row) for row in rows["codes"]) > 2**16


@pytest.mark.seconds
def test_views_are_the_centre_its_mirror_image_and_torchvisions_ten_crops(
    images: Path, tokenizer: ImageTokenizer
) -> None:
    folder = images.parent
    expected: dict[str, list[list[int]]] = {"flip": [], "10crop": []}
    for file in files(images):
        image = Image.open(file).convert("RGB")
        center = evaluation_view(image, 16)
        larger = Image.fromarray(evaluation_view(image, 17).permute(1, 2, 0).numpy())  # int(1.1 * 16)
        crops = [torch.from_numpy(np.array(crop)).permute(2, 0, 1) for crop in TenCrop(16)(larger)]
        for kind, views in (("flip", [center, center.flip(-1)]), ("10crop", crops)):
            expected[kind] += [tokenizer.encode(view[None] / 127.5 - 1).flatten().tolist() for view in views]
    for kind, number in (("flip", 2), ("10crop", 10)):
        assert main([*command(images, "--views", kind), f"--output={folder / kind}"]) == 0
        rows = load_tokens(folder / kind)
        assert rows["codes"][:] == expected[kind]
        views = rows["view"][:number]
        assert rows["view"][:] == views * 11 and len(set(views)) == number
        assert rows["index"][:] == [index for index in range(11) for _ in range(number)]
        assert [view.removesuffix("_mirrored") for view in views[number // 2 :]] == views[: number // 2]


@pytest.mark.parametrize("place", ["write_shard", "codes_of"])
def test_a_run_that_is_cut_off_goes_on_without_holes_or_duplicates(
    place: str, images: Path, tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main([*command(images, "--shard-images", "3"), f"--output={tmp_path / 'whole'}"]) == 0
    original, calls = getattr(module, place), []

    def breaks(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, place, breaks)
        assert main(command(images, "--shard-images", "3")) == 130
    tokens = tmp_path / "tokens"
    done = shards(tokens)
    assert 0 < len(done) < 4
    with pytest.raises(ValueError, match=f"{tokens} is not complete: {4 - len(done)} of 4 shards are missing"):
        load_tokens(tokens)
    inodes = {path: path.stat().st_ino for path in (tokens / "data").iterdir()}
    assert main(command(images)) == 0  # the size of a shard is remembered
    assert shards(tokens) == shards(tmp_path / "whole")
    assert all(path.stat().st_ino == inode for path, inode in inodes.items())  # what was there was not written again
    assert load_tokens(tokens)["index"][:] == list(range(11))
    assert main(command(images)) == 0  # nothing is left to do
    assert shards(tokens) == shards(tmp_path / "whole")


def run_processes(arguments: Sequence[str], processes: int) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "vqgan_accel", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_all_with(word: str) -> None:
    """SIGKILL to every process with that word on its command line, the launcher and its children, until they are
    gone."""
    found = True
    while found:
        found = False
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if word.encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    found = True
            except OSError:  # it has ended meanwhile
                pass


@pytest.mark.slow
def test_two_processes_share_the_shards_and_what_is_left_after_a_kill_is_done_by_one(
    images: Path, tokenizer: ImageTokenizer, tmp_path: Path
) -> None:
    write_images(images / "train" / "dog", 60, size=24, seed=9)
    assert main([*command(images, "--shard-images", "2"), f"--output={tmp_path / 'whole'}"]) == 0
    whole = shards(tmp_path / "whole")

    both = run_processes([*command(images, "--shard-images", "2"), f"--output={tmp_path / 'both'}"], 2)
    assert both.wait(120) == 0, both.stdout.read() if both.stdout else ""
    assert both.stdout is not None and "71 x 4 x 4 codes in 36 shards" in both.stdout.read()
    assert shards(tmp_path / "both") == whole

    killed = run_processes(command(images, "--shard-images", "2"), 2)
    tokens = tmp_path / "tokens"
    deadline = time.monotonic() + 120
    while len(list((tokens / "data").glob("train-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    kill_all_with(str(tokens))
    killed.wait(60)
    while time.monotonic() < deadline:  # the kernel lets go of a killed process's lock a moment later
        try:
            lock(tokens).close()
            break
        except ValueError:
            time.sleep(0.05)
    assert 3 <= len([name for name in shards(tokens) if not name.startswith(".")]) < 36
    assert main(command(images)) == 0
    assert shards(tokens) == whole
    assert load_tokens(tokens)["index"][:] == list(range(71))


def test_broken_images_stop_it_or_are_left_out_with_all_their_views(
    images: Path, tokenizer: ImageTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(files(images)[5])
    assert main(command(images, "--views=flip", "--shard-images=2")) == 2
    assert f"cannot read image {files(images)[5]}" in capsys.readouterr().err
    tokens = images.parent / "tokens"
    assert len(shards(tokens)) == 2  # those before it; they are kept
    assert main(command(images, "--views=flip", "data.on_error=skip")) == 0
    assert "20 x 4 x 4 codes in 6 shards, 1 unreadable images left out" in capsys.readouterr().out
    rows = load_tokens(tokens)
    assert rows["index"][:] == [index for index in range(11) if index != 5 for _ in range(2)]
    assert rows["label"][:] == [0] * 10 + [1] * 6 + [2] * 4


@pytest.mark.seconds
def test_labels_of_data_sets_and_of_betons(images: Path, tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    assert main(command(images)) == 0
    expected = load_tokens(tmp_path / "tokens")
    stored = datasets.Dataset.from_dict(
        {"image": [str(file) for file in files(images)], "label": expected["label"][:], "kind": ["x"] * 11},
        datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["a", "b", "c"]),
                "kind": datasets.Value("string"),
            }
        ),
    )
    stored.save_to_disk(str(tmp_path / "stored"))
    options = ["--max-resolution=24", "--write-mode=raw"]
    assert main(["make-beton", f"--source={images}", f"--output={tmp_path / 'betons'}", *options]) == 0
    for name, more, place, names in (
        ("stored", ["data.train_split=stored"], "row 7", ["a", "b", "c"]),
        ("betons", ["data.backend=beton"], "sample 7", None),
    ):
        arguments = [*command(images, f"--output={tmp_path / name}_tokens", f"--data={tmp_path / name}"), *more]
        assert main(arguments) == 0
        rows = load_tokens(tmp_path / f"{name}_tokens")
        assert rows["codes"][:] == expected["codes"][:] and rows["label"][:] == expected["label"][:]
        assert rows["file_name"][7] == place and getattr(rows.features["label"], "names", None) == names


def test_images_without_classes_have_no_label_and_that_is_said(
    images: Path, tokenizer: ImageTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(images / "train", 1, size=24, seed=8)
    assert main(command(images)) == 0
    assert "label" not in load_tokens(images.parent / "tokens").column_names
    assert "12 x 4 x 4 codes in 2 shards, without labels" in capsys.readouterr().out.replace("1 shards", "2 shards")
    assert main(command(images, f"--output={images.parent / 'more'}", "data.label_column=kind")) == 2
    assert "data.label_column kind is for data sets and betons" in capsys.readouterr().err
    evaluation = [str(images.parent / "tokenizer"), f"data.path={images}", "data.label_column=kind", "data.workers=0"]
    more = ["evaluation.split=train", "evaluation.metrics=[l2]", f"--output={images.parent / 'evaluated'}"]
    assert main(["evaluate", *evaluation, *more]) == 0  # which asks for no labels


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ([0.5, 1.0], datasets.Value("float32"), "not class numbers"),
        (["a", "b"], datasets.Value("string"), "not class numbers"),
        ([True, False], datasets.Value("bool"), "not class numbers"),
        ([[1], [2]], datasets.Sequence(datasets.Value("int64")), "not class numbers"),
        ([1, None], datasets.Value("int64"), "1 empty values"),
        ([1, None], datasets.ClassLabel(num_classes=3), "1 empty values"),
    ],
)
def test_a_column_that_holds_no_class_numbers_is_no_label_and_named_where_it_is_asked_for(
    values: list[Any],
    kind: Any,
    reason: str,
    images: Path,
    tokenizer: ImageTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": kind, "fine": datasets.Value("int8")})
    columns = {"image": [str(file) for file in files(images)[:2]], "label": values, "fine": [7, 5]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "stored"))
    data = [f"--data={tmp_path / 'stored'}", "data.train_split=stored"]
    assert main(command(images, *data)) == 0
    assert "without labels" in capsys.readouterr().out
    assert main(command(images, *data, "data.label_column=label", f"--output={tmp_path / 'a'}")) == 2
    said = capsys.readouterr().err
    assert reason in said and "its columns are image, label, fine" in said and not (tmp_path / "a").exists()
    assert main(command(images, *data, "data.label_column=fine")) == 2  # a folder is of one kind of labels
    assert "labels None, now" in capsys.readouterr().err
    assert main(command(images, *data, "data.label_column=fine", f"--output={tmp_path / 'b'}")) == 0
    assert load_tokens(tmp_path / "b")["label"][:] == [7, 5]


def test_another_part_of_a_data_set_is_told_from_the_first(
    images: Path, tokenizer: ImageTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, chosen in (("a", files(images)[:4]), ("b", files(images)[4:8])):
        rows = datasets.Dataset.from_dict({"image": [str(file) for file in chosen]})
        rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / name / "train.parquet"))
    assert main(command(images, f"--data={tmp_path / 'a'}", "data.train_split=train[:2]")) == 0
    assert main(command(images, f"--data={tmp_path / 'a'}", "data.train_split=train[-2:]")) == 2
    assert "split train[:2], now train[-2:]" in capsys.readouterr().err
    assert main(command(images, f"--data={tmp_path / 'b'}", "data.train_split=train[:2]")) == 2
    assert "sample_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["true", "123", "a: b", "null", "img ", "ünï", "imgs\U0001f600", "a${x}b"])
def test_the_data_may_have_any_name(name: str, images: Path, tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    shutil.move(images, tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main([*command(images), "--data", name]) == 0
    assert len(load_tokens(tmp_path / "tokens")) == 11


def test_a_file_name_that_is_no_utf8_is_shown_as_well_as_can_be(images: Path, tokenizer: ImageTokenizer) -> None:
    os.rename(files(images)[0], os.fsencode(files(images)[0].parent) + b"/\xff.png")
    assert main(command(images)) == 0
    assert "ant/\ufffd.png" in load_tokens(images.parent / "tokens")["file_name"][:]


def test_a_damaged_shard_is_written_again(images: Path, tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    assert main(command(images, "--shard-images=4")) == 0
    tokens, before = tmp_path / "tokens", shards(tmp_path / "tokens")
    first, second, third = sorted((tokens / "data").iterdir())
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-100])
    third.unlink()
    with pytest.raises(ValueError, match="is not complete: 3 of 3 shards are missing or damaged"):
        load_tokens(tokens)
    assert main(command(images)) == 0
    assert shards(tokens) == before


def test_a_run_that_was_killed_before_its_manifest_was_there_begins_again(
    images: Path, tokenizer: ImageTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokens" / "data").mkdir(parents=True)
    (tmp_path / "tokens" / ".lock").touch()
    (tmp_path / "tokens" / ".manifest.json.partial").write_text("{")
    assert main(command(images)) == 0
    assert len(load_tokens(tmp_path / "tokens")) == 11


def test_while_another_process_is_at_work_nothing_is_written(
    images: Path, tokenizer: ImageTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    with held_by_another(tokens):
        assert main(command(images)) == 2
        assert f"another process is at work in {tokens}" in capsys.readouterr().err
        assert not (tokens / "manifest.json").exists()
    assert main(command(images)) == 0


def test_broken_images_are_left_out_whatever_the_architecture(tmp_path: Path, images: Path) -> None:
    """diffusers' attention knows no empty batch."""
    config = StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8)
    tiny_tokenizer(config, **TAMING).save_pretrained(tmp_path / "tokenizer")
    truncate(files(images)[5])
    more = ["data.on_error=skip", "evaluation.batch_size=1", "--shard-images=1"]
    assert main(command(images, *more)) == 0
    assert load_tokens(tmp_path / "tokens")["index"][:] == [index for index in range(11) if index != 5]


@pytest.mark.seconds
def test_what_is_wrong_is_one_sentence_and_nothing_is_touched(
    images: Path, tokenizer: ImageTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(images)) == 0
    capsys.readouterr()
    before = shards(tmp_path / "tokens")

    def sentence(*more: str) -> str:
        assert main(command(images, *more)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "image_size 16, now 24" in sentence("data.image_size=24")
    assert "shard_images 11, now 4" in sentence("--shard-images=4")
    assert "views ['center'], now ['center', 'center_mirrored']" in sentence("--views=flip")
    content = files(images)[0].read_bytes()
    write_images(images / "train" / "ant", 1, size=24, seed=77)  # another image of the same name
    assert "sample_sha256" in sentence() and shards(tmp_path / "tokens") == before
    files(images)[0].write_bytes(content)
    write_images(images / "train" / "eel", 1, size=24, seed=77)
    assert "num_images 11, now 12" in sentence()
    shutil.rmtree(images / "train" / "eel")
    assert main(command(images)) == 0
    capsys.readouterr()
    other = tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=32, embedding_dim=8))
    other.save_pretrained(tmp_path / "other")
    assert main(["tokenize", str(tmp_path / "other"), *command(images)[2:]]) == 2
    assert "tokenizer_sha256" in capsys.readouterr().err
    assert "give another output folder" in sentence(f"--output={images}")
    assert "a shard of 0 images" in sentence(f"--output={tmp_path / 'new'}", "--shard-images=0")
    assert not (tmp_path / "new").exists()
    assert shards(tmp_path / "tokens") == before


def test_what_is_no_folder_of_tokens_is_said(images: Path, tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{images} holds no tokens"):
        load_tokens(images)
    assert main(command(images, "--shard-images=4")) == 0
    tokens = tmp_path / "tokens"
    first, second, _ = sorted((tokens / "data").iterdir())
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match="is not complete: 1 of 3 shards are missing or damaged"):
        load_tokens(tokens)
    first.write_bytes(content)
    parquet.write_table(parquet.read_table(second).slice(1), second)
    with pytest.raises(ValueError, match="has 10 rows and its manifest says 11"):
        load_tokens(tokens)
    manifest = json.loads((tokens / "manifest.json").read_text())
    for key in ("shards", "split", "complete", "rows", "views"):
        (tokens / "manifest.json").write_text(json.dumps({**manifest, key: None}))
        with pytest.raises(ValueError, match=rf"is not the manifest of a folder of tokens: it has no {key}"):
            load_tokens(tokens)
    (tokens / "manifest.json").write_text("[")
    with pytest.raises(ValueError, match=r"manifest\.json is not the manifest of a folder of tokens"):
        load_tokens(tokens)
