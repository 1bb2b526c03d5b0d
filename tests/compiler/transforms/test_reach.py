"""A search that can't go on says in its one refusal how much of the model can go."""

from types import SimpleNamespace

import pytest
from effc.compiler.transforms.search.refusals import no_candidate_diagnostic

LEFT = SimpleNamespace(candidates=[], scores={})
SAVES_NOTHING = SimpleNamespace(candidates=[object()], scores={"a": 1.0})


@pytest.mark.parametrize(("round_", "refusals"), [(LEFT, {"a": "layer a stays"}), (SAVES_NOTHING, {})])
def test_the_share_that_a_search_reached_is_what_the_remedy_names_rounded_down(round_, refusals):
    found = no_candidate_diagnostic(round_, refusals, "params", 0.0349)
    assert "3.4%" in found.message and "remove at most 3.4% of params" in found.help
    nothing = no_candidate_diagnostic(round_, refusals, "params", 0.0004)
    assert "0% " in nothing.message and "remove" not in nothing.help
