"""Searches of prune.multi that estimate what they don't score, cut together, and say where they fit their rows."""

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.shrink import param_count
from effc.compiler.core.events import Warned
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.values import Ratio

from tests import tiny
from tests.passes.test_multi import DEFAULTS, IDS, pruned
from tests.recipes_in_memory import context_of, recipe_of

KINDS = ("channels", "heads")


def test_cuts_that_are_made_together_lie_in_different_layers_and_are_scored_together(tmp_path):
    model = tiny.model("llama", num_hidden_layers=6)
    program = pruned(tmp_path, model, remove=Ratio(0.1, "params"), group=4, order=KINDS, estimate="taylor", together=3)
    decisions = [note for note in program.notes if "cut" in note]
    groups = list(dict.fromkeys(tuple(note["together"]) for note in decisions if "together" in note))
    assert groups and all(len({name.split(" ")[0].rpartition(".")[0] for name in g}) == len(g) for g in groups)
    assert [note["cut"] for note in decisions if "together" in note] == [name for g in groups for name in g]
    with torch.no_grad():
        values = program.model(input_ids=IDS).logits[:, :-1].reshape(-1, 128)
    loss = torch.nn.functional.cross_entropy(values, IDS[:, 1:].reshape(-1))
    assert torch.allclose(loss.exp(), torch.tensor(decisions[-1]["score"]), rtol=1e-3)


def test_an_estimated_search_says_what_it_left_out(tmp_path):
    model = tiny.model("llama", num_hidden_layers=6)
    program = pruned(tmp_path, model, remove=Ratio(0.1, "params"), group=4, estimate="taylor")
    decisions = [note for note in program.notes if "cut" in note]
    assert len(decisions[0]["scores"]) + decisions[0]["left_out"] == 24  # 12 branches, 6 MLPs, 6 attentions
    assert decisions[0]["left_out"] > 6 and all(note["slack"] >= 0 for note in decisions)


def test_rows_that_a_search_fits_are_named_before_it_starts_and_where_its_score_falls(tmp_path):
    said = []
    model = tiny.model("llama", num_hidden_layers=6)
    program = pruned(tmp_path, model, tell=said.append, remove=Ratio(0.1, "params"), group=4, order=KINDS)
    told = [event.message for event in said if isinstance(event, Warned)]
    assert "perplexity(rows) reads 48 tokens" in told[0]
    note = next(note for note in program.notes if "fits" in note)
    assert note["score"] <= 0.995 * note["begun"] and f"after {note['cuts']} cut" in told[1]
    assert len(told) == 2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_is_foreseen_of_coarse_cuts_is_about_what_goes(tmp_path, name):
    """A KV head of these is some 6% of the model, as much as all of 64 channels that a module may lose."""
    model = tiny.model(name)
    before = sum(p.numel() for p in model.parameters())
    program = pruned(tmp_path, model, remove=Ratio(0.05, "params"), group=64)
    gone = 1 - sum(p.numel() for p in program.model.parameters()) / before
    recipe = recipe_of([("step", "prune.multi", {**DEFAULTS, "remove": Ratio(0.05, "params"), "group": 64})])
    step = context_of(tmp_path, model, recipe).registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    skeleton = skeleton_of(capture(model))
    foreseen = 1 - param_count(step.forecast(skeleton)) / param_count(skeleton)
    assert 0.05 <= foreseen < 0.065 and abs(foreseen - gone) < 0.02
