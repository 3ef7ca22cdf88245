"""load_config: every mistake stops with sentences that name the key and what would be right, and nothing else does.

Also what the recipes amount to, in exact numbers.
"""

from __future__ import annotations

import math
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published import LLAMAGEN, VQGAN
from tiny import QUANTIZERS, having

from vqgan_accel.config import (
    Config,
    TrainingConfig,
    batch_scale,
    config_keys,
    load_config,
    parse_config,
    save_config,
)
from vqgan_accel.describe import describe
from vqgan_accel.sections import Duration
from vqgan_accel.training.plan import make_plan

RECIPES = Path(__file__).parent.parent / "configs"
MINIMAL = "training: {max_steps: 100}\n"
LINE_OF_ALIAS = [] if version("omegaconf").startswith("2.3.") else ["line 1"]  # 2.3 does not say it
*OTHERS, LAST = QUANTIZERS
TYPES = f"{', '.join(OTHERS)} or {LAST}"


def sentences_of(text: str | bytes, folder: Path, *overrides: str) -> list[str]:
    """What load_config says about a file, without the file's name; it must say something."""
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r"run\.yaml|is not an override") as error:
        load_config(path, overrides)
    return str(error.value).removeprefix(f"{path}: ").splitlines()


def sentence_of(text: str | bytes, folder: Path, *overrides: str) -> str:
    (sentence,) = sentences_of(text, folder, *overrides)
    return sentence


def load(folder: Path, *overrides: str, text: str = MINIMAL) -> Config:
    (folder / "run.yaml").write_text(text)
    return load_config(folder / "run.yaml", overrides)


# ---- keys and values


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("training.max_step=3", "training.max_steps"),  # a letter
        ("trainig.max_steps=3", "training"),  # a letter of the section
        ("training.total_batchsize=8", "training.total_batch_size"),
        ("max_steps=3", "training.max_steps"),  # no section
        ("data.max_steps=3", "training.max_steps"),  # the wrong section
        ("training.num_codes=3", "quantizer.num_codes"),
        ("discriminator.adaptive_wieght=true", "discriminator.adaptive_weight"),
        ("losses.perceptual=1", "losses.perceptual_weight"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(override, suggestion, tmp_path):
    key = override.split(".max_steps")[0] if suggestion == "training" else override.split("=")[0]
    assert sentence_of(MINIMAL, tmp_path, override) == f"unknown key '{key}'; did you mean '{suggestion}'?"


def test_an_unknown_key_that_resembles_none_is_named_all_the_same(tmp_path):
    assert sentence_of(MINIMAL + "zzz: 3", tmp_path).startswith("unknown key 'zzz'; `vqgan-accel keys`")


@pytest.mark.parametrize(
    ("type_", "key"),
    [("standard", "decay"), ("ema", "entropy_ratio"), ("entropy", "temperature_end"), ("gumbel", "commitment_cost")],
)
def test_a_key_of_another_quantizer_is_told_as_such(type_, key, tmp_path):
    sentence = sentence_of(MINIMAL, tmp_path, f"quantizer.type={type_}", f"quantizer.{key}=0.5")
    assert sentence.startswith(f"unknown key 'quantizer.{key}'")
    assert "belongs to another quantizer.type" in sentence


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.max_steps=abc", ["'training.max_steps' is 'abc'", "integer"]),
        ("training.max_steps=2.5", ["'training.max_steps' is 2.5", "integer"]),
        ("training.max_steps=0", ["'training.max_steps' is 0", "greater than or equal to 1"]),
        ("training.max_steps.x=3", ["'training.max_steps'", "integer"]),  # an override into a scalar
        ("training=5", ["'training' is 5", "dictionary"]),
        ("training.base_lr=fast", ["'training.base_lr' is 'fast'", "number"]),
        ("training.base_lr=-1", ["'training.base_lr' is -1", "greater than 0"]),
        ("training.eps=.nan", ["'training.eps' is nan", "finite"]),
        ("training.max_epochs=.inf", ["'training.max_epochs' is inf", "finite"]),
        ("training.betas=[0.9]", ["'training.betas.1' is missing"]),
        ("training.betas=[0.9, 1.0]", ["betas are two numbers in [0, 1)", "1.0"]),
        ("data.horizontal_flip=1", ["'data.horizontal_flip' is 1", "boolean"]),
        ("data.path=3", ["'data.path' is 3", "string"]),
        ("data.backend=webdataset", ["'data.backend' is 'webdataset'", "'folder', 'hub', 'ffcv', 'beton' or 'auto'"]),
        ("data.crop_scale=[0.9, 0.1]", ["crop_scale", "0 < smallest <= largest <= 1"]),
        ("data.crop_scale=0.5", ["'data.crop_scale' is 0.5"]),
        ("seed=true", ["'seed' is True", "integer"]),
        ("seed=-1", ["'seed' is -1", "greater than or equal to 0"]),
        ("output_dir=null", ["'output_dir' is None", "string"]),
        ("quantizer=null", ["'quantizer' is None", "dictionary"]),
        ("quantizer={num_codes: 8}", ["'quantizer.type' is missing", TYPES]),
        ("quantizer.type=emma", ["'quantizer.type' is 'emma'", TYPES]),
        ("discriminator.type=patchgan", ["'discriminator.type' is 'patchgan'", "must be stylegan2"]),
        ("training.validation_metrics=[l2, fid]", ["'training.validation_metrics.1' is 'fid'", "'rfid'"]),
        ("training.lr_warmup=10", ["training.lr_warmup", "number and a unit", "'500 steps'"]),
        ("training.lr_warmup=10 minutes", ["training.lr_warmup", "number and a unit", "'7.5 epochs'"]),
        ("training.lr_warmup=-1 steps", ["training.lr_warmup", "number and a unit"]),
        ("training.lr_warmup=1.5 steps", ["training.lr_warmup", "whole number"]),
        ("discriminator.start=soon", ["discriminator.start", "number and a unit"]),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_would_be_right(override, parts, tmp_path):
    sentence = sentence_of(MINIMAL, tmp_path, override)
    assert [part for part in parts if part not in sentence] == []


def test_each_of_several_mistakes_gets_its_sentence(tmp_path):
    told = sentences_of(MINIMAL, tmp_path, "training.base_lr=x", "data.wrokers=2", "seed=-1")
    assert len(told) == 3
    keys = ("seed", "data.wrokers", "training.base_lr")
    assert all(any(f"'{key}'" in sentence for sentence in told) for key in keys)


def test_a_run_without_an_end_is_refused(tmp_path):
    assert "max_epochs or max_steps" in sentence_of("training: {}", tmp_path)


# ---- what YAML 1.1 would read otherwise


@pytest.mark.parametrize(("written", "meant"), [("3e-4", 3e-4), ("1e-3", 1e-3), ("2E-5", 2e-5), ("1.5e-4", 1.5e-4)])
def test_a_number_with_an_exponent_is_a_float_without_quotes(written, meant, tmp_path):
    assert load(tmp_path, text=f"training: {{max_steps: 1, base_lr: {written}}}").training.base_lr == meant
    assert load(tmp_path, f"training.base_lr={written}").training.base_lr == meant


def test_an_integer_serves_where_a_float_is_asked_for_and_not_the_other_way(tmp_path):
    assert load(tmp_path, "losses.l1_weight=1").losses.l1_weight == 1.0
    assert "integer" in sentence_of(MINIMAL, tmp_path, "training.log_every=50.0")


# ---- files


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {max_steps: 5}\ntraining: {max_steps: 6}\n", ["duplicate key training", "line 2"]),
        ("training:\n  max_steps: 5\n  max_steps: 6\n", ["duplicate key max_steps", "line 3"]),
        ("training:\n  max_steps: 5\n   seed: 3\n", ["cannot be read as YAML", "line 3"]),
        ("training:\n\tmax_steps: 5\n", ["cannot be read as YAML", "line 2"]),
        ("training: {max_steps: 5\n", ["cannot be read as YAML", "line 1"]),
        ("training: {max_steps: 5}\n---\nseed: 1\n", ["cannot be read as YAML", "line 2"]),
        ("training: !!python/object/apply:os.abort []\n", ["cannot be read as YAML", "line 1"]),
        ("a: &a [*a]\n", ["cannot be read as YAML", "recursive", *LINE_OF_ALIAS]),
        (b"training: {max_steps: 5}\n# \xff\n", ["cannot be read as YAML", "utf-8"]),
        ("- data\n- training\n", ["must hold sections"]),
        ("3\n", ["cannot be read as YAML"]),
        ("", ["'training' is missing"]),
        ("# nothing yet\n", ["'training' is missing"]),
        ("training: {max_steps: 5}\n7: 8\n", ["'7'", "keys should be strings"]),
    ],
)
def test_a_file_that_is_no_config_is_told_with_its_name_and_line(text, parts, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path}") and "\n" not in sentence
    assert [part for part in parts if part not in sentence] == []


def test_a_missing_file_is_told_with_the_one_that_was_meant(tmp_path):
    (tmp_path / "standard_vqgan.yaml").write_text(MINIMAL)
    with pytest.raises(FileNotFoundError, match=r"no config file at .*/standart_vqgan\.yaml; did you mean .*standard"):
        load_config(tmp_path / "standart_vqgan.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config file at .*nowhere"):
        load_config(tmp_path / "nowhere" / "else")
    with pytest.raises(FileNotFoundError, match="no config file at"):
        load_config(tmp_path)  # a folder


# ---- overrides


@pytest.mark.parametrize("word", ["training.max_steps", "max_steps:3", "=3", "--seed=3", "", "data[path]=x"])
def test_an_override_without_key_and_value_is_told_how_to_write_it(word, tmp_path):
    sentence = sentence_of(MINIMAL, tmp_path, word)
    assert sentence.startswith(f"'{word}' is not an override; write section.key=value")


@pytest.mark.parametrize("value", ["{a", "[1, 2", "'", "@x", "!!python/object/apply:os.abort []"])
def test_an_override_that_is_no_yaml_value_is_one_sentence(value, tmp_path):
    assert "override does not fit" in sentence_of(MINIMAL, tmp_path, f"output_dir={value}")


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    config = load(
        tmp_path, "seed=1", "training.max_steps=7", "seed=2", "data.path=/a b/c=d", "training.betas=[0, 0.99]"
    )
    assert (config.seed, config.training.max_steps) == (2, 7)
    assert config.data.path == "/a b/c=d"  # blanks and a second equals sign belong to the value
    assert config.training.betas == (0, 0.99)


def test_an_override_may_add_or_remove_the_discriminator(tmp_path):
    assert load(tmp_path).discriminator is None
    with_one = MINIMAL + "discriminator: {weight: 0.3}\n"
    assert load(tmp_path, "discriminator.weight=0.5", text=with_one).discriminator.weight == 0.5
    assert load(tmp_path, "discriminator=null", text=with_one).discriminator is None


# ---- interpolation


def test_interpolation_reads_the_environment_and_other_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_TEST_RUNS", "/scratch/runs")
    text = MINIMAL + "output_dir: ${oc.env:VQGAN_TEST_RUNS}/${data.train_split}\ndata: {train_split: a}\n"
    assert load(tmp_path, text=text).output_dir == "/scratch/runs/a"


def test_what_the_environment_holds_is_a_string_and_is_not_evaluated(tmp_path, monkeypatch):
    poison = "${oc.env:HOME} !!python/object/apply:os.abort [] __import__('os').abort() $(touch pwned) `touch pwned`"
    monkeypatch.setenv("VQGAN_TEST_RUNS", poison)
    monkeypatch.setenv("VQGAN_TEST_SEED", "1 + 1")
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, "output_dir=${oc.env:VQGAN_TEST_RUNS}").output_dir == poison
    assert "'seed' is '1 + 1'" in sentence_of(MINIMAL, tmp_path, "seed=${oc.env:VQGAN_TEST_SEED}")
    assert os.listdir(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize(
    "value",
    [
        "${__import__('os').abort()}",
        "${os.abort:}",
        "${eval:1+1}",
        "${oc.env:VQGAN_NOT_SET}",
        "${nowhere.at_all}",
        "${output_dir}",  # itself
        "${",
    ],
)
def test_an_interpolation_that_means_nothing_is_one_sentence(value, tmp_path, monkeypatch):
    monkeypatch.delenv("VQGAN_NOT_SET", raising=False)
    for sentence in (
        sentence_of(MINIMAL + f'output_dir: "{value}"\n', tmp_path),
        sentence_of(MINIMAL, tmp_path, f"output_dir={value}"),
    ):
        assert "output_dir" in sentence


# ---- what fits together


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["training.total_batch_size=10", "training.gradient_accumulation_steps=4"],
            ["total_batch_size 10", "gradient_accumulation_steps 4", "not divisible"],
        ),
        (
            ["training.total_batch_size=12", "training.gradient_accumulation_steps=2", "discriminator.type=stylegan2"],
            ["6 images", "total_batch_size", "gradient_accumulation_steps", "discriminator.minibatch_stddev_group 4"],
        ),
        (
            ["data.image_size=4", "autoencoder.channel_multipliers=[1]", "discriminator.type=stylegan2"],
            ["data.image_size", "power of two of at least 8", "not 4", "discriminator=null"],
        ),
        (
            ["data.image_size=48", "discriminator.type=stylegan2"],
            ["data.image_size", "power of two", "not 48", "discriminator=null"],
        ),
        (
            ["autoencoder.channels=48"],
            ["autoencoder", "channels 48 x multiplier 1 = 48", "32 groups", "multiple of 32"],
        ),
        (["autoencoder.channels=64", "autoencoder.channel_multipliers=[1, 0]"], ["multiplier 0", "positive multiple"]),
        (["autoencoder.channel_multipliers=[]"], ["'autoencoder.channel_multipliers'", "at least 1"]),
        (["data.image_size=250"], ["data.image_size 250", "divisible by 16", "4 levels", "channel_multipliers"]),
        (
            ["data.image_size=8", "autoencoder.channel_multipliers=[1]"],
            ["ssim needs", "11 pixels", "data.image_size is 8"],
        ),
        (["training.lr_warmup=101 steps"], ["lr_warmup (101 steps)", "longer than training (100 steps)"]),
        (
            ["training.lr_warmup=2 epochs", "training.max_epochs=1.5"],
            ["lr_warmup (2 epochs)", "longer than training (1.5 epochs)"],
        ),
        (["training.best_metric=fid"], ["best_metric 'fid'", "validation results: l2, psnr", "perplexity"]),
        (["training.best_metric=rfid"], ["best_metric 'rfid'", "validation results: l2, psnr"]),  # known, not measured
        (
            ["losses.l1_weight=0", "losses.l2_weight=0", "losses.perceptual_weight=0"],
            ["l1_weight, l2_weight and perceptual_weight are all 0", "at least one"],
        ),
    ],
)
def test_values_that_do_not_fit_together_are_told_with_their_keys(overrides, parts, tmp_path):
    sentence = sentence_of(MINIMAL, tmp_path, *overrides)
    assert [part for part in parts if part not in sentence] == []


def test_fp16_is_refused_with_the_reason(tmp_path):
    sentence = sentence_of(MINIMAL, tmp_path, "training.mixed_precision=fp16")
    assert "'training.mixed_precision' cannot be fp16" in sentence
    assert "gradient scaler" in sentence and "bf16" in sentence


@pytest.mark.parametrize(
    ("text", "num_images", "num_processes", "parts"),
    [
        (
            "training: {max_steps: 9, total_batch_size: 24}",
            100,
            16,
            ["training.total_batch_size 24", "16 processes", "nearest that is: 32"],
        ),
        (
            "training: {max_steps: 9, total_batch_size: 32, gradient_accumulation_steps: 2}\ndiscriminator: {}",
            100,
            8,
            ["2 images per process", "minibatch_stddev_group 4"],
        ),
        (
            "training: {max_steps: 9, total_batch_size: 10, lr_warmup: 1 epoch}",
            100,
            1,
            ["training.lr_warmup (1 epoch, 10 steps)", "longer than training (9 steps)"],
        ),
        (
            "training: {max_epochs: 2, total_batch_size: 10, lr_warmup: 21 steps}",
            100,
            1,
            ["training.lr_warmup (21 steps, 21 steps)", "longer than training (20 steps)"],
        ),
        (
            "training: {max_epochs: 0.01, total_batch_size: 10}",
            100,
            1,
            ["training.max_epochs 0.01", "less than one step"],
        ),
        (
            "training: {max_epochs: 2, total_batch_size: 8}\ndiscriminator: {start: 2 epochs}",
            80,
            1,
            ["discriminator.start (step 20)", "training ends (step 20)"],
        ),
        ("training: {max_steps: 9, total_batch_size: 64}", 63, 1, ["63", "64"]),
    ],
)
def test_what_depends_on_images_and_processes_is_checked_before_the_first_step(
    text, num_images, num_processes, parts, tmp_path
):
    config = load(tmp_path, text=text)
    with pytest.raises(ValueError) as error:
        make_plan(config, num_images, num_processes)
    assert [part for part in parts if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("scaling", "factor"), [("sqrt", math.sqrt(2)), ("linear", 2.0), ("none", 1.0)])
def test_the_learning_rate_scales_with_the_batch_as_its_key_says(scaling, factor):
    training = TrainingConfig(max_steps=1, total_batch_size=512, base_batch_size=256, lr_scaling=scaling)
    assert batch_scale(training) == factor


def test_an_unquoted_no_is_the_precision_and_not_a_boolean(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {max_steps: 1, mixed_precision: no}")
    assert load_config(tmp_path / "c.yaml").training.mixed_precision == "no"
    assert load_config(tmp_path / "c.yaml", ["training.mixed_precision=no"]).training.mixed_precision == "no"
    save_config(load_config(tmp_path / "c.yaml"), tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").training.mixed_precision == "no"


# ---- durations


@given(st.floats(0, 999_999).map(lambda value: float(f"{value:.6g}")), st.sampled_from(["steps", "epochs"]))
@example(1.0, "epochs")
@example(7.5, "epochs")
@example(0.24, "epochs")
@example(0.0, "steps")
def test_a_duration_of_six_digits_survives_printing_and_parsing(value, unit):
    value = float(round(value)) if unit == "steps" else round(value, 4)
    duration = Duration(value, unit)
    assert parsed_duration(str(duration)) == duration


@pytest.mark.parametrize("written", ["1000000 steps", "1234567 steps", "0.1234567 epochs", "0.00001 epochs"])
def test_a_duration_of_any_length_survives_printing_and_parsing(written):
    duration = parsed_duration(written)
    assert duration.value == float(written.split()[0])
    assert parsed_duration(str(duration)) == duration


def parsed_duration(written: str) -> Duration:
    duration = parse_config({"training": {"max_epochs": 1e9, "lr_decay": written}}).training.lr_decay
    assert isinstance(duration, Duration)
    return duration


@pytest.mark.parametrize(
    ("written", "steps"), [("3 steps", 3), ("1 step", 1), ("2 epochs", 20), ("0.24 epochs", 2), ("1 epoch", 10)]
)
def test_a_duration_in_epochs_becomes_the_nearest_whole_step(written, steps):
    assert parsed_duration(written).steps(steps_per_epoch=10) == steps


# ---- saving


fractions = st.floats(0, 0.999)
durations = st.one_of(
    st.builds(Duration, st.integers(0, 999_999).map(float), st.just("steps")),
    st.builds(Duration, st.integers(0, 99_999).map(lambda n: n / 100), st.just("epochs")),
).map(str)
# printable, no '$' and no number with an exponent: the next test has those
printable = st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"], exclude_characters="$")
names = st.text(printable, max_size=12).filter(lambda name: not re.search(r"\d[eE][-+]?\d", name))


@st.composite
def valid_values(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(QUANTIZERS)))
    quantizer: dict[str, Any] = {"type": kind, **having(kind, num_codes=draw(st.integers(2, 10**6)))}
    match kind:
        case "ema":
            quantizer |= {"decay": draw(fractions), "reinit_every_epochs": draw(st.none() | st.integers(1, 9))}
        case "entropy":
            target = draw(st.sampled_from(["softmax", "argmax"]))
            quantizer |= {"entropy_ratio": draw(fractions), "entropy_target": target}
        case "gumbel":
            quantizer |= {"kl_warmup": draw(durations), "straight_through": draw(st.booleans())}
            quantizer["hidden_channels"] = draw(
                st.integers(1, 9) | st.just(None if quantizer["num_codes"] < 46_000 else 1)
            )
    rounds = draw(st.integers(1, 4))
    return {
        "output_dir": draw(names.filter(bool)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "data": {"path": draw(st.none() | names), "crop_scale": draw(st.none() | st.just([0.25, 1.0]))},
        "quantizer": quantizer,
        "discriminator": draw(st.none() | st.fixed_dictionaries({"start": durations, "r1_weight": st.floats(0, 1e6)})),
        "training": {
            "max_epochs": draw(st.floats(1e-3, 1e6)),
            "total_batch_size": 4 * rounds * draw(st.integers(1, 64)),
            "gradient_accumulation_steps": rounds,
            "base_lr": draw(st.floats(1e-12, 1e3)),
            "betas": [draw(fractions), draw(fractions)],
            "lr_decay": draw(st.none() | durations),
            "validation_metrics": ["psnr", *draw(st.sets(st.sampled_from(["l2", "rfid", "lpips"])))],
        },
        "tracking": {"run_name": draw(st.none() | names)},
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(values=valid_values())
def test_a_saved_config_loads_to_an_equal_object(values, tmp_path_factory):
    config = parse_config(values)
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize("name", ["1e3", "8e12345", "yes", "null", "${x}", r"\${x}"])
def test_a_saved_string_that_looks_like_something_else_loads_as_that_string(name, tmp_path):
    config = parse_config({"training": {"max_steps": 1}})
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"run_name": name})})
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


# ---- junk

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["${", "${seed}", "???", "gumbel", "3 steps", "1e400 steps", 10**400, -1, 2**64, "é"]),
)
leaves = sorted({key.rsplit(".", 1)[-1] for key in config_keys()})
keys = st.one_of(st.sampled_from(leaves), st.text(max_size=6), st.sampled_from(["type", "training", 3, 2.5, True]))
junk = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
TOP = sorted(Config.model_fields)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(TOP) | keys, junk, max_size=6))
def test_junk_is_refused_with_a_value_error_or_is_a_config(values):
    try:
        assert isinstance(parse_config(values), Config)
    except ValueError as error:
        assert str(error).startswith("config: ")


@pytest.mark.seconds
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(config_keys())), st.text(max_size=10)), max_size=4))
def test_junk_after_the_equals_sign_is_refused_with_a_value_error_or_is_a_config(pairs):
    overrides = [f"{key}={value}" for key, value in pairs]
    try:
        assert isinstance(parse_config({"training": {"max_steps": 5}}, overrides), Config)
    except ValueError as error:
        assert str(error).startswith("config: ")


@pytest.mark.seconds
@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_a_file_of_junk_is_refused_with_a_value_error(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"junk\.yaml"):
        load_config(path)


# ---- the recipes

TRAINABLE = {
    "standard_vqvae_cb4096": 36_606_723,
    "standard_vqvae_cb4096_reinit10": 36_606_723,
    "entropy_vqvae_cb4096": 36_606_723,
    "ema_vqvae_cb4096": 35_558_147,
    "gumbel_vqvae_cb4096": 55_357_955,
    "standard_vqvae_cb1024": 35_820_291,
    "standard_vqgan_cb1024_noDisc": 35_820_291,
    "standard_vqgan_cb1024_fixed": 64_684_420,
    "standard_vqgan_cb1024_adaptive": 64_684_420,
    "standard_vqgan_cb1024_fixed_R1": 64_684_420,
    "standard_vqgan_cb1024_adaptive_R1": 64_684_420,
    "entropy_vqgan_cb1024_adaptive_R1": 64_684_420,
    "ema_vqgan_cb1024_adaptive_R1": 64_422_276,
    "gumbel_vqgan_cb1024_adaptive_R1": 66_128_004,
}


def test_there_are_the_fourteen_imagenet_recipes():
    assert sorted(path.stem for path in (RECIPES / "imagenet").glob("*")) == sorted(TRAINABLE)
    assert len(TRAINABLE) == 14


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_sets_its_own_output_dir(path):
    assert load_config(path).output_dir.startswith("runs/")
    assert load_config(path).output_dir.endswith(path.stem)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_recipe_has_the_parameters_of_the_published_run(name):
    path = RECIPES / "imagenet" / f"{name}.yaml"
    # the perceptual network trains nothing; without it there is less to build
    config = load_config(path, ["losses.l2_weight=1", "losses.perceptual_weight=0"])
    assert describe(config)["parameters"]["total_trainable"] == TRAINABLE[name]
    assert f"{TRAINABLE[name]:,} trainable parameters" in path.read_text()


@pytest.mark.seconds
def test_the_taming_recipe_has_the_tokenizer_of_llamagens_vq16():
    path = RECIPES / "taming_vq16.yaml"
    parameters = describe(load_config(path, ["losses.perceptual_weight=0"]))["parameters"]
    theirs = VQGAN(LLAMAGEN, multipliers=(1, 1, 2, 2, 4), attention=(4,))
    theirs.channels, theirs.blocks, theirs.latent_channels, theirs.num_codes = 128, 2, 256, 16384
    theirs.pixels(theirs.nearest(theirs.latents(torch.zeros(1, 3, 16, 16)))[1])
    assert parameters["tokenizer"] == sum(weight.numel() for weight in theirs.weights.values())
    assert f"{parameters['total_trainable']:,} trainable parameters" in path.read_text()


def test_a_vqgan_recipe_costs_the_published_flop():
    description = describe(load_config(RECIPES / "imagenet" / "standard_vqgan_cb1024_adaptive.yaml"))
    expected = {"encoder": 76.0, "decoder": 15.2, "perceptual": 80.2, "discriminator": 93.7}
    assert description["gflop_per_image"] == pytest.approx(expected, abs=0.1)
    assert description["latent_grid"] == [16, 16]
    assert description["bits_per_pixel"] == 256 * 10 / 256**2


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_recipe_plans_the_published_run_on_eight_processes(name):
    plan = make_plan(load_config(RECIPES / "imagenet" / f"{name}.yaml"), num_images=1_281_167, num_processes=8)
    assert (plan.batch_size, plan.steps_per_epoch, plan.total_steps) == (32, 5004, 150 * 5004)
    assert plan.learning_rate == (3e-4 if "vqvae" in name else 1e-4)
    assert plan.decay_steps == plan.total_steps
    assert plan.learning_rate_at(plan.total_steps) == pytest.approx(plan.learning_rate / 10)
    has_discriminator = "vqgan" in name and "noDisc" not in name
    assert plan.discriminator_start == (5004 if has_discriminator else None)


def test_gumbel_logits_of_more_weights_than_a_gpu_holds_name_the_key(tmp_path):
    many = ("quantizer.type=gumbel", f"quantizer.num_codes={2**18}")
    sentence = sentence_of(MINIMAL, tmp_path, *many)
    assert (
        "num_codes x num_codes = 68,719,476,736 weights" in sentence and "set quantizer.hidden_channels, to" in sentence
    )
    assert parse_config({"training": {"max_steps": 1}}, [*many, "quantizer.hidden_channels=256"])
    assert parse_config({"training": {"max_steps": 1}}, [many[0], f"quantizer.num_codes={2**15}"])
