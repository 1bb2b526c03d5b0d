"""Arguments of forced and free calls of tools."""

import pytest
from effc.compiler.apps.serving.tools import Function

CITY = {"properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_arguments_that_a_tool_does_not_name_are_not_written():
    schema = Function(name="weather", parameters=CITY).schema_of_arguments
    assert schema == {"type": "object", "additionalProperties": False, **CITY}


@pytest.mark.parametrize(
    "more", [{"additionalProperties": True}, {"allOf": [{"required": ["city"]}]}, {"patternProperties": {"^x": {}}}]
)
def test_a_schema_that_says_what_else_there_may_be_is_kept(more):
    parameters = CITY | more
    assert Function(name="weather", parameters=parameters).schema_of_arguments == {"type": "object"} | parameters


def test_a_tool_without_parameters_takes_an_empty_object():
    assert Function(name="now").schema_of_arguments["additionalProperties"] is False
