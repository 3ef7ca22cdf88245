"""What a run folder says, read as it is: of a run that is still at work, was interrupted, or is of an older version."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqgan_accel.config import Config, load_config
from vqgan_accel.files import read_lines
from vqgan_accel.run_folder import CLOCK, CONFIG, EVALUATION, EVALUATION_RESULTS, METRICS, STARTS, VALIDATION, pictures

Points = list[tuple[int, float]]  # (step, value), in the order of the steps


@dataclass(frozen=True)
class Run:
    name: str  # what tells it from the others
    folder: Path
    config: Config | None  # None: of a version that had other keys
    config_text: str
    lines: list[dict[str, Any]]  # of metrics.jsonl
    clock: list[dict[str, Any]]
    starts: list[dict[str, Any]]  # empty for runs of version 0.1.0 and before
    validation: dict[str, Any]  # of the last one; empty where there was none, and in older runs
    evaluations: dict[str, dict[str, Any]]  # split -> evaluate's report
    pictures: dict[int, Path]  # step -> the validation's picture

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def total_steps(self) -> int | None:
        return self.starts[-1]["total_steps"] if self.starts else None

    @property
    def seconds(self) -> float:
        """Of the clock on the wall, spent on the steps that were kept."""
        return sum(line["seconds"] for line in self.clock)

    @property
    def images_per_second(self) -> float | None:
        """The median over the logged intervals; of older runs too, whose clock has the seconds of a step alone."""
        times = [line["step_time"] for line in self.clock if line["step_time"]]
        return self.config.training.total_batch_size / statistics.median(times) if self.config and times else None

    def of_clock(self, name: str, of: Callable[[list[float]], float] = statistics.median) -> float | None:
        """Of a value that clock.jsonl may have, by default the median."""
        values = [line[name] for line in self.clock if name in line]
        return of(values) if values else None

    def curves(self) -> dict[str, Points]:
        """Metric -> its values; what was not finite is left out."""
        found: dict[str, Points] = {}
        for line in [*self.lines, *self.clock]:
            for name, value in line.items():
                if name not in ("step", "epoch", "seconds") and isinstance(value, int | float):
                    found.setdefault(name, []).append((line["step"], float(value)))
        return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """FileNotFoundError where one is no run folder; ValueError where one is named twice."""
    resolved = [folder.resolve() for folder in folders]
    if twice := next((folder for folder in resolved if resolved.count(folder) > 1), None):
        raise ValueError(f"{twice} is named twice; give different runs")
    return [read_run(folder, name) for folder, name in zip(folders, short_names(resolved), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no run: it has no {CONFIG}; give the output_dir of a training")
    try:
        config = load_config(folder / CONFIG)
    except ValueError:
        config = None
    reports = {file.parent.name: _read_json(file) for file in folder.glob(f"{EVALUATION}/*/{EVALUATION_RESULTS}")}
    return Run(
        name=name,
        folder=folder,
        config=config,
        config_text=(folder / CONFIG).read_text(encoding="utf-8", errors="replace"),
        lines=[line for line in read_lines(folder / METRICS) if isinstance(line.get("step"), int)],
        clock=[line for line in read_lines(folder / CLOCK) if {"step", "seconds", "step_time"} <= line.keys()],
        starts=[line for line in read_lines(folder / STARTS) if "total_steps" in line],
        validation=_read_json(folder / VALIDATION),
        evaluations={split: found for split, found in sorted(reports.items()) if "results" in found},
        pictures=pictures(folder),
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, of as many parts as it takes to tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [os.fspath(folder) for folder in folders]


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where there is none, or where it was not written to its end."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
