"""`vqgan-accel new`: looks at pictures and machine, and writes a config for them that says why it is so."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vqgan_accel.commented_yaml import commented_yaml, quoted
from vqgan_accel.config import Config, literal, parse_config, validated
from vqgan_accel.data.info import SplitInfo
from vqgan_accel.data.opening import open_indexed, require_apart
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
    processes,
    run_seconds,
)
from vqgan_accel.describe import latent_summary
from vqgan_accel.files import write_atomically
from vqgan_accel.looking import cut_off, look, settled_splits
from vqgan_accel.losses.perceptual import backbone_of
from vqgan_accel.models.weights import cached_weights
from vqgan_accel.recipes import recipes
from vqgan_accel.training.measure import Timings, measure_step, measure_views
from vqgan_accel.training.plan import Plan, make_plan
from vqgan_accel.words import duration

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
    command = training_command(output, number)
    estimate = estimated(plan, cost, machine)
    head = [
        f"A tokenizer of {quoted(data)}: {pictures.training:,} training images. Written by `vqgan-accel new`:",
        f"the recipe {machine.recipe}, changed as these pictures and this machine ask for. To train it takes",
        f"{estimate}.",
        f"  {command}",
    ]
    write_config(output, config, head, comments)
    lines = said(config, plan, info, pictures, machine, comments)
    lines |= {"estimate": [estimate], "written": [f"{output}, with the reasons"], "next": [command]}
    return [f"{'' if place else title:<12}{line}" for title, group in lines.items() for place, line in enumerate(group)]


def training_command(file: Path, processes: int) -> str:
    command = ["vqgan-accel", "train", str(file)]
    if processes > 1:
        command = ["accelerate", "launch", "--num_processes", str(processes), "-m", "vqgan_accel", *command[1:]]
    return shlex.join(command)


def write_config(file: Path, config: Config, head: Sequence[str], comments: Mapping[str, str]) -> None:
    """With a comment at its top and one beside each value that has a reason."""
    text = "".join(f"# {line}\n" for line in head) + commented_yaml(config, comments)
    written = OmegaConf.create(text)
    assert isinstance(written, DictConfig) and parse_config(written) == config
    write_atomically(file, text)


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
