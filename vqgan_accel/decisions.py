"""What `vqgan-accel new` decides: from what is known of the pictures and the machine to config values, each with its
reason. Nothing here looks at a disk or a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from vqgan_accel.config import Config, TamingConfig
from vqgan_accel.data.division import Group, place_of
from vqgan_accel.data.order import steps_per_epoch
from vqgan_accel.sections import Duration
from vqgan_accel.training.measure import Timings
from vqgan_accel.training.plan import Plan, total_steps_of
from vqgan_accel.words import duration

GPU_RECIPE, CPU_RECIPE = "imagenet/ema_vqgan_cb1024_adaptive_R1", "demo"
IMAGE_SIZES = (256, 128, 64, 32)  # pixels; the StyleGAN2 discriminator needs powers of two
REACHED_BY = 0.8  # of the images, with their shorter side: the others are enlarged
LARGEST_ON_CPU = 64  # pixels
GRID = 16  # codes a side
# Neighbours in a folder look alike where the median distance between their thumbnails is below this share of that
# between images of different folders. Measured on 8 x 8 grey thumbnails: frames of films 0.04 to 0.5, patches of one
# photograph in a folder 0.35 to 0.6 (overlapping or side by side), unlike photographs dealt out to folders 0.73 to 1.2.
# (Handwritten digits in a folder for each, which are alike throughout, have 0.47: data.validation_group=file for such.)
ALIKE = 0.65
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
ENOUGH, ENOUGH_OF = 40, 15  # validation images; or every 15th image, where that is less
CPU_BATCH, GPU_BATCH, LARGEST_TOTAL = 8, 64, 256  # images: on a CPU, on one GPU at most, on all GPUs together at most
HEADROOM = 0.85  # of a GPU's memory, at a step's peak: fragments, other programs, larger validation batches
EPOCHS = 150
GPU_STEPS, CPU_STEPS = (20_000, 300_000), 300  # smallest and largest; smallest
CPU_SECONDS = 3600  # of a whole run
VALIDATIONS = 20  # in a run
VALIDATION_SHARE = 0.1  # of the time, at most
LATEST_START = 20_000  # steps before the discriminator, on a GPU


class Choice(NamedTuple):
    value: Any  # as in YAML
    why: str  # in a few words; "": the value says it


Choices = dict[str, Choice]  # dotted key -> choice


class Pictures(NamedTuple):
    training: int  # images
    validation: int
    short_sides: Sequence[int]  # pixels; of the readable ones among those that were looked at
    broken: int  # of those that were looked at
    looked_at: int


class Machine(NamedTuple):
    gpus: Sequence[str]  # their names
    bf16: bool
    cores: int  # that this process may use
    memory: int  # bytes

    @property
    def recipe(self) -> str:
        return GPU_RECIPE if self.gpus else CPU_RECIPE


class Division(NamedTuple):
    """How a validation split is cut off."""

    fraction: float
    group: Group
    why: str


def division_of(names: Sequence[str], alikeness: float | None, told: Group | None = None) -> Division | None:
    """The smallest of FRACTIONS that gives enough images for validation; None where none of them does.

    `alikeness`: what ALIKE is compared with; None where it could not be measured, for lack of folders. `told`: the
    group that the user wants.
    """
    enough = min(ENOUGH, max(1, len(names) // ENOUGH_OF))
    groups: list[Group] = ["folder", "file"] if alikeness is not None and alikeness < ALIKE else ["file"]
    groups = [told] if told else groups
    for group in groups:
        places = [place_of(name, group) for name in names]
        for fraction in FRACTIONS:
            number = sum(place < fraction for place in places)
            if enough <= number <= max(1, len(names) // 2):
                return Division(fraction, group, _why_divided(number, len(names), group, alikeness))
    return None


def _why_divided(number: int, images: int, group: Group, alikeness: float | None) -> str:
    counted = f"{number:,} of {images:,} images"
    if alikeness is None:
        return counted
    kept = "so no folder is cut" if group == "folder" else "so folders may be cut"
    return f"{counted}; neighbours in a folder differ {alikeness:.2f} x as much as images of different folders, {kept}"


def choose_networks(config: Config, machine: Machine, pictures: Pictures) -> Choices:
    """What follows before anything is timed. `config`: the recipe with what the user gave."""
    size, reached = largest_size(pictures.short_sides, IMAGE_SIZES[0] if machine.gpus else LARGEST_ON_CPU)
    rate, tried = 1e-3, f"as the demo measured at batch {CPU_BATCH}"
    if machine.gpus:
        rate, tried = 1e-4, "the field's centre: LlamaGen at batch 128, MaskGIT's tokenizers at 256"
    choices = {
        "data.image_size": Choice(size, f"{reached:.0%} of the images reach it with their shorter side"),
        "data.crop_scale": Choice([0.7, 1.0], "random square crops, of this share of an image's area"),
        "data.horizontal_flip": Choice(True, "false where left and right matter, as in writing"),
        "data.workers": Choice(_workers(machine), f"loader processes for each training process; {machine.cores} cores"),
        "training.mixed_precision": Choice("bf16", "the GPU has it") if machine.bf16 else Choice("no", "float32"),
        "training.lr_scaling": Choice("none", "base_lr is the rate in use"),
        "training.base_lr": Choice(rate, tried),
    }
    if hasattr(config.quantizer, "reinit_every") and not config.training.decoder_only:
        choices["quantizer.reinit_every"] = Choice("1 epoch", "codes that an epoch did not use begin anew")
    if pictures.broken:
        why = f"{pictures.broken:,} of {pictures.looked_at:,} that were looked at are broken"
        choices["data.on_error"] = Choice("skip", why)
    if not machine.gpus:
        why = "add lpips and rfid where their networks are at hand: `vqgan-accel doctor`"
        choices["evaluation.metrics"] = Choice(["l2", "psnr", "ssim", "codebook"], why)
    return choices


def largest_size(short_sides: Sequence[int], largest: int) -> tuple[int, float]:
    """(pixels, the share of images that reach it)."""
    for size in IMAGE_SIZES:
        reached = sum(side >= size for side in short_sides) / len(short_sides)
        if size <= largest and reached >= REACHED_BY:
            break
    return size, reached


def choose_levels(config: Config) -> Choices:
    """For the image size that is settled now: a grid of codes about GRID x GRID."""
    levels = max(1, int(math.log2(config.data.image_size / GRID)))
    levels += isinstance(config.autoencoder, TamingConfig)  # whose last level keeps its side
    multipliers = list(config.autoencoder.channel_multipliers[:levels])
    side = config.data.image_size // 2 ** (len(multipliers) - isinstance(config.autoencoder, TamingConfig))
    return {"autoencoder.channel_multipliers": Choice(multipliers, f"{side} x {side} codes an image")}


def _workers(machine: Machine) -> int:
    return max(1, min(8, machine.cores // len(machine.gpus)) if machine.gpus else min(4, machine.cores // 2))


def processes(machine: Machine, pictures: Pictures) -> int:
    """One for each GPU, as long as there are images for all of them."""
    return max(1, min(len(machine.gpus), pictures.training // 4))


def batches(config: Config, machine: Machine, pictures: Pictures) -> list[Choices]:
    """What to try, largest batch first."""
    number, rounds = processes(machine, pictures), config.training.gradient_accumulation_steps
    most = max(1, pictures.training // (number * rounds))
    group = min(config.discriminator.minibatch_stddev_group, most) if config.discriminator else 1
    wanted = min(GPU_BATCH, LARGEST_TOTAL // number) if machine.gpus else CPU_BATCH
    sizes = {min(wanted >> halvings, most) // group * group for halvings in range(wanted.bit_length())} - {0}
    found: list[Choices] = []
    for size in sorted(sizes or {group}, reverse=True):
        why = "images a step" if number == 1 else f"images a step, {size} on each of {number} GPUs"
        why += f" in each of {rounds} rounds" if rounds > 1 else ""
        choices = {"training.total_batch_size": Choice(size * number * rounds, why)}
        if config.discriminator and group < config.discriminator.minibatch_stddev_group:
            choices["discriminator.minibatch_stddev_group"] = Choice(group, "no more than a batch holds")
        found.append(choices)
    return found


class Cost(NamedTuple):
    """Seconds on this machine, data loading included; with several processes, if they do not slow each other down."""

    plain: float  # a step before the discriminator starts
    adversarial: float  # afterwards, R1 included on average
    validation: float  # of the whole split


def cost_of(config: Config, timings: Timings, view: float, validation_images: int, num_processes: int) -> Cost:
    """`timings` are of one accumulation round, `view` seconds of a loader process for an image."""
    rounds, workers = config.training.gradient_accumulation_steps, config.data.workers
    images = config.training.total_batch_size / num_processes
    r1_every = config.discriminator.r1_every if config.discriminator else 1
    adversarial = timings.adversarial + (timings.with_r1 - timings.adversarial) / r1_every

    def with_loading(computing: float, images: float) -> float:
        return max(computing, images * view / workers) if workers else computing + images * view

    share = validation_images / num_processes
    return Cost(
        with_loading(timings.plain * rounds, images),
        with_loading(adversarial * rounds, images),
        with_loading(timings.forward * share, share),
    )


def choose_lengths(config: Config, machine: Machine, pictures: Pictures, cost: Cost, given: bool) -> Choices:
    """Everything that is counted in steps. `given`: the user said when training ends."""
    epoch = steps_per_epoch(pictures.training, config.training.total_batch_size)
    length = None if given else _length(machine, epoch, cost)
    total = length.value if length else max(1, total_steps_of(config.training, epoch))
    choices = {"training.max_steps": length} if length else {}
    if config.discriminator is not None:
        start = min(total // 3, LATEST_START) if machine.gpus else total // 2
        choices["discriminator.start"] = Choice(str(Duration(start, "steps")), "until then the tokenizer learns alone")
    spacing = max(total / VALIDATIONS, cost.validation / (VALIDATION_SHARE * cost.plain))
    every = str(Duration(min(total, rounded(spacing)), "steps"))
    took = f"one takes {duration(cost.validation)} for {pictures.validation:,} images"
    choices["training.validate_every"] = Choice(every, took)
    choices["training.checkpoint_every"] = Choice(every, "what an interruption costs at most")
    choices["training.log_every"] = Choice(max(1, min(50, rounded(total / 100))), "steps")
    return choices


def _length(machine: Machine, epoch: int, cost: Cost) -> Choice:
    """Of the whole run."""
    in_an_hour = CPU_SECONDS / (1 + VALIDATION_SHARE) / ((cost.plain + cost.adversarial) / 2)  # half with each
    least, most = GPU_STEPS if machine.gpus else (CPU_STEPS, max(CPU_STEPS, rounded(in_an_hour)))
    total = max(least, min(most, EPOCHS * epoch))
    why = f"{total / epoch:.3g} epochs"
    if total < EPOCHS * epoch:
        why += f"; {EPOCHS} would be {EPOCHS * epoch:,} steps, too many for " + ("one run" if machine.gpus else "a CPU")
    return Choice(total, why)


def run_seconds(plan: Plan, cost: Cost) -> float:
    total = plan.total_steps
    before = total if plan.discriminator_start is None else min(total, plan.discriminator_start)
    validations = math.ceil(total / plan.validate_every)
    return before * cost.plain + (total - before) * cost.adversarial + validations * cost.validation


def rounded(number: float) -> int:
    """Down to two digits, at least 1."""
    if number < 1:
        return 1
    unit = 10 ** max(0, int(math.log10(number)) - 1)
    return int(number // unit * unit)
