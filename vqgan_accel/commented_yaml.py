"""A config as a short YAML file for people: with a reason beside each value, and without what the schema's defaults
say already."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from vqgan_accel.config import Config, literal
from vqgan_accel.sections import Section

WIDTH = 110  # columns; a longer comment stands above its value


def commented_yaml(config: Config, comments: Mapping[str, str]) -> str:
    """`load_config` reads an equal config from it. `comments`: dotted key -> why, on one line. Values with a comment
    are written even where they are the defaults."""
    lines: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            named = type(value) is not type(field.default)  # by its type: another section of a union, or of null
            entries = _entries(name, value, comments, named)
            lines += ["", f"{name}:"] if entries else []
            for key, inner in entries.items():
                lines += _line(key, inner, comments.get(f"{name}.{key}"), "  ")
        elif name in comments or value != field.default:
            lines += _line(name, value, comments.get(name), "")
    return "\n".join(lines) + "\n"


def _entries(section: str, values: Section, comments: Mapping[str, str], named: bool) -> dict[str, Any]:
    """What is to be written of a section, its type first."""
    plain, found = values.model_dump(mode="json"), {}
    for name, field in sorted(type(values).model_fields.items(), key=lambda item: item[0] != "type"):
        differs = field.is_required() or getattr(values, name) != field.default
        if differs or f"{section}.{name}" in comments or (named and name == "type"):
            found[name] = plain[name]
    return found


def _line(key: str, value: Any, comment: str | None, indent: str) -> list[str]:
    line = f"{indent}{key}: {scalar(value)}"
    if comment is None:
        return [line]
    if len(line) + len(comment) + 4 <= WIDTH:
        return [f"{line}  # {comment}"]
    return [f"{indent}# {comment}", line]


def scalar(value: Any) -> str:
    """A plain value, or a list of some, as YAML on one line that OmegaConf reads back to the same."""
    if isinstance(value, list):
        return f"[{', '.join(map(scalar, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        simple = re.fullmatch(r"[A-Za-z][\w./-]*|\d+ (steps?|epochs?)", value, re.ASCII)
        return value if simple and yaml.safe_load(value) == value else quoted(literal(value))
    return repr(value)


def quoted(text: str) -> str:
    """A double-quoted scalar on one line, whatever its characters."""
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    return letter if letter.isprintable() else f"\\U{ord(letter):08X}"
