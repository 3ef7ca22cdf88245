"""What comes with the package beside its code, and that what lies around in a checkout changes none of its checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vqgan_accel import __version__
from vqgan_accel.cli import main
from vqgan_accel.config import config_keys, load_config
from vqgan_accel.extras import is_installed
from vqgan_accel.recipes import CONFIGS, LAUNCH, copy_launch_files, recipes, summary

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.seconds
def test_recipes_have_one_place_and_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    assert CONFIGS.resolve() == REPOSITORY / "configs" and LAUNCH.resolve() == REPOSITORY / "launch"
    monkeypatch.chdir(tmp_path)
    assert {"demo", "taming_vq16", "imagenet/ema_vqvae_cb4096"} <= recipes().keys()
    for name, file in recipes().items():
        assert load_config(name, ["seed=3"]) == load_config(file, ["seed=3"])
        assert file.resolve() == (REPOSITORY / "configs" / f"{name}.yaml")


def test_a_file_that_is_there_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("training: {max_steps: 7}\n")
    assert load_config("demo").training.max_steps == 7


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dmeo", "did you mean demo?"),
        ("demo.yaml", "did you mean demo?"),
        ("imagenet/ema_vqvae_cb4096.yaml", "did you mean imagenet/ema_vqvae_cb4096?"),
        ("ema_vqvae_cb4096", "did you mean imagenet/ema_vqvae_cb4096?"),
        ("xyz", "nor a recipe of this name; `vqgan-accel recipes` lists them"),
    ],
)
def test_a_name_that_is_neither_says_what_was_meant(tmp_path, monkeypatch, name, near):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^no config file at {name}.*{near.replace('?', '.')}$"):
        load_config(name)


def test_every_recipe_has_a_line_of_its_own(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipes())
    for line, (name, file) in zip(lines, recipes().items(), strict=True):
        assert line.split() == [name, *summary(file).split()]
        assert 20 < len(summary(file)) < 120
    assert len({summary(file) for file in recipes().values()}) == len(lines)


def test_launch_files_are_copied_as_they_are_and_over_nothing(tmp_path, capsys):
    assert main(["launch-files", str(tmp_path / "launch")]) == 0
    copies = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {"8xA100_bf16.yaml", "slurm.sh", "two_cpu_processes.sh"} <= {copy.name for copy in copies}
    for copy in copies:
        assert copy.read_bytes() == (REPOSITORY / "launch" / copy.name).read_bytes()
        assert os.access(copy, os.X_OK) == os.access(REPOSITORY / "launch" / copy.name, os.X_OK)
    copies[0].unlink()
    copies[-1].write_text("mine")
    with pytest.raises(ValueError, match="is there already and may hold your changes"):
        copy_launch_files(tmp_path / "launch")
    assert not copies[0].exists() and copies[-1].read_text() == "mine"


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"vqgan_accel {__version__}\n"


def completions(line: str, tmp_path: Path) -> list[str]:
    """What the shell's Tab key offers after `line`, by argcomplete's protocol."""
    pytest.importorskip("argcomplete")
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    script = "import sys; sys.argv[0] = 'vqgan-accel'; from vqgan_accel.cli import main; main()"
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=REPOSITORY, check=True)
    return [word.strip() for word in (tmp_path / "offered").read_text().split("\n")]


@pytest.mark.seconds
def test_the_tab_key_knows_commands_recipes_and_keys(tmp_path):
    assert completions("vqgan-accel desc", tmp_path) == ["describe"]
    assert completions("vqgan-accel train imagenet/gum", tmp_path) == [
        "imagenet/gumbel_vqgan_cb1024_adaptive_R1",
        "imagenet/gumbel_vqvae_cb4096",
    ]
    offered = completions("vqgan-accel train demo seed=1 training.", tmp_path)
    assert offered == [f"{key}=" for key in config_keys() if key.startswith("training.")]
    assert completions("vqgan-accel evaluate RUN data.pa", tmp_path) == ["data.path="]


# ---- what is left behind


@pytest.fixture
def used_checkout(tmp_path) -> Path:
    """A copy of this checkout in which somebody has worked: runs, downloads, environments, scripts, an old build."""
    checkout = tmp_path / "checkout"
    folders = ("vqgan_accel", "tests", "benchmarks", "docs", "launch", "configs")
    hidden = shutil.ignore_patterns("__pycache__", "golden")
    for folder in folders:
        shutil.copytree(REPOSITORY / folder, checkout / folder, symlinks=True, ignore=hidden)
    for file in ("pyproject.toml", "setup.cfg", "train.py", "evaluate.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(REPOSITORY / file, checkout / file)
    left = ("runs/demo", "wandb", "tiny", "images", "torch", "evaluation/me/mine", "my_code", "vqgan_accel_old", "env")
    for folder in left:
        (checkout / folder).mkdir(parents=True)
        (checkout / folder / "__init__.py").write_text("import os,sys\nx=1\n")
    (checkout / "my_script.py").write_text("from vqgan_accel import train\nimport os,sys\nprint( 1 )\n")
    return checkout


def test_lint_sees_the_projects_own_files_and_nothing_else(used_checkout):
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if ruff is None:
        pytest.skip("ruff is not installed")
    for words in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([ruff, *words, "--no-cache"], cwd=used_checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    listed = subprocess.run([ruff, "check", "--show-files"], cwd=used_checkout, capture_output=True, text=True).stdout
    seen = {Path(line).relative_to(used_checkout).as_posix() for line in listed.splitlines()}
    own = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("tests/**/*.py")}
    assert own | {"train.py", "vqgan_accel/cli.py", "benchmarks/loading.py", "docs/second_stage.py"} <= seen
    assert not {path for path in seen if path.split("/")[0] in ("runs", "wandb", "my_code", "my_script.py", "env")}
    (used_checkout / "tests" / "runs.py").write_text("import sys,os\n")  # and of its own it sees what is wrong
    assert subprocess.run([ruff, "check", "."], cwd=used_checkout, capture_output=True).returncode == 1


def test_a_folder_that_a_program_left_is_not_that_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb_that_is_not_installed" / "run-1").mkdir(parents=True)
    assert not is_installed("wandb_that_is_not_installed")
    assert not is_installed("neither_there_nor_here")
    assert is_installed("yaml") and is_installed("torch")
