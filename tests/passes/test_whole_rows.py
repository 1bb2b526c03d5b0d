"""Models that judge rows as a whole, pictures and texts: healed towards what the original says, cut and observed."""

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.evaluation import equivalence, reference
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.branches import Branches
from effc.compiler.transforms.search.savings import SavingsTable
from effc.compiler.transforms.search.widths import Widths
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef

from tests.architectures import table
from tests.architectures.passes import context

HEAL = {"data": DataRef("rows"), "steps": 40, "batch": 2, "lr": 1e-2, "method": "full"}


@pytest.mark.parametrize("name", ["vit_msn", "bert, classes", "bert, labels of tokens"])
@pytest.mark.parametrize("held_out", [None, DataRef("rows")])
def test_it_learns_what_the_original_says_of_each_row(tmp_path, name, held_out):
    model = table.model(name)
    ctx = context(model, tmp_path, name)
    ctx.recipe.data["others"] = Invocation("synthetic", {"count": 2, "length": 12, "seed": 1})
    with torch.no_grad():
        model.classifier.weight.add_(
            torch.randn(model.classifier.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    program, rows = capture(model), ctx.rows(DataRef("rows"))

    def apart():
        return reference.mean_kl_divergence(
            model, rows, reference.load_or_make_reference(ctx, DataRef("rows")), "divergence", "rows"
        )

    before = apart()
    args = HEAL if held_out is None else HEAL | {"data": DataRef("others"), "held_out": held_out, "every": 4}
    ctx.registry.make("pass", Invocation("tune.heal", args)).run(program, ctx)
    assert 0 < apart() < before


def test_a_decoder_of_classes_is_observed_though_it_says_nothing_of_tokens():
    model = table.model("llama, classes")
    assert (
        equivalence.max_difference(
            equivalence.record_logits_of_sample_calls(model), equivalence.record_logits_of_sample_calls(model)
        )
        == 0
    )


@pytest.mark.slow
def test_a_branch_that_went_takes_its_tensors_out_of_groups_that_reach_beyond_it():
    program = capture(table.model("mobilevitv2"))
    savings_table, first = SavingsTable(skeleton_of(program)), skeleton_of(program).branches[0]
    widths = Widths(
        program, skeleton_of(program).groups, 1, savings_table, lambda group: torch.arange(float(group.count))
    )
    reaching = [s.group.site for s in widths.sites if any(m.tensor.startswith(first.site) for m in s.group.members)]
    assert "mobilevitv2" in reaching  # the width of the stream
    next(iter(Branches(program, skeleton_of(program).branches[:1], savings_table).candidates())).cut()
    program.changed()
    names = dict(program.model.named_parameters())
    (stream,) = [c.site.group for c in widths.candidates() if c.site.group.site == "mobilevitv2"]
    assert all(member.tensor in names for member in stream.members)
