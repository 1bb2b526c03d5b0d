"""Numbers read as a person would write them."""

import pytest
from effc.compiler.core import quantity


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (134515008, "", "134.5 M"),
        (12345678, "", "12.3 M"),
        (1234567, "", "1.23 M"),
        (12000, "", "12.0 k"),
        (9999, "", "9999"),
        (21.849999, "", "21.85"),
        (0.5, "", "0.5"),
        (float("nan"), "", "nan"),
        (float("inf"), "ms", "inf"),
        (12.5, "ms", "12.5 ms"),
        (1250, "ms", "1.2 s"),
        (0.75, "ms", "750 µs"),
        (3 << 20, "bytes", "3.00 MiB"),
        (12, "tokens/s", "12 tokens/s"),
        (37.5, "%", "37.5%"),
    ],
)
def test_a_metric_prints_with_its_unit(value, unit, text):
    assert quantity.measurement_text(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "250 ms"), (5, "5.0 s"), (42.2, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_seconds_are_said_in_the_unit_that_fits(value, text):
    assert quantity.duration_text(value) == text


def test_a_change_is_a_share_of_what_was():
    assert quantity.change_text(100, 80) == "-20.0 %"
    assert quantity.change_text(5, 5) == "same"
    assert quantity.change_text(0, 5) == ""


def test_a_count_has_its_noun():
    assert [quantity.count_text(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
