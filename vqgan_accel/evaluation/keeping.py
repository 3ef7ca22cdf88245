"""Reconstructions as files, for other people's evaluators: all of a split in its order, complete or absent."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from vqgan_accel.config import EvaluationConfig
from vqgan_accel.evaluation.pixels import reconstruction_levels
from vqgan_accel.files import naming

NAME = "reconstructions"


class Kept:
    """Each process writes its own images, one PNG or one file of bytes each, into a folder that all of them see."""

    def __init__(self, settings: EvaluationConfig, folder: Path) -> None:
        self.folder, self.kind = folder, settings.save_reconstructions
        self.protocol = settings.rules

    def add(self, reconstructions: Tensor, positions: Tensor) -> None:
        """reconstructions (B, 3, H, W) in [-1, 1] of the images at `positions` (B,) of the split"""
        levels = reconstruction_levels(self.protocol, reconstructions).permute(0, 2, 3, 1).cpu().numpy()
        with naming(self.folder):
            for image, position in zip(levels, positions.tolist(), strict=True):
                file = self.folder / f"{position:08}"
                if self.kind == "png":
                    Image.fromarray(image).save(file.with_suffix(".png"))
                else:
                    image.tofile(file)


@contextmanager
def keeping(settings: EvaluationConfig, output: Path, size: int, accelerator: Accelerator) -> Iterator[Kept | None]:
    """What takes in reconstructions of size x size pixels; None where evaluation.save_reconstructions is.

    At the end they are output/reconstructions.npz, or .png files in output/reconstructions, in place of earlier ones.
    """
    if settings.save_reconstructions is None:
        yield None
        return
    partial = output / f".{NAME}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield Kept(settings, partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if settings.save_reconstructions == "png":
            shutil.rmtree(output / NAME, ignore_errors=True)
            os.replace(partial, output / NAME)
        else:
            write_samples(output / f"{NAME}.npz", sorted(partial.iterdir()), size)
            shutil.rmtree(partial)


def write_samples(path: Path, files: list[Path], size: int) -> None:
    """An .npz with `arr_0`, uint8 (N, H, W, 3), of files of bytes, without ever holding all of them."""
    partial = path.with_name(f".{path.name}.partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, 3)}
    with naming(path):
        with zipfile.ZipFile(partial, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for file in files:
                array.write(file.read_bytes())
        os.replace(partial, path)
