"""JSON is read as the type that it should have, or refused with the field that is not."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import pytest
from effc.dsl.syntax.json_types import from_json, make_range_predicate
from hypothesis import given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Part:
    shape: tuple[int, ...]
    axes: Mapping[str, tuple[float, bool]]


@dataclass(frozen=True)
class Whole:
    name: str
    share: Annotated[float, make_range_predicate(0, 1)]
    parts: tuple[Part, ...]
    kind: Literal["a", "b"] = "a"
    seed: int | None = None
    facts: Any = None
    by_number: Mapping[int, str] = field(default_factory=dict)


PARTS = st.builds(
    Part,
    shape=st.lists(st.integers()).map(tuple),
    axes=st.dictionaries(st.text(), st.tuples(st.floats(allow_nan=False), st.booleans())),
)
WHOLES = st.builds(
    Whole,
    name=st.text(),
    share=st.floats(0, 1),
    parts=st.lists(PARTS, max_size=3).map(tuple),
    kind=st.sampled_from("ab"),
    seed=st.none() | st.integers(),
    by_number=st.dictionaries(st.integers(), st.text()),
)


@given(value=WHOLES)
def test_what_was_written_is_read_back(value):
    assert from_json(json.loads(json.dumps(asdict(value))), Whole) == value


GOOD = {"name": "n", "share": 0.5, "parts": [{"shape": [1], "axes": {"x": [1.0, True]}}]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": 3}, "name"),
        ({"share": 1.5}, "share"),
        ({"share": float("nan")}, "share"),
        ({"share": True}, "share"),
        ({"share": 10**400}, "share"),
        ({"parts": {}}, "parts"),
        ({"parts": [3]}, "parts.0"),
        ({"parts": [{"shape": [1.0], "axes": {}}]}, "parts.0.shape.0"),
        ({"parts": [{"shape": [True], "axes": {}}]}, "parts.0.shape.0"),
        ({"parts": [{"shape": [1]}]}, "parts.0.axes"),
        ({"parts": [{"shape": [1], "axes": {"x": [1.0]}}]}, "parts.0.axes.x"),
        ({"parts": [{"shape": [1], "axes": {"x": [1.0, 1]}}]}, "parts.0.axes.x.1"),
        ({"kind": "c"}, "kind"),
        ({"kind": ["a"]}, "kind"),
        ({"seed": "1"}, "seed"),
        ({"more": 1}, "more"),
        ({"by_number": {"x": "y"}}, "by_number.x"),
    ],
)
def test_the_field_that_is_of_another_form_is_named(change, field):
    with pytest.raises(ValueError, match=f"^`{field}` is missing, of another form, or out of its range$"):
        from_json({**GOOD, **change}, Whole)


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_what_is_no_object_is_no_record(data):
    with pytest.raises(ValueError):
        from_json(data, Whole)


def test_defaults_stand_for_what_is_left_out():
    assert from_json(GOOD, Whole).seed is None and from_json(GOOD, Whole).kind == "a"
