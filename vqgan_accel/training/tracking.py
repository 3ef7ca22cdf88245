"""What a run says: metrics.jsonl as the record of truth, trackers through Accelerate, messages beside the progress
bar."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from vqgan_accel.config import Config, TrackingConfig, flat_config
from vqgan_accel.run_folder import METRICS, write_atomically


class Tracking:
    """Only the main process writes; every rank may call."""

    def __init__(
        self, accelerator: Accelerator, config: Config, run: Path, resumed_step: int, total_steps: int
    ) -> None:
        self.accelerator = accelerator
        self.file = run / METRICS
        self.bar = tqdm(
            total=total_steps,
            initial=resumed_step,
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        if accelerator.is_main_process:
            trim_metrics(self.file, resumed_step)
        if config.tracking.trackers:
            name = config.tracking.run_name or run.name
            accelerator.init_trackers(
                config.tracking.project,
                config=flat_config(config),
                init_kwargs={"wandb": {"name": name, "mode": config.tracking.wandb_mode, "dir": str(run)}},
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one entry in each tracker."""
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, **{name: _number(value) for name, value in values.items()}}) + "\n"
                )
        self.accelerator.log(values, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [picture]}, step=step)

    def say(self, message: str) -> None:
        """A line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def advance(self, postfix: dict[str, str]) -> None:
        if postfix:
            self.bar.set_postfix(postfix, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        if self.accelerator.trackers:
            self.accelerator.end_training()


def check_trackers(config: TrackingConfig) -> None:
    """ValueError where a tracker's package is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"tracking.trackers asks for {name}, which is not installed: pip install "
                f"'vqgan_accel[{name}]', or remove it"
            )


def trim_metrics(file: Path, last_step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint that is resumed, and a half-written last line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_atomically(file, "".join(kept))


def _number(value: float) -> float | str:
    """JSON has no nan or inf; they are written as strings."""
    return value if math.isfinite(value) else str(value)
