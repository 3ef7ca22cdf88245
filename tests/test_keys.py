"""What `vqgan-accel keys` says of a config's keys, and the JSON schema of a config file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import DISCRIMINATOR, NEAREST, QUANTIZERS, tiny_config

from vqgan_accel.cli import main
from vqgan_accel.config import Config, config_keys, json_schema, key_lines, save_config
from vqgan_accel.recipes import recipes

PAGE = Path(__file__).parent.parent / "docs" / "config.md"


def test_every_key_is_told_with_its_meaning_as_the_page_has_it():
    lines = key_lines()
    told = dict(zip(lines[::2], lines[1::2], strict=True))
    assert {re.split(r"[ :]", head)[0] for head in told} == set(config_keys())
    assert all(meaning.startswith("    ") and len(meaning) > 8 for meaning in told.values())
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    for name, allowed, default, meaning in rows:
        if allowed.startswith("section of type"):  # the page names its types here, and `keys` in a line of their own
            continue
        its = {line for head, line in told.items() if head.endswith(f": {allowed}; default {default}".replace("`", ""))}
        # (A type is told once, and on the page with each of them.)
        assert name.endswith(".type") or f"    {meaning}".replace("\\|", "|") in its, name
    assert len(rows) > 100


def test_a_prefix_is_a_section_or_the_beginning_of_keys(capsys):
    assert main(["keys", "quantizer.kl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "quantizer.kl_cost (gumbel): number; at least 0; default 0.00859375",
        "    weight of the KL loss; 6.6 / 768 (Ramesh et al. 2021, A.2: per pixel value, 256 px at f = 16)",
        "quantizer.kl_warmup (gumbel): duration; default 0.24 epochs",
        "    cosine from 0 to kl_cost",
    ]
    assert key_lines("training")[:3:2] == [
        "training: section; must be given",
        "training.max_epochs: number, or null; above 0; default null",
    ]
    assert len(key_lines("training")) == 2 * (1 + sum(key.startswith("training.") for key in config_keys()))


def test_a_key_of_some_types_of_a_section_says_which():
    heads = key_lines()[::2]
    *others, last = QUANTIZERS
    for head in (
        f"quantizer.type: {', '.join(others)} or {last}; must be given",
        f"quantizer.commitment_cost ({', '.join(NEAREST)}): number; at least 0; default 0.25",
        "quantizer.decay (ema): number; at least 0 and below 1; default 0.99",
        "autoencoder.channels: whole number; above 0; default 128",
        "autoencoder.type: maskgit or taming; default maskgit",
        "autoencoder.num_res_blocks (maskgit): whole number; at least 1; default 2",
        "autoencoder.num_res_blocks (taming): whole number; at least 1; default 2",
        "discriminator: section, or null; default null",
    ):
        assert heads.count(head) == 1, head


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [
        ("trainng.max_steps", "did you mean 'training.max_steps'?"),
        ("max_steps", "did you mean 'training.max_steps'?"),
        ("xyz", "`vqgan-accel keys` lists all there are"),
    ],
)
def test_a_prefix_of_nothing_says_what_was_meant(prefix, hint, capsys):
    assert main(["keys", prefix]) == 2
    assert capsys.readouterr().err == f"error: no key begins with '{prefix}'; {hint}\n"


# ---- the JSON schema


def faults(values: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [fault.message for fault in jsonschema.Draft202012Validator(json_schema()).iter_errors(values)]


def test_the_command_prints_a_schema(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    assert main(["keys", "--json-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$defs"]["TrainingConfig"]["properties"]["checkpoint_every"]["default"] == "1 epoch"
    assert main(["keys", "training", "--json-schema"]) == 2


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_valid_under_it(name):
    assert faults(OmegaConf.to_container(OmegaConf.load(recipes()[name]))) == []


def test_a_resolved_config_is_valid_under_it(tmp_path):
    for number, changes in enumerate(({}, {"discriminator": DISCRIMINATOR}, {"autoencoder": {"type": "taming"}})):
        changes.get("autoencoder", {}).update(channels=32)
        save_config(tiny_config(tmp_path, **changes), tmp_path / f"{number}.yaml")
        assert faults(OmegaConf.to_container(OmegaConf.load(tmp_path / f"{number}.yaml"))) == []


@pytest.mark.parametrize(
    "values",
    [
        {"autoencoder": {"channels": 64}},
        {"quantizer": {"type": "ema", "decay": 0.9}},
        {"discriminator": None},
        {"discriminator": {"start": "2 epochs"}},
        {"data": {"crop_scale": [0.5, 1]}},
        {"training": {"max_steps": 1, "mixed_precision": False}},  # what YAML 1.1 makes of an unquoted no
    ],
    ids=str,
)
def test_what_the_trainer_takes_is_valid_under_it(values):
    values = {"training": {"max_steps": 1}} | values
    Config.model_validate(values)
    assert faults(values) == []


@pytest.mark.parametrize(
    "values",
    [
        {"data": {"pth": "images"}},
        {"quantizer": {"num_codes": 8}},
        {"quantizer": {"type": "standard", "decay": 0.9}},
        {"quantizer": {"type": "emma"}},
        {"autoencoder": {"channels": 64, "latent_channels": 8}},  # of another type than the default
        {"discriminator": {"strat": "2 epochs"}},
        {"discriminator": {"start": "2"}},
        {"data": {"crop_scale": [0.5]}},
        {"data": {"backend": "files"}},
        {"training": {"max_step": 1}},
    ],
    ids=str,
)
def test_what_the_trainer_refuses_is_not_valid_under_it(values):
    values = {"training": {"max_steps": 1}} | values
    with pytest.raises(ValueError):
        Config.model_validate(values)
    assert faults(values)
