"""What a section of a config is, and what the section of a component says about it.

A component (a quantizer, a discriminator, a loss term) is its section and its module. The section says everything that
others have to know of it before it is built, and builds it; the union of sections in `vqgan_accel/config/` is the list
of all there are. docs/extending.md goes through an example.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

    from vqgan_accel.losses.terms import LossTerm
    from vqgan_accel.models.discriminators.base import Discriminator
    from vqgan_accel.models.quantizers.base import Quantizer


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# ---- durations


class Duration(NamedTuple):
    """A length of training, written in YAML as `500 steps` or `7.5 epochs`."""

    value: float
    unit: Literal["steps", "epochs"]

    def steps(self, steps_per_epoch: int | None) -> int:
        """The duration in optimizer steps, rounded to the nearest. None: nothing but 0 is given in epochs."""
        return round(self.value * (steps_per_epoch or 0 if self.unit == "epochs" else 1))

    def __str__(self) -> str:
        unit = self.unit if self.value != 1 else self.unit[:-1]
        number = f"{self.value:.0f}" if self.value == int(self.value) else repr(self.value)
        return f"{number} {unit}"


_DURATION = r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(steps?|epochs?)\s*"


def _parse_duration(value: object) -> object:
    if isinstance(value, Duration):
        return value
    match = re.fullmatch(_DURATION, value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("a duration is a number and a unit, such as '500 steps' or '7.5 epochs'")
    unit: Literal["steps", "epochs"] = "steps" if match[2].startswith("step") else "epochs"
    if unit == "steps" and not float(match[1]).is_integer():
        raise ValueError("a duration in steps is a whole number, such as '500 steps'")
    return Duration(float(match[1]), unit)


DurationField = Annotated[
    Duration,
    BeforeValidator(_parse_duration),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": f"^{_DURATION}$"}),
]


# ---- one of the names in a table


class OneOf:
    """Marks a text that has to be one of `names`: `Annotated[str, OneOf(["a", "b"])]`, as a Literal of them would, but
    the names may be a table's keys."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, annotation: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


# ---- several sections for one key, told apart by their `type`


class ByType:
    """Marks a union of sections, or the only one there is so far: `Annotated[A | B, ByType()]`. The key `type` says
    which one is meant; with a `default` it may be left out."""

    def __init__(self, default: str | None = None) -> None:
        self.default = default

    def __get_pydantic_core_schema__(self, annotation: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {type_of(section): handler.generate_schema(section) for section in sections_of(annotation)}
        tagged = core_schema.tagged_union_schema(choices, discriminator="type")
        return core_schema.no_info_before_validator_function(self._with_type, tagged)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Whatever has no `type` is the default, and nothing else."""
        found = handler(schema)
        default = found["discriminator"]["mapping"].get(self.default)
        found["oneOf"] = [
            part if part["$ref"] == default else {"allOf": [part, {"required": ["type"]}]} for part in found["oneOf"]
        ]
        return found

    def _with_type(self, value: object) -> object:
        if isinstance(value, dict) and self.default is not None:
            return {"type": self.default, **value}
        return value


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation names, in its order."""
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [section for part in get_args(annotation) for section in sections_of(part)]
    kind = type(Section)  # (on Python 3.10 tuple[int, ...] is a `type` too)
    return [annotation] if isinstance(annotation, kind) and issubclass(annotation, Section) else []


def type_of(section: type[BaseModel]) -> str:
    """What `type` is in YAML for this section."""
    return get_args(section.model_fields["type"].annotation)[0]


# ---- what of a section the weights' meaning depends on

T = TypeVar("T")
_LEARNING = "says how weights are learnt, not what they mean"
Learning = Annotated[T, _LEARNING]  # marks such a field: `decay: Learning[float] = 0.99`


def layout_of(section: Section) -> dict[str, Any]:
    """Every field, of sections in it too, but those marked as `Learning`. Weights of two sections mean the same if and
    only if these are equal: a forgotten mark refuses what would have fitted, and lets nothing pass."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= {f"{name}.{key}": part for key, part in layout_of(value).items()}
        elif _LEARNING not in field.metadata:
            found[name] = value
    return found


# ---- components


class Reinit(NamedTuple):
    """How codes that are hardly used are given new vectors."""

    every: Duration
    below: float  # uses, in units of the mean code's; 0: of those that are not used at all
    source: Literal["latents", "used_codes"]


class QuantizerSection(Section):
    """A quantizer's section has, as fields or as properties, `type`, `num_codes` (K) and `embedding_dim` (D), and marks
    as `Learning` what does not change the meaning of a codebook."""

    if TYPE_CHECKING:

        @property
        def num_codes(self) -> int: ...

        @property
        def embedding_dim(self) -> int: ...

    def build(self) -> Quantizer:
        raise NotImplementedError

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """How many codes each of a position's codes is one of. Where there are several, num_codes is the largest."""
        return (self.num_codes,)

    @property
    def draws_noise(self) -> bool:
        """In training; it is then given a seed for each sample."""
        return False

    def at_step(self, step: int, steps_per_epoch: int | None) -> dict[str, float]:
        """Attributes of the quantizer that follow a schedule: their values in optimizer step `step`."""
        return {}

    @property
    def reinit(self) -> Reinit | None:
        """None where its codes are never replaced. Otherwise what it builds has `lookups`."""
        return None

    @property
    def starts_from_latents(self) -> bool:
        """Whether its `lookups` get their first codebooks from the first step's latents, by k-means."""
        return False

    def require_latents(self, number: int) -> None:
        """ValueError, a sentence that names keys, where these are too few latents (h x w of an image) to start from."""


class TermSection(Section):
    """Of a further loss: see `vqgan_accel.losses.terms`."""

    def build(self) -> LossTerm:
        raise NotImplementedError


class DiscriminatorSection(Section):
    """The adversarial game, and the network that a discriminator's section adds to it."""

    type: str
    loss: Literal["hinge", "non_saturating"] = Field(
        "non_saturating", description="of both networks (Lim & Ye 2017; Goodfellow et al. 2014)"
    )
    start: DurationField = Field(
        Duration(0, "epochs"), description="adversarial training begins here; before it, D neither runs nor learns"
    )
    warmup: DurationField = Field(
        Duration(0, "steps"),
        description="from then on D learns alone, before its loss reaches the tokenizer",
    )
    weight: float = Field(0.1, ge=0, description="of the generator's adversarial loss; times lambda where adaptive")
    adaptive_weight: bool = Field(False, description="lambda of Esser et al. 2021, eq. 7")
    r1_weight: float = Field(
        0.0, ge=0, description="coefficient of mean |grad D(x)|^2 as applied (Mescheder et al. 2018); 0: off"
    )
    r1_every: int = Field(16, ge=1, description="optimizer steps between two applications (lazy regularisation)")

    def build(self, image_size: int) -> Discriminator:
        """For images of image_size x image_size pixels."""
        raise NotImplementedError

    def require_image_size(self, image_size: int) -> None:
        """ValueError, a sentence that names keys, for sizes that the network cannot take."""

    @property
    def group(self) -> tuple[str, int]:
        """Images that have to be in one process and round together, because the network compares them, and the key
        that says so."""
        return "", 1
