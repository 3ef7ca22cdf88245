"""What a component's section says: what of it is layout, and which section a `type` means."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from helpers import tiny_tokenizer
from pydantic import ValidationError
from tiny import tiny_config

from vqgan_accel.config import StandardQuantizerConfig
from vqgan_accel.config.quantizers import QuantizerField
from vqgan_accel.models.build import layout_differences
from vqgan_accel.sections import ByType, Learning, OneOf, Section, layout_of, sections_of, type_of

# what decides, for the four quantizers of old, what their weights and codes mean
EMA = {"type", "num_codes", "embedding_dim", "l2_normalize", "epsilon"}
LAYOUT = {
    "standard": {"type", "num_codes", "embedding_dim", "l2_normalize"},
    "ema": EMA,
    "entropy": {"type", "num_codes", "embedding_dim", "l2_normalize"},
    "gumbel": {"type", "num_codes", "embedding_dim", "hidden_channels"},
    "residual": {"type", "depth", "shared", *(f"inner.{key}" for key in EMA)},
    "product": {"type", "groups", *(f"inner.{key}" for key in EMA)},
}


@pytest.mark.parametrize("section", sections_of(QuantizerField), ids=type_of)
def test_what_says_how_to_learn_is_no_layout(section: type[Section]) -> None:
    kind = type_of(section)
    layout = layout_of(section(type=kind))
    assert layout.keys() == LAYOUT.get(kind, layout.keys())
    assert {"type", *(key.split(".")[0] for key in layout)} <= section.model_fields.keys()


def test_a_field_whose_mark_was_forgotten_refuses_weights_and_a_marked_one_does_not(tmp_path) -> None:
    class Graded(StandardQuantizerConfig):
        levels: tuple[int, ...] = (4, 4)
        patience: Learning[int] = 3

    ours = Graded(type="standard", num_codes=16, embedding_dim=8)
    saved = tiny_tokenizer(StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8))
    config = tiny_config(tmp_path)
    for changes, named in (
        ({}, []),
        ({"patience": 4}, []),
        ({"levels": (2, 8)}, ["quantizer.levels ((4, 4))"]),
        ({"levels": (2, 8), "embedding_dim": 7}, ["quantizer.embedding_dim (8)", "quantizer.levels ((4, 4))"]),
    ):
        saved.settings.__dict__["quantizer_config"] = ours
        changed = config.model_copy(update={"quantizer": ours.model_copy(update=changes)})
        differences = [key for key in layout_differences(changed, saved) if key.startswith("quantizer.")]
        assert differences == named


def test_another_type_is_named_before_all_else(tmp_path) -> None:
    saved = tiny_tokenizer(
        StandardQuantizerConfig(type="standard", num_codes=16, embedding_dim=8), 16, channel_multipliers=[1, 1]
    )
    config = tiny_config(tmp_path, quantizer={"type": "gumbel"})
    assert layout_differences(config, saved) == ["quantizer.type (standard)", "quantizer.l2_normalize (False)"]


class Circle(Section):
    type: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Section):
    type: Literal["square"] = "square"
    side: float


class Drawing(Section):
    one: Annotated[Circle, ByType(default="circle")] | None = None
    several: Annotated[Circle | Square, ByType()] = Circle()
    colour: Annotated[str, OneOf({"red": 1, "blue": 2})] = "red"


def test_the_type_says_which_section_is_meant_even_where_there_is_but_one() -> None:
    drawing = Drawing.model_validate(
        {"one": {"radius": 2.0}, "several": {"type": "square", "side": 3.0}, "colour": "blue"}
    )
    assert drawing == Drawing(one=Circle(radius=2.0), several=Square(side=3.0), colour="blue")
    assert Drawing.model_validate(drawing.model_dump(mode="json")) == drawing
    assert Drawing.model_validate({"one": None}).one is None


@pytest.mark.parametrize(
    ("values", "where", "kind"),
    [
        ({"one": {"type": "square", "side": 1.0}}, ("one",), "union_tag_invalid"),
        ({"several": {"side": 1.0}}, ("several",), "union_tag_not_found"),
        ({"several": {"type": "square"}}, ("several", "square", "side"), "missing"),
        ({"several": {"type": "circle", "side": 1.0}}, ("several", "circle", "side"), "extra_forbidden"),
        ({"colour": "green"}, ("colour",), "literal_error"),
    ],
)
def test_what_is_wrong_is_placed(values: dict[str, object], where: tuple[str, ...], kind: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate(values)
    (error,) = caught.value.errors()
    assert (error["loc"], error["type"]) == (where, kind)
