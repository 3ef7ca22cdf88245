"""What other people's folders hold: images of every size and mode, and names of every kind.

Hypothesis chooses the pixels, sizes and trees; numpy and pathlib say what should come out.
"""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from images import noise
from numpy.typing import NDArray
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.hub import HubSource
from vqgan_accel.data.source import decode_image
from vqgan_accel.data.transforms import to_rgb, training_crop, training_view

pytestmark = pytest.mark.slow

Pixels = NDArray[np.uint8]

# ---- sizes

SIDES = st.integers(1, 60)
SCALES = st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(lambda pair: (min(pair), max(pair)))
EXTREME = [(1, 1), (1, 2), (3, 2), (4000, 3000), (3000, 4000), (4000, 1), (1, 4000), (4000, 37), (1001, 1000)]


@given(st.integers(1, 4000), st.integers(1, 3000), SCALES, st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
@example(4000, 1, (0.001, 1.0), 0)
@example(1, 3000, (1.0, 1.0), 0)
def test_the_crop_lies_inside_the_image_and_has_the_area_that_was_asked_for(
    width: int, height: int, scale: tuple[float, float], seed: int
) -> None:
    left, top, side = training_crop(width, height, scale, np.random.default_rng(seed))
    assert side >= 1 and left >= 0 and top >= 0 and left + side <= width and top + side <= height
    smallest, largest = np.sqrt(width * height * np.array(scale))
    central = ((width - min(width, height)) // 2, (height - min(width, height)) // 2, min(width, height))
    assert smallest - 0.5 <= side <= largest + 0.5 or (left, top, side) == central


@pytest.mark.parametrize(("width", "height"), EXTREME)
def test_a_constant_colour_stays_exactly_constant_at_any_size(width: int, height: int) -> None:
    colour = (1, 128, 254)
    image = Image.new("RGB", (width, height), colour)
    for image_size in (1, 31, 256):
        expected = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, image_size, image_size)
        views = [evaluation_view(image, image_size), training_view(image, image_size, (0.01, 1.0), True, 0, 0, 0)]
        for view in views:
            assert view.dtype == torch.uint8 and torch.equal(view, expected)


@given(SIDES, SIDES, st.integers(1, 40), st.none() | SCALES, st.tuples(*[st.integers(0, 2**40)] * 3))
@settings(max_examples=100, deadline=None)
@example(4000, 3, 16, (0.7, 1.0), (0, 0, 0))
@example(3, 4000, 16, None, (0, 0, 0))
def test_two_calls_give_the_same_square_of_bytes(
    width: int, height: int, image_size: int, scale: tuple[float, float] | None, key: tuple[int, int, int]
) -> None:
    image = noise(width, height)
    once, twice = (training_view(image, image_size, scale, True, *key) for _ in range(2))
    assert once.dtype == torch.uint8 and once.shape == (3, image_size, image_size) and torch.equal(once, twice)
    once, twice = (evaluation_view(image, image_size) for _ in range(2))
    assert once.dtype == torch.uint8 and once.shape == (3, image_size, image_size) and torch.equal(once, twice)
    assert np.array_equal(np.asarray(image), np.asarray(noise(width, height)))  # neither view changed it


@given(st.integers(5, 60), st.integers(5, 60), st.integers(2, 40), st.none() | st.just((0.5, 1.0)), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_view_with_flips_is_the_view_without_or_its_mirror(
    width: int, height: int, image_size: int, scale: tuple[float, float] | None, seed: int
) -> None:
    image = noise(width, height)
    mirrored = 0
    for index in range(40):  # all alike by chance: 2^-39
        plain = training_view(image, image_size, scale, False, seed, 0, index)
        view = training_view(image, image_size, scale, True, seed, 0, index)
        assert not torch.equal(plain, plain.flip(2))
        assert torch.equal(view, plain) or torch.equal(view, plain.flip(2))
        mirrored += torch.equal(view, plain.flip(2))
    assert 0 < mirrored < 40


@given(SIDES, SIDES, st.integers(1, 40), SCALES, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_pixels_outside_of_the_crop_do_not_show(
    width: int, height: int, image_size: int, scale: tuple[float, float], seed: int
) -> None:
    image = noise(width, height)
    rng = np.random.default_rng((2, seed, 0, 0))  # the stream of augmentations
    left, top, side = training_crop(width, height, scale, rng)
    inside = (slice(top, top + side), slice(left, left + side))
    other = 255 - np.asarray(image)
    other[inside] = np.asarray(image)[inside]
    key = (image_size, scale, False, seed, 0, 0)
    assert torch.equal(training_view(Image.fromarray(other), *key), training_view(image, *key))


# ---- modes


def shown(image: Image.Image, format: str, **options: Any) -> NDArray[np.int64]:
    """What a network would see of the image once it is in a file, as (height, width, 3) integers."""
    file = io.BytesIO()
    image.save(file, format, **options)
    rgb = to_rgb(decode_image(file))
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(np.int64)


def arrays(*channels: int, below: int = 256, dtype: type = np.uint8) -> st.SearchStrategy[NDArray[Any]]:
    """(height, width, *channels)"""
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda shape: (*shape, *channels))
    return shapes.flatmap(lambda shape: hnp.arrays(dtype, shape, elements=st.integers(0, below - 1)))


def on_white(colour: Pixels, alpha: Pixels) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def palette_image(indices: Pixels, palette: Pixels) -> Image.Image:
    image = Image.new("P", indices.shape[::-1])
    image.putpalette(palette.tobytes())
    image.putdata(indices.flatten().tolist())
    return image


PALETTES = hnp.arrays(np.uint8, (16, 3))


@given(arrays())
@settings(max_examples=40, deadline=None)
def test_grey_becomes_three_equal_channels(grey: Pixels) -> None:
    for format in ("PNG", "BMP"):
        assert np.array_equal(shown(Image.fromarray(grey), format), np.stack([grey] * 3, axis=2))


@given(arrays(2))
@settings(max_examples=60, deadline=None)
def test_transparent_grey_is_blended_with_white(pixels: Pixels) -> None:
    expected = on_white(np.stack([pixels[..., 0]] * 3, axis=2), pixels[..., 1])
    assert np.abs(shown(Image.fromarray(pixels, "LA"), "PNG") - expected).max() <= 1


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
@given(pixels=arrays(4))
@settings(max_examples=60, deadline=None)
def test_transparent_colours_are_blended_with_white(format: str, options: dict[str, bool], pixels: Pixels) -> None:
    expected = on_white(pixels[..., :3], pixels[..., 3])
    assert np.abs(shown(Image.fromarray(pixels), format, **options) - expected).max() <= 1


@given(arrays(3, below=3), st.tuples(*[st.integers(0, 2)] * 3))
@settings(max_examples=40, deadline=None)
def test_the_transparent_colour_of_an_image_without_alpha_becomes_white(
    pixels: Pixels, key: tuple[int, int, int]
) -> None:
    expected = np.where((pixels == key).all(axis=2, keepdims=True), 255, pixels)
    assert np.array_equal(shown(Image.fromarray(pixels), "PNG", transparency=key), expected)
    grey = pixels[..., 0]
    expected = np.stack([np.where(grey == key[0], 255, grey)] * 3, axis=2)
    assert np.array_equal(shown(Image.fromarray(grey), "PNG", transparency=key[0]), expected)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP"])
@given(indices=arrays(below=16), palette=PALETTES)
@settings(max_examples=40, deadline=None)
def test_a_palette_is_looked_up(format: str, indices: Pixels, palette: Pixels) -> None:
    assert np.array_equal(shown(palette_image(indices, palette), format), palette[indices])


@pytest.mark.parametrize("format", ["PNG", "GIF"])
@given(indices=arrays(below=16), palette=PALETTES, transparent=st.integers(0, 15))
@settings(max_examples=40, deadline=None)
def test_the_transparent_entry_of_a_palette_becomes_white(
    format: str, indices: Pixels, palette: Pixels, transparent: int
) -> None:
    expected = np.where((indices == transparent)[..., None], 255, palette[indices])
    # with optimize a GIF would renumber its entries
    image = shown(palette_image(indices, palette), format, transparency=transparent, optimize=False)
    assert np.array_equal(image, expected)


@given(arrays(below=16), PALETTES, st.binary(min_size=1, max_size=16))
@settings(max_examples=60, deadline=None)
def test_a_palette_with_degrees_of_transparency_is_blended_with_white(
    indices: Pixels, palette: Pixels, alpha: bytes
) -> None:
    of_entry = np.frombuffer(alpha + b"\xff" * (16 - len(alpha)), np.uint8)  # entries that a file leaves out are opaque
    expected = on_white(palette[indices], of_entry[indices])
    assert np.abs(shown(palette_image(indices, palette), "PNG", transparency=alpha) - expected).max() <= 1


@given(arrays(4))
@settings(max_examples=60, deadline=None)
def test_ink_takes_light_away(ink: Pixels) -> None:
    light = 255 - ink.astype(np.float64)
    expected = light[..., :3] * light[..., 3:] / 255
    assert np.abs(shown(Image.fromarray(ink, "CMYK"), "TIFF") - expected).max() <= 1


@given(arrays(below=65536, dtype=np.uint16))
@settings(max_examples=60, deadline=None)
@example(np.array([[0, 128, 129, 65406, 65407, 65535]], np.uint16))
def test_16_bit_grey_is_rounded_to_the_nearest_of_256(grey: NDArray[np.uint16]) -> None:
    expected = np.stack([np.rint(grey / 257)] * 3, axis=2)
    big_endian = Image.frombytes("I;16B", grey.shape[::-1], grey.astype(">u2").tobytes())
    for image, format in [(Image.fromarray(grey), "PNG"), (Image.fromarray(grey), "TIFF"), (big_endian, "TIFF")]:
        assert np.array_equal(shown(image, format), expected)


# What the standard says: the sides of the upright picture at which the file's row 0 and column 0 are.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def as_stored(upright: NDArray[Any], orientation: int) -> NDArray[Any]:
    row, column = ORIENTATIONS[orientation]
    stored = np.swapaxes(upright, 0, 1) if row in ("left", "right") else upright
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    return np.ascontiguousarray(stored)


LOSSLESS = [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@given(pixels=arrays(3), grey=arrays(below=65536, dtype=np.uint16), indices=arrays(below=16), palette=PALETTES)
@settings(max_examples=8, deadline=None)
def test_every_orientation_is_turned_upright(
    orientation: int, pixels: Pixels, grey: NDArray[np.uint16], indices: Pixels, palette: Pixels
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format, options in LOSSLESS:
        stored = Image.fromarray(as_stored(pixels, orientation))
        assert np.array_equal(shown(stored, format, exif=exif, **options), pixels)
    stored = Image.fromarray(as_stored(grey, orientation))
    assert np.array_equal(shown(stored, "PNG", exif=exif), np.stack([np.rint(grey / 257)] * 3, axis=2))
    stored = palette_image(as_stored(indices, orientation), palette)
    expected = np.where((indices == 3)[..., None], 255, palette[indices])
    assert np.array_equal(shown(stored, "PNG", exif=exif, transparency=3), expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_an_animation_shows_its_first_frame(width: int, height: int, count: int, data: st.DataObject) -> None:
    frames = data.draw(hnp.arrays(np.uint8, (count, height, width, 3)))
    first, *others = map(Image.fromarray, frames)
    for format, options in [("WEBP", {"lossless": True}), ("PNG", {})]:
        assert np.array_equal(shown(first, format, save_all=True, append_images=others, **options), frames[0])
    palette = data.draw(PALETTES)
    indices = data.draw(hnp.arrays(np.uint8, (count, height, width), elements=st.integers(0, 15)))
    first, *others = (palette_image(frame, palette) for frame in indices)
    animation = shown(first, "GIF", save_all=True, append_images=others, optimize=False)
    assert np.array_equal(animation, palette[indices[0]])


# ---- names

ODD = "aZ09 _-+()[]'\"\\*?%&~#\n\t\u00e9\u0301\u00df\u0130\u65e5\u05d0\u200d\U0001f986\ufe0f\u00a0"
WORDS = st.text(ODD, min_size=1, max_size=6)
# a folder's name holds no dot and a file's name does, so that no two of them are in each other's way
FILES = st.tuples(WORDS, st.sampled_from([".png", ".JPG", ".jPeG", ".bmp", ".webp", ".png ", ".gif", ".png.txt", "."]))
RELATIVE = st.tuples(st.lists(WORDS, max_size=3), FILES.map("".join)).map(lambda path: "/".join([*path[0], path[1]]))
TREES = st.lists(RELATIVE, max_size=10, unique=True).map(lambda names: ["always.png", *names])
IMAGE_ENDS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def colour_of(number: int) -> tuple[int, int, int]:
    return (number % 251, number // 251, 7)


def write(folder: Path, names: list[str]) -> None:
    """Images of one pixel, of the colours 0, 1, 2, ..."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1), colour_of(number)).save(folder / name, "PNG")


def relative_names(source: FolderSource) -> list[str]:
    return [os.path.relpath(source.name(i), source.folder) for i in range(len(source))]


def listing(folder: Path) -> list[str]:
    """The images of a folder without links, a second time."""
    images = [path for path in folder.rglob("*") if path.is_file() and path.name.lower().endswith(IMAGE_ENDS)]
    return sorted(path.relative_to(folder).as_posix() for path in images)


@contextmanager
def shuffled_folders(seed: int) -> Iterator[None]:
    """As on another file system, which keeps the entries of a folder in another order."""
    scandir = os.scandir

    @contextmanager
    def shuffled(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        random.Random(seed).shuffle(found)
        yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", shuffled)
        yield


@given(TREES, st.lists(st.lists(WORDS, min_size=1, max_size=3), max_size=3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
@example([f"{name}/1.png" for name in ["a", "a b", "a-", "A", " a", "a ", "a\u0301", "\u00e1"]], [["empty"]], 0)
def test_every_image_is_listed_once_in_the_order_of_its_name_and_opens(
    names: list[str], empty: list[list[str]], seed: int
) -> None:
    with TemporaryDirectory() as root:
        folder = Path(root, "train")
        write(folder, names)
        for words in empty:
            folder.joinpath(*words).mkdir(parents=True, exist_ok=True)
        source = FolderSource(Path(root), "train")
        assert relative_names(source) == listing(folder)
        for i, name in enumerate(relative_names(source)):
            assert source.open(i).getpixel((0, 0)) == colour_of(names.index(name))
        with shuffled_folders(seed):
            assert [*FolderSource(Path(root), "train").files] == [*source.files]


@given(TREES, st.randoms(use_true_random=False), st.data())
@settings(max_examples=40, deadline=None)
def test_the_fingerprint_tells_names_and_nothing_else(
    names: list[str], order: random.Random, data: st.DataObject
) -> None:
    with TemporaryDirectory() as root:
        write(Path(root, "a"), names)
        fingerprint = FolderSource(Path(root), "a").fingerprint()
        write(Path(root, "b"), order.sample(names, len(names)))  # other pixels, other place, written in another order
        images = listing(Path(root, "b"))
        Path(root, "b", images[-1]).write_bytes(b"broken")
        assert FolderSource(Path(root), "b").fingerprint() == fingerprint

        renamed = Path(root, "b", data.draw(st.sampled_from(images)))
        target = renamed.with_name(data.draw(WORDS.filter(lambda word: word != renamed.stem)) + ".png")
        replaced = target.exists()
        renamed.rename(target)
        assert FolderSource(Path(root), "b").fingerprint() != fingerprint
        target.rename(renamed)
        assert replaced or FolderSource(Path(root), "b").fingerprint() == fingerprint
        Path(root, "b", "another class").mkdir()
        target = renamed.rename(Path(root, "b", "another class", renamed.name))
        assert FolderSource(Path(root), "b").fingerprint() != fingerprint
        target.rename(renamed)
        Path(root, "b", "one more.png").touch()
        assert FolderSource(Path(root), "b").fingerprint() != fingerprint


@given(TREES, st.lists(st.tuples(WORDS, st.sampled_from(["", ".png"])), max_size=5), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_with_links_and_loops_every_folder_is_listed_once_under_one_name(
    names: list[str], links: list[tuple[str, str]], seed: int, data: st.DataObject
) -> None:
    with TemporaryDirectory() as root:
        folder = Path(os.path.realpath(root), "train")
        write(folder, names)
        outside = folder.parent / "outside"
        write(outside, ["of/a.png", "b.png"])
        real = sorted(folder.parent.rglob("*"))
        folders = [path for path in real if path.is_dir() and path.is_relative_to(folder)]
        (folder / "out").symlink_to(outside)
        for word, end in links:  # each to a folder or a file, itself, or nothing
            link = data.draw(st.sampled_from(folders)) / (word + end)
            target = data.draw(st.sampled_from([*real, folder.parent, link, folder / "gone"]))
            if not os.path.lexists(link):
                link.symlink_to(target)

        source = FolderSource(folder.parent, "train")
        found = [(os.path.realpath(path.parent), path.name) for path in map(Path, map(source.name, range(len(source))))]
        reached = {os.path.realpath(path) for path in [folder, *folder.rglob("*"), *outside.rglob("*")] if is_dir(path)}
        expected = [(place, name) for place in reached for name in os.listdir(place) if is_image(Path(place, name))]
        assert sorted(found) == sorted(expected)
        assert [*source.files] == sorted(source.files)
        with shuffled_folders(seed):
            assert [*FolderSource(folder.parent, "train").files] == [*source.files]


def is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # Path.is_dir raises at a link to itself


def is_image(path: Path) -> bool:
    return not is_dir(path) and path.name.lower().endswith(IMAGE_ENDS)


def test_a_name_that_is_no_unicode_is_listed_and_opened(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe9t\xe9.png")  # "été" in latin-1
    write(tmp_path / "train", ["a.png", name])
    source = FolderSource(tmp_path, "train")
    assert [*source.files] == ["a.png", name]
    assert source.open(1).getpixel((0, 0)) == colour_of(1)
    before = source.fingerprint()
    (tmp_path / "train" / name).rename(tmp_path / "train" / "\u00e9t\u00e9.png")
    assert FolderSource(tmp_path, "train").fingerprint() != before


def test_equal_names_in_different_classes_are_different_images(tmp_path: Path) -> None:
    names = [f"{folder}/1.png" for folder in ["cat", "cat ", "cats", "Cat", "cat/cat"]]
    write(tmp_path / "train", names)
    source = FolderSource(tmp_path, "train")
    assert [*source.files] == sorted(names)
    pixels = [source.open(i).getpixel((0, 0)) for i in range(5)]
    assert pixels == [colour_of(names.index(name)) for name in sorted(names)]


def test_ten_thousand_images_are_listed_in_order(tmp_path: Path) -> None:
    names = [f"n{folder:03}/{file}.JPEG" for folder in range(100) for file in range(100)]
    write(tmp_path, ["pixel.png"])
    for folder in range(100):
        (tmp_path / "train" / f"n{folder:03}").mkdir(parents=True)
    for name in random.Random(0).sample(names, len(names)):
        os.link(tmp_path / "pixel.png", tmp_path / "train" / name)  # far cheaper than as many files
    source = FolderSource(tmp_path, "train")
    assert len(source) == 10_000
    assert [*source.files] == sorted(names)
    assert [source.name(i) for i in (0, 1, 9_999)] == [
        f"{tmp_path}/train/{name}" for name in ("n000/0.JPEG", "n000/1.JPEG", "n099/99.JPEG")
    ]
    assert source.open(9_999).getpixel((0, 0)) == colour_of(0)


# ---- the same tree for `datasets`

CLASSES = st.lists(st.sampled_from(["cat", "Bird 2", "n01440764", "gr\u00f6\u00dfe", "\u65e5\u672c"]), max_size=2)
PLAIN = st.tuples(st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9 _-]{0,5}", fullmatch=True), st.sampled_from(IMAGE_ENDS))
PLAIN_TREES = st.lists(
    st.tuples(CLASSES, PLAIN.map("".join)).map(lambda path: "/".join([*path[0], path[1]])),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(PLAIN_TREES)
@settings(max_examples=15, deadline=None)
def test_a_folder_and_datasets_hold_the_same_images(names: list[str]) -> None:
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(root, "cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        write(Path(root, "data", "train"), names)
        Path(root, "data", "train", "notes.txt").touch()
        shutil.copytree(Path(root, "data", "train"), Path(root, "data", "validation"))
        folder = FolderSource(Path(root, "data"), "train")
        hub = HubSource(DataConfig(path=f"{root}/data", backend="hub"), "train")
        assert len(hub) == len(folder) == len(names)
        pixels = {folder.name(i): folder.open(i).getpixel((0, 0)) for i in range(len(folder))}
        assert {hub.rows[i]["image"]["path"]: hub.open(i).getpixel((0, 0)) for i in range(len(hub))} == pixels
