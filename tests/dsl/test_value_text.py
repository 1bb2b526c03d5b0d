"""Values as the text that a recipe would have of them."""

import pytest
from effc.dsl.checker.units import parse_number_with_unit
from effc.dsl.checker.value_text import value_text
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 10**15))
def test_a_whole_percentage_is_rendered_as_it_was_written(number):
    assert value_text(parse_number_with_unit(str(number), "%")) == f"{number}%"


@pytest.mark.parametrize("digits", ["0.7", "33.3", "1e+29", "1e-09"])
def test_a_percentage_of_any_size_is_rendered_without_digits_of_its_rounding(digits):
    assert value_text(parse_number_with_unit(digits, "%")) == f"{digits}%"
