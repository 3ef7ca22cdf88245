"""`vqgan-accel tokenize`: the codes of a whole data set, for the second stage (see read.py for what is written).

A shard is a function of its number: of which images it holds, in which batches they are encoded. So processes share the
shards, and a run that was killed writes those that are missing: no image twice, none left out.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor
from tqdm import tqdm

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import Config
from vqgan_accel.data.crops import CROPS, TEN_CROP_SCALE, VIEWS, views_of
from vqgan_accel.data.opening import open_indexed, require_apart, split_of, views_loader
from vqgan_accel.data.source import ImageSource, Labels, in_utf8
from vqgan_accel.data.views import Batch, Failure, read_image, to_float
from vqgan_accel.distributed import decided_by_main
from vqgan_accel.files import lock, naming, sync, write_json
from vqgan_accel.models.opening import open_tokenizer
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.models.weights import require_finite, state_hash
from vqgan_accel.tokens.read import LARGEST_UINT16, MANIFEST, read_manifest, rows_in, shard_files

SHARD_IMAGES = 10_000  # at most, unless told otherwise
SAMPLE = 32  # images whose pixels are hashed


def tokenize(
    model: str | Path,
    *,
    data: str | Path | None = None,
    output: str | Path,
    overrides: Sequence[str] = (),
    views: str = "center",
    shard_images: int | None = None,
) -> dict[str, Any]:
    """Write the codes of `evaluation.split` of `data.path` as parquet, which `load_tokens` reads; the main process
    returns the finished manifest. Every process calls it.

    model: what `load_tokenizer` takes; data: images in place of the run's own, whatever data.path may be; overrides:
    `section.key=value`, of the run's config. views: `center`, `flip` (two views an image) or `10crop` (ten).
    shard_images: images in a file, by default 10,000, or fewer where not every process would have a file. Broken images
    stop it, or are left out and counted with data.on_error=skip. What is in `output` already, of the same images by the
    same tokenizer, is kept. ValueError or FileNotFoundError says what is wrong.

    >>> manifest = tokenize("runs/first", output="tokens", views="flip", overrides=["evaluation.split=train"])
    >>> manifest["rows"], manifest["code_grid"], manifest["num_codes"]
    (16, [4, 4], 16)
    """
    output = Path(output)
    if shard_images is not None and shard_images < 1:
        raise ValueError(f"a shard of {shard_images} images is none; give at least 1")
    opened = open_tokenizer(model)
    config = opened.config(overrides, data)
    accelerator = start_accelerator("no", config.training.timeout_minutes)
    source = open_indexed(config.data, config.evaluation.split)
    require_apart(output, config.data, "--output")
    job = Job(opened.tokenizer, config, source, source.labels(), views)
    largest = min(SHARD_IMAGES, -(-len(source) // accelerator.num_processes)) if shard_images is None else shard_images
    with ExitStack() as held:

        def begin() -> tuple[dict[str, Any], list[int]]:
            require_finite(opened.tokenizer, str(opened.folder))
            require_tokens_or_nothing(output)
            (output / "data").mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(output))
            manifest = begin_or_go_on(output, manifest_of(job), largest, told=shard_images is not None)
            files = shard_files(output, manifest)
            return manifest, [number for number, file in enumerate(files) if rows_in(file) is None]

        manifest, missing = decided_by_main(begin)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        write_shards(job, output, manifest, mine, accelerator)
        if accelerator.is_main_process:
            # (No barrier: it would give up after some minutes, and a shard may take longer. Where another process
            # fails, the launcher ends this one.)
            files = shard_files(output, manifest)
            while any(rows_in(files[number]) is None for number in missing):
                time.sleep(1)
            return finish(output, manifest)
    return manifest


class Job(NamedTuple):
    """The views of which images are encoded by what."""

    tokenizer: ImageTokenizer
    config: Config
    source: ImageSource
    labels: Labels | None
    views: str  # a key of VIEWS


def write_shards(
    job: Job, output: Path, manifest: dict[str, Any], numbers: list[int], accelerator: Accelerator
) -> None:
    """Encode the images of these shards, one shard after another."""
    files, device, source = shard_files(output, manifest), accelerator.device, job.source
    size, batch = manifest["shard_images"], batch_images(job.config, job.views)
    shards = {number: range(number * size, min((number + 1) * size, len(source))) for number in numbers}
    # made when they are asked for: as lists all of them are half a gigabyte of 14 million images
    wanted = (images for shard in shards.values() for images in batches_of(shard, batch))
    crop = job.config.evaluation.rules.crop
    views, pin_memory = partial(views_of, crop=crop, kind=job.views), device.type == "cuda"
    loader = views_loader(source, job.config.data, wanted, views, pin_memory)
    job.tokenizer.to(device)
    total = sum(map(len, shards.values()))
    bar = tqdm(total=total, unit="image", disable=not accelerator.is_main_process, dynamic_ncols=True)
    with bar, closing(iter(loader)) as loaded:
        for number, shard in shards.items():
            codes, indices = [], []
            for images in batches_of(shard, batch):
                loaded_batch = next(loaded)
                codes.append(codes_of(job.tokenizer, loaded_batch, device))
                indices.append(loaded_batch["index"])
                bar.update(len(images))
            places = torch.cat(indices).numpy()
            names = [in_utf8(source.file_name(int(index))) for index in places]
            write_shard(files[number], torch.cat(codes).numpy(), places, names, job.labels, manifest)


def batch_images(config: Config, views: str) -> int:
    """How many images with all their views make about evaluation.batch_size pictures."""
    return max(1, config.evaluation.batch_size // len(VIEWS[views]))


def batches_of(shard: range, batch: int) -> Iterator[list[int]]:
    """Its images. No batch reaches over the shard's end: how many are encoded together may decide a code's tie."""
    return (list(shard[start : start + batch]) for start in range(0, len(shard), batch))


def codes_of(tokenizer: ImageTokenizer, batch: Batch, device: torch.device) -> Tensor:
    """(B, h*w) or (B, q*h*w) int64 on the CPU; B may be 0."""
    images = to_float(batch["image"].to(device, non_blocking=True))
    return tokenizer.encode(images).flatten(1).cpu()


def manifest_of(job: Job) -> dict[str, Any]:
    """All that decides the rows, and what they are."""
    tokenizer, config, source, labels, views = job
    side, sizes = config.data.image_size // tokenizer.stride, tokenizer.quantizer.codebook_sizes
    crop = CROPS[config.evaluation.rules.crop]
    return {
        "tokenizer_sha256": state_hash(tokenizer),
        "tokenizer": tokenizer.settings.model_dump(mode="json"),
        "num_codes": tokenizer.quantizer.num_codes,
        "code_grid": [side, side] if len(sizes) == 1 else [len(sizes), side, side],
        **({"codebook_sizes": list(sizes)} if len(sizes) > 1 else {}),
        "split": split_of(config.data, config.evaluation.split),
        "images": source.fingerprint(),
        "sample_sha256": sample_hash(source),
        "num_images": len(source),
        "labels": labels and labels.fingerprint(),
        "image_size": config.data.image_size,
        "crop": crop.crop,
        "resize_filter": crop.resize_filter,
        "views": list(VIEWS[views]),
        "ten_crop_scale": TEN_CROP_SCALE if views == "10crop" else None,
    }


def sample_hash(source: ImageSource) -> str:
    """Of the pixels of SAMPLE images that are spread over the source: data sets of as many images of the same names are
    told apart without decoding all of them."""
    digest = hashlib.sha256()
    for index in np.linspace(0, len(source) - 1, SAMPLE).astype(int):
        image = read_image(source, int(index))
        digest.update(b"broken" if isinstance(image, Failure) else str(image.size).encode() + image.tobytes())
    return digest.hexdigest()[:16]


def require_tokens_or_nothing(output: Path) -> None:
    """ValueError where `output` holds something else than tokens, or their very beginning."""
    if output.exists() and not (output / MANIFEST).is_file():
        others = [path for path in output.rglob("*") if not path.name.startswith(".") and path != output / "data"]
        if not output.is_dir() or others:
            raise ValueError(f"{output} is there already and holds no tokens; give another output folder")


def begin_or_go_on(output: Path, made: dict[str, Any], shard_images: int, told: bool) -> dict[str, Any]:
    """The manifest in `output`, written if there is none. ValueError where the codes there are others."""
    if not (output / MANIFEST).is_file():
        shards = -(-made["num_images"] // shard_images)
        manifest = made | {"shard_images": shard_images, "shards": shards, "complete": False}
        write_json(output / MANIFEST, manifest)
        return manifest
    found = read_manifest(output)
    wanted = made | ({"shard_images": shard_images} if told else {})
    differing = [key for key, value in wanted.items() if found.get(key) != value]
    if differing:
        reasons = ", ".join(f"{key} {_short(found.get(key))}, now {_short(wanted[key])}" for key in differing)
        raise ValueError(f"{output} holds other tokens ({reasons}); give another output folder")
    return found


def _short(value: object) -> str:
    return text if len(text := str(value)) <= 40 else text[:37] + "..."


def write_shard(
    file: Path,
    codes: NDArray[np.int64],
    indices: NDArray[np.int64],
    names: list[str],
    labels: Labels | None,
    manifest: dict[str, Any],
) -> None:
    """codes (R, L), indices and names (R,): all views of a shard's images. The file is there when it is complete."""
    views = manifest["views"]
    assert len(codes) % len(views) == 0
    features = features_of(manifest, labels)
    schema = features.arrow_schema
    numbers = pa.array(codes.ravel(), schema.field("codes").type.value_type)
    columns = {
        "codes": pa.FixedSizeListArray.from_arrays(numbers, codes.shape[1]),
        "label": labels.numbers[indices] if labels else [],
        "file_name": names,
        "index": indices,
        "view": views * (len(codes) // len(views)),
    }
    table = pa.table([columns[name] for name in features], schema)
    unfinished = file.with_name(f".{file.name}.partial")
    with naming(file):
        parquet.write_table(table, unfinished, compression="zstd")
        sync(unfinished)
        os.replace(unfinished, file)
        sync(file.parent)


def features_of(manifest: dict[str, Any], labels: Labels | None) -> datasets.Features:
    kind = "uint16" if manifest["num_codes"] <= LARGEST_UINT16 else "int32"
    classes = (
        {}
        if labels is None
        else {"label": datasets.Value("int64") if labels.names is None else datasets.ClassLabel(names=labels.names)}
    )
    return datasets.Features(
        {
            "codes": datasets.Sequence(datasets.Value(kind), length=math.prod(manifest["code_grid"])),
            **classes,
            "file_name": datasets.Value("string"),
            "index": datasets.Value("int64"),
            "view": datasets.Value("string"),
        }
    )


def finish(output: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Count what is there and say that it is complete."""
    rows = sum(rows_in(file) or 0 for file in shard_files(output, manifest))
    if not rows:
        raise ValueError("not one image of the split could be read: there are no codes")
    skipped = manifest["num_images"] - rows // len(manifest["views"])
    manifest = manifest | {"complete": True, "rows": rows, "skipped_images": skipped}
    write_json(output / MANIFEST, manifest)
    return manifest
