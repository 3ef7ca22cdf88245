"""Where a run keeps what. (How files are written: files.py. Which tokenizer of a run is meant: models/finding.py.)

RUN/config.yaml                    the resolved config
RUN/metrics.jsonl                  one JSON object per logged step
RUN/clock.jsonl                    how long those steps took, by the clock of the machine
RUN/starts.jsonl                   one JSON object for each time that training was started: machine, versions, images
RUN/status.json                    how its last training ended, or that it is under way; see status.py
RUN/validation.json                the last validation: its protocol, and how often it used each code
RUN/report.html                    all of it to be looked at, written at the end of training
RUN/.lock                          held by the process that trains there
RUN/wandb_id                       the id of the run on wandb, where it is tracked there
RUN/images/step_00001000.png       validation originals over reconstructions
RUN/codebook.png                   how evenly the last validation used the codes
RUN/checkpoints/step_00001000/     see training/checkpoint.py; `latest` and `best` are links to such folders
RUN/evaluation/...                 what evaluate.py measured
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CLOCK = "clock.jsonl"
STARTS = "starts.jsonl"
STATUS = "status.json"
VALIDATION = "validation.json"
REPORT = "report.html"
CODEBOOK_PICTURE = "codebook.png"  # the uses of the codes in the last validation
PICTURES = "images"  # a folder of one for each validation
WANDB_ID = "wandb_id"  # of the run there, so that a resumed one goes on in the same curves
LATEST, BEST = "latest", "best"  # links to checkpoints, beside them
TOKENIZER = "tokenizer"  # folders inside a checkpoint
TOKENIZER_EMA = "tokenizer_ema"
TOKENIZER_CONFIG = "config.json"  # files there, named so by diffusers
WEIGHTS_PATTERN = "diffusion_pytorch_model*.safetensors*"
DISCRIMINATOR = "discriminator.safetensors"  # a file there
EVALUATION = "evaluation"  # a folder of one for each split
EVALUATION_RESULTS = "metrics.json"  # a file there


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def picture_file(run: Path, step: int) -> Path:
    """Of a validation: originals over reconstructions."""
    return run / PICTURES / f"{step_name(step)}.png"


def pictures(run: Path) -> dict[int, Path]:
    """Step of a validation -> its picture, in the order of the steps."""
    found = [file for file in (run / PICTURES).glob("step_*.png") if re.fullmatch(r"step_\d{8,}", file.stem)]
    return {
        step_of(file.with_suffix("")): file for file in sorted(found, key=lambda file: step_of(file.with_suffix("")))
    }


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = checkpoints_folder(run)
    try:
        names = os.listdir(folder)  # not glob, which takes a folder that cannot be read for an empty one
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [folder / name for name in names if re.fullmatch(r"step_\d{8,}", name) and (folder / name).is_dir()]
    return sorted(found, key=step_of)
