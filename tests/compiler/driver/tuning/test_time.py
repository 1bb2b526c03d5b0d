"""The time of a search of steps: what it spends, on a machine that is slower than plans know, is what it was given."""

from types import SimpleNamespace

import pytest
from effc.compiler.core import stopping
from effc.compiler.core.cache import Cache
from effc.compiler.driver.tuning.journal import Journal
from effc.compiler.driver.tuning.search import Search
from effc.compiler.driver.tuning.trials import Trial

from tests.compiler.driver.tuning.test_search import SimulatedTrials, wish_of

PLANNED = 10.0


class Clocked(SimulatedTrials):
    """Measurements that take `slowness` times as long as planned, by a clock of their own; a plan takes `planning`."""

    seconds, slowness, planning = 0.0, 1.0, 0.0

    def clock_seconds(self):
        return self.seconds

    def plan(self, candidate):
        type(self).seconds += self.planning
        return SimpleNamespace(seconds=PLANNED, emissions=())

    def simulate(self, candidate, rows):
        seconds = self.slowness * PLANNED
        type(self).seconds += seconds
        return Trial(super().simulate(candidate, rows).values, rows, seconds=seconds)


@pytest.fixture
def clocked(monkeypatch):
    monkeypatch.setattr(Clocked, "seconds", 0.0)
    return Clocked


@pytest.mark.parametrize("minutes", [4, 12])
@pytest.mark.parametrize("slowness", [0.2, 1.0, 3.0, 9.0])
@pytest.mark.parametrize("planning", [0.0, 0.5])
def test_a_search_ends_in_its_time_but_for_the_candidate_that_runs(tmp_path, clocked, minutes, slowness, planning):
    clocked.slowness, clocked.planning = slowness, planning
    cache = Cache(tmp_path / "cache")
    wish = wish_of(tmp_path, limit=1.2, minutes=minutes)
    search = Search(wish, clocked(wish, cache, tmp_path / "m"), Journal.read_or_make(wish, cache))
    ranked = search.run()
    assert ranked and search.measured_count >= 2
    assert clocked.seconds <= 60 * minutes + slowness * PLANNED, (clocked.seconds, len(search.quick_trials))
    assert clocked.seconds == pytest.approx(search.seconds), "time that nobody counted"
    if slowness == 9.0:
        assert search.out_of_time


def test_what_a_signal_broke_off_is_not_kept_as_a_refusal(tmp_path):
    class Broken(SimulatedTrials):
        def measure(self, plans, rows):
            stopping.request_stop()
            return {candidate: Trial(refused="torch.onnx.export makes no ONNX of it") for candidate in plans}

    cache = Cache(tmp_path / "cache")
    wish = wish_of(tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            Search(wish, Broken(wish, cache, tmp_path / "m"), Journal.read_or_make(wish, cache)).run()
    finally:
        stopping.clear_stop_request()
    assert not [name for name in Journal.read_or_make(wish, cache).rows if " on " in name]
