"""The pages lead where they say, name nothing that is not there, and the scripts under docs/ run as they stand."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from PIL import Image
from tiny import tiny_config

import vqgan_accel
from vqgan_accel.arguments import build_parser
from vqgan_accel.config import Config, config_keys
from vqgan_accel.sections import Section
from vqgan_accel.training.loop import train

ROOT = Path(__file__).parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = sorted({key.split(".")[0] for key in config_keys() if "." in key})

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


# ---- docs/config.md


def config_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "docs" / "config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_config_keys_is_what_the_schema_gives():
    reference = config_reference()
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python docs/config_reference.py"


def test_the_reference_names_every_key_with_a_meaning():
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \| (.+) \| (.+) \|$", config_reference().PAGE.read_text(), re.MULTILINE)
    sections = set(Config.model_fields) - {"output_dir", "seed"}
    told = {key for key, *_ in rows}
    inside = {key for key in config_keys() if key.replace(".inner.", ".") in told and ".inner." in key}  # of a section
    assert told | sections | inside == set(config_keys()) and "quantizer.inner" in told
    assert all(kind.strip() and default.strip() and len(meaning) > 3 for _, kind, default, meaning in rows)


def test_a_field_without_a_description_is_refused():
    class Bare(Section):
        workers: int = 4

    with pytest.raises(ValueError, match=r"Bare\.workers has no description"):
        config_reference().meaning(Bare, "workers")


# ---- links


def without_code(text: str) -> str:
    """Without fenced blocks and code spans, in which nothing is a link or a heading."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults_of_links(page: Path) -> list[str]:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            faults.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors(file):
            faults.append(f"{target}: there is no such heading")
    return faults


@each_page
def test_every_link_and_picture_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert faults_of_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The `A.b` & c\n[a](page.md#the-ab--c) ![b](none.png) [c](#nowhere) `[d](code.md)`\n")
    assert faults_of_links(page) == ["none.png: there is no such file", "#nowhere: there is no such heading"]


def test_every_page_is_in_the_index_and_leads_to_the_next() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = list(dict.fromkeys(re.findall(r"\]\(([\w/.-]+\.md)\)", index)))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES[len(TOP) :]} == {*pages, "README.md"}
    for page, following in itertools.pairwise(pages):
        last = (ROOT / "docs" / page).read_text(encoding="utf-8").rstrip().splitlines()[-1]
        assert re.match(rf"Next: \[.+\]\({re.escape(following)}\)", last), page


# ---- commands and keys


def commands_of(page: Path) -> list[list[str]]:
    """What fenced blocks give to the command line, each as argparse would get it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = []
    for line in "".join(block for language, block in blocks if not language).splitlines():
        match = re.search(r"vqgan-accel (?=[a-z])|-m vqgan_accel (?=[a-z])|\b(train|evaluate)\.py (?=\S)", line)
        if match and not line.startswith(("  ", "#")):
            words = shlex.split(re.split(r" &&| \|", line[match.end() :])[0], comments=True)
            found.append([match[1], *words] if match[1] else words)
    return found


def faults_of_commands(commands: list[list[str]]) -> list[str]:
    faults, keys = [], set(config_keys())
    for words in commands:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                _, rest = build_parser().parse_known_args(words)
            faults += [f"{' '.join(words)}: {word}" for word in rest if word.startswith("-")]
        except SystemExit:
            faults.append(" ".join(words))
        overrides = [word.split("=")[0] for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
        faults += [f"{' '.join(words)}: there is no key {key}" for key in overrides if key not in keys]
    return faults


def faults_of_names(text: str) -> list[str]:
    """Commands and keys that are named anywhere, also within a sentence."""
    subparsers = next(action for action in build_parser()._actions if action.dest == "command" or action.choices)
    known = set(subparsers.choices or ())
    faults = [name for name in re.findall(r"`vqgan-accel ([a-z][\w-]*)", text) if name not in known]
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[a-z]\w*)(?![\w/(]|\.\w)", text)
    endings = ("md", "py", "yaml", "png", "html", "jsonl", "json", "csv", "safetensors")
    keys = set(config_keys())
    return faults + [key for key in named if key not in keys and key.split(".")[1] not in endings]


@each_page
def test_every_command_and_key_that_a_page_names_is_there(page: Path) -> None:
    assert faults_of_commands(commands_of(page)) == []
    assert faults_of_names(page.read_text(encoding="utf-8")) == []


def test_commands_and_keys_that_are_not_there_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nnothing\n```\nvqgan-accel text\n```\n"
        "vqgan-accel trian a.yaml\npython train.py a.yaml --resum  # why\nvqgan-accel train a.yaml data.pth=B seeds=1\n"
        "accelerate launch evaluate.py RUN --output DIR data.path=B\n```\n"
    )
    assert faults_of_commands(commands_of(page)) == [
        "trian a.yaml",
        "train a.yaml --resum: --resum",
        "train a.yaml data.pth=B seeds=1: there is no key data.pth",
        "train a.yaml data.pth=B seeds=1: there is no key seeds",
    ]
    assert faults_of_names("`vqgan-accel go` takes `data.paths`, data.md and `training.max_steps=1`") == [
        "go",
        "data.paths",
    ]


def test_most_pages_show_commands() -> None:
    """Or the two tests above would look at nothing."""
    assert sum(len(commands_of(page)) for page in PAGES) > 40


def test_the_readme_has_the_two_commands_that_ci_runs_and_no_others() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("  ")[0] for line in lines if re.match(r"bash launch/(demo|test)\.sh( |$)", line)] == [
        "bash launch/demo.sh",
        "bash launch/test.sh",
    ]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vqgan_accel.__version__
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "MIT" and citation["authors"]
    assert f"## [{vqgan_accel.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---- scripts


@pytest.mark.slow
def test_from_another_trainers_checkpoint_to_the_data_set_of_a_second_stage(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "docs" / "second_stage.py"), str(tmp_path / "out")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "standard quantizer, 32 codes, revision head",
        "256 x 256 px: PSNR ",
        "32 grids of [8, 8] codes below 32",
        "features: ['codes', 'label', 'file_name', 'index', 'view']",
        "a code takes 5.00 bits, and ",
        "decoded.png: astronaut from their codes",
    ):
        assert said in done.stdout, done.stdout
    with Image.open(tmp_path / "out" / "decoded.png") as picture:
        assert picture.height == 2 * 32 + 2
    assert len(list((tmp_path / "out" / "reconstructions").rglob("*.png"))) == 16


@pytest.mark.slow
def test_from_a_run_without_classes_to_the_data_set_of_a_second_stage(tmp_path: Path) -> None:
    run = train(tiny_config(tmp_path))
    script = [sys.executable, str(ROOT / "docs" / "second_stage.py"), str(tmp_path / "out"), "--run", str(run)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 grids of [4, 4] codes below 16" in done.stdout
    assert "decoded.png: 000.png, 001.png, 002.png, 003.png from their codes" in done.stdout
    with Image.open(tmp_path / "out" / "decoded.png") as picture:
        assert picture.height == 2 * 16 + 2
