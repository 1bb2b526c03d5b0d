"""Models that rounding moves far are held to how far it moves them, and faults are told from it nevertheless."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.verify import Moves, compare, judged
from effc.compiler.artifacts.verify_child import probe
from effc.compiler.capture.capture import capture
from effc.compiler.measuring.rounding import draws, exact_twin
from effc.compiler.targets.native import Native
from torch import nn

from tests.architectures import table
from tests.architectures.matrix import inputs
from tests.architectures.passes import context, in_halves

FORM = Native(path="x").forms()[0]
FAR = [("t5, gated", "fp32"), ("qwen3_next", "fp32"), ("gemma4_text", "fp32"), ("phimoe", "bf16")]


@cache
def original(name: str, half: str) -> nn.Module:
    model = table.model(name)
    return in_halves(model) if half == "bf16" else model


def native(model: nn.Module, folder: Path, name: str):
    """What the engine computes of a model, and the folder that it was opened from."""
    (folder / "a").mkdir()
    Native(path="x").emit(capture(copy.deepcopy(model)), folder / "a", context(model, folder, name))
    return probe(load(folder / "a" / FORM.folder), inputs(model), 3), folder / "a" / FORM.folder


def checks(model: nn.Module, other: nn.Module, folder: Path, name: str):
    """The checks of what the engine makes of `other`, held against `model`: of the share alone, and of what moves."""
    found, place = native(other, folder, name)
    given = inputs(model)
    expected = probe(model, given, 3)
    alone = compare(
        FORM, expected, found, next(model.parameters()).dtype, FORM.rounds(model), routes=FORM.routes(place)
    )
    return alone, judged(FORM, place, model, given, expected, found, steps=3)


@pytest.mark.parametrize(("name", "half"), FAR)
def test_a_model_that_rounding_moves_far_is_held_to_how_far_it_does(tmp_path, name, half):
    model = original(name, half)
    alone, moved = checks(model, model, tmp_path, name)
    assert not all(check.holds for check in alone)  # else another architecture is needed here
    assert all(check.holds for check in moved), [(c.what, c.worst, c.tolerance) for c in moved]


def rolled(weight):
    return weight.roll(1, 0)


@pytest.mark.parametrize(("name", "half"), FAR)
@pytest.mark.parametrize(
    "change",
    [torch.neg, pytest.param(torch.zeros_like, marks=pytest.mark.heavy), pytest.param(rolled, marks=pytest.mark.heavy)],
)
def test_a_weight_that_is_another_is_found_in_such_a_model_too(tmp_path, name, half, change):
    model = original(name, half)
    other = copy.deepcopy(model)
    layers = [path for path, m in other.named_modules() if isinstance(m, nn.Linear) and path.endswith(OUTPUTS)]
    with torch.no_grad():
        weight = other.get_submodule(layers[-1]).weight  # nothing comes after it that would carry a fault further
        weight.copy_(change(weight))
    _, moved = checks(model, other, tmp_path, name)
    assert not all(check.holds for check in moved), layers[-1]


OUTPUTS = ("o_proj", "down_proj", "out_proj", ".o", ".wo")


def test_a_form_that_rounds_less_is_not_held_to_what_bfloat16_moves(tmp_path):
    model = original(*FAR[0])
    found, place = native(model, tmp_path, FAR[0][0])
    given = inputs(model)
    checked = judged(replace(FORM, halves=False), place, model, given, probe(model, given, 3), found, steps=3)
    assert not all(check.holds for check in checked)


def test_a_draw_rounds_weights_as_an_engine_does_and_lets_nothing_else_drift():
    model = nn.Linear(64, 64)
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    seen = draws(model, lambda it: it(x), seed=0, count=64)
    rounded = nn.functional.linear(x, model.weight.bfloat16().float(), model.bias)
    one, mean = (seen[0] - rounded).square().mean(), (torch.stack(seen).mean(0) - rounded).square().mean()
    assert 0 < mean < 2 * one / 64  # up and down as often, so that the mean is 64 times nearer


def test_what_moves_is_seen_of_the_numbers_in_float32():
    model = nn.Linear(8, 8)
    assert exact_twin(model) is model
    twin = exact_twin(copy.deepcopy(model).bfloat16())
    assert twin.weight.dtype == torch.float32 and torch.equal(twin.weight, model.weight.bfloat16().float())


def test_behind_a_parting_a_draw_says_no_more_than_before_it():
    name = "logits of prefill and 2 decode steps"
    exact = torch.tensor([[[0.0, 4.0], [4.0, 0.0], [0.0, 4.0]]])
    near = exact + torch.tensor([0.1, -0.1])
    parted = near.clone()
    parted[0, 1:] = torch.tensor([[0.0, 9.0], [90.0, 0.0]])  # another token, and what follows that
    outputs = [{name: x, "greedy tokens": x.argmax(-1)} for x in (exact, near, parted)]
    moves = Moves(outputs[0], (outputs[1],)).of(name, outputs[0])
    assert torch.allclose(moves, torch.full((1, 3), 0.1, dtype=moves.dtype))
    moves = Moves(outputs[0], (outputs[2],)).of(name, outputs[0])
    assert moves[0, 2] == moves[0, 1] < 7  # 47 away, of which nothing is known
