"""What a search believes to have saved is what the model then lacks, in whatever order its parts are narrowed."""

from functools import cache

import pytest
from effc.compiler.capture.capture import capture
from effc.compiler.planning import shrink
from effc.compiler.search.narrowing import again
from effc.compiler.search.saving import OF_MODEL, Ledger, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.architectures import table

NAMES = ("mobilenet_v1", "resnet", "llama", "mixtral")


@cache
def skeleton(name):
    return capture(tiny.model(name) if name in ("llama", "mixtral") else table.model(name)).skeleton


@settings(deadline=None, max_examples=40)  # the first example of a name captures a model
@given(name=st.sampled_from(NAMES), data=st.data())
def test_steps_save_what_the_model_loses_in_any_order(name, data):
    before = left = skeleton(name)
    ledger, saved = Ledger(before), dict.fromkeys(OF_MODEL, 0.0)
    groups = [g for g in before.groups if g.kind == "channels" and not g.per_block]
    for _ in range(data.draw(st.integers(1, 6))):
        group = again(left, data.draw(st.sampled_from(groups)))
        if steps(group) < 3:
            continue
        count = data.draw(st.integers(1, max(1, steps(group) // 3)))
        for of in saved:
            saved[of] += ledger.next(group.site, group.kind, count, of)
        ledger.narrowed(group.site, group.kind, count)
        left = shrink.narrowed(left, group, group.count - count)
    for of, value in saved.items():
        assert value == pytest.approx(OF_MODEL[of](before) - OF_MODEL[of](left))


def test_a_step_between_narrowed_neighbours_saves_less_than_at_first():
    before = skeleton("mobilenet_v1")
    ledger = Ledger(before)
    (site, kind), kin = next((key, kin) for key, kin in ledger.crossing.items() if len(kin) > 1)
    ledger.narrowed(*kin[0], 4)
    assert ledger.next(site, kind, 1, "params") < ledger.of_step(site, kind, "params")
