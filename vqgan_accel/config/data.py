"""The section that says where images come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vqgan_accel.data.sources import SOURCES
from vqgan_accel.sections import OneOf, Section


class DataConfig(Section):
    backend: Annotated[str, OneOf([*SOURCES, "auto"])] = Field(
        "folder",
        description="folder: plain image files; hub: Hugging Face data sets; ffcv: betons, in training by FFCV's own "
        "loader; beton: the same files by Pillow alone; auto: what data.path turns out to be",
    )
    path: str | None = Field(
        None,
        description="folder of images or betons, local data set, or (hub) its name on the Hugging Face hub, or the URL "
        "of its parquet files or tars, as s3://BUCKET/FOLDER",
    )
    subset: str | None = Field(None, description="hub: the configuration's name, for data sets that have several")
    revision: str | None = Field(None, description="hub: branch, tag or commit of the data set")
    image_column: str = Field("image", description="hub: the column that holds the image")
    label_column: str | None = Field(
        None,
        description="hub, beton: the column or field of class numbers, which tokenize and make-beton keep; null: "
        "`label`, if there is one",
    )
    streaming: bool = Field(False, description="hub: read in order while training, without downloading first")
    shuffle_buffer: int = Field(
        1000,
        ge=1,
        description="streaming: images, over all processes, that are read and shuffled at once",
    )
    train_split: str = Field(
        "train",
        description="folder: PATH/train; ffcv, beton: PATH/train.beton; hub: the split's name",
    )
    validation_split: str = Field("validation", description="the same of the validation split")
    test_split: str = Field("test", description="the same of the test split")
    validation_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="folder, hub: this share of train_split, by a hash of the names, is the validation split, and the"
        " rest is for training; null: validation_split",
    )
    validation_group: Literal["file", "folder"] = Field(
        "file",
        description="what stays on one side: a file, or all files of a folder",
    )
    expected_hash: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="of the training images' content, as `vqgan-accel data-info CONFIG --hash` prints it: a run reads"
        " them all before its first step and refuses others",
    )
    image_size: int = Field(256, ge=4, description="pixels; every image becomes image_size x image_size")
    crop_scale: Annotated[tuple[float, float], Field(strict=False)] | None = Field(
        (0.7, 1.0),
        description="training: area of the random square crop over the image's area, drawn as "
        "RandomResizedCrop(ratio=1) does; null: the central square",
    )
    horizontal_flip: bool = Field(True, description="training: flip with probability 1/2")
    workers: int = Field(
        4,
        ge=0,
        description="loader processes per training process; ffcv: threads, no more than there are cores",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise",
        description="a broken image stops the run, or is replaced, counted and reported",
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is [smallest, largest] with 0 < smallest <= largest <= 1, not {self.crop_scale}"
            )
        if self.streaming and self.backend not in ("hub", "auto"):
            raise ValueError(f"streaming is for backend hub, not for {self.backend}; set streaming=false")
        if self.streaming and self.validation_fraction is not None:
            raise ValueError(
                "validation_fraction needs the names of all images, which a stream has not; name slices such as "
                "train[:95%] and train[95%:] as the splits, or set streaming=false"
            )
        if self.streaming and self.expected_hash:
            raise ValueError("expected_hash means reading all images before the first step; set streaming=false")
        return self
