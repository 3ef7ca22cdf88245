"""What a GPU makes of this project, check by check: does it run, is it right, how fast is it.

    bash launch/gpu_check.sh [--device cuda|cpu] [--only a,b,c] [--output gpu_check] [--seconds 400]

a  versions, device                        e  seconds and memory of the recipe's step: bf16, float32, compiled
b  training, and resuming it, bit for bit  f  where the host waits for the GPU inside a step
c  the CPU's numbers beside the GPU's      g  images a second of the loader alone
d  evaluate, tokenize, codebook, ...       h  one process under torchrun, and in DDP over NCCL

Every check is a process of its own with a limit of its own; those of one wave, which time nothing, run side by side.
OUTPUT/gpu_check.json and gpu_check.md are written anew whenever a check has found something, so a run that is killed
leaves what it had; gpu_check.log holds what the checks printed. Networks have random weights: no number here says how
good anything looks. With `--device cpu` sizes are tiny and times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).parent.parent
RECIPE = REPOSITORY / "configs/imagenet/standard_vqgan_cb1024_adaptive_R1.yaml"
CODEBOOK = {"num_codes": 64, "embedding_dim": 32}
REINIT = {"reinit_every": "1 epoch"}
QUANTIZERS: dict[str, dict[str, Any]] = {
    **{quantizer: CODEBOOK | REINIT for quantizer in ("standard", "ema", "entropy", "ibq")},
    **{quantizer: CODEBOOK for quantizer in ("gumbel", "simvq")},
    "fsq": {"levels": [8, 5, 5]},
    "lfq": {"bits": 6},
    "bsq": {"bits": 6},
    "residual": {"depth": 2, "dropout": 0.5, "inner": {"type": "ema", **CODEBOOK, **REINIT}},
    "product": {"groups": 2, "inner": {"type": "standard", **CODEBOOK, **REINIT}},
}
TWICE = ("standard", "ema", "entropy", "gumbel")  # are also trained without deterministic algorithms
RESULTS = "gpu_check"  # .json, .md, .log
ROWS = 12  # of a profile
Logged = dict[int, dict[str, float]]  # step -> name -> value


@dataclass
class Place:
    """What a check is given, and what it has found."""

    name: str
    shared: Path  # what `prepare` has made
    folder: Path  # its own, empty
    cuda: bool
    found: dict[str, Any] = field(default_factory=lambda: {"rows": [], "text": ""})

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")

    def record(self, what: str, value: float | str, unit: str = "", expected: str = "") -> None:
        self.found["rows"].append([what, value, unit, expected])
        self.flush()

    def say(self, text: str) -> None:
        """Below the table."""
        self.found["text"] += text + "\n"
        self.flush()

    def flush(self) -> None:
        part = self.folder.with_suffix(".tmp")
        part.write_text(json.dumps(self.found))
        part.replace(self.folder.with_suffix(".json"))


Batches = Generator[dict[str, Any], None, None]  # `image` uint8 (B, 3, S, S), `index`, `skipped`


class Check(NamedTuple):
    name: str  # of which --only takes the beginning
    run: Callable[[Place], None]
    seconds: float  # after which it is killed
    wave: int  # checks of one wave run side by side


# ---- what the checks share: images, weights, configs


def prepare(place: Place) -> None:
    """Photograph-like noise: tiny PNGs and ImageNet-sized JPEGs; random weights of feature networks, no bigger than
    needed."""
    from torchvision import models

    side = 64 if place.cuda else 32
    for split, number in (("train", 32), ("validation", 12)):
        write_images(place.shared / "tiny" / split, number, (side, side), "png")
    for split, number in (("train", 512), ("validation", 4)) if place.cuda else (("train", 8), ("validation", 4)):
        write_images(place.shared / "photographs" / split, number, (500, 375) if place.cuda else (40, 30), "jpg")
    torch.manual_seed(0)
    for name, network in (
        ("vgg16", models.vgg.make_layers(models.vgg.cfgs["D"])),
        ("squeezenet", models.squeezenet1_1(weights=None).features),
        ("mobilenet_v2", models.mobilenet_v2(weights=None).features),
    ):
        state = {f"features.{key}": value for key, value in network.state_dict().items()}
        torch.save(state, place.shared / f"{name}.pth")


def write_images(folder: Path, number: int, size: tuple[int, int], ending: str) -> None:
    folder.mkdir(parents=True)
    for index in range(number):
        random = np.random.default_rng((index, len(folder.name)))
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse) + random.normal(0, 8, (size[1], size[0], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04}.{ending}")


def weights(place: Place) -> dict[str, str]:
    return {name: str(place.shared / f"{name}.pth") for name in ("vgg16", "squeezenet", "mobilenet_v2")}


def tiny_config(place: Place, quantizer: str, **training: Any) -> Path:
    """A run of 8 steps on tiny networks with every part switched on, as a YAML file. An epoch is 4 steps."""
    values = {
        "data": {
            "path": str(place.shared / "tiny"),
            "image_size": 64 if place.cuda else 32,
            "workers": 2 if place.cuda else 1,
        },
        "autoencoder": {"channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1},
        "quantizer": {"type": quantizer} | QUANTIZERS[quantizer],
        "losses": {"perceptual_network": "lpips_squeeze"},
        "discriminator": {"channel_base": 1024, "adaptive_weight": True, "r1_weight": 10.0, "r1_every": 2},
        "training": {
            "max_steps": 8,
            "total_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "mixed_precision": "no",
            "ema_decay": 0.9,
            "max_grad_norm": 1.0,
            "log_every": 1,
            "validate_every": "5 steps",
            "checkpoint_every": "5 steps",
        }
        | training,
        "evaluation": {
            "metrics": ["l2", "psnr", "ssim", "lpips", "fd_mobilenet", "codebook"],
            "lpips_network": "squeeze",
            "batch_size": 4,
        },
        "weights": weights(place),
    }
    file = place.folder / f"{quantizer}.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


def vqgan(*arguments: object) -> None:
    """The command line, in this process."""
    from vqgan_accel.cli import main

    words = [str(argument) for argument in arguments]
    if status := main(words):
        raise RuntimeError(f"`{' '.join(words)}` ended with status {status}; the log says why")


def train(config: Path, run: Path, *options: str) -> Path:
    vqgan("train", config, f"output_dir={run}", *options)
    return run


def start(*arguments: object, **environment: str) -> Callable[[], None]:
    """Python on these arguments, in a process of its own; what is returned waits for its end."""
    words = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(words, env=os.environ | environment, cwd=REPOSITORY)

    def finish() -> None:
        if status := process.wait():
            raise RuntimeError(f"`{' '.join(words[1:])}` ended with status {status}; the log says why")

    return finish


def start_on_cpu(place: Place, *arguments: object) -> Callable[[], None]:
    """The command line in a process that sees no GPU, as `start`. Where nobody sees one: in this process, at once."""
    if place.cuda:
        return start("-m", "vqgan_accel", *arguments, CUDA_VISIBLE_DEVICES="")
    vqgan(*arguments)
    return lambda: None


def relative(found: list[Tensor], reference: list[Tensor]) -> float:
    """|found - reference| / |reference|, over all of them together."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(found, reference, strict=True)]
    difference = sum((a - b).square().sum() for a, b in pairs)
    return float((difference / sum(b.square().sum() for _, b in pairs)).sqrt())


# ---- a: what is there


def check_machine(place: Place) -> None:
    from vqgan_accel.config import WeightFiles
    from vqgan_accel.doctor import doctor_lines
    from vqgan_accel.models.precision import tf32_convolutions

    place.say("\n".join(doctor_lines(WeightFiles())))
    place.record("cores", os.cpu_count() or 0)
    place.record("kernel", platform.release())
    place.record("/dev/shm", shutil.disk_usage("/dev/shm").total / 2**30, "GiB")
    place.record("TF32 allowed in convolutions, before a run", f"{tf32_convolutions()}", "", "True, torch's default")
    if place.cuda:
        about = torch.cuda.get_device_properties(0)
        place.record("device", f"{about.name}, {about.total_memory / 2**30:.1f} GiB, {about.multi_processor_count} SMs")
        place.record("cuDNN, NCCL", f"{torch.backends.cudnn.version()}, {torch.cuda.nccl.version()}")
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        place.record(
            "driver, clocks, power limit", subprocess.run(query, capture_output=True, text=True).stdout.strip()
        )


# ---- b: training through its own door, twice, and resumed


def check_training(place: Place, quantizer: str, precision: str = "no", deterministic: bool = False) -> None:
    """8 steps, the same again, and from the checkpoint of step 5 on: are the last checkpoints equal?"""
    from vqgan_accel.run_folder import checkpoints

    config = tiny_config(place, quantizer, mixed_precision=precision, deterministic=deterministic)
    began = time.perf_counter()
    once = train(config, place.folder / "once")
    place.record("8 steps, all included", time.perf_counter() - began, "s")
    again = train(config, place.folder / "again")
    resumed = Path(shutil.copytree(once, place.folder / "resumed", symlinks=True))
    for checkpoint in checkpoints(resumed)[1:]:
        shutil.rmtree(checkpoint)
    train(config, resumed, "--resume")
    exact = "equal" if deterministic else "equal, or to rounding where cuDNN adds in no order"
    place.record("the same run twice", difference(once, again), "", exact)
    place.record("resumed from step 5", difference(once, resumed), "", exact)


def difference(a: Path, b: Path) -> str:
    """Of the last checkpoints of two runs."""
    from vqgan_accel.run_folder import checkpoints

    left, right = (tensors(checkpoints(run)[-1]) for run in (a, b))
    if left.keys() != right.keys():
        return "other tensors"
    unequal = {name for name in left if not torch.equal(left[name], right[name])}
    if not unequal:
        return "equal bit for bit"
    worst = max(unequal, key=lambda name: relative([left[name]], [right[name]]))
    largest = max((left[name].double() - right[name].double()).abs().max().item() for name in unequal)
    return (
        f"{len(unequal)} of {len(left)} tensors differ, at most by {largest:.1e}; "
        f"worst {relative([left[worst]], [right[worst]]):.1e} of its norm ({worst})"
    )


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(checkpoint)}:{name}": tensor.clone()
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


# ---- c: the CPU's numbers beside the GPU's


def check_numbers(place: Place) -> None:
    """Logged values of three steps, R1's gradient, and codes, each with TF32 in cuDNN and without."""
    config = tiny_config(place, "standard", max_steps=3)
    finish = start_on_cpu(place, "train", config, f"output_dir={place.folder / 'cpu'}")
    for allowed in (True, False):
        train(config, place.folder / tf32_name(allowed), f"training.tf32={str(allowed).lower()}")
    check_r1(place)
    check_codes(place)
    finish()
    reference = logged(place.folder / "cpu")
    for allowed in (True, False):
        found = logged(place.folder / tf32_name(allowed))
        record_apart(place, f"{tf32_name(allowed)} beside the CPU", found, reference, "1e-3" if allowed else "1e-5")


def tf32_name(allowed: bool) -> str:
    return "TF32" if allowed else "IEEE"


def record_apart(place: Place, what: str, found: Logged, reference: Logged, expected: str) -> None:
    """How far two runs' logged values are apart, in their first step and in their third."""
    for step in (1, 3):
        off = {name: abs(found[step][name] - value) / (abs(value) + 1e-12) for name, value in reference[step].items()}
        worst = max(off, key=off.__getitem__)
        values = f"total {off['total']:.1e}, worst {off[worst]:.1e} ({worst})"
        place.record(f"logged values of step {step}, {what}, relative", values, "", expected)


def logged(run: Path) -> Logged:
    """Losses and norms."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name: value for name, value in line.items() if isinstance(value, float) and value}
        for line in lines
        if "total" in line
    }


def check_r1(place: Place) -> None:
    """R1's gradient in D's weights, 8 images of 64 px, beside float64."""
    from vqgan_accel.losses.adversarial import r1_penalty
    from vqgan_accel.models.discriminators.stylegan2 import StyleGAN2Discriminator
    from vqgan_accel.models.precision import ieee_float32

    torch.manual_seed(0)
    size = 64 if place.cuda else 16
    images = torch.rand(8, 3, size, size) * 2 - 1
    for base in (1024, 32768) if place.cuda else (256,):
        network = StyleGAN2Discriminator(size, base)

        def gradients(device: torch.device, dtype: torch.dtype, autocast: bool = False) -> list[Tensor]:
            discriminator = network.to(device, dtype, memory_format=torch.channels_last)  # noqa: B023
            x = images.to(device, dtype).requires_grad_()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = discriminator(x)
            penalty = r1_penalty(logits, x)
            # no gradient where R1 does not look: biases of the last layer
            asked = [p for p in discriminator.parameters() if p.requires_grad]
            found = torch.autograd.grad(penalty, asked, allow_unused=True)
            return [
                penalty.detach(),
                *(torch.zeros_like(p) if g is None else g for p, g in zip(asked, found, strict=True)),
            ]

        state = {name: value.clone() for name, value in network.state_dict().items()}
        reference = gradients(torch.device("cpu") if base <= 1024 else place.device, torch.float64)
        kinds = {"CPU float32": (torch.device("cpu"), True, False)} if base <= 1024 else {}
        kinds |= {name: (place.device, name != "IEEE", name == "bf16") for name in ("TF32", "IEEE", "bf16")}
        for kind, (device, allowed, autocast) in kinds.items():
            network.to("cpu", torch.float32).load_state_dict(state)
            with ieee_float32(but_convolutions=allowed):
                found = gradients(device, torch.float32, autocast)
            of_penalty, of_gradient = relative(found[:1], reference[:1]), relative(found[1:], reference[1:])
            place.record(
                f"R1 at {size} px, channel base {base}, {kind} beside float64, relative",
                f"gradient {of_gradient:.1e}, penalty {of_penalty:.1e}",
                "",
                {"TF32": "1.1e-2, 2e-4", "bf16": "6e-2"}.get(kind, "1e-6"),
            )


@torch.no_grad()
def check_codes(place: Place) -> None:
    """Of the recipe's encoder with random weights; codes drawn from latents of other images."""
    from vqgan_accel.config import load_config
    from vqgan_accel.models.build import build_tokenizer
    from vqgan_accel.models.precision import ieee_float32

    overrides = [] if place.cuda else ["autoencoder.channels=32", "quantizer.num_codes=64"]
    config = load_config(RECIPE, overrides)
    torch.manual_seed(0)
    size = 256 if place.cuda else 32
    tokenizer = build_tokenizer(config).eval()
    files = sorted((place.shared / "photographs" / "train").iterdir())[: 24 if place.cuda else 8]
    pixels = [np.asarray(Image.open(file).resize((size, size))) for file in files]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
    others, images = images[: len(images) // 3], images[len(images) // 3 :]
    latents = tokenizer.latents(others).permute(0, 2, 3, 1).flatten(0, 2)
    drawn = torch.randint(len(latents), (config.quantizer.num_codes,))
    tokenizer.quantizer.codebook.copy_(latents[drawn])
    reference = tokenizer.encode(images)
    tokenizer.to(place.device)
    on_device = images.to(place.device)
    for kind in ("TF32", "IEEE", "bf16"):
        bf16 = torch.autocast(place.device.type, torch.bfloat16, enabled=kind == "bf16")
        with ieee_float32(but_convolutions=kind != "IEEE"), bf16:  # `encode` itself does not take TF32
            codes = tokenizer.quantizer.choose(tokenizer.latents(on_device)).cpu()
        unlike = codes != reference
        place.record(
            f"codes unlike the CPU's, {kind}",
            f"{int(unlike.sum())} of {unlike.numel()} ({100 * float(unlike.double().mean()):.3f} %)",
            "",
            {"TF32": "0.1 %", "IEEE": "0", "bf16": "0.4 %"}[kind],
        )


# ---- d: what is done with a run


def check_commands(place: Place) -> None:
    """evaluate and tokenize on both devices; codebook, reconstruct and describe complete."""
    run = train(tiny_config(place, "standard", max_steps=3), place.folder / "run")
    on_cpu = [
        start_on_cpu(place, "evaluate", run, "--output", place.folder / "evaluated_cpu"),
        start_on_cpu(place, "tokenize", run, "--output", place.folder / "tokens_cpu"),
    ]
    vqgan("evaluate", run, "--output", place.folder / "evaluated")
    vqgan("tokenize", run, "--output", place.folder / "tokens")
    vqgan("codebook", run, "--output", place.folder / "codebook")
    pictures = place.shared / "photographs" / "validation"
    vqgan("reconstruct", run, pictures, "--output", place.folder / "pictures", "--tile", 256)
    place.record("evaluate, tokenize, codebook, reconstruct", "complete")
    for finish in on_cpu:
        finish()
    here, there = (
        json.loads((place.folder / name / "metrics.json").read_text())["results"]
        for name in ("evaluated", "evaluated_cpu")
    )
    for name, value in there.items():
        off = abs(here[name] - value) / (abs(value) + 1e-6)
        place.record(f"evaluate: {name} beside the CPU's {value:.5g}, relative", off, "", "1e-4, codes that flip aside")
    left, right = (tokens(place.folder / name) for name in ("tokens", "tokens_cpu"))
    place.record("tokenize: tokens unlike the CPU's", f"{int((left != right).sum())} of {left.size}", "", "0 or few")


def tokens(folder: Path) -> np.ndarray:
    from pyarrow import parquet

    files = sorted(folder.rglob("*.parquet"))
    return np.concatenate([np.stack(parquet.read_table(file).to_pandas()["codes"].map(flat)) for file in files])


def flat(codes: Any) -> np.ndarray:
    return np.concatenate([np.ravel(row) for row in codes]) if np.asarray(codes).dtype == object else np.ravel(codes)


# ---- e: seconds and bytes of the recipe's step


class Finished(Exception):
    """Raised in the training loop by what should give it a batch."""


class Phase(NamedTuple):
    name: str
    steps: int
    warm_up: int  # steps of them
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext


def run_loop(run: Any, feed: Callable[[Batches], Batches]) -> None:
    """The training loop itself, on what `feed` makes of its loader's batches, for as long as there are some."""
    from vqgan_accel.interruption import StopRequest
    from vqgan_accel.training.loop import train_to_the_end

    def batches(loader: Batches) -> Batches:
        yield from feed(loader)
        raise Finished

    run.batches = batches(run.batches)
    with contextlib.suppress(Finished):
        train_to_the_end(run, StopRequest())


def recipe(place: Place, *overrides: str) -> AbstractContextManager[Any]:
    """A run of the recipe: 256 px, 32 images on this device, R1 in every fourth step, random VGG weights."""
    from vqgan_accel.config import load_config
    from vqgan_accel.training.setup import open_run

    small = "data.image_size=32 autoencoder.channels=32 autoencoder.channel_multipliers=[1,1] quantizer.num_codes=64"
    small += " quantizer.embedding_dim=32 discriminator.channel_base=256 data.workers=1"
    small += f" losses.perceptual_network=lpips_squeeze weights.squeezenet={place.shared / 'squeezenet.pth'}"
    never = "1000000 steps"
    settings = [
        f"output_dir={place.folder / 'run'}",
        f"data.path={place.shared / 'photographs'}",
        f"weights.vgg16={place.shared / 'vgg16.pth'}",
        f"training.total_batch_size={32 if place.cuda else 4}",
        "training.max_steps=1000000",
        f"training.validate_every={never}",
        f"training.checkpoint_every={never}",
        "discriminator.start=0 steps",
        "discriminator.r1_every=4",
        *([] if place.cuda else small.split()),
        *overrides,
    ]
    return open_run(load_config(RECIPE, settings))


def timed(place: Place, run: Any, phases: list[Phase], loader: Batches) -> Batches:
    """The same batch, already on the device, for every step of every phase; records the phases' times and memory.

    The loop asks for the next batch when a step is over, so a step lies between two lines of this function.
    """
    batch = next(loader)
    batch = batch | {"image": batch["image"].to(place.device)}
    for phase in phases:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        peak = {False: 0.0, True: 0.0}
        first = 0.0
        with phase.setting():
            for index in range(phase.steps):
                r1 = run.plan.r1_at(run.progress.step)
                began = clock(place)
                yield batch
                took, used = clock(place) - began, peak_gib(place)
                first = first or took
                if index >= phase.warm_up:
                    seconds[r1].append(took)
                    peak[r1] = max(peak[r1], used)
        record_steps(place, phase.name, len(batch["image"]), seconds, peak, first)


def clock(place: Place) -> float:
    if place.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib(place: Place) -> float:
    """Since the last call."""
    if not place.cuda:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


GFLOP = {False: 1049.0, True: 1329.5}  # an image, by benchmarks/step_flops.py: of a plain step, of one with R1


def record_steps(
    place: Place, name: str, images: int, seconds: dict[bool, list[float]], peak: dict[bool, float], first: float
) -> None:
    for r1, measured in seconds.items():
        if measured:
            median, step = statistics.median(measured), f"{name}: {'R1' if r1 else 'plain'} step"
            spread = f"s ({min(measured):.4f} to {max(measured):.4f}, {len(measured)} steps)"
            place.record(step, median, spread)
            place.record(f"{step}, arithmetic", GFLOP[r1] * images / median / 1e3, "TFLOP/s")
            place.record(f"{step}, peak memory", peak[r1], "GiB")
    if seconds[False] and seconds[True]:
        mean = (15 * statistics.median(seconds[False]) + statistics.median(seconds[True])) / 16
        place.record(f"{name}: with R1 in every 16th step", images / mean, "images/s")
    place.record(f"{name}: its first step", first, "s")


def check_bf16(place: Place) -> None:
    """The step as it is; a profile of it; then with other memory formats, and with cuDNN choosing by trial; last with
    the real loader."""
    record_ceilings(place, torch.bfloat16)
    with recipe(place, "training.mixed_precision=bf16") as run:
        long, short = (24, 16) if place.cuda else (4, 5)
        tokenizer, discriminator = run.networks.learners
        # training/networks.py has D contiguous on a GPU and in channels_last on a CPU: the other one is tried
        d_name, d_format = (
            ("channels_last", torch.channels_last) if place.cuda else ("contiguous", torch.contiguous_format)
        )
        phases = [
            Phase("bf16", long + 1, 4),  # then three plain steps come, and one with R1
            Phase("bf16, profiled", 3, 0, partial(profiled, place, "plain steps", 3)),
            Phase("bf16, R1 profiled", 1, 0, partial(profiled, place, "R1 step", 1)),
            Phase(f"bf16, D {d_name}", short, 4, partial(layout, discriminator, d_format)),
            Phase("bf16, tokenizer channels_last", short, 4, partial(layout, tokenizer, torch.channels_last)),
            Phase("bf16, as it is, again", short, 4),
            Phase("bf16, cudnn.benchmark", long, 8, cudnn_benchmark),
        ]

        def feed(loader: Batches) -> Batches:
            yield from timed(place, run, phases, loader)
            yield from with_loader(place, 40 if place.cuda else 4, loader)

        run_loop(run, feed)


def with_loader(place: Place, steps: int, loader: Batches) -> Batches:
    """Real batches; records how long the loop waits for them."""
    waited, images, began = 0.0, 0, clock(place)
    for index in range(steps):
        if index == steps // 4:  # workers have started, the first batches are there
            waited, images, began = 0.0, 0, clock(place)
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        images += len(batch["image"])
        yield batch
    seconds = clock(place) - began
    place.record("bf16, with the real loader, R1 in every 4th step", images / seconds, "images/s")
    place.record("bf16, with the real loader: waiting for images", 100 * waited / seconds, "% of the time", "under 5")


def check_float32(place: Place) -> None:
    from vqgan_accel.models.precision import ieee_float32

    record_ceilings(place, torch.float32)
    with recipe(place, "training.mixed_precision=no") as run:
        phases = [
            Phase("float32, TF32 convolutions", 16 if place.cuda else 5, 4, partial(ieee_float32, True)),
            Phase("float32, IEEE", 12 if place.cuda else 5, 4, partial(ieee_float32, False)),
        ]
        run_loop(run, partial(timed, place, run, phases))


def check_compiled(place: Place) -> None:
    """training.compile: encoder, decoder and perceptual network."""
    compiled = f"training.compile={'true' if place.cuda else 'false'}"
    with recipe(place, "training.mixed_precision=bf16", compiled) as run:
        phases = [
            Phase("bf16, compiled: compiling", 2, 1),
            Phase("bf16, compiled", 20 if place.cuda else 4, 4),
        ]
        run_loop(run, partial(timed, place, run, phases))


def record_ceilings(place: Place, dtype: torch.dtype) -> None:
    """A large matrix product on random numbers and a large copy, each the median of ten."""
    side = 8192 if place.cuda else 256
    a, b = (torch.randn(side, side, device=place.device).to(dtype) for _ in range(2))

    def median(run: Callable[[], object]) -> float:
        times = []
        for _ in range(13):
            began = clock(place)
            run()
            times.append(clock(place) - began)
        return statistics.median(times[3:])

    name = str(dtype).removeprefix("torch.")
    place.record(f"ceiling: {side} x {side} matrix product, {name}", 2e-12 * side**3 / median(lambda: a @ b), "TFLOP/s")
    large = torch.empty(side * side * 16, dtype=torch.uint8, device=place.device)
    other = torch.empty_like(large)
    moved = 2e-12 * large.numel()
    place.record("ceiling: copy, read and written", moved / median(lambda: other.copy_(large)), "TB/s")
    peak_gib(place)


@contextmanager
def layout(learner: Any, memory_format: torch.memory_format) -> Iterator[None]:
    """A network's weights and moments in another memory format, and back."""
    network = learner.network
    weights = [parameter for parameter in network.parameters() if parameter.dim() == 4 and min(parameter.shape[1:]) > 1]
    usual = torch.contiguous_format if weights[0].is_contiguous() else torch.channels_last

    def turn(to: torch.memory_format) -> None:
        network.to(memory_format=to)
        for state in learner.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() == 4:
                    state[key] = value.contiguous(memory_format=to)

    turn(memory_format)
    try:
        yield
    finally:
        turn(usual)


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


@contextmanager
def profiled(place: Place, name: str, steps: int) -> Iterator[None]:
    """torch.profiler around a phase of so many steps: what the GPU's time goes into, by kernel and by operator."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.cuda else [])]
    began = clock(place)
    with profile(activities=activities) as profiler:
        yield
        seconds = clock(place) - began
    spent = (lambda event: event.self_device_time_total) if place.cuda else (lambda event: event.self_cpu_time_total)
    kinds: dict[str, list[Any]] = {"kernel": [], "operator": []}
    for event in profiler.key_averages():
        if not event.is_user_annotation:
            kinds["operator" if event.device_type == DeviceType.CPU else "kernel"].append(event)
    busy = sum(spent(event) for event in kinds["kernel" if place.cuda else "operator"]) / 1e6
    place.record(f"bf16, {name} profiled: GPU busy", 100 * busy / seconds, "% of the time", "over 95")
    launches = sum(event.count for event in kinds["kernel"])
    place.record(f"bf16, {name} profiled: kernels and copies a step", launches / steps)
    for kind, events in kinds.items():
        events.sort(key=spent, reverse=True)
        place.say(f"{'ms a step':>9} {'share':>6} {'calls':>7}  bf16, {name}, by {kind}")
        for event in events[:ROWS]:
            share = spent(event) / 1e6 / busy if busy else 0.0
            place.say(f"{spent(event) / steps / 1e3:9.2f} {share:6.1%} {event.count / steps:7.0f}  {event.key[:150]}")


# ---- f: where the host waits


def check_waits(place: Place) -> None:
    """Lines of ours at which the host waits for the device in a step in which nothing but training happens."""
    from vqgan_accel.config import load_config
    from vqgan_accel.training.setup import open_run

    for quantizer in QUANTIZERS if place.cuda else ("gumbel",):
        settings = [f"output_dir={place.folder / quantizer}", "data.workers=0"]
        waits: Counter[str] = Counter()
        with open_run(load_config(tiny_config(place, quantizer), settings)) as run:
            run_loop(run, partial(watched, run, waits))
        record_waits(place, f"host waits a step, {quantizer}, ema_decay 0.9", waits, "1")


WATCHED = (1, 2)  # optimizer steps, counted from 0: an R1 step is among them; no epoch ends, nothing is saved


def watched(run: Any, waits: Counter[str], loader: Batches, last: int = WATCHED[-1]) -> Batches:
    """The loader's batches up to step `last`; fills `waits` with the lines at which the host waited in WATCHED."""
    for batch in loader:
        step = run.progress.step
        if step > last:
            break
        with waits_counted(waits) if step in WATCHED else nullcontext():
            yield batch


@contextmanager
def waits_counted(waits: Counter[str]) -> Iterator[None]:
    def count(message: Any, *_: object, **__: object) -> None:
        if "synchronizing" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack()[:-1] if Path(frame.filename).name != "warnings.py"]
        ours = [frame for frame in stack if frame.filename.startswith(str(REPOSITORY / "vqgan_accel"))]
        places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-1:], stack[-1]])
        waits[f"{' > '.join(places)} `{(stack[-1].line or '')[:60]}`"] += 1

    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def record_waits(place: Place, what: str, waits: Counter[str], expected: str) -> None:
    steps = len(WATCHED)
    lines = "; ".join(f"{number / steps:g} x {where}" for where, number in waits.most_common())
    place.record(what, f"{sum(waits.values()) / steps:g}" + (f": {lines}" if lines else ""), "", expected)


# ---- g: the loader alone


def check_loader(place: Place) -> None:
    """From JPEGs of 500 x 375 px to float32 batches (32, 3, 256, 256) on the device, through pinned memory."""
    from vqgan_accel.config import DataConfig
    from vqgan_accel.data.opening import open_source, training_loader
    from vqgan_accel.data.order import TrainingOrder
    from vqgan_accel.data.views import to_float

    batch_size, size, seconds = (32, 256, 4.0) if place.cuda else (4, 32, 0.2)
    for workers in (8, 16) if place.cuda else (1,):
        config = DataConfig(path=str(place.shared / "photographs"), image_size=size, workers=workers)
        source = open_source(config, "train")
        order = TrainingOrder(0, len(source), batch_size, 1, 0, 1, 0, 10**6)
        images = 0
        with contextlib.closing(iter(training_loader(source, config, order, pin_memory=place.cuda))) as batches:
            for index in range(10**6):
                batch = next(batches)
                to_float(batch["image"].to(place.device, non_blocking=True))
                if index == 2 * workers:  # the workers have started
                    began, images = clock(place), 0
                images += len(batch["image"])
                if index > 2 * workers and time.perf_counter() - began > seconds:
                    break
            place.record(
                f"loader alone, {workers} workers", images / (clock(place) - began), "images/s", "100 to 200 a worker"
            )
    place.record("an image is pinned on its way", str(batch["image"].is_pinned()), "", "True")


# ---- h: torchrun, NCCL, DDP


def check_distributed(place: Place) -> None:
    """One process under torchrun; the same in DDP, which Accelerate is made to use here."""
    config = tiny_config(place, "gumbel")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    runs = {name: place.folder / name for name in ("plain", "torchrun", "ddp")}
    started = [
        start("train.py", config, f"output_dir={runs['plain']}"),
        start(*torchrun, "train.py", config, f"output_dir={runs['torchrun']}"),
    ]
    train_in_ddp(place, config, runs["ddp"])
    for finish in started:
        finish()
    place.record("under torchrun beside without", difference(runs["plain"], runs["torchrun"]), "", "to rounding")
    place.record("in DDP beside without", difference(runs["plain"], runs["ddp"]), "", "to rounding")


def check_two_processes(place: Place) -> None:
    """Two processes, where there are two GPUs (NCCL takes one for a duplicate), beside one with the whole batch."""
    if place.cuda and torch.cuda.device_count() < 2:
        place.record("two processes", "not tried: one GPU")
        return
    config = tiny_config(place, "ema", deterministic=True, max_steps=3, total_batch_size=16)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    start(*two, "train.py", config, f"output_dir={place.folder / 'two'}")()
    start("train.py", config, f"output_dir={place.folder / 'one'}")()
    one, other = (logged(place.folder / name) for name in ("one", "two"))
    record_apart(place, "two processes beside one", other, one, "1e-5")


def train_in_ddp(place: Place, config: Path, folder: Path) -> None:
    import torch.distributed as dist
    from accelerate.state import PartialState

    from vqgan_accel.config import load_config
    from vqgan_accel.distributed import leaving_process_group
    from vqgan_accel.training.setup import open_run

    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}
    os.environ |= here
    PartialState.use_distributed = property(lambda self: True)  # type: ignore[method-assign]
    waits: Counter[str] = Counter()
    with leaving_process_group():
        with open_run(load_config(config, [f"output_dir={folder}"])) as run:
            wrapper = type(run.networks.tokenizer.wrapped).__name__
            place.record(
                "backend, wrapper",
                f"{dist.get_backend() if dist.is_initialized() else 'none'}, {wrapper}",
                "",
                "nccl, DistributedDataParallel",
            )
            if dist.is_initialized():
                value = torch.ones(3, device=place.device)
                dist.all_reduce(value)
                objects: list[Any] = [{"step": 1}]
                dist.broadcast_object_list(objects)
                dist.all_gather_object(objects, "fingerprint")
                place.record("all_reduce, broadcast_object_list, all_gather_object", "complete")
            run_loop(run, partial(watched, run, waits, last=8))
        record_waits(place, "host waits a step, gumbel in DDP, 2 rounds, ema_decay 0.9", waits, "1")
    place.record("process group", "destroyed" if not dist.is_initialized() else "still there", "", "destroyed")


# ---- running them


def checks() -> list[Check]:
    def training(quantizer: str, name: str = "", **settings: Any) -> Check:
        return Check(f"b train {quantizer}{name}", partial(check_training, quantizer=quantizer, **settings), 150, 1)

    return [
        Check("prepare", prepare, 90, 0),
        Check("a machine", check_machine, 60, 0),
        *(training(quantizer) for quantizer in TWICE),
        *(training(quantizer, " deterministic", deterministic=True) for quantizer in QUANTIZERS),
        training("standard", " bf16", precision="bf16"),
        Check("c numbers", check_numbers, 150, 1),
        Check("d commands", check_commands, 150, 1),
        Check("f waits", check_waits, 120, 1),
        Check("h distributed", check_distributed, 150, 1),
        Check("h two processes", check_two_processes, 150, 1),
        Check("e step bf16", check_bf16, 150, 2),
        Check("e step float32", check_float32, 90, 3),
        Check("g loader", check_loader, 40, 4),
        Check("e step compiled", check_compiled, 150, 5),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", metavar="a,b train ema", help="checks whose names begin so")
    parser.add_argument("--output", type=Path, default=Path(RESULTS), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=400, help="after which everything is stopped")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.output.mkdir(parents=True, exist_ok=True)
    asked = ("prepare", *options.only.split(",")) if options.only else ("",)
    wanted = [check for check in checks() if check.name.startswith(asked)]
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), options.output, cuda, time.monotonic() + options.seconds)
        for wave in sorted({check.wave for check in wanted}):
            runner.run([check for check in wanted if check.wave == wave])
        runner.write_log()
    print((options.output / f"{RESULTS}.md").read_text())
    failed = [name for name, found in runner.results.items() if found["status"] != "ok"]
    print(f"{len(wanted) - len(failed)} of {len(wanted)} checks completed" + (f"; not: {failed}" if failed else ""))
    return 1 if failed else 0


class Runner:
    def __init__(self, folder: Path, output: Path, cuda: bool, deadline: float) -> None:
        self.folder, self.output, self.cuda, self.deadline = folder, output, cuda, deadline
        self.results: dict[str, dict[str, Any]] = {}
        self.at_once = 16 if cuda else 2
        # CUDA survives no fork; without it a fork saves the imports, which are the longest part there
        self.processes = multiprocessing.get_context("spawn" if cuda else "fork")
        if not cuda:
            for name in ("cli", "evaluation.codebook", "evaluation.reconstruct", "tokens.write", "training.loop"):
                importlib.import_module(f"vqgan_accel.{name}")
        (folder / "shared").mkdir()

    def run(self, checks: list[Check]) -> None:
        """All of them; returns when each has ended or been ended."""
        waiting, running = list(checks), {}
        while waiting or running:
            while waiting and len(running) < self.at_once:
                check = waiting.pop(0)
                place = Place(check.name, self.folder / "shared", self.folder / file_name(check), self.cuda)
                process = self.processes.Process(target=run_check, args=(check, place))
                process.start()
                running[check] = (process, time.monotonic())
                self.results[check.name] = {"status": "running", "seconds": 0.0, "rows": [], "text": ""}
            time.sleep(0.1)
            for check, (process, began) in list(running.items()):
                seconds, alive = time.monotonic() - began, process.is_alive()
                late = alive and (seconds > check.seconds or time.monotonic() > self.deadline)
                if late:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                if late or not alive:
                    process.join()
                    del running[check]
                    status = "stopped: out of time" if late else "failed" if process.exitcode else "ok"
                    self.results[check.name] |= {"status": status, "seconds": round(seconds, 1)}
            self.write(checks)

    def write(self, checks: list[Check]) -> None:
        """What the checks have found so far."""
        for check in checks:
            part = self.folder / f"{file_name(check)}.json"
            if part.is_file():
                self.results[check.name] |= json.loads(part.read_text())
        for ending, text in (("json", json.dumps(self.results, indent=1)), ("md", markdown(self.results))):
            file = self.output / f"{RESULTS}.{ending}"
            if not file.is_file() or file.read_text() != text:
                file.write_text(text)

    def write_log(self) -> None:
        """The end of what each check printed."""
        with (self.output / f"{RESULTS}.log").open("w") as log:
            for part in sorted(self.folder.glob("*.log")):
                log.write(f"==== {part.stem}\n{part.read_text(errors='replace')[-20000:]}\n")


def file_name(check: Check) -> str:
    return check.name.replace(" ", "_")


def run_check(check: Check, place: Place) -> None:
    """In its own process, and process group: what it starts ends with it."""
    os.setsid()
    log = os.open(place.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place.folder.mkdir()
    try:
        check.run(place)
    except BaseException:
        place.found["error"] = traceback.format_exc().splitlines()[-12:]
        place.flush()
        traceback.print_exc()
        raise SystemExit(1) from None
    place.flush()


def markdown(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| check | what | found | expected |", "| --- | --- | --- | --- |"]
    for name, found in results.items():
        lines.append(f"| **{name}** | {found['status']} | {found['seconds']:.0f} s | |")
        for what, value, unit, expected in found["rows"]:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells = (cell.replace("|", "/") for cell in (what, f"{shown} {unit}".strip(), expected))
            lines.append(f"| | {' | '.join(cells)} |")
    for name, found in results.items():
        for title, text in (("", found["text"]), (", which failed", "\n".join(found.get("error", [])))):
            if text:
                lines += ["", f"{name}{title}", "", "```", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
