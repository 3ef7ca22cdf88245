"""The public names: there, documented by examples that run, and imported only when they are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import examples
import pytest
import torch
from helpers import GOLDEN, tiny_tokenizer

import vqgan_accel
from vqgan_accel import ImageTokenizer, load_tokenizer
from vqgan_accel.config import StandardQuantizerConfig
from vqgan_accel.interop.lightning import import_lightning

REPOSITORY = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "datasets",
    "lpips",
    "torchmetrics",
    "torch_fidelity",
    "pydantic",
)


def test_the_public_names_are_those_that_are_listed_and_say_what_they_are():
    assert set(vqgan_accel.__all__) == set(vqgan_accel._HOMES) <= set(dir(vqgan_accel))
    for name in vqgan_accel.__all__:
        assert len(getattr(vqgan_accel, name).__doc__) > 100, name
    with pytest.raises(AttributeError, match="has no attribute 'tokenise'"):
        vqgan_accel.tokenise  # noqa: B018


@pytest.mark.seconds
def test_the_examples_of_the_docstrings_give_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples.prepare(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried = examples.run()
    assert set(tried) | {"Config"} == set(vqgan_accel.__all__)
    assert all(number >= 1 for number in tried.values())


def test_an_example_that_gives_something_else_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vqgan_accel.load_config, "__doc__", '>>> load_config("demo").seed\n1\n')
    with pytest.raises(AssertionError, match="1 examples gave something else"):
        examples.run(("load_config",))
    assert "Expected:\n    1\nGot:\n    0\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, Path]:
    """One tokenizer in every kind of place that a RUN may be; its folder itself is `saved`."""
    folder = tmp_path_factory.mktemp("homes")
    golden = GOLDEN / "lightning_standard_head"
    import_lightning(golden.with_suffix(".ckpt"), golden.with_suffix(".yaml"), folder / "import")
    saved = folder / "import" / "tokenizer"
    checkpoint = folder / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tokenizer").symlink_to(saved)
    tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=8, embedding_dim=4)).save_pretrained(
        folder / "run" / "checkpoints" / "step_00000001" / "tokenizer"
    )
    return {"import": folder / "import", "saved": saved, "checkpoint": checkpoint, "run": folder / "run"}


@pytest.mark.parametrize("kind", ["import", "saved", "checkpoint", "run"])
@pytest.mark.parametrize("load", [load_tokenizer, ImageTokenizer.from_pretrained])
def test_a_tokenizer_is_read_from_whatever_the_commands_take_for_a_run(homes, load, kind):
    expected = ImageTokenizer.from_pretrained(homes["import"], subfolder="tokenizer")
    tokenizer = load(str(homes[kind]))
    assert not tokenizer.training
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, tokenizer.state_dict()[name]), name


@pytest.mark.parametrize("load", [load_tokenizer, ImageTokenizer.from_pretrained])
def test_a_folder_without_a_tokenizer_says_what_to_give(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: give a run folder, a checkpoint or a folder of"):
        load(tmp_path)


def imported(code: str) -> list[str]:
    """Which of HEAVY a fresh interpreter has imported after `code`."""
    script = "import contextlib, io, json, sys\n"
    script += f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    {code}\n"
    script += f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


COMMAND = "from vqgan_accel.cli import main; main({})"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import vqgan_accel", []),
        (COMMAND.format(["--help"]), []),
        (COMMAND.format(["--version"]), []),
        (COMMAND.format(["train", "--help"]), []),
        (COMMAND.format(["recipes"]), []),
        (COMMAND.format(["keys"]), ["pydantic"]),
        (COMMAND.format(["keys", "--json-schema"]), ["pydantic"]),
        (COMMAND.format(["train", "no.yaml"]), ["pydantic"]),
        (COMMAND.format(["train", "demo", "training.maxsteps=1"]), ["pydantic"]),
        (COMMAND.format(["describe", "imagenet/standard_vqgan_cb1024_adaptive_R1"]), ["torch", "pydantic"]),
        (COMMAND.format(["describe", "demo"]), ["torch", "pydantic"]),
    ],
)
def test_what_answers_at_once_imports_nothing_that_takes_seconds(code, expected):
    """Importing torch takes 2 s here; diffusers, torchvision and lpips took 6 s more."""
    assert imported(code) == expected


@pytest.mark.slow
def test_a_training_imports_what_it_trains_with_and_not_every_metrics_package():
    """torchmetrics brings scipy, and takes as long as torch."""
    found = imported("import vqgan_accel.training.loop")
    assert {"torch", "diffusers"} <= set(found) and not {"torchmetrics", "torch_fidelity", "lpips"} & set(found)
