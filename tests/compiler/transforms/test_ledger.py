"""What a search believes to have saved is what the model then lacks, in whatever order its parts are cut."""

from functools import cache

import pytest
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.analysis.planning.selection import searchable_branch_groups_by_kind
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.branches import Branches
from effc.compiler.transforms.search.importance import l1_importance
from effc.compiler.transforms.search.savings import OF_MODEL, SavingsTable, step_count_of
from effc.compiler.transforms.search.uniform_widths import group_in_skeleton
from effc.compiler.transforms.search.widths import Widths
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.architectures import table

NAMES = ("mobilenet_v1", "resnet", "llama", "mixtral", "mobilevitv2")


@cache
def skeleton(name):
    return skeleton_of(capture(tiny.model(name) if name in ("llama", "mixtral") else table.model(name)))


@pytest.mark.slow
@settings(deadline=None, max_examples=40)  # the first example of a name captures a model
@given(name=st.sampled_from(NAMES), data=st.data())
def test_steps_save_what_the_model_loses_in_any_order(name, data):
    before = left = skeleton(name)
    savings_table, saved = SavingsTable(before), dict.fromkeys(OF_MODEL, 0.0)
    groups = [g for g in before.groups if g.kind == "channels" and not g.per_block]
    for _ in range(data.draw(st.integers(1, 6))):
        if len(left.branches) > 1 and data.draw(st.booleans()):
            branch = data.draw(st.sampled_from(left.branches))
            for of in saved:
                saved[of] += savings_table.branch_savings(branch.site, of)
            savings_table.note_dropped_branch(branch.site)
            left = shrink.without_branch(left, branch)
            continue
        known = {(g.site, g.kind) for g in left.groups}
        group = group_in_skeleton(left, data.draw(st.sampled_from([g for g in groups if (g.site, g.kind) in known])))
        if step_count_of(group) < 3:
            continue
        count = data.draw(st.integers(1, max(1, step_count_of(group) // 3)))
        for of in saved:
            saved[of] += savings_table.step_savings(group.site, group.kind, count, of)
        savings_table.note_narrowed_group(group.site, group.kind, count)
        left = shrink.with_narrowed_group(left, group, group.count - count)
    for of, value in saved.items():
        assert value == pytest.approx(OF_MODEL[of](before) - OF_MODEL[of](left))


@settings(deadline=None, max_examples=5)  # each captures a model and edits it up to eight times
@given(data=st.data())
@pytest.mark.slow
def test_cuts_at_random_take_what_they_count_on_out_of_the_model(data):
    program = capture(table.model("mobilevitv2"))
    size = shrink.param_count(skeleton_of(program))
    savings_table = SavingsTable(skeleton_of(program))
    groups = searchable_branch_groups_by_kind(skeleton_of(program), None)["channels"]
    widths = Widths(program, groups, 8, savings_table, lambda group: l1_importance(program, group))
    blocks = Branches(program, skeleton_of(program).branches, savings_table)
    saved = 0.0
    for _ in range(data.draw(st.integers(2, 8))):
        pool = blocks if blocks.candidates() and data.draw(st.booleans()) else widths
        candidate = data.draw(st.sampled_from(pool.candidates()))
        saved += candidate.saves("params")
        candidate.cut()
    widths.finish()
    assert size - shrink.param_count(skeleton_of(program)) == saved


def test_a_step_between_narrowed_neighbours_saves_less_than_at_first():
    before = skeleton("mobilenet_v1")
    savings_table = SavingsTable(before)
    (site, kind), kin = next((key, kin) for key, kin in savings_table.crossing.items() if len(kin) > 1)
    savings_table.note_narrowed_group(*kin[0], 4)
    assert savings_table.step_savings(site, kind, 1, "params") < savings_table.savings_per_step(site, kind, "params")
