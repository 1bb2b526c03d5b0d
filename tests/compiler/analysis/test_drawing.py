"""Pictures are what a person would draw; their goldens lie in `goldens/` and are made to be read."""

import functools

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.drawing import draw_skeleton, human_count, unit_as_code, unit_as_dot
from effc.compiler.analysis.planning.shrink import param_count, with_narrowed_group, without_branch
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.skeleton import Part, Skeleton
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny

torch.set_num_threads(1)


@functools.cache
def program(name: str):
    return capture(tiny.model(name))


def first_unit(name: str):
    return next(iter(program(name).units.values()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tree_as_a_person_would_draw_it(name, golden):
    golden(draw_skeleton(skeleton_of(program(name))) + "\n", f"tree-{name}.txt")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_program_as_a_person_would_write_it(name, golden):
    golden(unit_as_code(first_unit(name)) + "\n", f"graph-{name}.txt")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_equal_layers_are_drawn_once_and_all_parameters_are_there(name):
    skeleton = skeleton_of(program(name))
    text = draw_skeleton(skeleton)
    assert "0..2" in text and f"{human_count(param_count(skeleton))} parameters" in text.splitlines()[0]
    assert "96 channels" in text and "4 heads of 16" in text


def test_layers_that_differ_are_drawn_apart():
    skeleton = skeleton_of(program("llama"))
    group = next(g for g in skeleton.groups if g.site == "model.layers.0.mlp")
    text = draw_skeleton(with_narrowed_group(skeleton, group, 80))
    assert "80 channels" in text and "layers.0 " not in text.replace("layers\n", "")
    assert "1..2" in text, "the two that are still alike stay together"


def test_a_branch_that_is_gone_is_not_drawn():
    skeleton = skeleton_of(program("gpt2"))
    gone = next(b for b in skeleton.branches if b.site == "transformer.h.1.attn")
    assert draw_skeleton(without_branch(skeleton, gone)).count("heads of 16") == 2


@settings(deadline=None, max_examples=50)  # the first example captures a model
@given(st.integers(20, 120))
def test_no_line_is_wider_than_asked(width):
    assert max(map(len, draw_skeleton(skeleton_of(program("opt")), width=width).splitlines())) <= width


def test_what_cannot_be_narrowed_is_said_once():
    parts = tuple(Part(f"layers.{i}.x", "Odd", (("weight", (2, 2)),)) for i in range(3))
    refused = [[f"layers.{i}.x", "an Odd is taken as a whole"] for i in range(3)]
    text = draw_skeleton(Skeleton("odd", parts, (), facts={"refused": refused}))
    assert text.splitlines()[-1] == "layers.0.x and 2 more can't be narrowed: an Odd is taken as a whole"


def test_a_model_without_modules_is_a_title():
    assert draw_skeleton(Skeleton("none", (), ())) == "none: 0 parameters"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_call_of_a_layer_is_written_and_every_arrow_has_two_ends(name):
    unit = first_unit(name)
    text, arrows = unit_as_code(unit), unit_as_dot(unit)
    for node in unit.graph.nodes:
        if node.op == "call_module":
            assert f"self.{node.target}(" in text
    lines = [line for line in arrows.splitlines() if "->" in line]
    ends = {end.strip(" ;") for line in lines for end in line.split("->")}
    drawn = {line.split()[0] for line in arrows.splitlines() if "[label=" in line}
    assert ends <= drawn and "<built-in" not in text + arrows


@pytest.mark.parametrize(
    "count, said",
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (8192, "8.19 k"),
        (134_515_008, "135 M"),
        (999_700, "1.00 M"),
        (70_553_706_496, "70.6 B"),
    ],
)
def test_counts_in_three_digits(count, said):
    assert human_count(count) == said
