from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from images import noise, truncate, write_images
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data.crops import evaluation_view
from vqgan_accel.data.opening import evaluation_loader, open_source, training_loader
from vqgan_accel.data.order import TrainingOrder
from vqgan_accel.data.transforms import to_rgb, training_view
from vqgan_accel.data.views import to_float

SIZE = 16
SEED = 11
COUNT = 13


@pytest.fixture
def paths(tmp_path):
    return write_images(tmp_path / "train", COUNT)


def config(paths, **options):
    return DataConfig(**{"path": str(paths[0].parent.parent), "image_size": SIZE, "workers": 0, **options})


def train(paths, batch=4, rounds=1, process=0, processes=1, start=0, total=7, **options):
    data = config(paths, **options)
    source = open_source(data, "train")
    order = TrainingOrder(SEED, len(source), batch, rounds, process, processes, start, total)
    return training_loader(source, data, order, pin_memory=False)


def evaluate(paths, batch=4, process=0, processes=1, **options):
    data = config(paths, **options)
    return evaluation_loader(open_source(data, "train"), data, batch, process, processes, pin_memory=False)


def same(a, b):
    assert a.keys() == b.keys() and a["skipped"] == b["skipped"]
    return torch.equal(a["image"], b["image"]) and torch.equal(a["index"], b["index"])


def view_of(paths, epoch, index):
    return training_view(to_rgb(Image.open(paths[index])), SIZE, (0.7, 1.0), True, SEED, epoch, index)


# ---- position decides


def test_training_batches_hold_the_views_of_their_keys(paths):
    loader = train(paths)
    batches = list(loader)
    assert len(batches) == len(loader) == 7
    for batch, keys in zip(batches, loader.batch_sampler, strict=True):
        assert batch["image"].shape == (4, 3, SIZE, SIZE) and batch["image"].dtype == torch.uint8
        assert batch["index"].tolist() == [index for _, index in keys]
        assert batch["skipped"] == 0
        assert torch.equal(batch["image"], torch.stack([view_of(paths, *key) for key in keys]))


@pytest.mark.seconds
def test_batches_do_not_depend_on_workers_or_on_what_was_loaded_before(paths):
    whole = list(train(paths))
    torch.set_num_threads(2)
    torch.randn(500, 500) @ torch.randn(500, 500)  # forking after parallel work is where workers used to hang
    loader = train(paths, workers=2)
    assert all(map(same, loader, whole))
    assert all(map(same, loader, whole))  # the workers persist; the second pass is the same
    assert all(map(same, train(paths, workers=2, start=4), whole[4:]))
    assert all(map(same, evaluate(paths, workers=2), evaluate(paths)))


def test_two_processes_in_two_rounds_load_what_one_does(paths):
    one = list(train(paths, batch=8, rounds=2))
    two = zip(*(train(paths, batch=8, rounds=2, process=process, processes=2) for process in range(2)), strict=True)
    for whole, shards in zip(one, two, strict=True):
        assert torch.equal(torch.stack([shard["image"] for shard in shards], dim=1).flatten(0, 1), whole["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_neither_uses_nor_changes_global_random_states(paths, workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    batches = list(train(paths, workers=workers)) + list(evaluate(paths, workers=workers))
    assert states() == before
    torch.manual_seed(5)
    np.random.seed(5)
    assert all(map(same, list(train(paths, workers=workers)) + list(evaluate(paths, workers=workers)), batches))


def test_the_config_decides_crop_and_flip(paths):
    plain = next(iter(train(paths, crop_scale=None, horizontal_flip=False)))
    views = [evaluation_view(to_rgb(Image.open(paths[index])), SIZE) for index in plain["index"]]
    # training resizes with torch, evaluation with Pillow
    assert (plain["image"].int() - torch.stack(views).int()).abs().max() <= 1


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 20])
def test_evaluation_shows_every_image_exactly_once_over_all_processes(paths, processes, batch):
    seen = []
    for process in range(processes):
        for part in evaluate(paths, batch, process, processes):
            seen += part["index"].tolist()
            views = [evaluation_view(to_rgb(Image.open(paths[index])), SIZE) for index in part["index"]]
            assert torch.equal(part["image"], torch.stack(views))
        assert seen[-1] % processes == process
    assert sorted(seen) == list(range(COUNT))


HELD_LOCK = """
import contextlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_data_loading import train

loader = train([Path(sys.argv[2])], workers=2)
batches = iter(loader)
next(batches)
loader._iterator._workers_done_event._cond.acquire()  # as the worker would, in its stead
with contextlib.suppress(RuntimeError):  # torch's own word of it may come at any time from here on
    loader._iterator._workers[0].kill()
    loader._iterator._workers[0].join()
batches.close()
print("ended")
"""


@pytest.mark.slow
def test_the_loader_ends_where_a_worker_died_holding_a_lock_that_its_end_waits_for(paths):
    """As one in fifty does that are killed; without the way around it this waits for ever."""
    command = [sys.executable, "-c", HELD_LOCK, str(Path(__file__).parent), str(paths[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "ended\n", done.stderr


def test_workers_are_outside_of_the_group_that_signals_reach(paths):
    loader = train(paths, workers=2)
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker
    groups = {os.getpgid(worker.pid) for worker in loader._iterator._workers}
    assert len(groups) == 2 and os.getpgid(0) not in groups


ORPHANS = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
multiprocessing.set_start_method("forkserver")  # Python 3.14's default, under which workers would have another parent
from torch.utils.data._utils import worker
worker.MP_STATUS_CHECK_INTERVAL = 600  # torch's own look for the parent's end
from test_data_loading import evaluate, train

loaders = [train([Path(sys.argv[2])], workers=2), evaluate([Path(sys.argv[2])], workers=1)]
batches = [iter(loader) for loader in loaders]
for each in batches:
    next(each)
workers = [worker for loader in loaders for worker in loader._iterator._workers]
print(*(type(worker).__name__ for worker in workers), flush=True)
print(*(worker.pid for worker in workers), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_are_forked_whatever_pythons_default_and_end_with_their_process(paths, number):
    command = [sys.executable, "-c", ORPHANS, str(Path(__file__).parent), str(paths[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().split() == ["ForkProcess"] * 3
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert all(state_of(pid) in "SRD" for pid in workers)
        process.send_signal(number)
    end = time.monotonic() + 30
    while any(state_of(pid) not in "ZX" for pid in workers) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(state_of(pid) in "ZX" for pid in workers)


def state_of(pid):
    """S: sleeping, R: running, D: waiting for a disk; Z: ended and not yet collected, X: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


# ---- broken images


def png_of_claimed_size(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def break_jpeg(path):
    noise(64, 64).save(path, "JPEG")
    truncate(path)


BREAK = {
    "truncated": (truncate, r"image file is truncated.*"),
    "truncated jpeg": (break_jpeg, r"image file is truncated.*"),
    "deleted": (lambda path: path.unlink(), "No such file or directory"),
    "empty": (lambda path: path.write_bytes(b""), "it is not an image that Pillow can identify"),
    "text": (lambda path: path.write_text("<html>404</html>"), "it is not an image that Pillow can identify"),
    "bomb": (lambda path: path.write_bytes(png_of_claimed_size(100_000)), r"Image size \(10000000000 pixels\) exc.*"),
    "no pixels": (lambda path: path.write_bytes(png_of_claimed_size(8)), r".+"),
    "header only": (lambda path: path.write_bytes(path.read_bytes()[:20]), r".+"),
    "floating point": (lambda path: Image.new("F", (9, 9)).save(path, "TIFF"), "its pixels are floating-point .*"),
}


def broken(loader, path, kind):
    """`loader`, made before the file breaks, as where a file disappears during training."""
    BREAK[kind][0](path)
    return loader


@pytest.mark.parametrize("make", [train, evaluate])
@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BREAK), ("truncated", 2), ("deleted", 2)])
def test_a_broken_image_stops_the_run_with_one_sentence(paths, make, kind, workers):
    loader = broken(make(paths, workers=workers), paths[5], kind)
    with pytest.raises(ValueError) as error:
        list(loader)
    assert not multiprocessing.active_children()  # while the error is still held, whose traceback could keep them
    sentence = str(error.value)
    head, tail = f"cannot read image {paths[5]}: ", "; remove or repair it, or set data.on_error=skip"
    assert "\n" not in sentence and sentence.startswith(head) and sentence.endswith(tail)
    reason = sentence.removeprefix(head).removesuffix(tail)
    assert re.fullmatch(BREAK[kind][1], reason), reason


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BREAK), ("truncated", 2), ("deleted", 2)])
def test_skipping_in_training_takes_the_next_image_under_its_own_key_and_counts(paths, capfd, kind, workers):
    whole = list(train(paths))
    loader = train(paths, workers=workers, on_error="skip")
    broken(broken(loader, paths[12], kind), paths[5], kind)
    for batch, before, keys in zip(loader, whole, loader.batch_sampler, strict=True):
        assert batch["skipped"] == sum(index in (5, 12) for _, index in keys)
        for i, (epoch, index) in enumerate(keys):
            seen = {5: 6, 12: 0}.get(index, index)
            assert batch["index"][i] == seen
            expected = before["image"][i] if seen == index else view_of(paths, epoch, seen)
            assert torch.equal(batch["image"][i], expected)
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipping" in line]
    for path in (paths[5], paths[12]):
        about = [line for line in lines if line.startswith(f"skipping image {path}: ")]
        assert 1 <= len(about) <= max(workers, 1)  # once per worker, in two epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_in_evaluation_leaves_the_image_out_and_counts(paths, capfd, workers):
    loader = evaluate(paths, batch=3, workers=workers, on_error="skip")
    for path in [*paths[3:6], paths[12]]:
        truncate(path)
    batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2], [], [6, 7, 8], [9, 10, 11], []]
    assert [batch["skipped"] for batch in batches] == [0, 3, 0, 0, 1]
    for batch in batches:
        assert batch["image"].shape == (len(batch["index"]), 3, SIZE, SIZE)
        assert batch["image"].dtype == torch.uint8 and batch["index"].dtype == torch.int64
    assert f"skipping image {paths[4]}: image file is truncated" in capfd.readouterr().err


@pytest.mark.parametrize("make", [train, evaluate])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_ends_with_one_sentence_where_every_image_is_broken(paths, make, workers):
    loader = make(paths, workers=workers, on_error="skip")
    for path in paths:
        truncate(path)
    with pytest.raises(ValueError) as error:
        list(loader)
    assert re.fullmatch(r"none of the 13 images can be read; the last tried was /.*: .* truncated.*", str(error.value))


def test_a_process_whose_shard_is_broken_goes_on_where_others_are_not(paths):
    for path in paths[1::2]:
        truncate(path)
    batches = list(evaluate(paths, process=1, processes=2, on_error="skip"))
    assert [len(batch["index"]) for batch in batches] == [0, 0]
    assert sum(batch["skipped"] for batch in batches) == 6


# ---- values


def test_to_float_maps_bytes_onto_minus_one_to_one_and_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.shape == values.shape
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(((floats + 1) * 127.5).round().to(torch.uint8), values)
    assert to_float(torch.empty(0, 3, 4, 4, dtype=torch.uint8)).shape == (0, 3, 4, 4)
