"""What there is to see of a data set before there is a config: its splits, its pictures, and whether neighbours are
alike."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data.division import Group, Part
from vqgan_accel.data.info import SplitInfo, split_info
from vqgan_accel.data.opening import backend_of, open_indexed, open_whole
from vqgan_accel.data.source import ImageSource, MissingSplitError
from vqgan_accel.data.views import Failure, read_image
from vqgan_accel.decisions import Choice, Choices, division_of

LOOKED_AT = 5000  # images, at most
FEW = 200  # images, for which starting workers takes longer
COMPARED = 500  # pairs of neighbours, at most, and as many of different folders
USUAL_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}


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
