"""`vqgan-accel new`: looks at pictures and machine, and writes a config for them that says why it is so."""

from __future__ import annotations

import os
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from vqgan_accel.commented_yaml import commented_yaml, quoted
from vqgan_accel.config import Config, DataConfig, literal, parse_config, validated
from vqgan_accel.data.division import Group, Part
from vqgan_accel.data.info import SplitInfo, split_info
from vqgan_accel.data.opening import backend_of, open_indexed, open_whole, require_apart
from vqgan_accel.data.source import ImageSource, MissingSplitError
from vqgan_accel.data.views import Failure, read_image
from vqgan_accel.decisions import (
    HEADROOM,
    Choice,
    Choices,
    Cost,
    Machine,
    Pictures,
    batches,
    choose_lengths,
    choose_levels,
    choose_networks,
    cost_of,
    division_of,
    processes,
    run_seconds,
)
from vqgan_accel.describe import latent_summary
from vqgan_accel.files import write_atomically
from vqgan_accel.losses.perceptual import backbone_of
from vqgan_accel.models.weights import cached_weights
from vqgan_accel.recipes import recipes
from vqgan_accel.training.measure import Timings, measure_step, measure_views
from vqgan_accel.training.plan import Plan, make_plan
from vqgan_accel.words import duration

LOOKED_AT = 5000  # images, at most
COMPARED = 500  # pairs of neighbours, at most, and as many of different folders
USUAL_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}
FEW = 200  # images, for which starting workers takes longer
UNLIMITED = 10**6  # steps, until it is settled how many


def new(data: str, output: Path | None, overrides: Sequence[str]) -> list[str]:
    """Write a config for `data`, which is whatever data.path may be; `overrides` are settled before all that depends on
    them. Returns lines for the user: what was seen, decided and why, and what comes next.

    Nothing is overwritten. ValueError or FileNotFoundError for a data set that cannot be read or has too few images,
    for overrides that are wrong, and for a network that does not fit in the GPU's memory.
    """
    output = output or Path(f"{name_of(data)}.yaml")
    name = output.stem  # of the run
    require_writable(output)
    fixed = given_keys(overrides)
    if "data.path" in fixed:
        raise ValueError("give the pictures as --data, and not as data.path, too")
    machine = this_machine()
    asked = parse_config(recipe_values(machine, data, f"runs/{name}", fixed), overrides, source="new")

    choices = settled_splits(asked.data, fixed)
    asked = settled(asked, choices, fixed)
    info = look(asked.data)
    if not {"data.validation_split", "data.validation_fraction"} & {*choices, *fixed}:
        choices |= cut_off(asked.data, asked.data.validation_group if "data.validation_group" in fixed else None)
        asked = settled(asked, choices, fixed)
    training, validation = (open_indexed(asked.data, split) for split in ("train", "validation"))
    short_sides = list(map(min, info.widths, info.heights))
    pictures = Pictures(len(training), len(validation), short_sides, len(info.broken), info.images)

    choices |= choose_output(asked, name, fixed) | choose_networks(asked, machine, pictures)
    config = settled(asked, choices, fixed)
    choices |= (levels := choose_levels(config))
    config = settled(config, levels, fixed)
    number = processes(machine, pictures)
    trials = [{}] if "training.total_batch_size" in fixed else batches(config, machine, pictures)
    config, batch, timings = first_that_fits(config, trials, fixed, number)
    view = measure_views(training, config.data)
    cost = cost_of(config, timings, view, pictures.validation, number)
    told = bool({"training.max_steps", "training.max_epochs"} & fixed)
    choices |= batch | (lengths := choose_lengths(config, machine, pictures, cost, told))
    config = settled(config, lengths, fixed)
    plan = make_plan(config, pictures.training, number)

    comments = {key: choice.why for key, choice in choices.items() if choice.why} | dict.fromkeys(fixed, "given")
    command = ["vqgan-accel", "train", str(output)]
    if number > 1:
        command = ["accelerate", "launch", "--num_processes", str(number), "-m", "vqgan_accel", *command[1:]]
    estimate = estimated(plan, cost, machine)
    head = [
        f"A tokenizer of {quoted(data)}: {pictures.training:,} training images. Written by `vqgan-accel new`:",
        f"the recipe {machine.recipe}, changed as these pictures and this machine ask for. To train it takes",
        f"{estimate}.",
        f"  {shlex.join(command)}",
    ]
    text = "".join(f"# {line}\n" for line in head) + commented_yaml(config, comments)
    written = OmegaConf.create(text)
    assert isinstance(written, DictConfig) and parse_config(written) == config
    write_atomically(output, text)
    lines = said(config, plan, info, pictures, machine, comments)
    lines |= {"estimate": [estimate], "written": [f"{output}, with the reasons"], "next": [shlex.join(command)]}
    return [f"{'' if place else title:<12}{line}" for title, group in lines.items() for place, line in enumerate(group)]


def estimated(plan: Plan, cost: Cost, machine: Machine) -> str:
    pace = f"{cost.plain:.2g} s a step"
    if plan.discriminator_start is not None and plan.discriminator_start < plan.total_steps:
        pace += f", {cost.adversarial:.2g} s from step {plan.discriminator_start:,} on"
    if plan.num_processes > 1:
        pace += f", if {plan.num_processes} GPUs are {plan.num_processes} times as fast as one"
    return f"about {duration(run_seconds(plan, cost))} on {hardware(machine)} ({pace})"


def said(
    config: Config, plan: Plan, info: SplitInfo, pictures: Pictures, machine: Machine, why: Mapping[str, str]
) -> dict[str, list[str]]:
    """What was seen and decided, for the user; `why`: the comments of the file."""
    data, training, grid = config.data, config.training, latent_summary(config)["latent_grid"]
    validation = f"split {data.validation_split}"
    if data.validation_fraction is not None:
        reason = why["data.validation_fraction"]
        validation = (
            f"split {data.train_split}: {data.validation_fraction:g} of it, by {data.validation_group} ({reason})"
        )
    whole = pictures.training + (0 if data.validation_fraction is None else pictures.validation)
    part = f"; {info.images:,} of {whole:,} images, evenly spaced, were looked at" if info.images < whole else ""
    size = f"{data.image_size} px ({why['data.image_size']})"
    codes = f"{grid[0]} x {grid[1]} codes of {config.quantizer.num_codes:,}"
    length = f"{plan.total_steps:,} steps ({why.get('training.max_steps', 'given')})"
    lines = {
        "pictures": [f"{data.path} (backend {data.backend}){part}", *info.lines(data.image_size)],
        "training": [f"{pictures.training:,} images of split {data.train_split}"],
        "validation": [f"{pictures.validation:,} images of {validation}"],
        "machine": [f"{hardware(machine)}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB of memory"],
        "recipe": [f"{machine.recipe}, {size}, {codes}"],
        "batch": [f"{training.total_batch_size} {why['training.total_batch_size']}"],
        "rate": [f"{plan.learning_rate:g} ({why['training.base_lr']})"],
        "length": [length],
    }
    return lines | {"NOTE": missing_weights(config)}


def missing_weights(config: Config) -> list[str]:
    """What training would download first."""
    name = backbone_of(config.losses.perceptual_network)
    if config.losses.perceptual_weight == 0 or getattr(config.weights, name) or cached_weights(name).is_file():
        return []
    return [
        f"the first start downloads the weights of {config.losses.perceptual_network} for the perceptual loss; without "
        f"a network give them as weights.{name}=FILE, or losses.perceptual_weight=0"
    ]


def require_writable(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} is there already and may hold your changes; give another --output")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for --output {output}; create it first")


def name_of(data: str) -> str:
    """For files and runs: of letters, digits, `_`, `-` and dots."""
    path = Path(data).expanduser()
    name = path.stem if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]+", "_", name).strip("._-") or "data"


def given_keys(overrides: Sequence[str]) -> set[str]:
    """The dotted keys that overrides name. (Whether they are well-formed `parse_config` says.)"""
    return {override.partition("=")[0] for override in overrides}


def recipe_values(machine: Machine, data: str, output_dir: str, fixed: set[str]) -> dict[str, Any]:
    """The recipe's plain values, but for its pictures and whatever is counted in steps or epochs of them."""
    values: Any = OmegaConf.to_container(OmegaConf.load(recipes()[machine.recipe]))
    values |= {"output_dir": output_dir}
    values["data"] |= {"path": literal(data), "backend": "auto"}
    values["training"] = {
        key: value
        for key, value in values["training"].items()
        if key not in ("max_epochs", "lr_decay", "base_batch_size")
    }
    values["training"]["max_steps"] = None if "training.max_epochs" in fixed else UNLIMITED
    return values


def settled(config: Config, choices: Choices, fixed: set[str]) -> Config:
    """The config with the choices, but for what the user has given, and for sections that it does not have."""
    values = config.model_dump(mode="json")
    for key, choice in choices.items():
        section, _, name = key.rpartition(".")
        place = values[section] if section else values
        if key not in fixed and place is not None:
            place[name] = choice.value
    return validated(values, "new")


# ---- pictures


def settled_splits(data: DataConfig, fixed: set[str]) -> Choices:
    """What the data set calls its training images, and its validation images if it has some."""
    choices = {"data.backend": Choice(backend_of(data), "")}
    split = data.train_split
    if "data.train_split" not in fixed:
        split, why = training_split(data)
        choices["data.train_split"] = Choice(split, why)
    if split == "." or {"data.validation_split", "data.validation_fraction"} & fixed:
        return choices
    found, _ = usual_split(data, "validation")
    if found is not None:
        choices["data.validation_split"] = Choice(found, "as it is called there")
    return choices


def training_split(data: DataConfig) -> tuple[str, str]:
    """(name, why)"""
    found, missing = usual_split(data, "train")
    if found is not None:
        return found, "as it is called there"
    assert missing is not None
    if backend_of(data) == "folder":
        return ".", "all images below data.path, which has no folder named train"
    if len(missing.known) == 1:
        return missing.known[0], "the only one there is"
    raise missing


def usual_split(data: DataConfig, side: Literal["train", "validation"]) -> tuple[str | None, MissingSplitError | None]:
    """The split's name under one of its usual names, in whatever letter case; or None, and what there is instead."""
    first, *_ = USUAL_NAMES[side]
    try:
        open_indexed(data.model_copy(update={f"{side}_split": first, "validation_fraction": None}), side)
    except MissingSplitError as error:
        names = (name for usual in USUAL_NAMES[side] for name in error.known if name.lower() == usual)
        return next(names, None), error
    return first, None


def look(data: DataConfig) -> SplitInfo:
    """Of the training images, validation's included where they are still to be cut off; of many those that lie evenly
    spaced. ValueError where there is only one, or none can be read."""
    source = open_whole(data, "train")
    if len(source) == 1:
        raise ValueError(f"{data.path} has one image, {source.name(0)}, of which nothing can be learnt; give more")
    indices = np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(np.int64)
    workers = len(os.sched_getaffinity(0)) if len(indices) > FEW else 0
    info = split_info(Part(source, indices, "a sample"), workers, "looking")
    if not info.widths:
        raise ValueError(f"none of the {info.images:,} images of {data.path} can be read; the first: {info.broken[0]}")
    return info


def cut_off(data: DataConfig, told: Group | None) -> Choices:
    """A validation split, where there is none. ValueError where there are too few images for one."""
    source = open_whole(data, "train")
    names = source.stored_names()
    if names is None:
        open_indexed(data, "validation")  # says what there is instead
        return {}
    division = division_of(names, alikeness(source, names), told)
    if division is None:
        raise ValueError(
            f"{data.path} has {len(names)} training images, too few to cut a validation split off; give more, or "
            "data.validation_split"
        )
    return {
        "data.validation_fraction": Choice(division.fraction, division.why),
        "data.validation_group": Choice(division.group, "what a hash of the names puts on one side"),
    }


def alikeness(source: ImageSource, names: Sequence[str]) -> float | None:
    """How far apart neighbours in a folder are, over how far images of different folders are: medians of the distances
    between their thumbnails. None where no two folders have two readable images."""
    folders = [name.rpartition("/")[0] for name in names]
    pairs = [first for first in range(len(names) - 1) if folders[first] and folders[first] == folders[first + 1]]
    if not pairs:
        return None
    chosen = [pairs[place] for place in np.linspace(0, len(pairs) - 1, min(len(pairs), COMPARED)).astype(int)]
    indices = sorted({index for first in chosen for index in (first, first + 1)})
    small = {index: seen for index in indices if (seen := thumbnail(source, index)) is not None}
    others = np.random.default_rng(0).choice(indices, (4 * COMPARED, 2)).tolist()
    near, far = (
        [float(np.abs(small[one] - small[two]).mean()) for one, two in kind if one in small and two in small]
        for kind in (
            [(first, first + 1) for first in chosen],
            [(one, two) for one, two in others if folders[one] != folders[two]],
        )
    )
    if not near or not far or not statistics.median(far):
        return None
    return statistics.median(near) / statistics.median(far)


def thumbnail(source: ImageSource, index: int) -> NDArray[np.float32] | None:
    """(8, 8), grey; None of a broken image."""
    image = read_image(source, index)
    if isinstance(image, Failure):
        return None
    return np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), np.float32)


def choose_output(config: Config, name: str, fixed: set[str]) -> Choices:
    """output_dir: below the current folder, or beside the pictures where that lies among them. ValueError where the
    one that the user gave does."""
    try:
        require_apart(Path(config.output_dir), config.data, "output_dir")
    except ValueError:
        if "output_dir" in fixed:
            raise
        images = Path(str(config.data.path)).expanduser() / config.data.train_split
        return {"output_dir": Choice(str(images.resolve().parent / "runs" / name), "not among the pictures")}
    return {}


# ---- machine


def this_machine() -> Machine:
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Machine(
        gpus=[device.name for device in devices],
        bf16=bool(devices) and all(device.major >= 8 for device in devices),  # from NVIDIA's Ampere on
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def hardware(machine: Machine) -> str:
    if not machine.gpus:
        return "a CPU"
    return f"{len(machine.gpus)} x {machine.gpus[0]}" if len(machine.gpus) > 1 else machine.gpus[0]


def first_that_fits(
    config: Config, trials: list[Choices], fixed: set[str], num_processes: int
) -> tuple[Config, Choices, Timings]:
    """The first trial whose steps fit in the memory, and how long they take. ValueError where none does."""
    for trial in trials:
        tried = settled(config, trial, fixed)
        size = tried.training.total_batch_size // tried.training.gradient_accumulation_steps // num_processes
        timings = measure_step(tried, max(1, size))
        if timings is not None and timings.memory <= HEADROOM:
            return tried, trial, timings
    raise ValueError(
        f"{max(1, size)} images of {config.data.image_size} px for each process do not fit in the GPU's memory; give "
        "a smaller data.image_size or autoencoder.channels, or more training.gradient_accumulation_steps"
    )
