"""YAML and dotted overrides in, one validated Config out; and back."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from vqgan_accel.config.schema import Config
from vqgan_accel.config.sentences import sentences
from vqgan_accel.files import write_atomically
from vqgan_accel.recipes import recipes
from vqgan_accel.sections import Section, sections_of, type_of


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or a recipe by its name (`vqgan-accel recipes` lists them), apply `section.key=value`
    overrides, validate.

    Raises FileNotFoundError for a missing file and ValueError, naming each wrong key and what would be right,
    otherwise.

    >>> config = load_config("demo", ["data.path=photographs", "training.max_steps=500"])
    >>> config.quantizer.num_codes, str(config.training.validate_every)
    (256, '135 steps')
    """
    path = config_file(Path(path))
    try:
        values = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except RecursionError:  # omegaconf < 2.4
        raise ValueError(f"{path} cannot be read as YAML: an alias in it is recursive") from None
    if not isinstance(values, DictConfig):
        raise ValueError(f"{path} must hold sections such as 'data:' and 'training:', and it holds none")
    return parse_config(values, overrides, source=str(path))


def config_file(path: Path) -> Path:
    """The file itself, or that of the recipe of this name. FileNotFoundError says what there is instead."""
    if path.is_file():
        return path
    known = recipes()
    if path.as_posix() in known:
        return known[path.as_posix()]
    files = {file.name: file for file in path.parent.glob("*.yaml")}
    near = [str(files[name]) for name in difflib.get_close_matches(path.name, files, n=1)]
    near += difflib.get_close_matches(path.with_suffix("").as_posix(), known, n=1)
    near += [name for name in known if Path(name).name == path.stem]
    hint = f"; did you mean {near[0]}?" if near else ", nor a recipe of this name; `vqgan-accel recipes` lists them"
    raise FileNotFoundError(f"no config file at {path}{hint}")


def parse_config(values: DictConfig | dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Config:
    """A Config from plain values and overrides; `source` is what error sentences name."""
    for override in overrides:
        if not re.match(r"[A-Za-z_][\w.]*=", override):
            raise ValueError(
                f"'{override}' is not an override; write section.key=value, such as training.max_steps=200"
            )
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(_without_other_types(OmegaConf.create(values), given, source), given)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{source}: an override does not fit: {' '.join(str(error).split())}") from error
    try:
        return validated(OmegaConf.to_container(merged, resolve=True), source)
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error


def _without_other_types(
    values: DictConfig, overrides: DictConfig, source: str, model: type[Section] = Config, prefix: str = ""
) -> DictConfig:
    """The values of a file without what belongs to another type of a section than the one that an override asks for:
    `quantizer.type=standard` begins with that type's defaults. What is left out is said."""
    for name, field in model.model_fields.items():
        parts = sections_of(field.annotation)
        section, other = (values.get(name), overrides.get(name)) if parts else (None, None)
        if not isinstance(section, DictConfig) or not isinstance(other, DictConfig):
            continue
        kinds = {type_of(part): part for part in parts if "type" in part.model_fields}
        kind = other.get("type")
        if kind in kinds:
            fields = kinds[kind].model_fields
            dropped = {key: section.pop(key) for key in list(section) if key not in fields}
            if dropped and os.environ.get("RANK", "0") == "0":
                listed = ", ".join(f"{key} {value}" for key, value in dropped.items())
                said = f"{prefix}{name}.type={kind} leaves out what {source} says of another type: {listed}"
                print(said, file=sys.stderr)
        inside = kinds.get(kind or section.get("type")) if kinds else parts[0]
        if inside is not None:
            _without_other_types(section, other, source, inside, f"{prefix}{name}.")
    return values


def validated(values: Any, source: str) -> Config:
    """A Config from plain values as they are."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}: {sentences(error)}") from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal object."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(literal(config.model_dump(mode="json")))))


def literal(values: Any) -> Any:
    """Plain values as OmegaConf has to be given them, so that `${` in their strings stays what it is."""
    if isinstance(values, dict):
        return {key: literal(value) for key, value in values.items()}
    if isinstance(values, list):
        return [literal(value) for value in values]
    if isinstance(values, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", values)
    return values


def flat_config(config: Config) -> dict[str, bool | int | float | str]:
    """Dotted keys to plain values; what is no number, bool or string is shown as one."""
    flat: dict[str, bool | int | float | str] = {}

    def visit(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)

    visit(config.model_dump(mode="json"), "")
    return flat
