"""What a run says: metrics.jsonl as the record of truth, the clock beside it, trackers through Accelerate, messages
above the progress bar."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tqdm import tqdm

from vqgan_accel.config import Config, TrackingConfig, flat_config
from vqgan_accel.distributed import decided_by_main
from vqgan_accel.extras import EXTRAS, is_installed
from vqgan_accel.files import append_line, read_lines, sync, write_atomically
from vqgan_accel.run_folder import CLOCK, METRICS, WANDB_ID

IN_A_LINE = {  # of the values of a step, where it has them, and what they are called there
    "total": "loss",
    "l1": "l1",
    "l2": "l2",
    "perceptual": "perceptual",
    "generator": "G",
    "discriminator": "D",
    "adversarial_weight": "weight of G",
    "epoch_codebook_usage": "codes in use, %",
    "recent_codebook_usage": "codes in use, %",
    "reinitialised_codes": "replaced codes",
}


class Tracking:
    """Only the main process writes; every rank may call.

    metrics.jsonl must be written, or the run stops with an OSError. A tracker that fails is left out from then on.
    """

    def __init__(
        self, accelerator: Accelerator, config: Config, run: Path, resumed_step: int, total_steps: int
    ) -> None:
        self.accelerator = accelerator
        self.file, self.clock = run / METRICS, run / CLOCK
        decided_by_main(lambda: trim_lines(self.file, resumed_step))
        decided_by_main(lambda: trim_lines(self.clock, resumed_step))
        if config.tracking.trackers:
            decided_by_main(lambda: start_trackers(accelerator, config, run, resumed_step))
        self.bar = tqdm(
            total=total_steps,
            initial=resumed_step,
            unit="step",
            disable=None if accelerator.is_main_process else True,  # None: where nobody looks at a terminal
            dynamic_ncols=True,
        )

    def log(self, step: int, values: dict[str, float], wall_clock: dict[str, float] | None = None) -> None:
        """One line of metrics.jsonl and one entry in each tracker. What the clock says goes into a file of its own:
        metrics.jsonl of a resumed run holds the bytes of an uninterrupted one's."""
        if self.accelerator.is_main_process:
            append_line(self.file, {"step": step, **{name: _number(value) for name, value in values.items()}})
            if wall_clock:
                append_line(self.clock, {"step": step, **wall_clock})
        self._tell_trackers(lambda tracker: tracker.log(values | (wall_clock or {}), step=step))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        def show(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [picture]}, step=step)

        self._tell_trackers(show)

    def say(self, message: str) -> None:
        """A line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def advance(self, postfix: dict[str, str]) -> None:
        if postfix:
            self.bar.set_postfix(postfix, refresh=False)
        self.bar.update()

    def sync(self) -> None:
        """Make what was logged durable: a checkpoint of this step promises it. One process calls it."""
        if self.file.exists():
            sync(self.file)
        self._tell_trackers(lambda tracker: tracker.writer.flush() if tracker.name == "tensorboard" else None)

    def close(self) -> None:
        """Every rank waits for what the trackers still have to send: a launcher may end the last process."""
        self.bar.close()
        decided_by_main(lambda: self._tell_trackers(lambda tracker: tracker.finish()))

    def _tell_trackers(self, tell: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                tell(tracker)
            except Exception as error:  # whatever a service, a network or a full disk makes of it: training goes on
                self.accelerator.trackers.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                self.say(f"tracker {tracker.name} failed and is left out from here on ({reason}); {self.file} goes on")


def log_line(step: int, total_steps: int, values: dict[str, float], clock: dict[str, float], left: str) -> str:
    """What the terminal shows of a logged step. `clock`: Pace.report's; `left`: Pace.time_left's."""
    numbers = ", ".join(f"{word} {values[name]:.4g}" for name, word in IN_A_LINE.items() if name in values)
    parts = [f"step {step:,} of {total_steps:,}: {numbers}"]
    if clock["step_time"]:
        waits = clock["data_time"] / clock["step_time"]
        images = f"{clock['images_per_second']:{',.0f' if clock['images_per_second'] >= 10 else '.2g'}}"
        speed = f"{clock['step_time']:.3g} s a step ({images} images/s)"
        parts.append(speed + (f", {waits:.0%} of it for images" if waits > 0.01 else ""))
    return "; ".join([*parts, left] if left else parts)


def start_trackers(accelerator: Accelerator, config: Config, run: Path, resumed_step: int) -> None:
    """A resumed run goes on in its old curves. What its interrupted self had logged past `resumed_step` is the same as
    what comes again: TensorBoard replaces it, wandb keeps the first. One process calls it."""
    tracking = config.tracking
    settings: dict[str, dict[str, object]] = {"tensorboard": {"purge_step": resumed_step + 1} if resumed_step else {}}
    if "wandb" in tracking.trackers:
        name = tracking.run_name or run.name
        settings["wandb"] = {"name": name, "mode": tracking.wandb_mode, "dir": str(run)}
        settings["wandb"] |= {"id": wandb_id(run), "resume": "allow"}
    try:
        accelerator.init_trackers(tracking.project, config=flat_config(config), init_kwargs=settings)
    except Exception as error:
        raise ValueError(
            f"tracking.trackers {', '.join(tracking.trackers)} cannot be started: {' '.join(str(error).split())}"
        ) from error


def wandb_id(run: Path) -> str:
    """The id of this run on wandb, made when it is first asked for."""
    file = run / WANDB_ID
    if not file.exists():
        write_atomically(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


def check_trackers(config: TrackingConfig) -> None:
    """ValueError where a tracker's package is not installed."""
    for name in config.trackers:
        if not is_installed(name):
            raise ValueError(
                f"tracking.trackers asks for {name}, which is not installed: pip install "
                f"'vqgan_accel[{EXTRAS[name][0]}]', or remove it"
            )


def trim_lines(file: Path, last_step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint that is resumed, and a half-written last line."""
    if file.exists():
        kept = [line for line in read_lines(file) if isinstance(line.get("step"), int) and line["step"] <= last_step]
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))


def _number(value: float) -> float | str:
    """JSON has no nan or inf; they are written as strings."""
    return value if math.isfinite(value) else str(value)
