"""The schema's keys: what there is, what it means, and the JSON schema for editors.

`vqgan-accel keys` and docs/config.md say the same of a key. Types, bounds and values are spelled here, so that no
version of pydantic changes the page.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from vqgan_accel.config.schema import Config
from vqgan_accel.sections import ByType, Duration, OneOf, sections_of, type_of
from vqgan_accel.words import either

Mark = TypeVar("Mark")


class Key(NamedTuple):
    name: str  # as on the command line, with its sections
    allowed: str  # type and bounds
    default: str | None  # as YAML has it; None: it has none, for it is a section, or is required
    required: bool
    meaning: str  # empty where the field has no description
    types: tuple[str, ...] = ()  # of its section, that have it in this form; empty: all

    def lines(self) -> list[str]:
        """For a terminal."""
        types = f" ({', '.join(self.types)})" if self.types else ""
        default = "; must be given" * self.required or f"; default {self.default}" * (self.default is not None)
        return [f"{self.name}{types}: {self.allowed.replace('`', '')}{default}", f"    {self.meaning}".rstrip()]


def config_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, for suggestions."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in sections_of(field.annotation):
            keys += config_keys(section, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def key_lines(prefix: str = "") -> list[str]:
    """What there is to know of the keys that begin so. ValueError where none does."""
    found = [key for key in _keys_below(Config, "") if key.name.startswith(prefix)]
    if not found:
        near = nearest_key(prefix)
        hint = f"did you mean '{near}'?" if near else "`vqgan-accel keys` lists all there are"
        raise ValueError(f"no key begins with '{prefix}'; {hint}")
    return [line for key in found for line in key.lines()]


def nearest_key(wanted: str) -> str | None:
    """The key that was probably meant: spelt alike as a whole, or in its last part; None if none is."""
    keys = config_keys()
    leaf = wanted.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(wanted, keys, n=1, cutoff=0.75)
    near = near or [known for known in keys if known.rsplit(".", 1)[-1] == leaf][:1]
    if not near:
        leaves = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
        near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    return near[0] if near else None


def json_schema() -> dict[str, Any]:
    """Of a config file, as editors read it."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Config.model_json_schema(schema_generator=_JsonSchema)


class _JsonSchema(GenerateJsonSchema):
    def encode_default(self, default: Any) -> Any:
        return str(default) if isinstance(default, Duration) else super().encode_default(default)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a key's name once more


def keys_of(section: type[BaseModel], prefix: str) -> list[Key]:
    """The section's own keys, its type first; not those of sections in it."""
    fields = sorted(section.model_fields.items(), key=lambda item: item[0] != "type")
    return [_key(prefix + name, field) for name, field in fields if not sections_of(field.annotation)]


def _keys_below(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    """The keys of a section and of all sections in it, each of these after its own key."""
    yield from keys_of(section, prefix)
    for name, field in section.model_fields.items():
        if sections := sections_of(field.annotation):
            below, by_type = f"{prefix}{name}.", mark_of(field, ByType)
            null = type(None) in parts_of(field.annotation)
            default = "null" if null and field.default is None else None
            allowed = "section, or null" if null else "section"
            yield Key(prefix + name, allowed, default, field.is_required(), field.description or "")
            yield from _keys_of_types(sections, by_type, below) if by_type else _keys_below(sections[0], below)


def _keys_of_types(sections: Sequence[type[BaseModel]], by_type: ByType, prefix: str) -> Iterator[Key]:
    """Of one section that has several types: a key that several have in the same form comes once."""
    meanings = [f"{type_of(section)}: {section.model_fields['type'].description or ''}" for section in sections]
    names = _either([type_of(section) for section in sections])
    yield Key(f"{prefix}type", names, by_type.default, by_type.default is None, "; ".join(meanings))
    holders: dict[Key, list[str]] = {}
    for section in sections:
        for key in _keys_below(section, prefix):
            if key.name != f"{prefix}type":
                holders.setdefault(key, []).append(type_of(section))
    order = list(dict.fromkeys(key.name for key in holders))
    for key, some in sorted(holders.items(), key=lambda item: order.index(item[0].name)):
        yield key._replace(types=tuple(some) if len(some) < len(sections) else ())


# ---- types, bounds, defaults


def _key(name: str, field: FieldInfo) -> Key:
    one_of = mark_of(field, OneOf)
    kind = _either(one_of.names) if one_of else type_name(field.annotation)
    allowed = "; ".join(part for part in (kind, bounds(field)) if part)
    required = field.is_required()
    return Key(name, allowed, None if required else value_text(field.default), required, field.description or "")


def mark_of(field: FieldInfo, kind: type[Mark]) -> Mark | None:
    """Of a field's annotation, or of a part of it where that is a union."""
    parts = () if get_origin(field.annotation) is tuple else get_args(field.annotation)
    nested = (mark for part in parts for mark in getattr(part, "__metadata__", ()))
    return next((mark for mark in (*field.metadata, *nested) if isinstance(mark, kind)), None)


def parts_of(annotation: Any) -> list[Any]:
    """The members of a union; the annotation itself where it is none."""
    annotation = _plain(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in parts_of(member)]
    return [annotation]


def type_name(annotation: Any) -> str:
    """As a reader of YAML would say it; `null` where it may be."""
    names = [_one_type(part) for part in parts_of(annotation)]
    return ", ".join(name for name in names if name != "null") + (", or null" if "null" in names else "")


def bounds(field: FieldInfo) -> str:
    """Of the field's own constraints: `above 0`, `at least 0 and at most 1`, ..."""
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


def _plain(annotation: Any) -> Any:
    return _plain(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _one_type(annotation: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if annotation in names:
        return names[annotation]
    if annotation is Duration:
        return "duration"
    if get_origin(annotation) is Literal:
        return _either(get_args(annotation))
    if get_origin(annotation) is tuple:
        members = get_args(annotation)
        marks = getattr(members[0], "__metadata__", ())
        if names_of := [mark.names for mark in marks if isinstance(mark, OneOf)]:
            return f"list: {_either(names_of[0])}"
        if members[-1] is Ellipsis:
            return f"list: {_plural(_one_type(_plain(members[0])))}"
        return f"list of {len(members)} {_plural(_one_type(_plain(members[0])))}"
    raise TypeError(f"no words for the type {annotation}")


def _either(values: Sequence[object]) -> str:
    return either([f"`{value}`" for value in values])


def _plural(name: str) -> str:
    return name.replace("number", "numbers")
