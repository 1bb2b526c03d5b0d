"""An exact prune.multi against the published loop: decision by decision, those that overshoot, too."""

import pytest
from effc.dsl.checker.values import Ratio, Shares

from tests import tiny
from tests.grids import wide
from tests.passes.published_loop import Oracle
from tests.passes.test_multi import cuts, pruned


@pytest.mark.parametrize("seed", wide(range(6), (0, 1)))
@pytest.mark.parametrize("split", [(44.0, 52.0, 4.0), (20.0, 60.0, 20.0)])
@pytest.mark.slow
def test_an_exact_search_decides_as_the_published_loop(tmp_path, seed, split):
    model = tiny.model("llama", seed=seed)
    shares = Shares(tuple(zip(("blocks", "channels", "heads"), split, strict=True)))
    program = pruned(tmp_path, model, remove=Ratio(0.3, "params"), search="exact", split=shares)
    assert cuts(program) == Oracle(model, 16, 0.3, split).run()


@pytest.mark.parametrize("seed", [2, 3])
def test_an_exact_search_cuts_a_candidate_that_overshoots_where_the_published_loop_does(tmp_path, seed):
    """Blocks are to save 8 %: an attention is 11 %, within half of the goal more, and an MLP 17 %."""
    model, split = tiny.model("llama", seed=seed), Shares((("blocks", 1.0), ("channels", 0.0), ("heads", 0.0)))
    program = pruned(tmp_path, model, remove=Ratio(0.08, "params"), search="exact", split=split)
    assert (oracle := Oracle(model, 16, 0.08, (1.0, 0.0, 0.0)).run())[0].endswith(".mlp")
    assert cuts(program) == oracle
    first = next(note for note in program.notes if "cut" in note)
    assert len(first["scores"]) == 2 * len(model.model.layers)
