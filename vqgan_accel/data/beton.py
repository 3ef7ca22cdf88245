"""Images from FFCV's beton files (https://ffcv.io, format version 2), read with numpy and Pillow.

No compiled library is needed to train from a beton or to check one. It is as fast as a folder of JPEG files, not as
FFCV's own loader.

A beton is: a header; a description of each field; a row of fields for each sample, in which an image is (mode, width,
height, pointer); pages of data; the table of what was allocated where.
"""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqgan_accel.config import DataConfig
from vqgan_accel.data.source import DEFAULT_LABEL, Labels, MissingSplitError, decode_image, listed, nearest_name

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_pointer", "<u8"),  # 0 until the file is finished
    ]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("bytes", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
JPG, RAW = 0, 1  # an image's mode: a JPEG file | height x width x 3 bytes
INT_TYPE, IMAGE_TYPE = 1, 2
IN_A_ROW = {  # field type -> what stands in a sample's row
    0: np.dtype("<f8"),  # float
    INT_TYPE: np.dtype("<i8"),
    IMAGE_TYPE: IMAGE,
    3: np.dtype([("pointer", "<u8"), ("bytes", "<u8")]),  # bytes
    4: np.dtype("<u8"),  # array
    5: np.dtype([("pointer", "<u8"), ("bytes", "<u8")]),  # JSON
    6: np.dtype("<u8"),  # tensor
}


def open_split(config: DataConfig, split: str, key: str) -> BetonSource:
    """See data/sources.py."""
    return BetonSource(Path(str(config.path)).expanduser(), split, key, config.label_column)


class BetonSource:
    """The images of `root/split.beton`, in the file's order, and the whole numbers in `label_field` (default: label) as
    their classes; other fields are left alone.

    `key` is the config key that named the split, for error sentences. Raises FileNotFoundError for a missing file and
    ValueError for one that is no finished beton with one field of images.
    """

    def __init__(self, root: Path, split: str, key: str = "data.train_split", label_field: str | None = None) -> None:
        self.arguments = (root, split, key, label_field)
        self.label_field = label_field
        self.file = _beton_file(root, split, key)
        self.title = str(self.file)
        if (size := self.file.stat().st_size) < HEADER.itemsize:
            raise ValueError(f"{self.file} is no beton: it has {size} bytes")
        content = np.memmap(self.file, np.uint8, "r")
        header = content[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION:
            raise ValueError(f"{self.file} is no beton of format version {VERSION}; write it again with FFCV 1.x")
        table = int(header["table_pointer"])
        if table == 0 or table >= len(content) or (len(content) - table) % ALLOCATION.itemsize:
            raise ValueError(f"{self.file} was not written to its end; delete it and write it again")
        if HEADER.itemsize + FIELD.itemsize * int(header["num_fields"]) > table or not header["page_size"]:
            raise ValueError(f"{self.file} is damaged: its header is not that of a beton; write it again")
        fields = content[HEADER.itemsize :][: FIELD.itemsize * int(header["num_fields"])].view(FIELD)
        if not all(field["name"].isascii() for field in fields):
            raise ValueError(f"{self.file} is damaged: the names of its fields are not ASCII; write it again")
        self.field_names = [field["name"].decode() for field in fields]
        images = [number for number, field in enumerate(fields) if field["type"] == IMAGE_TYPE]
        unknown = sorted({int(field["type"]) for field in fields} - IN_A_ROW.keys())
        if len(images) != 1 or unknown:
            reason = f"types {unknown} of which are unknown here" if unknown else f"{len(images)} of them of images"
            raise ValueError(
                f"{self.file} has the fields {listed(self.field_names)}, {reason}; write it with one field of images"
            )
        row = row_type([int(field["type"]) for field in fields])
        start, size = HEADER.itemsize + fields.nbytes, row.itemsize * int(header["num_samples"])
        if not size:
            raise ValueError(f"{self.file} holds no images")
        if start + size > table:
            raise ValueError(f"{self.file} is damaged: its {header['num_samples']} samples do not fit in it")
        self.fields = content[start : start + size].view(row)
        self.types = [int(field["type"]) for field in fields]
        self.rows = self.fields[f"field{images[0]}"]  # (N,) of IMAGE
        allocations = content[table:].view(ALLOCATION)
        order = np.argsort(allocations["pointer"], kind="stable")
        self.pointers, self.sizes = allocations["pointer"][order], allocations["bytes"][order]
        self.content = content
        self.image_field = self.field_names[images[0]]

    def __reduce__(self) -> tuple[type[BetonSource], tuple[Path, str, str, str | None]]:
        return BetonSource, self.arguments  # a worker that is not forked opens the file, instead of getting its content

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.file} {self.file_name(index)}"

    def file_name(self, index: int) -> str:
        return f"sample {index}"

    def stored_names(self) -> None:
        """A beton keeps none."""

    def labels(self) -> Labels | None:
        wanted = self.label_field or DEFAULT_LABEL
        number = self.field_names.index(wanted) if wanted in self.field_names else None
        if number is None or self.types[number] != INT_TYPE:
            if self.label_field is None:
                return None
            raise ValueError(
                f"{self.file} has no field '{wanted}' of whole numbers (data.label_column); its fields are "
                f"{listed(self.field_names)}"
            )
        return Labels(np.array(self.fields[f"field{number}"], np.int64), None)

    def fingerprint(self) -> str:
        return f"{len(self)} images, rows {hashlib.sha256(self.rows.tobytes()).hexdigest()[:16]}"

    def readable(self) -> NDArray[np.bool_]:
        """(N,): False where a row does not fit what was allocated for it. Whether a JPEG file is intact only decoding
        tells."""
        rows = self.rows
        places = np.searchsorted(self.pointers, rows["pointer"]).clip(max=len(self.pointers) - 1)
        raw_bytes = rows["height"].astype(np.uint64) * rows["width"] * 3
        fits = (rows["mode"] == JPG) | ((rows["mode"] == RAW) & (self.sizes[places] == raw_bytes))
        inside = self.pointers[places] + self.sizes[places] <= len(self.content)
        return fits & inside & (self.pointers[places] == rows["pointer"]) & (raw_bytes > 0)

    def stored(self, index: int) -> bytes:
        return self.rows[index].tobytes() + self._data(index).tobytes()

    def open(self, index: int) -> Image.Image:
        mode, width, height, _ = (int(value) for value in self.rows[index])
        data = self._data(index)
        if mode == JPG:
            image = decode_image(BytesIO(data.tobytes()))
            if image.size != (width, height):
                raise ValueError(f"its JPEG is of {image.width} x {image.height} px, not of {width} x {height}")
            return image
        if mode != RAW or len(data) < height * width * 3:
            raise ValueError(f"its mode {mode} or its {len(data)} bytes are not those of {width} x {height} px")
        return Image.fromarray(np.array(data[: height * width * 3]).reshape(height, width, 3))

    def _data(self, index: int) -> NDArray[np.uint8]:
        """The bytes of a JPEG file, or pixels. ValueError where there are none."""
        pointer = self.rows[index]["pointer"]  # uint64, as the table: beside a Python int numpy would convert it all
        place = int(np.searchsorted(self.pointers, pointer))
        if place == len(self.pointers) or self.pointers[place] != pointer:
            raise ValueError(f"its data is not in the beton: nothing was allocated at {pointer}")
        return self.content[int(pointer) : int(pointer) + int(self.sizes[place])]


def row_type(field_types: list[int]) -> np.dtype[np.void]:
    """What one sample's row looks like: field0, field1, ..., each where a C compiler would put it."""
    return np.dtype([(f"field{number}", IN_A_ROW[kind]) for number, kind in enumerate(field_types)], align=True)


def beton_origin(file: Path) -> dict[str, object]:
    """What make-beton noted in the image field's arguments, which FFCV does not use: the source and the options.

    Empty where another program wrote the beton.
    """
    with file.open("rb") as beton:
        content = beton.read(HEADER.itemsize + FIELD.itemsize)[HEADER.itemsize :]
    if len(content) < FIELD.itemsize:
        return {}
    try:
        origin = json.loads(np.frombuffer(content, FIELD)[0]["arguments"].tobytes().rstrip(b"\0"))
    except ValueError:
        return {}
    return origin if isinstance(origin, dict) else {}


def _beton_file(root: Path, split: str, key: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at data.path {root}; give the one that holds {split}.beton")
    file = root / f"{split}.beton"
    if not file.is_file():
        found = sorted(path.stem for path in root.glob("*.beton"))
        near = nearest_name(split, found)
        hint = f"it has {listed(found)}; set {key}={near or found[0]}" if found else "it has no .beton files"
        raise MissingSplitError(f"no {split}.beton in data.path {root}; {hint}", found)
    return file
