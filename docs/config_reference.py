"""Write docs/config.md: every key of a config with its type, bounds, default and meaning, from vqgan_accel/config/.

    python docs/config_reference.py

The schema is walked, and a field's meaning is its description. tests/test_docs.py holds the page to what this writes.
Types and bounds are spelled here, so that no version of pydantic changes the page.
"""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vqgan_accel.config import Config
from vqgan_accel.config.autoencoders import ConvolutionalConfig
from vqgan_accel.sections import Duration, sections_of, type_of

PAGE = Path(__file__).parent / "config.md"
HEAD = """\
# Every key of a config

Written by `python docs/config_reference.py` from the schema, `vqgan_accel/config/`: change the descriptions there, not
this page.

A config is one YAML file, or a recipe's name (`vqgan-accel recipes`). A key of a section is written below it in the
file, and as `section.key=value` on the command line, where the last one wins: `training.max_steps=200`,
`discriminator=null`, `'training.validation_metrics=[psnr, codebook]'`, `discriminator.start="2 epochs"`. What is not
given has the default. An unknown key, a wrong type or an impossible combination stops before anything starts, in a
sentence that names the key. A run folder's `config.yaml` holds every key with its value. `${oc.env:NAME}` stands for a
variable of the environment.

A *duration* is a number and a unit, `500 steps` (of the optimizer) or `7.5 epochs`. A *list* is written `[a, b]`.
*null* is YAML's word for nothing. `1e-4` is a number and needs no quotes.

[Recipes](recipes.md) says how to choose, [own data](own_data.md) what `data.path` may be, [evaluation](evaluation.md)
what each metric is.
"""
TAIL = """\
Next: [exactness](exactness.md), the two promises.
"""


# ---- types, bounds, defaults


def plain(annotation: Any) -> Any:
    return plain(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def parts_of(annotation: Any) -> list[Any]:
    """The members of a union; the annotation itself where it is none."""
    annotation = plain(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in parts_of(member)]
    return [annotation]


def type_name(annotation: Any) -> str:
    """As a reader of YAML would say it; `null` where it may be."""
    names = [_one_type(part) for part in parts_of(annotation)]
    return ", ".join(name for name in names if name != "null") + (", or null" if "null" in names else "")


def _one_type(annotation: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if annotation in names:
        return names[annotation]
    if annotation is Duration:
        return "duration"
    if get_origin(annotation) is Literal:
        *others, last = (f"`{value}`" for value in get_args(annotation))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(annotation) is tuple:
        members = get_args(annotation)
        if members[-1] is Ellipsis:
            return f"list: {_plural(_one_type(plain(members[0])))}"
        return f"list of {len(members)} {_plural(_one_type(plain(members[0])))}"
    raise TypeError(f"no words for the type {annotation}")


def _plural(name: str) -> str:
    return name.replace("number", "numbers")


def bounds(field: FieldInfo) -> str:
    """Of the field's own constraints: `> 0`, `0 to 1`, ..."""
    known = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "min_length": "not empty"}
    found = []
    for name, words in known.items():
        for constraint in field.metadata:
            value = getattr(constraint, name, None)
            if value is not None:
                found.append(words.format(value_text(value)))
    for constraint in field.metadata:
        if getattr(constraint, "pattern", None) == "^[0-9a-f]{64}$":
            found.append("64 hexadecimal digits")
        elif getattr(constraint, "pattern", None) is not None:
            raise TypeError(f"no words for the pattern {constraint.pattern}")
    return " and ".join(found)


def value_text(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, Duration):
        return str(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(value_text(member) for member in value)}]"
    if isinstance(value, float):
        mantissa, _, exponent = repr(value).partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return str(value)


# ---- the page


def meaning(section: type[BaseModel], name: str) -> str:
    """ValueError where the field has none."""
    text = section.model_fields[name].description
    if not text:
        raise ValueError(f"{section.__name__}.{name} has no description that says what it is")
    return text


def introduction(section: type[BaseModel]) -> list[str]:
    """The class's own docstring."""
    text = section.__dict__.get("__doc__")
    return [*inspect.cleandoc(text).splitlines(), ""] if text else []


def table(section: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in sorted(section.model_fields.items(), key=lambda item: item[0] != "type"):
        if sections_of(field.annotation):
            continue
        allowed = "; ".join(part for part in (type_name(field.annotation), bounds(field)) if part)
        default = "must be given" if field.is_required() else f"`{value_text(field.default)}`"
        cells = [f"`{prefix}{name}`", allowed, default, meaning(section, name)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return ["| key | type | default | |", "| --- | --- | --- | --- |", *rows, ""]


def page() -> str:
    lines = [*HEAD.splitlines(), "", "## The file's top", "", *table(Config, "")]
    lines += ["and the sections:", ""]
    for name, field in Config.model_fields.items():
        if sections_of(field.annotation):
            lines.append(f"- [`{name}`](#{name}): {meaning(Config, name)}")
    for name, field in Config.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            continue
        lines += ["", f"## {name}", ""]
        if len(sections) > 1:
            shared = [ConvolutionalConfig] if all(issubclass(s, ConvolutionalConfig) for s in sections) else []
            lines += [line for base in shared for line in introduction(base)]
            default = Config.model_fields[name].default.type
            lines += [f"`{name}.type` says which of these it is; without the section, `{default}`.", ""]
            for section in sections:
                lines += [
                    f"### {name}.type: {type_of(section)}",
                    "",
                    *introduction(section),
                    *table(section, f"{name}."),
                ]
        else:
            if Config.model_fields[name].default is None:
                lines += ["Null where it is not given.", ""]
            lines += [*introduction(sections[0]), *table(sections[0], f"{name}.")]
        lines.pop()
    return "\n".join([*lines, "", *TAIL.splitlines(), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {page().count(chr(10))} lines", file=sys.stderr)
