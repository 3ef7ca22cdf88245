"""What a GPU would say to the package, on a CPU: real runs on the pretend device (pretend_device.py)."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pretend_device
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from helpers import mostly_slow, relative_error, reset_accelerate
from PIL import Image
from pretend_device import Collective, Place, on_device
from runs import assert_same_bits, metrics, tensors, train_until
from tiny import DISCRIMINATOR, QUANTIZERS, having, tiny_config, write_images, write_splits

from vqgan_accel import distributed
from vqgan_accel.config import Config
from vqgan_accel.evaluation.codebook import TABLE, codebook
from vqgan_accel.evaluation.evaluate import evaluate
from vqgan_accel.evaluation.reconstruct import reconstruct
from vqgan_accel.interruption import StopRequest, TrainingInterruptedError
from vqgan_accel.losses.perceptual import LPIPSDistance
from vqgan_accel.models.build import build_discriminator, build_tokenizer
from vqgan_accel.models.discriminators import convolution
from vqgan_accel.models.quantizers import base, gumbel
from vqgan_accel.tokens.write import tokenize
from vqgan_accel.training import adversary, loop, networks, round
from vqgan_accel.training.setup import open_run

if not pretend_device.is_possible():
    pytest.skip("this torch knows no device that is written in Python", allow_module_level=True)

pytestmark = pytest.mark.seconds

There = Callable[..., Any]


def plug_in() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{pretend_device.NAME}:0"
    os.environ.pop("ACCELERATE_USE_CPU", None)
    torch.set_num_threads(1)
    pretend_device.plug_in()


@pytest.fixture(scope="module")
def there() -> Iterator[There]:
    """Calls a function of this module in a process that has the device, and returns what it returns."""
    with ProcessPoolExecutor(1, get_context("spawn"), plug_in) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


# ---- what a step asks the device for, and what it sends


class Case(NamedTuple):
    processes: int
    settings: dict[str, Any]


class Step(NamedTuple):
    waits: dict[tuple[str, Place], int]
    collectives: list[Collective]


STEPS = 4
GAME = DISCRIMINATOR | {"adaptive_weight": True, "r1_weight": 1.0, "r1_every": 2}
EVERYTHING = {
    "discriminator": GAME | {"start": "1 steps"},  # with R1 in the second step and the fourth
    "training": {
        "max_steps": STEPS + 1,
        "total_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "max_grad_norm": 1.0,
    },
}
BARE = {"training": {"max_steps": STEPS + 1}}
SPECIAL: dict[str, dict[str, Any]] = {"entropy": {"entropy_target": "argmax"}, "gumbel": {"straight_through": True}}
CASES = {
    f"{kind}, {name}, {number}": Case(number, settings | {"quantizer": {"type": kind, **special}})
    for kind in QUANTIZERS
    for name, settings, special in (("everything", EVERYTHING, {}), ("bare", BARE, SPECIAL.get(kind, {})))
    for number in (1, 2)
}


def steps(folder: Path, case: Case, number: int = STEPS) -> list[Step]:
    """What was seen in each of the first steps of a run."""
    config = tiny_config(folder, **case.settings)
    found = []
    try:
        with processes(case.processes), on_device() as seen, open_run(config) as run:
            for _ in range(number):
                seen.clear()
                loop.take_step(run, StopRequest())
                found.append(Step(dict(seen.waits), seen.collectives))
    finally:
        reset_accelerate()
    return found


@contextmanager
def processes(number: int) -> Iterator[None]:
    """As the first of so many, which hear nothing of each other; Accelerate wraps the networks as it does on GPUs."""
    if number == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(number)}
    gpus = mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("fake", DistributedType.MULTI_GPU))
    ddp = mock.patch("torch.nn.parallel.DistributedDataParallel", Reducing)
    with mock.patch.dict(os.environ, ranks), gpus, ddp:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
        try:
            yield
        finally:
            dist.destroy_process_group()


class Reducing(torch.nn.parallel.DistributedDataParallel):
    """DDP that reduces from Python, for what its own reduction waits for is lost on the way through Python."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, reduce)


def reduce(state, bucket):  # no annotations: DDP compares them with its own types, and here they are strings
    dist.all_reduce(bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def in_the_loop(step: Step) -> list[tuple[str, str, str, int]]:
    """The waits of a step, less those of DDP where it lays its buckets out anew: once a network, with a broadcast."""
    anew = {each.place for each in step.collectives if each.name == "broadcast_"}
    return [(what, at.file, at.function, n) for (what, at), n in step.waits.items() if at not in anew]


@pytest.fixture(scope="module")
def steps_of(there: There, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Step]]:
    """`steps` there, of each case once, by its name."""
    known: dict[str, list[Step]] = {}

    def of(name: str) -> list[Step]:
        if name not in known:
            known[name] = there(steps, tmp_path_factory.mktemp("steps"), CASES[name])
        return known[name]

    return of


@pytest.mark.parametrize("name", mostly_slow(CASES, *(f"{kind}, everything, 2" for kind in QUANTIZERS)))
def test_the_host_waits_once_a_step(name: str, steps_of: Callable[[str], list[Step]]) -> None:
    """Where the loop asks for losses, norms and requests together."""
    found, case = steps_of(name), CASES[name]
    assert len(found) == STEPS
    for step in found:
        assert in_the_loop(step) == [("tolist", "training/loop.py", "global_values", 1)]
    if case.processes > 1:
        number = 2 if "discriminator" in case.settings else 1
        assert sum(each.name == "broadcast_" for step in found for each in step.collectives) == 2 * number


# bytes of what a quantizer of 16 codes of 8 numbers sums itself: in each of two rounds, or once an update
OWN = {
    "ema": [64, 512],
    "entropy": [64, 64],
    "ibq": [64, 64],
    "lfq": [64, 64],  # of 4 bits together
    "bsq": [32, 32],  # of each
    "residual": 3 * [64, 512],
}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_an_update_sends_each_gradient_once_and_little_else(
    kind: str, steps_of: Callable[[str], list[Step]], tmp_path: Path
) -> None:
    """From the device, for a tensor of the CPU would have been refused."""
    name = f"{kind}, everything, 2"
    config = tiny_config(tmp_path, **CASES[name].settings)
    built = [build_tokenizer(config), build_discriminator(config)]
    sizes = [4 * sum(each.numel() for each in network.parameters()) for network in built if network is not None]
    for step in steps_of(name)[2:]:  # when DDP's buckets lie as they will
        assert {each.name for each in step.collectives} == {"allreduce_"}
        gradients = [each for each in step.collectives if each.place.file != "distributed.py"]
        assert [each.bytes for each in gradients] == sizes
        assert [each.place.function for each in gradients] == ["tokenizer_backward", "_learn"]
        rest = [each.bytes for each in step.collectives if each not in gradients]
        last_layer = 2 * 4 * built[0].decoder.conv_out.weight.numel()  # its two gradients, for lambda, each round
        uses = 8 * sum(config.quantizer.codebook_sizes)  # which are counted in int64
        for known in (last_layer, last_layer, uses, *OWN.get(kind, [])):
            assert known in rest, (known, rest)
            rest.remove(known)
        assert len(rest) == 1 and rest[0] <= 4 * 16  # losses, skipped images, requests


def validation_sums(folder: Path) -> list[Collective]:
    """What a validation sends."""
    metrics = ["l2", "psnr", "ssim", "codebook"]
    config = tiny_config(folder, training={"validation_metrics": metrics}, evaluation={"grid_images": 0})
    try:
        with processes(2), on_device() as seen, open_run(config) as run:
            seen.clear()
            run.validation.measure(run.networks.best_tokenizer, StopRequest())
            return seen.collectives
    finally:
        reset_accelerate()


def test_a_validation_sends_its_sums_once_and_gathers_nothing(there: There, tmp_path: Path) -> None:
    found = there(validation_sums, tmp_path)
    means = 4 * [2 * 8]  # of l2, psnr, psnr_per_image, ssim: sum and number
    codes = [16 * 8, 3 * 8, 16 * 8]  # uses, pixels and errors, and uses for the picture
    counted = 3 * 8  # images, skipped ones, hash
    asked = 2 * [2 * 8]  # before each of two batches and at the end: is one of us to stop, has one of us images left?
    assert {each.name for each in found} == {"allreduce_"}
    assert sorted(each.bytes for each in found if each.bytes) == sorted([*means, *codes, counted, *asked])


def validation_waits(folder: Path, images: int) -> list[str]:
    """By the functions that waited, of a validation of so many images in batches of two."""
    write_images(folder / "images" / "validation", images)
    write_splits(folder / "images")
    metrics = ["l2", "psnr", "ssim", "codebook"]
    config = tiny_config(
        folder,
        data={"path": str(folder / "images")},
        training={"validation_metrics": metrics},
        evaluation={"grid_images": 0},
    )
    with on_device() as seen, open_run(config) as run:
        seen.clear()
        run.validation.measure(run.networks.best_tokenizer, StopRequest())
    reset_accelerate()
    return sorted(place.function for (_, place), number in seen.waits.items() for _ in range(number))


def test_a_validation_alone_waits_as_often_for_many_batches_as_for_few(there: There, tmp_path: Path) -> None:
    few, many = (there(validation_waits, tmp_path / str(images), images) for images in (2, 8))
    assert few == many and set(few) == {
        "evaluate_tokenizer",
        "results",
        "perplexity",
        "codebook_usage",
        "quantization_error",
    }


# ---- mistakes, planted one at a time


class Mistake(NamedTuple):
    name: str
    function: Any
    line: str  # text that occurs once in its file
    wrong: str
    seen: str  # what is counted, or the beginning of what is raised
    processes: int = 1
    quantizer: str = "standard"


REFUSED = "RuntimeError: "
SIZE, HERE, BLOCKING = "a size from values", "a copy to the host", "a blocking copy from the host"
OTHER_LAYOUT = (
    "[state.update(exp_avg=state['exp_avg'].to(memory_format=torch.channels_last)) "
    "for state in learner.optimizer.state.values() if state['exp_avg'].dim() == 4]"
)
MISTAKES = [
    Mistake("item", round.tokenizer_backward, "quantizer.loss.detach()\n", "quantizer.loss.item()\n", "item"),
    Mistake("bool", round.tokenizer_backward, "adversary is not None:\n", "loss == loss and adversary:\n", "item"),
    Mistake("tolist", round.tokenizer_backward, "output.latents,", "output.latents.tolist(),", "tolist"),
    Mistake("cpu", round.tokenizer_backward, "output.latents,", "output.latents.cpu(),", HERE),
    Mistake("nonzero", base.count_codes, "codes.flatten()\n", "codes.flatten(); codes.nonzero()\n", SIZE),
    Mistake("bincount", base.count_codes, "codes.flatten()\n", "codes.flatten(); codes.bincount()\n", SIZE),
    Mistake("mask", base.count_codes, "codes.flatten()\n", "codes.flatten(); codes[codes > 3]\n", "a mask as index"),
    Mistake("blocking", loop.global_values, "means.device, non_blocking=True", "means.device", BLOCKING),
    Mistake("tensor", adversary.Adversary.teach, "full((), self.config.weight", "tensor(self.config.weight", BLOCKING),
    Mistake(
        "in autograd's thread",
        convolution._input_gradient,
        "for value in geometry[:3])\n",
        "for value in geometry[:3]); gradient.sum().item()\n",
        "item",
    ),
    Mistake(
        "tensor of the CPU",
        base.count_codes,
        "dtype=torch.int64, device=codes.device)",
        "dtype=torch.int64)",
        REFUSED + "index_add_: tensors of both devices",
    ),
    Mistake(
        "generator",
        gumbel.gumbel_noise,
        "generator=generator",
        "generator=torch.Generator()",
        REFUSED + "exponential_: a generator of the CPU",
        quantizer="gumbel",
    ),
    Mistake(
        "layout of moments",
        loop.take_step,
        "learner.optimizer.step()\n",
        f"learner.optimizer.step(); {OTHER_LAYOUT}; learner.optimizer.step()\n",
        REFUSED + "fused AdamW: strides",
    ),
    Mistake(
        "collective",
        distributed.sum_over_processes,
        "dist.all_reduce(value)",
        "dist.all_reduce(value.cpu())",
        REFUSED + "allreduce_: CPU tensors",
        processes=2,
    ),
]


def step_with(folder: Path, mistake: Mistake) -> list[tuple[str, Place]] | str:
    """The first step's waits, or what it raised."""
    settings = EVERYTHING | {"discriminator": GAME, "quantizer": {"type": mistake.quantizer}}
    with planted(mistake):
        try:
            (step,) = steps(folder, Case(mistake.processes, settings), 1)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return list(step.waits)


@contextmanager
def planted(mistake: Mistake) -> Iterator[None]:
    """In the function itself, whoever has imported it."""
    function: FunctionType = mistake.function
    file = inspect.getfile(function)
    text = Path(file).read_text(encoding="utf-8")
    assert text.count(mistake.line) == 1, f"{file} has {text.count(mistake.line)} times: {mistake.line}"
    right = function.__code__
    [wrong] = [
        code
        for code in codes_in(compile(text.replace(mistake.line, mistake.wrong), file, "exec"))
        if (code.co_name, code.co_firstlineno) == (right.co_name, right.co_firstlineno)
    ]
    function.__code__ = wrong
    try:
        yield
    finally:
        function.__code__ = right


def codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from codes_in(each)


def place_of(mistake: Mistake) -> Place:
    file = Path(inspect.getfile(mistake.function))
    line = file.read_text(encoding="utf-8").partition(mistake.line)[0].count("\n") + 1
    return Place(str(file.relative_to(pretend_device.PACKAGE)), line, mistake.function.__name__)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_seen_with_its_line(mistake: Mistake, there: There, tmp_path: Path) -> None:
    found, place = there(step_with, tmp_path, mistake), place_of(mistake)
    if mistake.seen.startswith(REFUSED):
        assert isinstance(found, str) and found.startswith(mistake.seen) and found.endswith(f"at {place}")
    else:
        assert (mistake.seen, place) in found


# ---- whole runs

# Relative. On a GPU D lies in another memory format, so its sums are added in another order; lambda, a ratio of two
# gradients' sizes, and biases that begin at 0 (all of them is what they moved) carry the most of it: 1.01e-4 was seen.
ROUNDING = 1e-3


def whole(folder: Path, kind: str) -> Config:
    """Five steps with everything that training does, two epochs; writes its images beside `folder`."""
    reinit = {"reinit_every": "1 epoch", "reinit_from": "used_codes" if kind == "ema" else "latents"}
    training = {
        "max_steps": 5,
        "total_batch_size": 4,
        "log_every": 1,
        "eps": 1e-3,
    }  # AdamW would make steps of rounding
    write_splits(folder.parent / "images", 32)
    return tiny_config(
        folder,
        data={"path": str(folder.parent / "images"), "image_size": 32},
        # (At 8 numbers simvq's lambda differs by 0.8 % in a step in which all losses agree to 1e-4.)
        quantizer={"type": kind, **having(kind, **reinit), **({"embedding_dim": 32} if kind == "simvq" else {})},
        discriminator=GAME | {"start": "1 steps"},
        losses={"perceptual_weight": 1.0, "perceptual_network": "lpips_squeeze"},
        training=EVERYTHING["training"] | training | {"validate_every": "2 steps", "checkpoint_every": "2 steps"},
    )


@contextmanager
def random_perceptual() -> Iterator[None]:
    """The same one each time."""

    def build(*_: Any) -> LPIPSDistance:
        torch.manual_seed(3)
        return LPIPSDistance("squeeze")

    with mock.patch.object(networks, "build_perceptual", build):
        yield


def run_whole(folder: Path, kind: str) -> None:
    """Training, and what is made of a run afterwards, on this process's device."""
    run = folder / "run"
    with random_perceptual():
        loop.train(whole(folder, kind))
    for make in (
        lambda: evaluate(run, output=folder / "evaluation"),
        lambda: tokenize(run, output=folder / "tokens"),
        lambda: codebook(run, output=folder / "codebook"),
        lambda: reconstruct(run, inputs=[folder.parent / "images" / "test"], output=folder / "pictures"),
    ):
        reset_accelerate()
        make()
    reset_accelerate()


RESUMED = ("ema", "gumbel", "residual")  # buffers, noise, both: what a device could lose of a quantizer


def run_whole_there(folder: Path, kind: str) -> None:
    """The same; of some quantizers a run beside it, `broken`, that is interrupted and resumed."""
    broken = folder.with_name("broken")
    with on_device(), random_perceptual():
        run_whole(folder, kind)
        if kind in RESUMED:
            with pytest.raises(TrainingInterruptedError):
                train_until(whole(broken, kind), 3)
            reset_accelerate()
            loop.train(whole(broken, kind), resume=True)
    reset_accelerate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_run_and_all_that_is_made_of_it_are_those_of_a_cpu(kind: str, there: There, tmp_path: Path) -> None:
    mine, other = tmp_path / "cpu", tmp_path / "device"
    run_whole(mine, kind)
    there(run_whole_there, other, kind)
    left, right = metrics(mine / "run"), metrics(other / "run")
    assert len(left) == len(right) == 8  # three of them of validations
    for one, another in zip(left, right, strict=True):
        assert another == pytest.approx(one, rel=ROUNDING, abs=1e-4), one["step"]
    newest = Path("run", "checkpoints", "latest")
    assert_close_tensors(mine / newest, other / newest)
    if kind in RESUMED:
        assert_same_bits(other / newest, other.with_name("broken") / newest)
    for file in sorted((mine / "tokens" / "data").iterdir()):
        assert file.read_bytes() == (other / "tokens" / "data" / file.name).read_bytes()
    results = [json.loads((folder / "evaluation" / "metrics.json").read_text())["results"] for folder in (mine, other)]
    assert results[1] == pytest.approx(results[0], rel=ROUNDING)
    for name in ("evaluation/reconstructions.png", "pictures/000.png"):
        pixels = [np.asarray(Image.open(folder / name), dtype=int) for folder in (mine, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    tables = [sorted((folder / "codebook").rglob(TABLE)) for folder in (mine, other)]  # one for each codebook
    uses = [[line.split(",")[1] for file in files for line in file.open()] for files in tables]
    assert uses[0] == uses[1] and len(uses[0]) > 12


def assert_close_tensors(one: Path, other: Path) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys() and len(left) > 100
    for name in (name for name in left if "optimizers" not in name):  # some moments are of nothing but rounding
        tensor = left[name]
        assert torch.equal(tensor, right[name]) or relative_error(right[name], tensor) < ROUNDING, name
