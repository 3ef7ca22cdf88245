"""The report: one HTML file with everything in it, of one run or of several over each other."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from vqgan_accel import __version__
from vqgan_accel.evaluation.figures import grid_tiles
from vqgan_accel.files import naming, write_atomically
from vqgan_accel.report.charts import COLOURS, sections
from vqgan_accel.report.compare import config_tables, fact_table, is_best, score_tables, shown, state
from vqgan_accel.report.run import Run, read_runs
from vqgan_accel.run_folder import REPORT
from vqgan_accel.words import duration

SHOWN_STEPS = 5  # validations of which reconstructions are shown
SHOWN_IMAGES = 8
LOSSLESS_SIDE = 64  # pixels; larger images are shown as JPEG
SMALLEST_SHOWN = 96  # pixels of a tile on the page


class Strip(NamedTuple):
    """One image and what became of it: (caption, data URI), the original first."""

    tiles: list[tuple[str, str]]


class Gallery(NamedTuple):
    strips: list[Strip]
    side: int  # pixels of a tile on the page
    note: str


def report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one or several runs and return where it is: `output`, by default report.html in the run, or
    here for several. It is written anew where it is there already.

    FileNotFoundError where a folder is no run, OSError where the page cannot be written.
    """
    runs = read_runs(folders)
    output = output or (runs[0].folder / REPORT if len(runs) == 1 else Path(REPORT))
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file, such as {output / REPORT}")
    with naming(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page(runs))
    return output


def page(runs: Sequence[Run]) -> str:
    return template().render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        runs=runs,
        colours=COLOURS,
        summaries=[summary(run) for run in runs],
        about=fact_table(runs),
        differences=config_tables(runs),
        scores=score_tables(runs),
        gallery=gallery(runs),
        sections=sections(runs),
        shown=shown,
        is_best=is_best,
    )


@functools.cache
def template() -> Template:
    environment = Environment(
        loader=PackageLoader("vqgan_accel.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html")


def summary(run: Run) -> str:
    """A run in a line."""
    parts = [state(run)]
    if run.clock:
        parts[0] += f" in {duration(run.seconds)}"
    if run.config:
        codes = run.config.quantizer
        several = f"{places} x " if (places := len(codes.codebook_sizes)) > 1 else ""
        parts += [f"{run.config.data.image_size} px", f"{several}{codes.num_codes:,} codes ({codes.type})"]
        parts += ["with a discriminator" if run.config.discriminator else "without a discriminator"]
        parts += [f"images of {run.config.data.path}"]
    return "; ".join(parts)


def gallery(runs: Sequence[Run]) -> Gallery | None:
    """Of one run its reconstructions over time, of several the same images through each; None without pictures."""
    shown = [run for run in runs if run.pictures and run.config]
    if not shown:
        return None
    if len(runs) == 1:
        return gallery_over_time(shown[0])
    return gallery_of_runs(shown)


def gallery_over_time(run: Run) -> Gallery:
    steps = evenly(list(run.pictures), SHOWN_STEPS)
    by_step = {step: tiles_of(run, step) for step in steps}
    number = min(SHOWN_IMAGES, *(len(tiles) for tiles in by_step.values()))
    strips = []
    for index in range(number):
        original = by_step[steps[-1]][index][0]
        made = [(f"step {step:,}", data_uri(by_step[step][index][1])) for step in steps]
        strips.append(Strip([("original", data_uri(original)), *made]))
    return Gallery(strips, side_of(run), "")


def gallery_of_runs(runs: Sequence[Run]) -> Gallery:
    """Runs whose validation images are others than the first one's are left out, and named."""
    last = {run.name: tiles_of(run, max(run.pictures)) for run in runs}
    first = last[runs[0].name]
    alike: list[Run] = []
    others: list[Run] = []
    for run in runs:
        same = all(mine[0].tobytes() == its[0].tobytes() for mine, its in zip(last[run.name], first, strict=False))
        (alike if same and last[run.name] else others).append(run)
    number = min(SHOWN_IMAGES, *(len(last[run.name]) for run in alike))
    strips = []
    for index in range(number):
        made = [(f"{run.name}, step {max(run.pictures):,}", data_uri(last[run.name][index][1])) for run in alike]
        strips.append(Strip([("original", data_uri(first[index][0])), *made]))
    note = ", ".join(run.name for run in others)
    note += ": validated on other images, or of another size" if others else ""
    return Gallery(strips, side_of(runs[0]), note)


def tiles_of(run: Run, step: int) -> list[tuple[Image.Image, Image.Image]]:
    assert run.config is not None
    with Image.open(run.pictures[step]) as grid:
        return grid_tiles(grid, run.config.data.image_size)


def side_of(run: Run) -> int:
    assert run.config is not None
    return max(SMALLEST_SHOWN, run.config.data.image_size)


def evenly(steps: Sequence[int], number: int) -> list[int]:
    """No more than `number` of them, the first and the last among these."""
    if len(steps) <= number:
        return list(steps)
    return [steps[place * (len(steps) - 1) // (number - 1)] for place in range(number)]


def data_uri(image: Image.Image) -> str:
    buffer = BytesIO()
    kind, options = ("png", {}) if image.width <= LOSSLESS_SIDE else ("jpeg", {"quality": 92, "subsampling": 0})
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
