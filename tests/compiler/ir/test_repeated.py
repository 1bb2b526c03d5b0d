"""Models whose layers run several times in one forward: no layer is a unit, and what asks for none still works."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.selection import is_inside_layers
from effc.compiler.cli.verbs.inspect import _find_unit
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.training.adapters import require_adaptable_modules
from effc.dsl.checker.values import DataRef, Ratio
from effc.dsl.syntax.diagnostics import Reject
from transformers import AlbertConfig, AlbertForMaskedLM

from tests.recipes_in_memory import context_of, recipe_of
from tests.tiny import randomize


@pytest.fixture(scope="module")
def albert():
    config = AlbertConfig(
        vocab_size=128,
        hidden_size=64,
        embedding_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return randomize(AlbertForMaskedLM(config)).eval()


def run(tmp_path, model, word, **args):
    recipe = recipe_of([("step", word, args)])
    ctx, program = context_of(tmp_path, model, recipe), capture(copy.deepcopy(model))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def test_it_is_captured_without_units(albert):
    program = capture(copy.deepcopy(albert))
    assert program.shared and not program.units and skeleton_of(program).parts


@pytest.mark.parametrize("word", ["sparsify.magnitude", "sparsify.wanda"])
def test_half_of_what_its_layer_holds_is_zero_and_nothing_outside_of_it(tmp_path, albert, word):
    rows = {"data": DataRef("rows")} if word == "sparsify.wanda" else {}
    program = run(tmp_path, albert, word, sparsity=Ratio(0.5, "weights"), **rows)
    for path, module in program.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            zeros = (module.weight == 0).float().mean().item()
            assert zeros == (pytest.approx(0.5, abs=0.02) if "albert_layers.0." in path else 0)


def test_adapters_find_the_linear_modules_of_its_layer(albert):
    found = require_adaptable_modules(capture(copy.deepcopy(albert)), None)
    assert found and all("albert_layers.0." in path for path in found)


def test_what_cuts_layers_is_refused_and_so_is_a_drawing_of_one(tmp_path, albert):
    with pytest.raises(Reject, match="no-block"):
        run(tmp_path, albert, "prune.blocks", remove=Ratio(0.5, "blocks"))
    with pytest.raises(Reject, match="run several times in one forward"):
        _find_unit(capture(copy.deepcopy(albert)), "0")


def test_all_of_a_module_that_is_a_layer_itself_is_inside_of_it():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    skeleton = skeleton_of(capture(model, inputs={"input": torch.randn(2, 8)}))
    assert list(skeleton.units) == [""] and all(is_inside_layers(skeleton, part.path) for part in skeleton.parts)
