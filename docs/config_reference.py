"""Write docs/config.md: every key of a config with its type, bounds, default and meaning, from vqgan_accel/config.py.

    python docs/config_reference.py

The schema is walked, and a field's meaning is the comment that stands beside it. tests/test_docs.py holds the page to
what this writes. Types and bounds are spelled here, so that no version of pydantic changes the page.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tokenize
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vqgan_accel import config as schema
from vqgan_accel.config import UNIONS, Config, ConvolutionalConfig, Duration, Section

PAGE = Path(__file__).parent / "config.md"
HEAD = """\
# Every key of a config

Written by `python docs/config_reference.py` from the schema, `vqgan_accel/config.py`: change the comments there, not
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


# ---- comments


def comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment beside it.

    That is what stands behind `#` on the field's own lines and on comment lines that follow at once; and, where the
    field has none there, on the comment lines before it.
    """
    at_line: dict[int, tuple[str, bool]] = {}  # line -> the comment, whether it has the line for itself
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            at_line[token.start[0]] = (token.string.lstrip("#").strip(), alone)

    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            first, last = field.lineno, field.end_lineno or field.lineno
            parts = [at_line[line][0] for line in range(first, last + 1) if line in at_line]
            if parts:
                parts += below(at_line, last, +1)
            else:
                parts = below(at_line, first, -1)[::-1]
            found[node.name, field.target.id] = " ".join(parts)
    return found


def below(at_line: dict[int, tuple[str, bool]], line: int, step: int) -> list[str]:
    """The comments that have lines for themselves, from the next line on, downwards or (step -1) upwards."""
    parts = []
    while (line := line + step) in at_line and at_line[line][1]:
        parts.append(at_line[line][0])
    return parts


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


def sections_of(annotation: Any) -> list[type[Section]]:
    kind = type(Section)  # (on Python 3.10 tuple[int, ...] is a class too)
    return [part for part in parts_of(annotation) if isinstance(part, kind) and issubclass(part, Section)]


def meaning(section: type[BaseModel], name: str, known: dict[tuple[str, str], str]) -> str:
    """The comment in the class that has the field: its own, or one that it inherits from. ValueError where it has
    none."""
    for owner in section.__mro__:
        if text := known.get((owner.__name__, name)):
            return text
    raise ValueError(f"{section.__name__}.{name} has no comment in config.py that says what it is")


def introduction(section: type[BaseModel]) -> list[str]:
    """The class's own docstring."""
    text = section.__dict__.get("__doc__")
    return [*inspect.cleandoc(text).splitlines(), ""] if text else []


def table(section: type[BaseModel], prefix: str, known: dict[tuple[str, str], str]) -> list[str]:
    rows = []
    for name, field in sorted(section.model_fields.items(), key=lambda item: item[0] != "type"):
        if sections_of(field.annotation):
            continue
        allowed = "; ".join(part for part in (type_name(field.annotation), bounds(field)) if part)
        default = "must be given" if field.is_required() else f"`{value_text(field.default)}`"
        cells = [f"`{prefix}{name}`", allowed, default, meaning(section, name, known)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return ["| key | type | default | |", "| --- | --- | --- | --- |", *rows, ""]


def page() -> str:
    known = comments(Path(schema.__file__).read_text(encoding="utf-8"))
    lines = [*HEAD.splitlines(), "", "## The file's top", "", *table(Config, "", known)]
    lines += ["and the sections:", ""]
    for name, field in Config.model_fields.items():
        if sections_of(field.annotation):
            lines.append(f"- [`{name}`](#{name}): {meaning(Config, name, known)}")
    for name, field in Config.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            continue
        lines += ["", f"## {name}", ""]
        if name in UNIONS:
            shared = [ConvolutionalConfig] if all(issubclass(s, ConvolutionalConfig) for s in sections) else []
            lines += [line for base in shared for line in introduction(base)]
            default = Config.model_fields[name].default.type
            lines += [f"`{name}.type` says which of these it is; without the section, `{default}`.", ""]
            for section in sections:
                kind = get_args(section.model_fields["type"].annotation)[0]
                lines += [f"### {name}.type: {kind}", "", *introduction(section), *table(section, f"{name}.", known)]
        else:
            if Config.model_fields[name].default is None:
                lines += ["Null where it is not given.", ""]
            lines += [*introduction(sections[0]), *table(sections[0], f"{name}.", known)]
        lines.pop()
    return "\n".join([*lines, "", *TAIL.splitlines(), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {page().count(chr(10))} lines", file=sys.stderr)
