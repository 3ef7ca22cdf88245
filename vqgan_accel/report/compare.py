"""Runs beside one another as tables: what differs in their configs, how far they came, and their scores, side by side
only where they were measured alike."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vqgan_accel.config import LOWER_IS_BETTER, UNITS, flat_config
from vqgan_accel.describe import describe
from vqgan_accel.report.run import Run, read_runs
from vqgan_accel.words import duration

Cell = float | int | str | None
Format = Literal["text", "csv", "markdown"]
OWN_NAMES = ("output_dir", "tracking.run_name")  # config keys that differ between any two runs
LAST, BEST = "Last validation in training", "Best validation in training"
NO_PROTOCOL = "measured by a version that kept no protocol: `vqgan-accel evaluate` it to compare"


class Row(NamedTuple):
    name: str
    cells: list[Cell]  # one for each run; None: it has no such thing
    best: float | None = None  # of a score, where several runs have it


class Table(NamedTuple):
    title: str
    rows: list[Row]
    note: str = ""

    def columns(self) -> list[int]:
        """The runs of which it says anything."""
        number = max((len(row.cells) for row in self.rows), default=0)
        return [place for place in range(number) if any(row.cells[place] is not None for row in self.rows)]


class Scores(NamedTuple):
    """Of one measurement of one run."""

    results: dict[str, float]
    protocol: dict[str, Any]  # empty: not on record
    fingerprint: str
    place: str  # at which step, or of which checkpoint


def compare(folders: Sequence[Path], form: Format = "text") -> str:
    """The tables of one or several runs, as text for a terminal, CSV (section, name, one column for each run, numbers
    unrounded) or Markdown. FileNotFoundError where a folder is no run."""
    runs = read_runs(folders)
    names, found = [run.name for run in runs], tables(runs)
    return {"text": as_text, "csv": as_csv, "markdown": as_markdown}[form](names, found)


def tables(runs: Sequence[Run]) -> list[Table]:
    return [fact_table(runs), *config_tables(runs), *score_tables(runs)]


def fact_table(runs: Sequence[Run]) -> Table:
    """What was trained on what, how far, and on which machine."""
    rows: dict[str, list[Cell]] = {
        "folder": [str(run.folder) for run in runs],
        "state": [state(run) for run in runs],
        "time spent": [duration(run.seconds) if run.clock else None for run in runs],
        "images/s": [run.images_per_second for run in runs],
        "TFLOP/s of each device": [run.of_clock("tflops") for run in runs],
        "share of its bfloat16 rate (MFU)": [run.of_clock("mfu") for run in runs],
        "most GPU memory (GiB)": [run.of_clock("peak_memory", max) for run in runs],
        "data": [run.config.data.path if run.config else None for run in runs],
        **{key: [_last_start(run).get(key) for run in runs] for key in ("training_images", "validation_images")},
        **{key: [_last_start(run).get(key) for run in runs] for key in ("processes", "device", "mixed_precision")},
    }
    rows |= model_facts(runs)
    versions = [_last_start(run).get("versions", {}) for run in runs]
    rows |= {package: [its.get(package) for its in versions] for one in versions for package in one}
    known = {name: cells for name, cells in rows.items() if any(cell for cell in cells)}
    return Table("Runs", [Row(name.replace("_", " "), cells) for name, cells in known.items()])


def model_facts(runs: Sequence[Run]) -> dict[str, list[Cell]]:
    found = [describe(run.config) if run.config else None for run in runs]

    def row(value: Callable[[dict[str, Any]], Cell]) -> list[Cell]:
        return [value(summary) if summary else None for summary in found]

    return {
        "image size": row(lambda s: f"{s['image_size']} px"),
        "codes": row(_codes),
        "bits per pixel": row(lambda s: s["bits_per_pixel"]),
        "parameters": row(lambda s: f"{s['parameters']['tokenizer']:,} + {s['parameters']['discriminator']:,} of D"),
        "GFLOP per image": row(lambda s: sum(s["gflop_per_image"].values())),
    }


def _codes(summary: dict[str, Any]) -> str:
    height, width = summary["latent_grid"]
    each = f" x {several}" if (several := summary["codes_per_position"]) > 1 else ""
    return f"{height} x {width}{each} of {summary['num_codes']} ({summary['quantizer']})"


def state(run: Run) -> str:
    if run.total_steps is None or run.step < run.total_steps:
        return f"at step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
    return f"finished, {run.step:,} steps"


def config_tables(runs: Sequence[Run]) -> list[Table]:
    """The keys in which the configs differ; nothing for a single run."""
    if len(runs) < 2:
        return []
    configs = [flat_config(run.config) if run.config else {} for run in runs]
    unreadable = ", ".join(run.name for run in runs if run.config is None)
    rows = [
        Row(key, [config.get(key) for config in configs])
        for key in dict.fromkeys(key for config in configs for key in config)
        if key not in OWN_NAMES and len({config.get(key) for config in configs if config}) > 1
    ]
    note = f"{unreadable}: a config of another version, which cannot be read" if unreadable else ""
    return [Table("Differences of the configs", rows, note or ("" if rows else "none"))]


def score_tables(runs: Sequence[Run]) -> list[Table]:
    """For each measurement a table of the runs with the first one's protocol, and one for each other protocol, which
    says in what it differs."""
    measured = [scores_of(run) for run in runs]
    if all(scores.get(BEST) == scores.get(LAST) for scores in measured):
        measured = [{title: mine for title, mine in scores.items() if title != BEST} for scores in measured]
    found = []
    for title in dict.fromkeys(title for scores in measured for title in scores):
        groups: dict[str, list[int]] = {}  # fingerprint -> the runs' numbers; one without is alone
        for number, scores in enumerate(measured):
            if title in scores:
                groups.setdefault(scores[title].fingerprint or f"none on record ({number})", []).append(number)
        first = measured[next(iter(groups.values()))[0]][title]
        for key, members in groups.items():
            mine = measured[members[0]][title]
            note = why_not(first, mine) if mine.fingerprint != first.fingerprint or not mine.protocol else ""
            heading = title + (f", protocol {key}" if mine.fingerprint else "")
            found.append(Table(heading, _score_rows(measured, title, members, len(runs)), note))
    return found


def scores_of(run: Run) -> dict[str, Scores]:
    """Last and best validation in training, and what `evaluate` measured of each split."""
    found: dict[str, Scores] = {}
    validations = [line for line in run.lines if any(name.startswith("validation/") for name in line)]
    protocol, key = run.validation.get("protocol", {}), run.validation.get("fingerprint", "")
    chosen = {LAST: validations[-1:]}
    if run.config:
        metric = run.config.training.best_metric
        sign = -1 if metric in LOWER_IS_BETTER else 1
        usable = [line for line in validations if isinstance(line.get(f"validation/{metric}"), int | float)]
        best = max(usable, key=lambda line: sign * line[f"validation/{metric}"], default=None)
        chosen |= {BEST: [best] if best else []}
    for title, lines in chosen.items():
        for line in lines:
            results = {k.removeprefix("validation/"): v for k, v in line.items() if k.startswith("validation/")}
            found[title] = Scores(results, protocol, key, f"step {line['step']:,}")
    for split, report in run.evaluations.items():
        place = Path(report.get("checkpoint", ""))
        protocol, key = report.get("protocol", {}), report.get("fingerprint", "")
        found[f"Evaluation on {split}"] = Scores(report["results"], protocol, key, "/".join(place.parts[-2:]))
    return found


def why_not(first: Scores, other: Scores) -> str:
    """In what two measurements differ that must not stand side by side."""
    if not other.protocol or not first.protocol:
        return NO_PROTOCOL
    keys = [key for key in {**first.protocol, **other.protocol} if first.protocol.get(key) != other.protocol.get(key)]
    told = [
        f"{key.replace('_', ' ')} {shown(other.protocol.get(key))}, not {shown(first.protocol.get(key))}"
        for key in keys
    ]
    return f"does not compare with the table above: {'; '.join(told)}"


def as_text(names: Sequence[str], found: Sequence[Table]) -> str:
    lines: list[str] = []
    for table in found:
        columns = table.columns()
        cells = [["", *(names[place] for place in columns)]]
        cells += [[row.name, *(shown(row.cells[place]) for place in columns)] for row in table.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [table.title] + ([f"  {table.note}"] if table.note else [])
        for line in cells if table.rows else []:
            lines.append(
                "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            )
        lines.append("")
    return "\n".join(lines)


def as_csv(names: Sequence[str], found: Sequence[Table]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["section", "name", *names])
    for table in found:
        writer.writerows([table.title, row.name, *row.cells] for row in table.rows)
    return text.getvalue()


def as_markdown(names: Sequence[str], found: Sequence[Table]) -> str:
    lines: list[str] = []
    for table in found:
        columns = table.columns()
        lines += [f"### {table.title}", ""] + ([table.note, ""] if table.note else [])
        if table.rows:
            lines.append(_markdown_row(["", *(names[place] for place in columns)]))
            lines.append(_markdown_row(["---"] * (len(columns) + 1)))
        for row in table.rows:
            cells = [(row.cells[place], shown(row.cells[place])) for place in columns]
            lines.append(_markdown_row([row.name, *(f"**{text}**" if is_best(row, c) else text for c, text in cells)]))
        lines.append("")
    return "\n".join(lines)


def is_best(row: Row, cell: Cell) -> bool:
    return row.best is not None and cell == row.best


def _score_rows(measured: list[dict[str, Scores]], title: str, members: list[int], number: int) -> list[Row]:
    """The scores of the runs whose numbers are `members`, in columns of all runs."""
    mine = {member: measured[member][title] for member in members}
    rows = [Row("of", [mine[place].place if place in mine else None for place in range(number)])]
    for name in dict.fromkeys(name for scores in mine.values() for name in scores.results):
        cells: list[Cell] = [mine[place].results.get(name) if place in mine else None for place in range(number)]
        values = [cell for cell in cells if isinstance(cell, int | float)]
        best = (min if name in LOWER_IS_BETTER else max)(values) if len(values) > 1 else None
        unit = f" ({UNITS[name]})" if name in UNITS else ""
        rows.append(Row(f"{name}{unit}", cells, best))
    return rows


def _last_start(run: Run) -> dict[str, Any]:
    return run.starts[-1] if run.starts else {}


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)
