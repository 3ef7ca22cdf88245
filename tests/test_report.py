"""Reports and comparisons: the numbers on the page are those of the run, scores stand side by side only where they were
measured alike, and nothing that a run lacks or says can break the page."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import metrics, train_until
from tiny import DISCRIMINATOR, QUANTIZERS, SIZE, SPLITS, having, tiny_config, write_images

from vqgan_accel.cli import main
from vqgan_accel.config import LOWER_IS_BETTER, METRIC_RESULTS
from vqgan_accel.evaluation.evaluate import evaluate
from vqgan_accel.evaluation.figures import grid_tiles, reconstruction_grid, to_uint8
from vqgan_accel.interruption import TrainingInterruptedError
from vqgan_accel.report import page
from vqgan_accel.report.charts import (
    LEFT,
    MOST_POINTS,
    RIGHT,
    WIDTH,
    Line,
    chart,
    known,
    number,
    padded,
    scale,
    sections,
    thinned,
)
from vqgan_accel.report.compare import NO_PROTOCOL, compare, fact_table, score_tables
from vqgan_accel.report.run import Run, read_run, read_runs, short_names
from vqgan_accel.run_folder import pictures
from vqgan_accel.training.loop import train

VALIDATION = ["l2", "psnr", "ssim", "codebook"]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """a and b on the same images, c on others; and `old`, which a version without the new files left behind."""
    folder = tmp_path_factory.mktemp("runs")
    gan = DISCRIMINATOR | {"start": "2 steps"}
    shared: dict[str, Any] = {"training": {"max_steps": 4, "log_every": 1, "validate_every": "2 steps"}}
    a = train(tiny_config(folder, output_dir=str(folder / "a"), discriminator=gan, **shared))
    b = train(tiny_config(folder, output_dir=str(folder / "b"), quantizer={"type": "ema"}, seed=1, **shared))
    write_images(folder / "others" / "train", 8, seed=7)
    write_images(folder / "others" / "validation", 3, seed=8)
    other = {"data": {"path": str(folder / "others")}}
    c = train(tiny_config(folder, output_dir=str(folder / "c"), **shared, **other))
    old = shutil.copytree(a, folder / "old", symlinks=True)
    for name in ("starts.jsonl", "clock.jsonl", "validation.json", "report.html"):
        (old / name).unlink()
    yield {"a": a, "b": b, "c": c, "old": old}


# ---- what a training leaves behind


def test_the_record_of_a_validation_is_what_evaluate_finds_of_the_same_tokenizer(three: dict[str, Path]) -> None:
    run, record = three["a"], json.loads((three["a"] / "validation.json").read_text())
    report = evaluate(run, overrides=[f"evaluation.metrics=[{','.join(VALIDATION)}]"], output=run.parent / "evaluated")
    assert record["protocol"] == report["protocol"] and record["fingerprint"] == report["fingerprint"]
    assert record["step"] == 4 and sum(record["code_counts"]) == SPLITS["validation"] * (SIZE // 4) ** 2
    last = [line for line in metrics(run) if "validation/psnr" in line][-1]
    assert {name: last[f"validation/{name}"] for name in report["results"]} == pytest.approx(report["results"])


def test_a_start_is_recorded_with_its_machine_and_versions(three: dict[str, Path]) -> None:
    (start,) = [json.loads(line) for line in (three["a"] / "starts.jsonl").read_text().splitlines()]
    assert start["step"] == 0 and start["total_steps"] == 4 and start["processes"] == 1
    assert start["versions"]["torch"] == torch.__version__ and start["training_images"].startswith("8 images, names ")
    assert start["validation_images"].startswith("3 images, names ")


@pytest.mark.seconds
def test_the_clock_is_kept_apart_and_cut_with_the_metrics_where_a_run_is_resumed(tmp_path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "log_every": 1, "checkpoint_every": "2 steps"}
    config = tiny_config(tmp_path, training=settings)
    with pytest.raises(TrainingInterruptedError):
        train_until(config, 3)
    run = tmp_path / "run"
    assert not (run / "report.html").exists()  # there may be seconds left
    shutil.rmtree(run / "checkpoints" / "step_00000003")  # as if it had been killed in that step
    train(config, resume=True)
    clock = [json.loads(line) for line in (run / "clock.jsonl").read_text().splitlines()]
    assert (
        [line["step"] for line in clock] == [line["step"] for line in metrics(run) if "total" in line] == [1, 2, 3, 4]
    )
    assert all(line["seconds"] >= line["step_time"] >= line["data_time"] >= 0 for line in clock)
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    assert read_run(run, "run").seconds == pytest.approx(sum(line["seconds"] for line in clock))


def test_the_last_line_names_the_report_the_best_checkpoint_and_the_next_command(tmp_path, capsys) -> None:
    run = train(tiny_config(tmp_path))
    best = json.loads((run / "checkpoints" / "best" / "validated.json").read_text())
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"trained 2 steps; look at {run}/report.html; best checkpoint: {run}/checkpoints/best "
        f"(step {best['best_step']}, psnr {best['best']:.4g}); next: vqgan-accel evaluate {run}/checkpoints/best"
    )
    assert (run / "report.html").is_file()


def test_a_report_that_cannot_be_written_does_no_harm_to_the_training(tmp_path, capsys, monkeypatch) -> None:
    def broken(_: object) -> str:
        raise RuntimeError("a bug\nof ours")

    monkeypatch.setattr(page, "page", broken)
    run = train(tiny_config(tmp_path))
    assert "trained 2 steps; its report could not be written (a bug of ours); best" in capsys.readouterr().out
    assert (run / "checkpoints" / "latest").is_dir() and not (run / "report.html").exists()


@pytest.mark.seconds
def test_a_run_that_never_came_to_a_checkpoint_leaves_nothing_to_the_next_one_in_its_folder(tmp_path) -> None:
    run = train(tiny_config(tmp_path, training={"max_steps": 3, "validate_every": "1 step"}))
    shutil.rmtree(run / "checkpoints")
    train(tiny_config(tmp_path))
    assert [path.name for path in (run / "images").iterdir()] == ["step_00000002.png"]
    assert len((run / "starts.jsonl").read_text().splitlines()) == 1


# ---- curves


def test_the_curve_on_the_page_goes_through_the_logged_values(three: dict[str, Path]) -> None:
    run = read_run(three["a"], "a")
    logged = [(line["step"], line["total"]) for line in metrics(three["a"]) if "total" in line]
    assert run.curves()["total"] == logged
    drawn = chart("Total", [Line("", 0, False, logged)])
    places = [
        tuple(map(float, place.split()))
        for place in re.findall(r'class="line c0" d="M([^"]+)"', drawn.svg)[0].split("L")
    ]
    low, high, start, end = map(float, re.findall(r'data-x="([^"]+)"', drawn.svg)[0].split())
    assert [low + (x - start) / (end - start) * (high - low) for x, _ in places] == pytest.approx(
        [1, 2, 3, 4], abs=0.01
    )
    ticks = [
        (float(at) - 4, float(value))
        for at, value in re.findall(r'x="45" y="([\d.]+)" text-anchor="end">([^<]+)<', drawn.svg)
    ]
    (a, u), (b, v) = ticks[0], ticks[-1]
    assert [u + (y - a) / (b - a) * (v - u) for _, y in places] == pytest.approx([y for _, y in logged], rel=0.02)
    assert drawn.data == [{"label": "", "x": [1, 2, 3, 4], "y": [value for _, value in logged]}]


@given(st.floats(1e-9, 1e9), st.floats(1.0001, 1e9), st.booleans())
def test_a_scale_keeps_the_order_and_its_ticks_lie_inside(low: float, ratio: float, logarithmic: bool) -> None:
    bottom, top = padded(low, low * ratio, logarithmic)
    assert bottom < low < low * ratio < top
    made = scale(bottom, top, 100, 10, logarithmic)
    assert made(bottom) == pytest.approx(100) and made(top) == pytest.approx(10)
    middle = math.sqrt(bottom * top) if logarithmic else (bottom + top) / 2
    assert made(middle) == pytest.approx(55)
    assert all(10 <= made(tick) <= 100 for tick in made.ticks()) and 1 <= len(made.ticks()) <= 30


def test_a_curve_of_one_value_can_be_drawn() -> None:
    for value in (0.0, 5.0, -3.0):
        assert "NaN" not in (drawn := chart("One", [Line("", 0, False, [(10, value)])]).svg) and "nan" not in drawn
        assert f'cx="{WIDTH - RIGHT:.1f}"' in drawn
    assert f'cx="{LEFT:.1f}"' in chart("At 0", [Line("", 0, False, [(0, 1.0)])]).svg


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thinning_keeps_the_order_and_every_peak(values: list[float]) -> None:
    points = list(enumerate(values))
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(set(kept)) and set(kept) <= set(points)
    assert max(v for _, v in kept) == max(values) and min(v for _, v in kept) == min(values)


def test_what_was_not_finite_is_left_out_of_a_curve(tmp_path) -> None:
    run = train(tiny_config(tmp_path))
    lines = [{"step": 1, "total": "nan"}, {"step": 2, "total": 1.0}, {"step": 3, "total": True}, {"total": 2}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_run(run, "run").curves()["total"] == [(2, 1.0), (3, 1.0)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.25, "0.25"), (1234, "1.234k"), (12_500_000, "12.5M"), (2e-5, "2e-5"), (-1500, "-1.5k")],
)
def test_numbers_at_the_axis_are_short(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.seconds
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_value_that_a_run_logs_has_a_place_on_the_page(quantizer: str, tmp_path) -> None:
    settings: dict[str, Any] = {"discriminator": DISCRIMINATOR | {"r1_weight": 1.0}, "training": {"log_every": 1}}
    kind = {"type": quantizer, **having(quantizer, reinit_every="1 epoch")}
    run = train(tiny_config(tmp_path, quantizer=kind, **settings))
    drawn = sections(read_runs([run]))
    assert {known(name)[0] for name in ("mfu", "peak_memory")} == {"Speed"}  # which a GPU's clock has
    assert "Others" not in drawn and {"Losses", "Adversarial", "Optimization", "Speed", "Codebook"} <= drawn.keys()


# ---- pictures


@given(st.integers(1, 20), st.integers(3, 9), st.integers(0, 2**31))
def test_what_the_grid_was_drawn_of_comes_back(images: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    originals, made = torch.rand(2, images, 3, size, size, generator=generator) * 1.8 - 0.9
    tiles = grid_tiles(reconstruction_grid(originals, made), size)
    for row, expected in enumerate((originals, made)):
        assert b"".join(pair[row].tobytes() for pair in tiles) == to_uint8(expected).tobytes()


def test_only_the_pictures_of_validations_are_shown(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("step_100000000.png", "step_00000020.png", "step_3.png", "step_00000004 (copy).png", "notes.txt"):
        (tmp_path / "images" / name).touch()
    assert list(pictures(tmp_path)) == [20, 100_000_000]


def test_a_picture_of_another_size_is_no_grid() -> None:
    with pytest.raises(ValueError, match="100 x 100 px is no grid of images of 16 px"):
        grid_tiles(Image.new("RGB", (100, 100)), 16)


@given(st.lists(st.integers(0, 1000), unique=True, min_size=1).map(sorted), st.integers(2, 9))
def test_some_of_many_steps_are_spread_from_the_first_to_the_last(steps: list[int], number: int) -> None:
    chosen = page.evenly(steps, number)
    assert len(chosen) == min(number, len(steps)) and chosen == sorted(set(chosen)) and set(chosen) <= set(steps)
    assert chosen[0] == steps[0] and chosen[-1] == steps[-1]


def test_runs_show_the_same_images_and_one_of_other_images_is_named(three: dict[str, Path]) -> None:
    found = page.gallery(read_runs([three["a"], three["b"], three["c"]]))
    assert found is not None and found.note == "c: validated on other images, or of another size"
    assert [[caption for caption, _ in strip.tiles] for strip in found.strips] == [
        ["original", "a, step 4", "b, step 4"]
    ] * 2
    (over_time,) = [page.gallery(read_runs([three["a"]]))]
    assert over_time is not None
    assert [caption for caption, _ in over_time.strips[0].tiles] == ["original", "step 2", "step 4"]


# ---- scores


def tables_of(*runs: Path) -> list[Any]:
    return [table for table in score_tables(read_runs(runs)) if table.title.startswith("Last validation")]


def test_scores_stand_side_by_side_where_the_fingerprints_agree(three: dict[str, Path]) -> None:
    (table,) = tables_of(three["a"], three["b"])
    assert table.note == "" and table.columns() == [0, 1]
    for row in table.rows[1:]:
        name = row.name.split()[0]
        values = [line[f"validation/{name}"] for run in ("a", "b") for line in metrics(three[run])[-1:]]
        assert row.cells == values
        assert row.best == (min(values) if name in LOWER_IS_BETTER else max(values))


def test_scores_of_other_images_stand_apart_with_the_reason(three: dict[str, Path]) -> None:
    first, second = tables_of(three["a"], three["c"])
    assert (first.columns(), second.columns()) == ([0], [1])
    hashes = [json.loads((three[run] / "validation.json").read_text())["protocol"]["images_hash"] for run in ("a", "c")]
    assert second.note == f"does not compare with the table above: images hash {hashes[1]}, not {hashes[0]}"
    assert all(row.best is None for row in [*first.rows, *second.rows])


def test_a_run_of_an_older_version_has_its_scores_alone_and_its_curves(three: dict[str, Path]) -> None:
    first, second = tables_of(three["a"], three["old"])
    assert first.note == "" and second.note == NO_PROTOCOL and second.columns() == [1]
    assert [row.cells[1] for row in second.rows] == [row.cells[0] for row in first.rows]
    assert "step_time" not in read_run(three["old"], "old").curves()
    assert "at step 4" in page.page(read_runs([three["old"]]))


def test_the_best_validation_follows_the_direction_of_its_metric(three: dict[str, Path]) -> None:
    run = read_run(three["a"], "a")
    assert run.config is not None
    every = [name for names in METRIC_RESULTS.values() for name in names]
    for name in every:
        values = {1: 2.0, 2: 1.0, 3: 3.0, 4: 1.5}
        lines = [{"step": step, f"validation/{name}": value} for step, value in values.items()]
        training = run.config.training.model_copy(update={"best_metric": name})
        changed = run.config.model_copy(update={"training": training})
        mine = Run(**vars(run) | {"config": changed, "lines": lines})
        table = next(table for table in score_tables([mine]) if table.title.startswith("Best"))
        assert table.rows[0].cells == ["step 2" if name in LOWER_IS_BETTER else "step 3"], name


def test_the_table_says_what_differs_between_the_configs(three: dict[str, Path]) -> None:
    rows = {line[1]: line[2:] for line in csv.reader(compare([three["a"], three["b"]], "csv").splitlines())}
    assert rows["quantizer.type"] == ["standard", "ema"] and rows["seed"] == ["0", "1"]
    assert rows["quantizer.decay"] == ["", "0.99"] and rows["discriminator.start"] == ["2 steps", ""]
    assert "output_dir" not in rows and "data.image_size" not in rows
    assert rows["state"] == ["finished, 4 steps"] * 2
    assert float(rows["psnr (dB)"][1]) == metrics(three["b"])[-1]["validation/psnr"]  # unrounded


def test_the_table_has_the_speed_of_a_typical_interval_and_the_most_memory(three: dict[str, Path]) -> None:
    run = read_run(three["a"], "a")
    own = [line | {"mfu": line["step"] / 10, "peak_memory": float(line["step"])} for line in run.clock]
    cells = {row.name: row.cells for row in fact_table([Run(**vars(run) | {"clock": own}), run]).rows}
    rates = [line["images_per_second"] for line in run.clock if "images_per_second" in line]
    assert len(rates) == 3 and cells["images/s"][1] == pytest.approx(statistics.median(rates))
    assert cells["share of its bfloat16 rate (MFU)"] == [0.25, None] and cells["most GPU memory (GiB)"] == [4.0, None]


def test_the_three_forms_of_the_table_say_the_same(three: dict[str, Path]) -> None:
    runs = [three["a"], three["b"], three["c"]]
    text, comma, markdown = (compare(runs, form) for form in ("text", "csv", "markdown"))
    lines = list(csv.reader(comma.splitlines()))
    assert lines[0] == ["section", "name", "a", "b", "c"]
    titles = dict.fromkeys(line[0] for line in lines[1:])
    assert [line[4:] for line in markdown.splitlines() if line.startswith("### ")] == list(titles)
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == list(titles)
    psnr = next(line for line in lines if line[1] == "psnr (dB)")
    shown = [f"{float(value):.5g}" for value in psnr[2:4]]
    best = max(shown, key=float)
    assert re.search(rf"psnr \(dB\) +{shown[0]} +{shown[1]}\n", text)
    bold = [f"**{value}**" if value == best else value for value in shown]
    assert f"| psnr (dB) | {bold[0]} | {bold[1]} |" in markdown


def test_names_are_as_long_as_it_takes_to_tell_runs_apart() -> None:
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]


# ---- the page


class Reader(HTMLParser):
    """Tags that are closed in the order in which they were opened, and what is loaded from elsewhere."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)


def test_the_page_is_one_file_with_everything_in_it(three: dict[str, Path]) -> None:
    text = (three["a"] / "report.html").read_text()
    read = Reader(text)
    assert len(read.sources) == 2 * 3 and all(source.startswith("data:image/png;base64,") for source in read.sources)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    words = " ".join(read.words)
    for said in ("Total loss", "Gradient norm", "Learning rate", "Logits of the discriminator", "Share of each code"):
        assert said in words
    for said in ("Weight of the generator loss", "Seconds a step", "max_steps: 4", "torchmetrics", "finished, 4 steps"):
        assert said in words


def test_several_runs_make_one_page(three: dict[str, Path], capsys, monkeypatch) -> None:
    monkeypatch.chdir(three["a"].parent)
    assert main(["report", "a", "b", "c", "old"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    words = " ".join(Reader(Path("report.html").read_text()).words)
    assert "does not compare with the table above" in words and NO_PROTOCOL in words
    assert "c: validated on other images" in words and "Differences of the configs" in words


def test_what_a_user_wrote_cannot_become_part_of_the_page(three: dict[str, Path], tmp_path) -> None:
    name = "<img src=x onerror=alert(1)>\"'&"
    run = shutil.copytree(three["a"], tmp_path / name, symlinks=True)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + "# </pre></script><script>alert(2)</script>\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "</script><script>alert(3)</script>": 1.0}) + "\n")
    text = page.page(read_runs([run, three["b"]]))
    read = Reader(text)
    assert all(source.startswith("data:") for source in read.sources)
    assert not any("alert" in script for script in read.scripts if not script.startswith("[{"))
    assert name in " ".join(read.words)


def test_runs_that_have_not_come_far_have_a_page(three: dict[str, Path], tmp_path) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    shutil.copy(three["a"] / "config.yaml", run)
    assert "Nothing has been validated" in page.page(read_runs([run]))
    for name in ("metrics.jsonl", "validation.json", "starts.jsonl", "clock.jsonl"):
        (run / name).write_text('{"step": 1, "total": 0.5}\n{"step": 2, "to')
    assert "at step 1" in page.page(read_runs([run]))
    (run / "config.yaml").write_text("other: 1\n")  # of a version that had other keys
    assert "other: 1" in page.page(read_runs([run]))
    assert "begun: a config of another version" in compare([run, three["a"]])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "{here}/nowhere"], "nowhere is no run: it has no config.yaml; give the output_dir of a training"),
        (["compare", "{a}", "{a}/checkpoints"], "checkpoints is no run"),
        (["compare", "{a}", "{a}/../a"], "is named twice; give different runs"),
        (["report", "{a}", "--output", "{here}"], "is a folder; give the name of a file, such as"),
        (["report", "{a}", "--output", "{a}/config.yaml/page.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(three: dict[str, Path], tmp_path, capsys, words, sentence) -> None:
    assert main([word.format(a=three["a"], here=tmp_path) for word in words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
