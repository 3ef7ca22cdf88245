"""`vqgan-accel make-beton`: a data set written as FFCV's beton files (format version 2, see data/beton.py).

FFCV's own writer is not used: it waits for ever where an image cannot be read or is larger than a page, writes images
in an order that its workers decide, and leaves half a file behind. What is written here is read by FFCV's loader, needs
no FFCV, and is the same bytes whatever the number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vqgan_accel.config import DataConfig
from vqgan_accel.data.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    JPG,
    RAW,
    VERSION,
    beton_origin,
    row_type,
)
from vqgan_accel.data.opening import open_indexed, require_apart, split_of
from vqgan_accel.data.source import DEFAULT_LABEL, ImageSource, Labels, SplitName
from vqgan_accel.data.views import REMEDY, Failure, read_image
from vqgan_accel.files import lock, naming, sync
from vqgan_accel.interruption import worker_options

WriteMode = Literal["jpg", "raw", "smart"]
SMART_BYTES = 192 * 192 * 3  # smart: JPEG for images whose pixels take more than that, pixels for the others
LARGEST_RESOLUTION = 16384  # pixels; a page then has 2 GiB, and FFCV counts a page's bytes in 32 bits
SMALLEST_PAGE = 2**23  # bytes; a power of two, in which every image fits
CHUNK = 8  # images that a worker hands over at once


class BetonOptions(NamedTuple):
    max_resolution: int  # pixels; a longer side is shrunk to that, keeping the aspect ratio
    write_mode: WriteMode
    quality: int  # of JPEG, 1 to 100


class Encoded(NamedTuple):
    mode: int  # JPG or RAW
    width: int
    height: int
    data: bytes


def make_betons(config: DataConfig, output: Path, options: BetonOptions) -> list[Path]:
    """Write output/train.beton, validation.beton and test.beton, of the splits that `config` has.

    Each file appears when it is complete. One that the same source and options have made already is kept, so that an
    interrupted run is started again with the same command. Raises ValueError for options out of range, for a file
    there that was made of something else, where another process is at work in the folder, and, unless
    data.on_error=skip, for a broken image.
    """
    _check(options)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")
    open_indexed(config, "train")  # a wrong path is told at once; of the other splits some may be missing
    require_apart(output, config, "--output")
    output.mkdir(parents=True, exist_ok=True)
    with lock(output):
        return _make_splits(config, output, options)


def _make_splits(config: DataConfig, output: Path, options: BetonOptions) -> list[Path]:
    written = []
    for split_name in get_args(SplitName):
        try:
            source = open_indexed(config, split_name)
        except (FileNotFoundError, ValueError) as error:
            print(f"{split_name}: left out, for {error}", flush=True)
            continue
        file = output / f"{split_name}.beton"
        origin: dict[str, object] = {
            "source": f"{config.path}[{split_of(config, split_name)}]",
            "images": source.fingerprint(),
        }
        origin |= {"max_resolution": options.max_resolution, "write_mode": options.write_mode}
        labels = source.labels()
        origin |= {"quality": options.quality, "on_error": config.on_error, "labels": labels and labels.fingerprint()}
        if file.exists():
            _require_same_origin(file, origin)
            print(f"{split_name}: {file} is there already, made of the same images with the same options", flush=True)
        else:
            written.append(file)
            number, skipped = _write(file, source, labels, config, options, json.dumps(origin), split_name)
            left_out = f", {skipped:,} broken ones left out" if skipped else ""
            size = file.stat().st_size
            print(f"{split_name}: {number:,} images in {file} ({size / 1e6:,.1f} MB){left_out}", flush=True)
    return written


def _check(options: BetonOptions) -> None:
    if not 1 <= options.max_resolution <= LARGEST_RESOLUTION:
        raise ValueError(f"--max-resolution is {options.max_resolution}; give 1 to {LARGEST_RESOLUTION} pixels")
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality is {options.quality}; give 1 to 100")


def _require_same_origin(file: Path, origin: dict[str, object]) -> None:
    found = beton_origin(file)
    differing = [f"{key} {found.get(key)}, now {value}" for key, value in origin.items() if found.get(key) != value]
    if differing:
        made = f"was made otherwise ({'; '.join(differing)})" if found else "was not written by make-beton"
        raise ValueError(f"{file} is there already and {made}; delete it, or give another --output")


def _write(
    file: Path,
    source: ImageSource,
    labels: Labels | None,
    config: DataConfig,
    options: BetonOptions,
    origin: str,
    title: str,
) -> tuple[int, int]:
    """(images written, broken images left out)."""
    partial = file.with_name(f".{file.name}.partial")
    fields = [(IMAGE_TYPE, b"image", origin.encode())] + ([(INT_TYPE, DEFAULT_LABEL.encode(), b"")] if labels else [])
    rows = np.zeros(len(source), row_type([kind for kind, _, _ in fields]))
    table = np.zeros(len(source), ALLOCATION)
    number = skipped = 0
    with naming(partial), partial.open("wb") as beton:
        page = page_size(options.max_resolution)
        end = HEADER.itemsize + len(fields) * FIELD.itemsize + rows.nbytes
        beton.seek(end)
        encoded = _encoded(source, config, options)
        bar = tqdm(encoded, total=len(source), desc=title, unit="image", dynamic_ncols=True)
        for index, item in enumerate(bar):
            if isinstance(item, Failure):
                if config.on_error == "raise":
                    raise ValueError(f"cannot read image {item.sentence}; {REMEDY}")
                tqdm.write(f"skipping image {item.sentence}")
                skipped += 1
                continue
            assert len(item.data) <= page
            if end // page != (end + len(item.data) - 1) // page:  # an image lies within one page
                end += -end % page
                beton.seek(end)
            beton.write(item.data)
            rows["field0"][number] = (item.mode, item.width, item.height, end)
            if labels:
                rows["field1"][number] = labels.numbers[index]
            table[number] = (number, end, len(item.data))
            end += len(item.data)
            number += 1
        if not number:
            raise ValueError(f"{title}: none of the {skipped} images can be read")
        beton.write(table[:number].tobytes())
        beton.seek(0)
        beton.write(np.array([(VERSION, len(fields), page, number, end)], HEADER).tobytes())
        beton.write(np.array(fields, FIELD).tobytes())
        beton.write(rows[:number].tobytes())
        _flush(beton)
    os.replace(partial, file)
    sync(file.parent)
    return number, skipped


def page_size(max_resolution: int) -> int:
    """Bytes: a power of two that holds the pixels of the largest image, or its JPEG file, which noise makes larger."""
    largest = 4 * max_resolution**2 + 2**16
    return max(SMALLEST_PAGE, 1 << (largest - 1).bit_length())


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _encoded(source: ImageSource, config: DataConfig, options: BetonOptions) -> Iterator[Encoded | Failure]:
    """In the order of the source."""
    loader: DataLoader[Any] = DataLoader(
        _Encoder(source, options), batch_size=CHUNK, collate_fn=list, **worker_options(config.workers)
    )
    for chunk in loader:
        yield from chunk


class _Encoder(Dataset[Encoded | Failure]):
    def __init__(self, source: ImageSource, options: BetonOptions) -> None:
        self.source = source
        self.options = options

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Encoded | Failure:
        image = read_image(self.source, index)
        return image if isinstance(image, Failure) else encode(image, self.options)


def encode(image: Image.Image, options: BetonOptions) -> Encoded:
    """An RGB image as a beton keeps it. Shrinking averages over areas, as FFCV's writer does (cv2.INTER_AREA)."""
    scale = options.max_resolution / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BOX)
    pixels = image.width * image.height * 3
    if options.write_mode == "raw" or (options.write_mode == "smart" and pixels <= SMART_BYTES):
        return Encoded(RAW, image.width, image.height, image.tobytes())
    file = BytesIO()
    image.save(file, "JPEG", quality=options.quality)
    return Encoded(JPG, image.width, image.height, file.getvalue())
