"""`vqgan-accel new`: from pictures to a config that trains."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
from images import noise, truncate
from PIL import Image
from skimage import data as photographs
from tiny import write_images

import vqgan_accel.looking
import vqgan_accel.new
from vqgan_accel.cli import main
from vqgan_accel.config import load_config
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.make_beton import BetonOptions, make_betons
from vqgan_accel.decisions import ALIKE, Machine
from vqgan_accel.looking import alikeness
from vqgan_accel.new import new
from vqgan_accel.training.measure import Timings, measure_step
from vqgan_accel.training.plan import make_plan

CPU = Machine([], False, cores=2, memory=2**34)
TINY = [
    "autoencoder.channels=32",
    "autoencoder.num_res_blocks=1",
    "discriminator.channel_base=64",
    "discriminator.channel_max=16",
    "data.workers=0",
    "losses.perceptual_weight=0",
]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """An empty current folder, a small machine, and nothing is timed but where a test asks for it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    pretend(monkeypatch, CPU)


def pretend(monkeypatch, machine: Machine, fits: int = 10**6, step: float = 0.5) -> None:
    """`fits`: images in the memory of a device."""
    timings = Timings(step, 2 * step, 3 * step, step / 50, 0.5)
    monkeypatch.setattr(vqgan_accel.new, "this_machine", lambda: machine)
    monkeypatch.setattr(vqgan_accel.new, "measure_step", lambda config, size: timings if size <= fits else None)
    monkeypatch.setattr(vqgan_accel.new, "measure_views", lambda source, config: 0.001)


def said(lines: list[str], title: str) -> str:
    return next(line for line in lines if line.startswith(title)).removeprefix(title).strip()


def albums(root: Path, names: tuple[str, ...] = ("Urlaub 2019, Größe", "日本", "it's #1")) -> Path:
    """Unlike photographs, whole and in parts, in folders of such names, as jpg and png of several sizes."""
    parts = []
    for photograph in ("astronaut", "coffee", "rocket", "chelsea", "retina"):
        whole = Image.fromarray(np.asarray(getattr(photographs, photograph)())[..., :3])
        width, height = whole.size
        boxes = [(0, 0, width, height)]
        boxes += [(x, y, x + width // 3, y + height // 3) for x in (0, width // 2) for y in (0, height // 2)]
        parts += [whole.crop(box).resize((90 + 7 * place, 80)) for place, box in enumerate(boxes)]
    for number, place in enumerate(np.random.default_rng(0).permutation(len(parts)).tolist()):
        file = root / names[number % len(names)] / f"IMG {number}.{('jpg', 'PNG')[number % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        parts[place].save(file)
    return root


# ---- from end to end


@pytest.mark.slow
def test_photographs_in_albums_become_a_config_that_trains_and_validates(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vqgan_accel.new, "this_machine", lambda: CPU)
    monkeypatch.setattr("vqgan_accel.training.measure.REPEATS", 1)
    root = albums(tmp_path / "meine Bilder (alle)")
    command = ["new", "--data", root.name, *TINY, "training.max_steps=3", "discriminator.start=1 step"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("vqgan-accel train meine_Bilder_alle.yaml")
    config = load_config("meine_Bilder_alle.yaml")
    assert (config.data.path, config.data.train_split, config.data.image_size) == (root.name, ".", 64)
    assert config.data.validation_group == "file"
    words = shlex.split(out.splitlines()[-1])
    assert main(words[words.index("train") :]) == 0
    rows = [json.loads(line) for line in Path("runs/meine_Bilder_alle/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3 and any("validation/psnr" in row for row in rows)
    assert main(["new", "--data", root.name, *TINY]) == 2  # never overwritten
    assert "is there already" in capsys.readouterr().err


@pytest.mark.seconds
def test_a_real_step_is_measured(monkeypatch, tmp_path):
    write_images(tmp_path / "pictures", 30, size=32)
    new(str(tmp_path / "pictures"), None, TINY)
    timings = measure_step(load_config("pictures.yaml"), 8)
    assert timings is not None and timings.memory == 0
    assert all(0 < seconds < 60 for seconds in timings[:4])


# ---- what is made of the pictures


def test_the_file_says_what_was_seen_and_why(tmp_path):
    for number, path in enumerate(write_images(tmp_path / "pictures", 200, size=32)):
        if number % 50 == 0:
            truncate(path)
    lines = new(str(tmp_path / "pictures"), None, [])
    text = Path("pictures.yaml").read_text()
    config = load_config("pictures.yaml")
    assert config.data.on_error == "skip" and "# 4 of 200 that were looked at are broken" in text
    assert config.data.validation_fraction == 0.1 and config.data.image_size == 32
    assert make_plan(config, 186, 1).total_steps == 150 * 23 and "# 150 epochs" in text
    assert "about" in text and "vqgan-accel train pictures.yaml" in text
    assert len(text.splitlines()) < 62
    assert said(lines, "written") == "pictures.yaml, with the reasons"
    assert "weights.mobilenet_v2=FILE" in said(lines, "NOTE")
    assert not any("weights" in line for line in new(str(tmp_path / "pictures"), Path("b.yaml"), TINY))
    assert [load_config(name).output_dir for name in ("pictures.yaml", "b.yaml")] == ["runs/pictures", "runs/b"]


@pytest.mark.parametrize(("train", "validation"), [("train", "val"), ("Training", "VALID"), ("TRAIN", "dev")])
def test_usual_names_of_splits_are_found_in_any_letter_case(train, validation, tmp_path):
    write_images(tmp_path / "p" / train, 9)
    write_images(tmp_path / "p" / validation / "deeper", 3)
    new(str(tmp_path / "p"), None, [])
    data = load_config("p.yaml").data
    assert (data.train_split, data.validation_split, data.validation_fraction) == (train, validation, None)


def test_without_a_training_split_all_images_are_divided_and_validation_among_them_is_not_one(tmp_path):
    for folder in ("val", "cats", "dogs"):
        write_images(tmp_path / "p" / folder, 20)
    new(str(tmp_path / "p"), None, [])
    data = load_config("p.yaml").data
    assert (data.train_split, data.validation_split) == (".", "validation") and data.validation_fraction is not None
    new(str(tmp_path / "p"), Path("b.yaml"), ["data.train_split=cats", "data.validation_split=dogs"])
    data = load_config("b.yaml").data
    assert (data.train_split, data.validation_split, data.validation_fraction) == ("cats", "dogs", None)
    new(str(tmp_path / "p"), Path("c.yaml"), ["data.validation_fraction=0.4", "data.validation_group=folder"])
    data = load_config("c.yaml").data
    assert (data.validation_fraction, data.validation_group) == (0.4, "folder")


@pytest.mark.seconds
def test_stored_data_sets_and_betons_come_through_the_same_door(tmp_path):
    write_images(tmp_path / "plain" / "train", 40)
    write_images(tmp_path / "plain" / "validation", 4)
    files = sorted(map(str, (tmp_path / "plain" / "train").iterdir()))
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "stored"))
    rows.to_parquet(tmp_path / "photos.parquet")
    for name, split in (("stored", "stored"), ("photos.parquet", "photos")):
        new(str(tmp_path / name), None, [])
        data = load_config(f"{Path(name).stem}.yaml").data
        assert (data.backend, data.train_split) == ("hub", split) and data.validation_fraction is not None
    config = load_config("stored.yaml").data.model_copy(update={"path": str(tmp_path / "plain"), "backend": "folder"})
    config = config.model_copy(update={"train_split": "train", "validation_fraction": None})
    make_betons(config, tmp_path / "betons", BetonOptions(64, "raw", 95))
    new(str(tmp_path / "betons"), None, ["data.backend=beton"])
    data = load_config("betons.yaml").data
    assert (data.backend, data.train_split, data.validation_split) == ("beton", "train", "validation")
    (tmp_path / "betons" / "validation.beton").unlink()
    with pytest.raises(FileNotFoundError, match=r"^no validation\.beton in data\.path .*; it has train; set"):
        new(str(tmp_path / "betons"), Path("b.yaml"), ["data.backend=beton"])


def drifting(photograph: str, frames: int, step: float) -> list[Image.Image]:
    """A film: the camera moves over a photograph."""
    whole = Image.fromarray(np.asarray(getattr(photographs, photograph)())[..., :3])
    side = min(whole.size) // 2
    places = [(int((whole.width - side) * t * step), int((whole.height - side) * t * step)) for t in range(frames)]
    return [whole.crop((x, y, x + side, y + side)).resize((64, 64)) for x, y in places]


@pytest.mark.seconds
def test_neighbours_in_films_and_patches_are_alike_and_photographs_in_albums_are_not(tmp_path):
    for name in ("astronaut", "coffee", "rocket", "chelsea"):
        whole = Image.fromarray(np.asarray(getattr(photographs, name)())[..., :3]).resize((256, 256))
        cut = [whole.crop((x, y, x + 64, y + 64)) for y in range(0, 193, 32) for x in range(0, 193, 32)]
        for kind, images in (("films", drifting(name, 20, 0.03)), ("patches", cut)):
            (tmp_path / kind / name).mkdir(parents=True)
            for number, image in enumerate(images):
                image.save(tmp_path / kind / name / f"{number:03}.png")
    albums(tmp_path / "albums")
    measured = {}
    for kind in ("films", "patches", "albums"):
        source = FolderSource(tmp_path, kind)
        measured[kind] = alikeness(source, source.stored_names())
    assert measured["films"] < 0.3 and measured["patches"] < ALIKE < measured["albums"]
    new(str(tmp_path / "films"), None, [])
    assert load_config("films.yaml").data.validation_group == "folder"
    assert "so no folder is cut" in Path("films.yaml").read_text()


def test_many_images_are_looked_at_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(vqgan_accel.looking, "LOOKED_AT", 7)
    write_images(tmp_path / "p", 40)
    lines = new(str(tmp_path / "p"), None, [])
    assert any("7 of 40 images, evenly spaced, were looked at" in line for line in lines)


# ---- what is made of the machine


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("gpus", "fits", "images", "batch", "number"), [(8, 64, 1000, 256, 8), (1, 16, 1000, 16, 1), (8, 64, 20, 20, 5)]
)
def test_pretended_gpus(gpus, fits, images, batch, number, tmp_path, monkeypatch):
    machine = Machine(["Pretended"] * gpus, True, cores=32, memory=2**38)
    pretend(monkeypatch, machine, fits)
    for number_of, path in enumerate(write_images(tmp_path / "p" / "train", 20, size=64)):
        for copy in range(images // 20 - 1):
            os.link(path, path.with_name(f"{number_of}-{copy}.png"))
    write_images(tmp_path / "p" / "val", 3, size=64)
    lines = new(str(tmp_path / "p"), None, [])
    config = load_config("p.yaml")
    assert config.training.total_batch_size == batch and config.training.mixed_precision == "bf16"
    assert make_plan(config, images, number).total_steps >= 20_000
    launch = f"accelerate launch --num_processes {number} -m vqgan_accel train p.yaml"
    assert said(lines, "next") == (launch if number > 1 else "vqgan-accel train p.yaml")
    assert ("times as fast as one" in said(lines, "estimate")) == (number > 1)
    assert "weights.vgg16=FILE" in said(lines, "NOTE")


def test_a_network_that_fits_in_no_batch_is_refused(tmp_path, monkeypatch):
    pretend(monkeypatch, Machine(["Tiny"], False, cores=2, memory=2**33), fits=2)
    write_images(tmp_path / "p", 40)
    with pytest.raises(ValueError, match=r"^4 images of 32 px for each process do not fit in the GPU's memory; give"):
        new(str(tmp_path / "p"), None, [])
    assert not Path("p.yaml").exists()


# ---- where things go


def test_output_dir_is_not_among_the_pictures(tmp_path, monkeypatch):
    write_images(tmp_path / "p", 20)
    monkeypatch.chdir(tmp_path / "p")
    new(".", Path("../x.yaml"), [])
    config = load_config("../x.yaml")
    assert config.output_dir == str(tmp_path / "runs" / "x") and config.data.path == "."
    with pytest.raises(ValueError, match=r"^output_dir mine lies among the images"):
        new(".", Path("../y.yaml"), ["output_dir=mine"])
    assert not Path("../y.yaml").exists()


def test_the_group_that_is_given_decides_the_fraction(tmp_path):
    for name in "abcdefghijkl":
        write_images(tmp_path / "p" / name, 3)
    new(str(tmp_path / "p"), None, ["data.validation_group=folder"])
    text = Path("p.yaml").read_text()
    assert "validation_group: folder  # given" in text and load_config("p.yaml").data.validation_fraction is not None


@pytest.mark.parametrize("name", ["${x}", 'it\'s "quoted" #1', "- no", "日本 😀", "null", "a: b", "x\\${y}", "x~"])
def test_folders_of_any_name(name, tmp_path, monkeypatch):
    write_images(tmp_path / "here" / name, 20)
    new(f"./{name}", Path("x.yaml"), [])
    config = load_config("x.yaml")
    assert config.data.path == f"./{name}" and len(FolderSource(Path(config.data.path), ".")) == 20


# ---- careless command lines


def test_pictures_that_cannot_be_trained_on_are_one_sentence(tmp_path):
    for folder in ("empty", "one", "broken", "deep/train"):
        (tmp_path / folder).mkdir(parents=True)
    noise(9, 9).save(tmp_path / "one" / "a.png")
    for number in range(3):
        (tmp_path / "broken" / f"{number}.png").write_bytes(b"none")
    (tmp_path / "file.txt").touch()
    noise(9, 9).save(tmp_path / "photo.png")
    for name, sentence in {
        "empty": r"no images below .*empty; put files there",
        "deep": r"no images below .*deep/train; put files there",
        "one": r".*one has one image, .*a\.png, of which nothing can be learnt; give more",
        "broken": r"none of the 3 images of .*broken can be read; the first: .*0\.png: it is not an image",
        "file.txt": r"data\.path .*file\.txt is neither a file that ends in",
        "photo.png": r"data\.path .*photo\.png is neither a file that ends in",
        "nowhere": r"no file or folder at data\.path .*nowhere; give one",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{sentence}") as error:
            new(str(tmp_path / name), Path("x.yaml"), [])
        assert "\n" not in str(error.value)
    write_images(tmp_path / "two", 2)
    with pytest.raises((ValueError, FileNotFoundError)) as error:  # unless a hash parts the two
        new(str(tmp_path / "two"), Path("x.yaml"), [])
        raise ValueError("data.path two: parted")
    assert "data.path" in str(error.value) or "too few" in str(error.value)


def test_overrides_and_outputs_that_are_wrong_are_told_before_a_picture_is_read(tmp_path, capsys):
    (tmp_path / "taken.yaml").touch()
    for words, sentence in {
        ("data.imagesize=64",): "unknown key 'data.imagesize'",
        ("training.max_steps=many",): "'training.max_steps' is 'many'",
        ("data.path=x",): "give the pictures as --data",
        ("32",): "'32' is not an override",
        ("--output", str(tmp_path / "taken.yaml")): "taken.yaml is there already",
        ("--output", str(tmp_path / "no" / "a.yaml")): "there is no folder",
        ("training.total_batch_size=6",): "minibatch_stddev_group 4 does not divide",
    }.items():
        assert main(["new", "--data", "nowhere at all", *words]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["new"])
    assert (tmp_path / "taken.yaml").read_text() == "" and not list(Path().iterdir())
