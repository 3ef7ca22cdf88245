"""pydantic's errors as sentences, one a mistake, with keys as the user writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from vqgan_accel.config.keys import config_keys, nearest_key
from vqgan_accel.config.schema import Config
from vqgan_accel.sections import sections_of, type_of
from vqgan_accel.words import either


def sentences(error: ValidationError, model: type[BaseModel] = Config) -> str:
    """One line for each mistake in the values of `model`."""
    return "\n".join(_sentence(detail, model) for detail in error.errors())


def _sentence(detail: Any, model: type[BaseModel]) -> str:
    key, types = _as_written(detail["loc"], model)
    given = detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'{_suggestion(key)}"
        case "missing":
            return f"'{key}' is missing"
        case "union_tag_not_found":
            return f"'{key}.type' is missing; give {either(types)}"
        case "union_tag_invalid":
            return f"'{key}.type' is {given.get('type')!r} but must be {either(types)}"
        case "value_error":
            return f"{key + ': ' if key else ''}{detail['msg'].removeprefix('Value error, ')}"
    if key == "training.mixed_precision" and given == "fp16":
        return (
            "'training.mixed_precision' cannot be fp16: one gradient scaler would serve two networks' optimizers, and "
            "its skipped steps would break the codebook's moving averages; use bf16 (same range as float32) or no"
        )
    return f"'{key}' is {given!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _as_written(location: Sequence[int | str], model: type[BaseModel]) -> tuple[str, list[str]]:
    """The dotted key of a pydantic location, and what its `type` may be where it is one of several sections. pydantic
    names the type after such a key; the user does not."""
    written, section = [], model
    by_type: dict[str, type[BaseModel]] = {}  # of the key that was written last
    for part in location:
        if part in by_type:
            section = by_type.pop(str(part))
            continue
        written.append(str(part))
        field = section.model_fields.get(str(part))
        sections = sections_of(field.annotation) if field else []
        by_type = {type_of(kind): kind for kind in sections if "type" in kind.model_fields}
        section = sections[0] if sections else section
    return ".".join(written), list(by_type)


def _suggestion(key: str) -> str:
    if key in config_keys():
        return f": '{key}' belongs to another {key.split('.')[0]}.type"
    near = nearest_key(key)
    return f"; did you mean '{near}'?" if near else "; `vqgan-accel keys` lists all there are"
