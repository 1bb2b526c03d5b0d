"""Patterns of an adapter's config, against those of peft."""

import time

import pytest
from effc.compiler.artifacts.lora_patterns import ModulePatterns, UnreadPattern, excluding_config_field
from hypothesis import given, settings
from hypothesis import strategies as st

get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
PATHS = [
    f"model.layers.{i}.{m}" for i in (0, 1, 2, 11) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
KEYS = [
    "q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "proj", "up_proj",
    "layers.[12].self_attn.v_proj", ".*q_proj", "q_proj|up_proj", "^model.layers.0.self_attn.q_proj", r"layers\.\d\.mlp\.up_proj",
    "^q_proj", "q_proj$", "layers.1..*", r"\w\w_proj", "nothing",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(KEYS), unique=True), st.sampled_from(PATHS))
def test_the_value_of_a_path_is_that_of_the_key_that_peft_takes(keys, path):
    values = {key: order for order, key in enumerate(keys)}
    assert ModulePatterns(values).value_for_path(path, -1) == values.get(get_pattern_key(values.keys(), path), -1)


@pytest.mark.parametrize("key", ["(a+)+", "a+", ".*.*", "a{9}", "(?=q)", "[q", "q\\", "x" * 201 + "|", "a*", "[^q]"])
def test_an_expression_that_could_run_for_long_is_not_tried(key):
    with pytest.raises(UnreadPattern):
        ModulePatterns({key: 1})


def test_many_expressions_are_not_tried_and_those_that_are_take_no_time():
    with pytest.raises(UnreadPattern, match="257 expressions"):
        ModulePatterns({f"{n}|x": 1 for n in range(257)})
    begun = time.process_time()
    slow = ModulePatterns({"a|" * 90 + f".*{n}|b": n for n in range(256)})
    assert slow.value_for_path("a." * 200 + "c", -1) == -1 and time.process_time() - begun < 2


@pytest.mark.parametrize(
    "config, field",
    [
        ({}, None),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
        ({"exclude_modules": ["proj", "k_proj"]}, None),
        ({"exclude_modules": r".*layers\.0.mlp.up_proj"}, "exclude_modules"),
        ({"exclude_modules": "(.+)+"}, None),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": 1}, "layers_to_transform"),
        ({"layers_to_transform": [0, 1, 2, 11]}, None),
        ({"layers_to_transform": []}, None),
        ({"layers_to_transform": [{}, "0", True]}, "layers_to_transform"),
    ],
)
def test_a_config_that_leaves_out_a_module_with_tensors_is_told(config, field):
    assert excluding_config_field(PATHS, config) == field
