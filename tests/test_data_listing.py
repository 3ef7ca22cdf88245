"""A folder's listing: names as bytes, kept from one start to the next, and made anew where anything has changed."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from images import noise
from PIL import Image, features

from vqgan_accel.data import listing
from vqgan_accel.data.folder import FolderSource
from vqgan_accel.data.listing import EXTENSIONS, image_files
from vqgan_accel.data.names import Names

ANY_NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0") | st.just("\udce9"), max_size=5)

# ---- names


@given(st.lists(ANY_NAME, max_size=30))
def test_names_are_the_list_that_they_were_made_of(names: list[str]) -> None:
    found = Names.of(iter(names))
    assert len(found) == len(names) and [*found] == names
    assert [found[index] for index in range(-len(names), len(names))] == names + names
    assert found[1:-1] == names[1:-1] and found[::-2] == names[::-2]
    assert bytes(found.joined()) == "\n".join(names).encode(errors="surrogateescape")
    assert [*pickle.loads(pickle.dumps(found))] == names
    for index in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            found[index]


def test_many_names_are_iterated_over_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgan_accel.data.names.AT_ONCE", 7)
    names = [f"a\n{number}" for number in range(50)]
    assert [*Names.of(names)] == names


def test_names_take_their_bytes_and_eight_more() -> None:
    names = [f"n{number % 1000:08}/n{number:013}.JPEG" for number in range(20_000)]
    tracemalloc.start()
    try:
        found = Names.of(names)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 1.3 * (sum(map(len, names)) + 9 * len(names))  # a growing bytearray has room to spare
    assert len(found) == len(names)


def test_the_fingerprint_and_the_classes_are_those_of_the_list(tmp_path: Path) -> None:
    files = ["b/1.png", "a.b/x/2.png", "a/3.png", "a/4.PNG", "größe/5.png", os.fsdecode(b"\xe9/6.png")]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    source = FolderSource(tmp_path, ".")
    digest = hashlib.sha256("\n".join(sorted(files)).encode(errors="surrogateescape")).hexdigest()
    assert source.fingerprint() == f"6 images, names {digest[:16]}"
    labels = source.labels()
    assert labels is not None and labels.names == sorted({file.split("/")[0] for file in files})
    assert [labels.names[number] for number in labels.numbers] == [file.split("/")[0] for file in sorted(files)]
    assert labels.numbers.dtype == np.int64
    (tmp_path / "0.png").touch()
    assert FolderSource(tmp_path, ".").labels() is None


@pytest.mark.parametrize("ending", [".tif", ".tiff", ".avif"])
def test_further_endings_are_read_where_pillow_reads_them(tmp_path: Path, ending: str) -> None:
    if ending == ".avif" and not ("avif" in features.modules and features.check("avif")):
        assert ending not in EXTENSIONS
        pytest.skip("this Pillow cannot read AVIF")
    lossless = {"quality": 100, "subsampling": "4:4:4"} if ending == ".avif" else {}
    noise(20, 16).save(tmp_path / f"a{ending.upper()}", **lossless)
    source = FolderSource(tmp_path, ".")
    difference = np.asarray(source.open(0)).astype(int) - np.asarray(noise(20, 16))
    assert np.abs(difference).max() <= (8 if ending == ".avif" else 0)


def test_sixteen_bits_of_grey_in_a_tiff_are_the_upper_eight(tmp_path: Path) -> None:
    from vqgan_accel.data.transforms import to_rgb

    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(to_rgb(FolderSource(tmp_path, ".").open(0)))[..., 0], grey // 257)


# ---- what is kept


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose listing is kept, however small and new it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "MANY", 1)
    monkeypatch.setattr(listing, "SETTLED", -(10**12))
    for name in ["a/1.png", "a/deep/er/2.jpg", "b/3.webp", "notes.txt"]:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    (tmp_path / "outside" / "one").mkdir(parents=True)
    (tmp_path / "outside" / "two").mkdir()
    (tmp_path / "outside" / "one" / "4.png").touch()
    (tmp_path / "outside" / "two" / "5.png").touch()
    (tmp_path / "outside" / "way").symlink_to(tmp_path / "outside" / "one")
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "outside" / "way")
    (tmp_path / "tree" / "nowhere").symlink_to(tmp_path / "outside" / "three")
    return tmp_path / "tree"


def kept_file(folder: Path) -> Path:
    (file,) = (folder.parent / "cache" / "vqgan_accel" / "listings").glob("*.npz")
    return file


def read_again(folder: Path) -> bool:
    """Whether the folder was looked into to list its images, which are then those that there are."""
    looked: list[object] = []
    scandir = os.scandir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: looked.append(path) or scandir(path))
        found = [*image_files(folder)]
    assert found == [*listing.listed(folder).files]
    return bool(looked)


def test_the_second_start_reads_what_the_first_has_kept(tree: Path) -> None:
    assert read_again(tree) and not read_again(tree) and not read_again(tree)
    assert [*image_files(tree)] == ["a/1.png", "a/deep/er/2.jpg", "b/3.webp", "linked/4.png"]
    assert not [path for path in kept_file(tree).parent.iterdir() if "partial" in path.name]
    (tree.parent / "other name").symlink_to(tree)
    assert not read_again(tree.parent / "other name")  # the same folder


def set_back(tree: Path) -> None:
    """As copying tools do."""
    before = (tree / "b").stat()
    (tree / "b" / "0.png").touch()
    os.utime(tree / "b", ns=(before.st_atime_ns, before.st_mtime_ns))


def filled(tree: Path) -> None:
    (tree.parent / "outside" / "three").mkdir()
    (tree.parent / "outside" / "three" / "6.png").touch()


def turned(tree: Path) -> None:
    (tree.parent / "outside" / "way").unlink()
    (tree.parent / "outside" / "way").symlink_to(tree.parent / "outside" / "two")


def replaced(tree: Path) -> None:
    tree.rename(tree.parent / "old")
    shutil.copytree(tree.parent / "old", tree, symlinks=True)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda tree: (tree / "a" / "deep" / "er" / "0.png").touch(),
    "a file less": lambda tree: (tree / "a" / "1.png").unlink(),
    "a file renamed": lambda tree: (tree / "b" / "3.webp").rename(tree / "b" / "4.webp"),
    "a folder more": lambda tree: shutil.copytree(tree / "b", tree / "a" / "deep" / "c"),
    "a folder moved": lambda tree: (tree / "a" / "deep").rename(tree / "deep"),
    "a folder less": lambda tree: shutil.rmtree(tree / "a"),
    "a file more, and the folder's time set back": set_back,
    "a file more behind a link": lambda tree: (tree.parent / "outside" / "one" / "0.png").touch(),
    "a link that leads through another elsewhere": turned,
    "a link that led nowhere": filled,
    "another folder in its place": replaced,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_has_changed_is_listed_anew(tree: Path, change: str) -> None:
    assert read_again(tree) and not read_again(tree)
    CHANGES[change](tree)
    assert read_again(tree), change
    assert not read_again(tree)


def test_what_the_images_themselves_are_changes_no_listing(tree: Path) -> None:
    assert read_again(tree)
    (tree / "a" / "1.png").write_bytes(b"other")
    assert not read_again(tree)


@pytest.mark.parametrize("damage", ["short", "empty", "other bytes", "no npz", "other endings"])
def test_a_listing_that_is_damaged_is_made_anew(tree: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_again(tree)
    content = kept_file(tree).read_bytes()
    place = content.index(b"a/1.png")
    if damage == "other endings":
        monkeypatch.setattr(listing, "EXTENSIONS", (".png",))
    else:
        damaged = {
            "short": content[: len(content) // 2],
            "empty": b"",
            "other bytes": content[:place] + b"b" + content[place + 1 :],
            "no npz": b"no npz at all",
        }
        kept_file(tree).write_bytes(damaged[damage])
    assert read_again(tree) and not read_again(tree)


def test_what_was_just_changed_or_is_small_is_not_kept(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MANY", 5)
    assert read_again(tree) and read_again(tree)
    monkeypatch.setattr(listing, "MANY", 4)
    monkeypatch.setattr(listing, "SETTLED", 2 * 10**9)
    assert read_again(tree) and read_again(tree)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * 10**9)
    assert read_again(tree) and not read_again(tree)


def test_a_cache_that_cannot_be_written_to_stops_nobody(tree: Path) -> None:
    (tree.parent / "cache").touch()
    assert read_again(tree) and read_again(tree)


LIST = """
import os, sys
from pathlib import Path
from vqgan_accel.data import listing
listing.MANY, listing.SETTLED, looked, scandir = 1, -10**12, [], os.scandir
def counting(path):
    looked.append(path)
    return scandir(path)
os.scandir = counting
print(len(listing.image_files(Path(sys.argv[1]))), len(looked))
"""


def test_of_several_processes_one_lists_and_the_others_read(tree: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", LIST, tree], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = sorted(process.communicate(timeout=60)[0].split() for process in processes)
    assert said == [["4", "0"], ["4", "0"], ["4", "6"]]
