"""Write docs/config.md: every key of a config with its type, bounds, default and meaning, from vqgan_accel/config/.

    python docs/config_reference.py

Only the page's layout is here: what it says of a key is what `vqgan-accel keys` says (vqgan_accel/config/keys.py).
tests/test_docs.py holds the page to what this writes.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from pydantic import BaseModel

from vqgan_accel.config import Config
from vqgan_accel.config.autoencoders import ConvolutionalConfig
from vqgan_accel.config.keys import keys_of
from vqgan_accel.sections import sections_of, type_of
from vqgan_accel.words import either

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
variable of the environment. `vqgan-accel keys` prints what is below, `vqgan-accel keys training` one section of it.

A *duration* is a number and a unit, `500 steps` (of the optimizer) or `7.5 epochs`. A *list* is written `[a, b]`.
*null* is YAML's word for nothing. `1e-4` is a number and needs no quotes.

[Recipes](recipes.md) says how to choose, [own data](own_data.md) what `data.path` may be, [evaluation](evaluation.md)
what each metric is.
"""
TAIL = """\
Next: [exactness](exactness.md), the two promises.
"""


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
    """Of the section's own keys, and below it those of the sections in it."""
    rows = []
    for key in keys_of(section, prefix):
        default = "must be given" if key.required else f"`{key.default}`"
        cells = [f"`{key.name}`", key.allowed, default, meaning(section, key.name.removeprefix(prefix))]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    inside = {name: sections_of(field.annotation) for name, field in section.model_fields.items()} if prefix else {}
    for name, sections in inside.items():
        if len(sections) > 1:  # that have tables of their own
            types, default = either([f"`{type_of(one)}`" for one in sections]), section.model_fields[name].default.type
            rows.append(f"| `{prefix}{name}` | section of type {types} | `{default}` | {meaning(section, name)} |")
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |", *rows, ""]
    for name, sections in inside.items():
        for inner in sections if len(sections) == 1 else []:
            title = [f"### {prefix}{name}", "", f"{meaning(section, name)}.", ""]
            lines += [*title, *introduction(inner), *table(inner, f"{prefix}{name}.")]
    return lines


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
