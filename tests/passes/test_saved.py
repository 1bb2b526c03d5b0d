"""A cut saves what it promised, or it is none."""

import contextlib
import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.trial import with_branch_skipped
from effc.compiler.transforms.search.budget import Budget
from effc.compiler.transforms.search.choice import Exact
from effc.compiler.transforms.search.loop import Search
from effc.dsl.checker.values import Selector
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from tests.architectures import table
from tests.recipes_in_memory import SCORE, context_of, recipe_of

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))
CONFIGS = {
    "llama4_text": {
        **tiny._GATED,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_layers": [1, 2],
        "attention_chunk_size": 64,
    },
    "xmod": {
        **tiny._COMMON,
        "intermediate_size": 96,
        "languages": ["en_XX"],
        "default_language": "en_XX",
        "is_decoder": True,
    },
    "gpt_neox_japanese": {**tiny._COMMON, "intermediate_multiple_size": 2},
}


def model_of(name):
    if name not in CONFIGS:
        return tiny.model(name)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def size(model):
    return sum(p.numel() for p in model.parameters())


def pruned(tmp_path, model, **args):
    recipe = recipe_of([("step", "prune.blocks", args)])
    ctx, program = context_of(tmp_path, model, recipe), capture(copy.deepcopy(model))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def weigh(model, *modules):
    return sum(size(model.get_submodule(path)) for path in modules)


@pytest.mark.parametrize(
    ("name", "site", "modules"),
    [
        ("llama4_text", "model.layers.1.feed_forward", ("model.layers.1.feed_forward",)),  # experts add_ in location
        (
            "xmod",
            "roberta.encoder.layer.1.output.adapter_modules.en_XX",  # rows set in location
            ("roberta.encoder.layer.1.output.adapter_modules.en_XX",),
        ),
        (
            "gpt_neox_japanese",
            "gpt_neox_japanese.layers.1.attention",  # weights are handed out
            ("gpt_neox_japanese.layers.1.attention",),
        ),
    ],
)
def test_a_branch_that_goes_takes_its_weights_along(tmp_path, name, site, modules):
    model = model_of(name)
    branches = [b.site for b in skeleton_of(capture(model)).branches]
    assert site in branches
    program = pruned(tmp_path, model, remove=1, on=Selector((("|", site),)))
    assert size(program.model) <= size(model) - weigh(model, *modules)
    assert site not in [b.site for b in skeleton_of(program).branches]
    made = program.model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True)
    again = program.model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, again)


@pytest.mark.slow
def test_a_branch_whose_state_is_read_by_what_stays_is_left_alone_with_the_reason(tmp_path):
    """RWKV's feed-forward is handed what its attention keeps, so attention runs on."""
    model = model_of("rwkv")
    with pytest.raises(Reject) as refused:
        pruned(tmp_path, model, remove=1)
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "out-of-reach" and "0 of 16,832 parameters would go" in found.note


def test_what_layers_hand_on_in_a_dict_is_still_there_while_a_branch_is_on_trial():
    """Gemma 3n's later layers read keys and values out of a dict that an earlier one wrote them into."""
    model = table.model("gemma3n")
    program = capture(model)
    for branch in skeleton_of(program).branches:
        with with_branch_skipped(program, branch), torch.no_grad():
            assert model(input_ids=IDS).logits.isfinite().all()


class Idle:
    """A pool of one cut that saves a thousand parameters, so it says."""

    kind = "blocks"

    def __init__(self, program):
        self.program = program

    def candidates(self):
        return [self]

    name = location = "model.layers.0.mlp"
    unit = "model.layers.0"

    def applied(self):
        return contextlib.nullcontext()

    def cut(self):
        self.program.changed()

    def saves(self, of):
        return 1000.0 if of == "params" else 1.0

    def finish(self):
        pass


def test_a_search_that_saved_less_than_its_cuts_promised_fails(tmp_path):
    model = model_of("llama")
    ctx, program = context_of(tmp_path, model, recipe_of([])), capture(copy.deepcopy(model))
    search, pool = Search(program, ctx), Idle(program)
    search.cut_until_met([pool], SCORE, Budget("params", 900, size(model)), Exact())
    with pytest.raises(Reject) as refused:
        search.finish_cuts_and_record_cost([pool])
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "saved-less" and "1000 parameters less, and 0 went" in found.message
    assert found.fault.exit == "failure"
