"""The schema's keys: what there is, what it means, and as JSON schema for editors."""

from __future__ import annotations

from pydantic import BaseModel

from vqgan_accel.config.schema import Config
from vqgan_accel.sections import sections_of


def config_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, for suggestions."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in sections_of(field.annotation):
            keys += config_keys(section, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))
