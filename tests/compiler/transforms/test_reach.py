"""How much of a model can go: refusals say it, and no search takes a part behind which its budget can't be met."""

from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace

import pytest
from effc.compiler.transforms.search.budget import Budget
from effc.compiler.transforms.search.reach import affordable_candidates, can_be_met
from effc.compiler.transforms.search.refusals import no_candidate_diagnostic
from hypothesis import given
from hypothesis import strategies as st

LEFT = SimpleNamespace(candidates=[], scores={})
SAVES_NOTHING = SimpleNamespace(candidates=[object()], scores={"a": 1.0})


@pytest.mark.parametrize(("round_", "refusals"), [(LEFT, {"a": "layer a stays"}), (SAVES_NOTHING, {})])
def test_the_share_that_a_search_reached_is_what_the_remedy_names_rounded_down(round_, refusals):
    found = no_candidate_diagnostic(round_, refusals, "params", 0.0349)
    assert "3.4%" in found.message and "remove at most 3.4% of params" in found.help
    nothing = no_candidate_diagnostic(round_, refusals, "params", 0.0004)
    assert "0% " in nothing.message and "remove" not in nothing.help


@given(
    parts=st.lists(st.integers(1, 30), max_size=6),
    goal=st.integers(1, 40),
    widths=st.integers(0, 20),
    saved=st.integers(0, 10),
)
def test_a_budget_can_be_met_where_some_parts_with_as_much_of_widths_as_is_missing_lie_within_it(
    parts, goal, widths, saved
):
    budget = Budget("params", goal, 100)
    sums = {saved + sum(chosen) for n in range(len(parts) + 1) for chosen in combinations(parts, n)}
    expected = any(s + widths >= goal and (s <= 1.5 * goal or s == saved) for s in sums)
    assert can_be_met(budget, saved, parts, widths) == expected


@dataclass
class Part:
    size: float
    name: str = ""

    def saves(self, of: str) -> float:
        return self.size


class Parts:
    """A pool of parts each of which goes as a whole."""

    def __init__(self, *sizes: float):
        self.parts = [Part(size) for size in sizes]

    def reachable(self, of: str) -> float:
        return sum(part.size for part in self.parts)


def test_a_part_behind_which_the_budget_can_not_be_met_any_more_is_no_candidate():
    pool, budget = Parts(8.7, 14.6), Budget("params", 10, 100)
    pairs = [(pool, part) for part in pool.parts]
    assert affordable_candidates(pairs, [pool], 0.0, budget, budget) == pairs[1:]
    assert affordable_candidates(pairs, [pool], 0.0, budget, None) == pairs, "where the recipe lets it go beyond"


def test_nothing_is_left_out_where_steps_of_a_width_fill_the_gap():
    pool, budget = Parts(8.7, 14.6), Budget("params", 10, 100)
    pool.reachable = lambda of: 26.0
    pairs = [(pool, part) for part in pool.parts]
    assert affordable_candidates(pairs, [pool], 0.0, budget, budget) == pairs
