"""Validations inside training: what evaluate.py does, on images that are the same every time."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqgan_accel.compat import uncompiled
from vqgan_accel.config import Config
from vqgan_accel.data.views import Batch
from vqgan_accel.distributed import num_processes, sum_over_processes
from vqgan_accel.evaluation.comparable import fingerprint, protocol
from vqgan_accel.evaluation.evaluate import Evaluation, evaluate_tokenizer, usage_histogram
from vqgan_accel.evaluation.figures import picture_of, reconstruction_grid
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.files import naming, write_json
from vqgan_accel.interruption import StopRequest
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.run_folder import CODEBOOK_PICTURE, VALIDATION, picture_file


class ValidationStopped(Exception):
    """A process was asked to stop, and this validation has no result."""


def until_stopped(
    batches: Iterable[Batch], stop_request: StopRequest, device: torch.device
) -> Generator[Batch, None, None]:
    """This process's batches. Before each, and after the last until no process has any left, all of them ask one
    another whether one is to stop."""
    with closing(iter(batches)) as own:  # type: ignore[type-var]  # loaders' are generators
        while True:
            batch = next(own, None)
            asked, left = bool(stop_request), batch is not None
            if num_processes() > 1:
                told = torch.tensor([asked, left], dtype=torch.int64)
                asked, left = sum_over_processes(told.to(device)).tolist()
            if asked:
                raise ValidationStopped
            if not left:
                return
            if batch is not None:
                yield batch


class Validation:
    """The whole validation split, and how it is measured."""

    def __init__(self, config: Config, batches: Iterable[Batch], metrics: Metrics, device: torch.device) -> None:
        self.config, self.batches, self.metrics, self.device = config, batches, metrics, device
        self.protocol: dict[str, Any] | None = None  # known from the first validation on

    def measure(self, tokenizer: ImageTokenizer, stop_request: StopRequest) -> Evaluation:
        """Every process calls it and gets the same results. ValidationStopped, on all of them, where one is asked to
        stop."""
        with (
            uncompiled(),  # or the last, smaller batch of the split would be compiled for
            closing(until_stopped(self.batches, stop_request, self.device)) as batches,
        ):
            evaluation = evaluate_tokenizer(
                tokenizer,
                batches,
                self.metrics,
                self.device,
                self.config.data.image_size,
                self.config.evaluation.grid_images,
                hash_pixels=self.protocol is None,
                same_images=self.protocol is not None,
            )
        if self.protocol is None:
            self.protocol = protocol(self.config, evaluation.num_images, evaluation.pixels_hash, self.metrics)
        return evaluation

    def record(self, run: Path, step: int, evaluation: Evaluation) -> dict[str, Image.Image]:
        """Keep in the run's folder what a report shows of it beside the results. Returns its pictures. One process
        calls it."""
        assert self.protocol is not None
        record = {"step": step, "protocol": self.protocol, "fingerprint": fingerprint(self.protocol)}
        write_json(run / VALIDATION, record | {"code_counts": evaluation.code_counts.tolist()}, indent=None)
        pictures = {"codebook": picture_of(usage_histogram(evaluation.code_counts))}
        files = {"codebook": run / CODEBOOK_PICTURE, "validation": picture_file(run, step)}
        if len(evaluation.originals):
            pictures["validation"] = reconstruction_grid(evaluation.originals, evaluation.reconstructions)
        for name, picture in pictures.items():
            with naming(files[name]):
                files[name].parent.mkdir(exist_ok=True)
                picture.save(files[name])
        return pictures
