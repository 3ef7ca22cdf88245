"""Curves as SVG that takes its colours from the page, light or dark, and its points as data for a reader's pointer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

from vqgan_accel.config import UNITS
from vqgan_accel.report.run import Points, Run

WIDTH, HEIGHT = 380, 210  # units of the picture, near pixels
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 8, 24  # around the plotted area
MOST_POINTS = 400  # of a curve; of more the smallest and the largest of each stretch are kept
FEW_POINTS = 30  # up to so many each has a dot
LOG_FROM = 20.0  # largest over smallest value of a curve that is drawn on a logarithmic scale
COLOURS = 8  # that the page has for curves

# metric -> (section, chart, what tells it from others in the chart); others are drawn by their own names
KNOWN = {
    "total": ("Losses", "Total loss", ""),
    "l1": ("Losses", "L1", ""),
    "l2": ("Losses", "L2", ""),
    "perceptual": ("Losses", "Perceptual distance", ""),
    "codebook_loss": ("Losses", "Codebook loss", ""),
    "commitment_loss": ("Losses", "Commitment loss", ""),
    "entropy_loss": ("Losses", "Entropy loss", ""),
    "kl_loss": ("Losses", "KL loss", ""),
    "generator": ("Adversarial", "Generator loss", ""),
    "discriminator": ("Adversarial", "Discriminator loss", ""),
    "logits_real": ("Adversarial", "Logits of the discriminator", "images"),
    "logits_fake": ("Adversarial", "Logits of the discriminator", "reconstructions"),
    "adversarial_weight": ("Adversarial", "Weight of the generator loss (with lambda)", ""),
    "r1": ("Adversarial", "R1: squared gradient norm", ""),
    "grad_norm_tokenizer": ("Optimization", "Gradient norm", "tokenizer"),
    "grad_norm_discriminator": ("Optimization", "Gradient norm", "discriminator"),
    "learning_rate": ("Optimization", "Learning rate", ""),
    "bad_steps": ("Optimization", "Skipped steps so far", ""),
    "epoch_codebook_usage": ("Codebook", "Codes in use, % (training epoch)", ""),
    "epoch_perplexity": ("Codebook", "Perplexity (training epoch)", ""),
    "recent_codebook_usage": ("Codebook", "Codes in use, % (since the last count)", ""),
    "recent_perplexity": ("Codebook", "Perplexity (since the last count)", ""),
    "codebook_norm": ("Codebook", "Mean length of the codes' vectors", ""),
    "quantization_error": ("Codebook", "Squared distance of latents to their codes, relative", ""),
    "reinitialised_codes": ("Codebook", "Codes that were replaced", ""),
    "step_time": ("Speed", "Seconds a step", "in all"),
    "data_time": ("Speed", "Seconds a step", "waiting for images"),
    "images_per_second": ("Speed", "Images a second", ""),
    "tflops": ("Speed", "TFLOP a second, each device", ""),
    "mfu": ("Speed", "Share of the device's bfloat16 rate (MFU)", ""),
    "peak_memory": ("Speed", "Most GPU memory so far, GiB", ""),
    "skipped_images": ("Speed", "Unreadable images so far", ""),
}
SECTIONS = ("Validation", "Losses", "Adversarial", "Codebook", "Optimization", "Speed", "Others")
ALWAYS_ZERO = ("bad_steps", "skipped_images")  # of which no curve is drawn while there are none


class Line(NamedTuple):
    label: str
    colour: int  # 0 to COLOURS - 1
    dashed: bool
    points: Points  # at least one, in the order of the steps


class Chart(NamedTuple):
    title: str
    lines: list[Line]
    svg: Markup
    data: list[dict[str, Any]]  # {label, x, y} of each line, for the pointer


def sections(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Section -> the charts of all that the runs logged, each run in a colour of its own."""
    found: dict[tuple[str, str], list[Line]] = {}
    curves = [run.curves() for run in runs]
    for name in sorted(dict.fromkeys(name for curve in curves for name in curve), key=_place):
        if name in ALWAYS_ZERO and not any(value for curve in curves for _, value in curve.get(name, [])):
            continue
        section, title, part = known(name)
        lines = found.setdefault((section, title), [])
        dashed = bool(lines)  # the second metric of a chart
        for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            if name in curve:
                label = ", ".join(filter(None, [run.name if len(runs) > 1 else "", part]))
                lines.append(Line(label, number % COLOURS, dashed, curve[name]))
    charts: dict[str, list[Chart]] = {section: [] for section in SECTIONS}
    for (section, title), lines in found.items():
        charts[section].append(chart(title, lines))
    if counted := [run for run in runs if run.validation.get("code_counts")]:
        charts["Codebook"].append(share_of_codes(counted, runs))
    return {section: some for section, some in charts.items() if some}


def known(name: str) -> tuple[str, str, str]:
    if name.startswith("validation/"):
        metric = name.removeprefix("validation/")
        return "Validation", metric.replace("_", " ") + (f", {UNITS[metric]}" if metric in UNITS else ""), ""
    if (place := re.fullmatch(r"(\w+)_(\d+)", name)) and place[1] in KNOWN:  # of one of several codebooks
        section, title, _ = KNOWN[place[1]]
        return section, title, f"codebook {place[2]}"
    return KNOWN.get(name, ("Others", name.replace("_", " "), ""))


def chart(title: str, lines: list[Line]) -> Chart:
    kept = [line._replace(points=thinned(line.points)) for line in lines]
    data = [{"label": line.label, "x": [s for s, _ in line.points], "y": [v for _, v in line.points]} for line in kept]
    return Chart(title, kept, svg(title, kept), data)


def thinned(points: Points) -> Points:
    """No more than MOST_POINTS, in which no peak is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    kept: Points = []
    for number in range(stretches):
        part = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def svg(title: str, lines: Sequence[Line]) -> Markup:
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    logarithmic = min(values) > 0 and max(values) > LOG_FROM * min(values)
    x = scale(min(0, *steps), max(steps), LEFT, WIDTH - RIGHT, False)
    y = scale(*padded(min(values), max(values), logarithmic), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-x="{x.low} {x.high} {x.start} {x.end}">'
    ]
    for value in y.ticks():
        at = y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x.ticks():
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for line in lines:
        path = "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in line.points)
        classes = f"line c{line.colour}" + (" dashed" if line.dashed else "")
        parts.append(f'<path class="{classes}" d="{path}"><title>{escape(line.label)}</title></path>')
        if len(line.points) <= FEW_POINTS:
            parts += [
                f'<circle class="c{line.colour}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.2"/>' for s, v in line.points
            ]
    parts.append(f'<path class="pointer" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>')
    return Markup("".join(parts))  # numbers, and text that was escaped


class Scale(NamedTuple):
    """From values between low and high to places between start and end."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic and self.high > 10 * self.low:
            subs = (1.0, 2.0, 5.0) if self.high < 1000 * self.low else (1.0,)
            found: Iterable[float] = LogLocator(10, subs=subs, numticks=8).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        return [float(value) for value in found if self.low <= value <= self.high]


def scale(low: float, high: float, start: float, end: float, logarithmic: bool) -> Scale:
    return Scale(low, high if high > low else low + 1, start, end, logarithmic)


def padded(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    """A little more than what is shown, so that no curve runs along the edge."""
    if logarithmic:
        more = (high / low) ** 0.04
        return low / more, high * more
    more = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return low - more, high + more


def number(value: float) -> str:
    """Short enough for an axis: 0.25, 1.5e-05, 12k, 1.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-")


def share_of_codes(counted: Sequence[Run], runs: Sequence[Run]) -> Chart:
    """How evenly the last validation of each run used its codes."""
    lines = []
    for run in counted:
        counts = sorted(run.validation["code_counts"], reverse=True)
        tokens = max(1, sum(counts))
        shares = [(rank, 100 * uses / tokens) for rank, uses in enumerate(counts, 1)]
        lines.append(Line(run.name if len(runs) > 1 else "", runs.index(run) % COLOURS, False, shares))
    return chart("Share of each code in all tokens, %, most used first", lines)


def _place(name: str) -> int:
    """As in KNOWN; others come after these, in the order in which they were logged."""
    order = list(KNOWN)
    return order.index(name) if name in order else len(order)
