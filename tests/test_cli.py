"""The command line: what goes wrong is told in one sentence with status 2, and commands answer what they are asked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from images import noise, truncate
from tiny import SPLITS, tiny_config, write_images, write_splits

from vqgan_accel.cli import main
from vqgan_accel.config import METRIC_RESULTS, Config, WeightFiles, save_config
from vqgan_accel.doctor import CORE, EXTRAS

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The file of a run of two steps on images beside it."""
    save_config(tiny_config(tmp_path), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The file of a run that has been trained, into the folder `run` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    save_config(tiny_config(folder), folder / "tiny.yaml")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", str(folder / "tiny.yaml")]) == 0
    return folder / "tiny.yaml"


def sentence_of(capsys, *words: object) -> str:
    """What a command that fails says on stderr: one line, after 'error: '."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (sentence,) = re.findall(r"error: (.*)\n", error)
    return sentence


def only_sentence_of(capsys, *words: object) -> str:
    """The same where nothing else stands on stderr and nothing was said on stdout: it failed before it began."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err.removeprefix("error: ").rstrip("\n")


# ---- what cannot be trained


def test_a_misspelt_key_in_the_file_is_one_sentence(capsys, tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("training: {max_step: 5, max_epochs: 1}\n")
    sentence = only_sentence_of(capsys, "train", file)
    assert sentence == f"{file}: unknown key 'training.max_step'; did you mean 'training.max_steps'?"


def test_broken_yaml_is_one_sentence_with_file_and_line(capsys, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("training:\n  max_steps: 5\n   seed: 3\n")
    assert re.match(rf"{file} cannot be read as YAML: .*line 3", only_sentence_of(capsys, "train", file))


def test_a_missing_config_is_one_sentence(capsys, tiny):
    sentence = only_sentence_of(capsys, "train", tiny.with_name("tini.yaml"))
    assert sentence == f"no config file at {tiny.with_name('tini.yaml')}; did you mean {tiny}?"


def test_without_data_path_the_sentence_says_to_give_it(capsys, tiny):
    assert only_sentence_of(capsys, "train", tiny, "data.path=null") == "data.path is not set; give data.path=FOLDER"


def test_a_missing_folder_is_one_sentence(capsys, tiny):
    folder = tiny.parent / "imagse"
    sentence = only_sentence_of(capsys, "train", tiny, f"data.path={folder}")
    assert sentence == f"no folder at data.path {folder}; did you mean {tiny.parent / 'images'}?"


@pytest.mark.parametrize("folders", [".", "train", "train/deep/er"])
def test_an_empty_folder_is_one_sentence(capsys, tiny, folders):
    root = tiny.parent / "empty"
    (root / folders).mkdir(parents=True)
    sentence = only_sentence_of(capsys, "train", tiny, f"data.path={root}")
    expected = f"no folder 'train' in data.path {root}" if folders == "." else f"no images below {root}/train"
    assert sentence.startswith(expected)


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/nope"])
def test_an_output_dir_that_cannot_be_made_is_one_sentence(capsys, tiny, place):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    (tiny.parent / "file").touch()
    output_dir = tiny.parent / place  # an absolute `place` stays as it is
    assert str(output_dir) in only_sentence_of(capsys, "train", tiny, f"output_dir={output_dir}")


def test_an_output_dir_that_cannot_be_made_is_told_with_its_key(capsys, tiny):
    (tiny.parent / "file").touch()
    assert only_sentence_of(capsys, "train", tiny, f"output_dir={tiny.parent / 'file'}").startswith("output_dir ")


def test_an_empty_output_dir_is_refused(capsys, tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    assert "output_dir" in only_sentence_of(capsys, "train", tiny, "output_dir=''")


def test_a_seed_that_numpy_does_not_take_is_told_with_its_key(capsys, tiny):
    assert "'seed'" in only_sentence_of(capsys, "train", tiny, f"seed={2**32}")


def test_an_output_dir_that_holds_a_run_is_refused_and_left_as_it_is(capsys, finished):
    run = finished.parent / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    sentence = only_sentence_of(capsys, "train", finished, "training.max_steps=9")
    assert sentence == (
        f"output_dir {run} already holds a run, up to step_00000002; "
        "add --resume to go on with it, or give another output_dir"
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_finished_run_resumes_to_its_end_at_once(capsys, finished):
    assert main(["train", str(finished), "--resume"]) == 0
    assert "resuming from step_00000002" in capsys.readouterr().out


def test_resuming_a_run_beyond_its_new_end_is_one_sentence(capsys, tiny):
    assert main(["train", str(tiny)]) == 0
    assert "max_steps" in sentence_of(capsys, "train", tiny, "--resume", "training.max_steps=1")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_stops_training_with_its_name(capsys, tiny, workers):
    root = write_splits(tiny.parent / "more")
    broken = root / "train" / "broken.jpg"
    noise(40, 40).save(broken)
    truncate(broken)
    steps = SPLITS["train"] + 1  # an epoch of one image a step meets every image
    options = [f"data.path={root}", "training.total_batch_size=1", f"training.max_steps={steps}"]
    sentence = sentence_of(capsys, "train", tiny, *options, f"data.workers={workers}")
    assert re.fullmatch(rf"cannot read image {broken}: .*truncated.*; .*data\.on_error=skip", sentence)


def test_an_error_in_training_begins_a_line_below_the_progress_bar(capsys, tiny):
    (tiny.parent / "images" / "train" / "000.png").write_bytes(b"no image")
    assert main(["train", str(tiny)]) == 2
    assert re.search(r"^error: ", capsys.readouterr().err, re.MULTILINE)


def test_a_process_among_several_says_which_one_it_is(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error (process 1): no config file at {tmp_path / 'none.yaml'}, ") and error.count("\n") == 1
    )


def test_weights_that_are_not_there_are_one_sentence(capsys, tiny):
    options = ["losses.perceptual_weight=1", "losses.perceptual_network=mobilenet_v2", "weights.mobilenet_v2=nope.pth"]
    sentence = only_sentence_of(capsys, "train", tiny, *options)
    assert sentence == "weights.mobilenet_v2: there is no file nope.pth"
    assert not (tiny.parent / "run").exists()


# ---- what cannot be evaluated


def test_evaluating_nothing_is_one_sentence(capsys, tmp_path):
    sentence = only_sentence_of(capsys, "evaluate", tmp_path / "nothing")
    assert sentence == f"there is no run, checkpoint or saved tokenizer at {tmp_path / 'nothing'}"


def test_evaluating_a_folder_of_something_else_is_one_sentence(capsys, tmp_path):
    write_images(tmp_path, 1)
    sentence = only_sentence_of(capsys, "evaluate", tmp_path)
    assert sentence.startswith(f"{tmp_path} holds no tokenizer: give a run folder")


def test_evaluating_a_run_without_a_checkpoint_is_one_sentence(capsys, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert only_sentence_of(capsys, "evaluate", tmp_path).startswith(
        f"{tmp_path} is a run without a complete checkpoint"
    )


def test_a_misspelt_override_of_an_evaluation_is_one_sentence(capsys, finished):
    sentence = only_sentence_of(capsys, "evaluate", finished.parent / "run", "evaluation.splti=test")
    assert sentence.endswith("unknown key 'evaluation.splti'; did you mean 'evaluation.split'?")


def test_evaluate_prints_the_results_and_writes_them(capsys, finished, tmp_path):
    run = str(finished.parent / "run")
    assert main(["evaluate", run, "--output", str(tmp_path / "results"), "evaluation.split=test"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "results" / "metrics.json").read_text())
    names = ("l2", "psnr", "ssim", "codebook")
    assert set(report["results"]) == {result for name in names for result in METRIC_RESULTS[name]}
    assert f"on {SPLITS['test']} images" in printed and report["protocol"]["num_images"] == SPLITS["test"]
    assert all(
        re.search(rf"^  {name} +{value:.5g}", printed, re.MULTILINE) for name, value in report["results"].items()
    )
    assert (tmp_path / "results" / "reconstructions.png").is_file()


# ---- words


@pytest.fixture
def trained_with(monkeypatch) -> list[tuple[Config, bool]]:
    """What `train` was called with, in place of training."""
    calls: list[tuple[Config, bool]] = []
    monkeypatch.setattr("vqgan_accel.training.loop.train", lambda config, resume: calls.append((config, resume)))
    return calls


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ("train FILE seed=3 training.max_steps=7", False),
        ("train FILE seed=3 training.max_steps=7 --resume", True),
        ("train FILE --resume seed=3 training.max_steps=7", True),
        ("train FILE seed=3 --resume training.max_steps=7", True),
        ("train --resume FILE seed=3 training.max_steps=7", True),
        ("train FILE seed=2 --resume training.max_steps=7 --debug seed=3", True),
    ],
)
def test_overrides_stand_before_and_after_options(words, resume, tiny, trained_with):
    assert main(words.replace("FILE", str(tiny)).split()) == 0
    ((config, resumed),) = trained_with
    assert (config.seed, config.training.max_steps, resumed) == (3, 7, resume)


def test_overrides_of_one_call_are_forgotten_in_the_next(tiny, trained_with):
    main(["train", str(tiny), "--resume", "seed=3"])
    main(["train", str(tiny)])
    assert [(config.seed, resume) for config, resume in trained_with] == [(3, True), (0, False)]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train FILE --resmue", "--resmue"),
        ("train FILE seed=3 --lr 3", "--lr"),
        ("train FILE -v", "-v"),
        ("train FILE --seed=3", "--seed=3"),
        ("evaluate FILE --resume", "--resume"),
        ("describe FILE --resume", "--resume"),
        ("doctor FILE seed=3", "seed=3"),
        ("doctor --json", "--json"),
        ("trian FILE", "trian"),
        ("train", "config"),
        ("", "command"),
    ],
)
def test_unknown_words_are_refused_before_anything_runs(words, named, tiny, capsys, trained_with):
    with pytest.raises(SystemExit) as error:
        main(words.replace("FILE", str(tiny)).split())
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and named in message.splitlines()[-1]
    assert trained_with == []


def test_debug_lets_the_error_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file"):
        main(["train", str(tmp_path / "none.yaml"), "--debug"])


@pytest.mark.seconds
def test_the_script_ends_with_status_2_and_a_sentence_or_with_debug_in_a_traceback(tmp_path):
    code = (  # both in one process, for importing torch takes seconds
        "import runpy, sys\n"
        "script = sys.argv.pop(1)\n"
        "try: runpy.run_path(script, run_name='__main__')\n"
        "except SystemExit as error: print('status', error.code, flush=True)\n"
        "sys.argv.append('--debug')\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, REPOSITORY / "train.py", "none.yaml"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("status 2\n", 1)
    sentence, traceback = result.stderr.split("\n", 1)
    assert sentence.startswith("error: no config file at none.yaml, nor a recipe of this name")
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith(f"\nFileNotFoundError: {sentence.removeprefix('error: ')}\n")


def test_an_error_of_ours_is_never_hidden(tiny, monkeypatch):
    def broken(config, resume):
        raise KeyError("a mistake in the library")

    monkeypatch.setattr("vqgan_accel.training.loop.train", broken)
    with pytest.raises(KeyError):
        main(["train", str(tiny)])


def test_an_interrupt_is_status_130(tiny, monkeypatch, capsys):
    def interrupted(config, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqgan_accel.training.loop.train", interrupted)
    assert main(["train", str(tiny)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---- answers


def test_help_does_not_wait_for_torch():
    code = "import sys, vqgan_accel.cli as cli\ntry: cli.main(['--help'])\nfinally: print('torch' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert imported.stdout.splitlines()[-1] == "False"
    module = subprocess.run(
        [sys.executable, "-m", "vqgan_accel", "--help"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert module.returncode == 0
    assert all(
        re.search(rf"^ +{name} ", module.stdout, re.MULTILINE) for name in ("train", "evaluate", "describe", "doctor")
    )


def test_describe_prints_json_or_the_same_numbers_as_text(capsys, tiny):
    assert main(["describe", str(tiny), "--json", "quantizer.num_codes=32"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["image_size"], summary["latent_grid"], summary["num_codes"]) == (16, [4, 4], 32)
    assert summary["bits_per_pixel"] == 16 * 5 / 256
    assert main(["describe", str(tiny), "quantizer.num_codes=32"]) == 0
    text = capsys.readouterr().out
    assert f"{summary['parameters']['total_trainable']:,} trainable" in text
    assert "4 x 4 = 16 codes of 32" in text and "0.3125 bits per pixel" in text


def test_doctor_names_every_core_package_extra_and_weight_file(capsys):
    assert main(["doctor"]) == 0
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"torch", "torchvision", "accelerate", "datasets", "lpips", "wandb", "tensorboard"} <= named
    assert set(CORE) | set(EXTRAS) | set(WeightFiles.model_fields) <= named


def test_doctor_says_what_a_missing_package_would_enable(capsys, monkeypatch):
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("vqgan_accel.doctor.version", version)
    assert main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert all(lines[package].endswith(f"MISSING: pip install {package}") for package in CORE)
    for package, (extra, use) in EXTRAS.items():
        assert f"pip install vqgan_accel[{extra}] would enable {use}" in lines[package]


def test_doctor_checks_the_weight_files_of_a_config(capsys, tmp_path):
    (tmp_path / "vgg.pth").touch()
    weights = {"vgg16": str(tmp_path / "vgg.pth"), "inception": str(tmp_path / "none.pth")}
    save_config(tiny_config(tmp_path, weights=weights), tmp_path / "tiny.yaml")
    assert main(["doctor", str(tmp_path / "tiny.yaml")]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert f"{weights['vgg16']}, as weights.vgg16 says" in lines["vgg16"]
    assert f"weights.inception={weights['inception']} is not there" in lines["inception"]
    assert "weights.alexnet=FILE; enables lpips_alex" in lines["alexnet"] or "cached in" in lines["alexnet"]


def test_a_reader_that_has_had_enough_is_no_error():
    """`vqgan-accel keys | head -1`, with the reader gone before the first line."""
    command = [sys.executable, "-m", "vqgan_accel", "keys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
