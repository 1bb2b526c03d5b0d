"""Search of steps on simulated measurements, held against looking at everything."""

import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from effc.compiler.core.cache import Cache
from effc.compiler.driver.api import open_session
from effc.compiler.driver.tuning.alternatives import allowed_candidates
from effc.compiler.driver.tuning.effects import Effects
from effc.compiler.driver.tuning.journal import Journal
from effc.compiler.driver.tuning.search import FINALISTS, SLACK, Search
from effc.compiler.driver.tuning.trials import Trial, Trials, relative_times_and_refusals
from effc.compiler.driver.tuning.wish import Wish, read_wish
from effc.compiler.plugin.clock import Clock
from effc.dsl.syntax.diagnostics import Fault, Reject
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

no_numbers = Fault("no-numbers-here", "Logits are no numbers.")
QUALITY = "perplexity(text.choose)"
RECIPE = """effspec 1
use std.text
model base = zoo("tiny-llama")
pipeline fast(base) {{
  best = search.steps(optimize: decode.p50, {against}data: text.calib, choose: text.choose, within: {minutes}min)
}}
expect fast {{ perplexity(text.heldout) <= {limit} * base }}
emit fast {{ native("fast") }}
"""


def wish_of(folder: Path, limit: float = 1.05, minutes: int = 60, against: str = "") -> Wish:
    file = folder / "w.effspec"
    file.write_text(RECIPE.format(limit=limit, minutes=minutes, against=against))
    return read_wish(open_session(file, cache_dir=folder.parent / "texts"))  # rows of std.text, for all tests alike


class SimulatedTrials(Trials):
    """Measurements of a model whose changes multiply, but for interactions of a few percent."""

    def plan(self, candidate):
        return SimpleNamespace(seconds=10.0 * (1 + candidate.changes), emissions=())

    def clock_seconds(self):
        return 0.0

    def measure(self, plans, rows):
        return {candidate: self.simulate(candidate, rows) for candidate in plans}

    def simulate(self, candidate, rows):
        loss, speed = 0.0, 0.0
        for alternative in candidate.axes:
            draw = random.Random(f"{self.folder.name} {alternative.name}")
            if alternative.name != "unchanged":
                loss, speed = loss + draw.uniform(0, 0.08), speed - draw.uniform(0, 1.0)
        between = random.Random(f"{self.folder.name} {candidate.name}").gauss(0, 0.02) * max(0, candidate.changes - 1)
        noise = random.Random(f"{self.folder.name} {candidate.name} {rows}").gauss(0, 0.002 if rows else 0.0)
        values = {
            QUALITY: (10 * math.exp(loss + abs(between) + noise), 10.0),
            "decode.p50": (20 * math.exp(speed), 20.0),
            "params": (1e6, 1e6),
        }
        return Trial({name: values[name] for name in self.metrics}, rows, seconds=10.0)


def searched(folder: Path, name: str, **wish_options) -> Search:
    wish = wish_of(folder, **wish_options)
    cache = Cache(folder / f"cache-{name}")
    search = Search(wish, SimulatedTrials(wish, cache, folder / name), Journal.read_or_make(wish, cache))
    search.run()
    return search


@pytest.mark.slow
def test_the_best_of_all_candidates_is_nearly_reached_by_looking_at_a_quarter_of_them(tmp_path):
    losses, shares = [], []
    for number in range(6):
        search = searched(tmp_path, f"model {number}")
        everything = {c: search.trials.simulate(c, 0) for c in search.candidates}
        best = search.rank_measured_feasible_first(everything)[0]
        chosen = search.rank_measured_feasible_first(search.finals)[0]
        assert not search.worst_bound_violation(search.finals[chosen]), "a candidate that misses a bound was chosen"
        losses.append(search.objective_costs(everything[chosen])[0] / search.objective_costs(everything[best])[0] - 1)
        shares.append(len(search.quick_trials) / len(search.candidates))
    assert sorted(losses)[len(losses) // 2] <= 0.03, losses
    assert max(shares) <= 0.3, shares


@pytest.mark.slow
def test_a_front_is_nearly_that_of_all_candidates_by_looking_at_a_third_of_them(tmp_path):
    gaps, shares = [], []
    for number in range(6):
        search = searched(tmp_path, f"model {number}", limit=1.2, against=f"against: {QUALITY}, ")
        everything = {c: search.trials.simulate(c, 0) for c in search.candidates}
        front = search.select_front(search.finals)
        costs = [search.objective_costs(search.finals[c]) for c in front]
        assert costs == sorted(costs) and [c[1] for c in costs] == sorted((c[1] for c in costs), reverse=True)
        assert not any(search.worst_bound_violation(search.finals[c]) for c in front)
        points = [everything[c] for c in front]
        gaps.append(max(search.epsilon_gain(everything[c], points) for c in search.select_front(everything)))
        shares.append(len(search.quick_trials) / len(search.candidates))
    assert sorted(gaps)[len(gaps) // 2] <= 0.03, gaps
    assert max(shares) <= 0.4, shares


def test_a_second_metric_that_is_alike_for_all_candidates_leaves_one_point(tmp_path):
    search = searched(tmp_path, "alike", limit=1.2, against="against: params, ")
    assert len(search.select_front(search.finals)) == 1


def test_two_searches_of_one_wish_at_once_keep_the_measurements_of_both(tmp_path):
    wish, cache = wish_of(tmp_path), Cache(tmp_path / "cache")
    first, second, *_ = allowed_candidates(wish)
    searches = [Journal.read_or_make(wish, cache), Journal.read_or_make(wish, cache)]
    for journal, candidate in zip(searches, (first, second), strict=True):
        journal.first_planned_seconds({candidate: 1.0})
        journal.store_trials({candidate: Trial({"params": (1.0, 2.0)}, 8)}, 8)
        journal.write_recipe(tmp_path / candidate.name, candidate.name)
    after = Journal.read_or_make(wish, cache)
    assert all(
        after.read_trial(candidate, 8) and after.has_recorded_file(tmp_path / candidate.name)
        for candidate in (first, second)
    )
    assert after.first_planned_seconds({first: 2.0, second: 2.0}) == {first: 1.0, second: 1.0}


class Halting:
    """Timed metric of which a model may say that it writes no numbers."""

    def clock(self, model):
        def step():
            if isinstance(model, nn.Dropout):
                raise Reject(no_numbers("logits are no numbers"))
            return 1.0

        return Clock(step, 2, max)


def test_a_candidate_that_cannot_be_timed_is_refused_and_the_others_are_timed():
    models = {"good": nn.Identity(), "bad": nn.Dropout()}
    timed, refused = relative_times_and_refusals(nn.Identity(), models, Halting(), 0.1)
    assert timed == {"good": ((1.0, 1.0), (1.0, 1.0))} and refused == {"bad": "logits are no numbers"}
    assert relative_times_and_refusals(nn.Identity(), {"bad": nn.Dropout()}, Halting(), 0.1)[0] == {}
    with pytest.raises(Reject):
        relative_times_and_refusals(nn.Dropout(), {"good": nn.Identity()}, Halting(), 0.1)


@pytest.mark.slow
def test_a_search_that_was_killed_decides_the_same(tmp_path):
    wish = wish_of(tmp_path)

    def search_again(cache: Path, stop: int | None = None) -> Search:
        class Stopping(SimulatedTrials):
            def measure(self, plans, rows):
                if stop is not None and len(search.quick_trials) >= stop:
                    raise KeyboardInterrupt
                return super().measure(plans, rows)

        store = Cache(cache)
        search = Search(wish, Stopping(wish, store, tmp_path / "m"), Journal.read_or_make(wish, store))
        search.run()
        return search

    straight = search_again(tmp_path / "one")
    for stop in (1, 5, 11):
        with pytest.raises(KeyboardInterrupt):
            search_again(tmp_path / "two", stop)
    resumed = search_again(tmp_path / "two")
    assert list(resumed.quick_trials) == list(straight.quick_trials) and resumed.finals == straight.finals


def test_plans_of_steps_that_are_in_the_cache_change_no_decision(tmp_path):
    wish = wish_of(tmp_path, minutes=4)

    class Cached(SimulatedTrials):
        def plan(self, candidate):
            return SimpleNamespace(seconds=0.0, emissions=())

    def orders(*kinds) -> list[list[str]]:
        result = []
        for kind in kinds:
            store = Cache(tmp_path / "cache")
            search = Search(wish, kind(wish, store, tmp_path / "m"), Journal.read_or_make(wish, store))
            search.run()
            result.append([c.name for c in search.quick_trials])
        return result

    first, second = orders(SimulatedTrials, Cached)
    assert first == second


def test_values_of_params_are_part_of_what_is_kept(tmp_path):
    wish = wish_of(tmp_path)
    other = replace(wish, recipe=replace(wish.recipe, params={"share": 0.2}))
    cache = Cache(tmp_path / "cache")
    assert Journal.read_or_make(wish, cache).parts != Journal.read_or_make(other, cache).parts


def test_more_time_goes_on_with_what_was_measured(tmp_path):
    wish = wish_of(tmp_path, minutes=3)
    parts = Journal.read_or_make(wish, Cache(tmp_path / "cache")).parts
    assert Journal.read_or_make(wish_of(tmp_path, minutes=30), Cache(tmp_path / "cache")).parts == parts
    assert Journal.read_or_make(wish_of(tmp_path, limit=1.2), Cache(tmp_path / "cache")).parts != parts


def test_less_time_than_two_measurements_is_refused_with_a_time_that_would_do(tmp_path):
    class Slow(SimulatedTrials):
        def simulate(self, candidate, rows):
            trial = super().simulate(candidate, rows)
            return Trial(trial.values, rows, seconds=400.0)

    wish = wish_of(tmp_path, minutes=5)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(Reject, match="too-little-time") as caught:
        Search(wish, Slow(wish, cache, tmp_path / "m"), Journal.read_or_make(wish, cache)).run()
    help = caught.value.diagnostics[0].help
    assert "`within: 28min`" in help and "`--within 28min`" in help


def test_a_search_out_of_time_has_measured_finalists(tmp_path):
    search = searched(tmp_path, "short", minutes=2)
    assert search.out_of_time and search.finals and search.seconds <= 2 * 60 + 10 * (1 + len(search.finals))


def test_of_a_candidate_that_time_ran_out_for_nobody_says_that_it_was_no_better(tmp_path):
    from effc.compiler.driver.tuning.summary import table_rows
    from effc.compiler.driver.tuning.tune import Tuned

    search = searched(tmp_path, "short", minutes=10)
    best = search.rank_measured_feasible_first(search.quick_trials, SLACK)[:FINALISTS]
    first, *others = (c for c in best if not search.worst_bound_violation(search.quick_trials[c]))
    search.finals, search.out_of_time = {first: search.finals[first]}, True
    states = {row.name: row.state for row in table_rows(Tuned(search.wish, search))}
    assert {states[c.name] for c in others} == {"time ran out before it was measured on all rows"}
    assert others and "no better at decode.p50" in states.values()


@pytest.mark.parametrize("confidence", ["", " with 95% confidence"])
def test_a_bound_far_from_the_original_is_refused_at_once_with_the_baseline_that_it_lacks(tmp_path, confidence):
    file = tmp_path / "w.effspec"
    file.write_text(RECIPE.format(limit="1.05", minutes=60, against="").replace(" * base", confidence))
    wish = read_wish(open_session(file, cache_dir=tmp_path / "cache"))
    cache = Cache(tmp_path / "cache")
    search = Search(wish, SimulatedTrials(wish, cache, tmp_path / "m"), Journal.read_or_make(wish, cache))
    with pytest.raises(Reject, match="unreachable-bound") as caught:
        search.run()
    (diagnostic,) = caught.value.diagnostics
    assert f"`perplexity(text.heldout) <= 1.05 * base{confidence}`" in diagnostic.help and "10" in diagnostic.message
    assert len(search.quick_trials) == 1


def test_the_mildest_quick_change_is_measured_first_and_then_the_smallest(tmp_path):
    sizes = {"default format": 200, "int8, inputs int16": 100, "int4, group 64": 60, "int4, group 32": 70}

    class Sized(SimulatedTrials):
        def plan(self, candidate):
            emission = SimpleNamespace(disk_bytes=sizes.get(candidate.name, 100))
            return SimpleNamespace(seconds=30.0 if candidate.name in sizes else 90.0, emissions=(emission,))

    wish = wish_of(tmp_path)
    cache = Cache(tmp_path / "cache")
    search = Search(wish, Sized(wish, cache, tmp_path / "m"), Journal.read_or_make(wish, cache))
    search.run()
    first = [c.name for c in search.quick_trials][:4]
    assert first == ["default format", "int8, inputs int16", "int4, group 64", "int4, group 32"]


def test_where_nothing_keeps_the_bounds_the_nearest_come_first(tmp_path):
    search = searched(tmp_path, "strict", limit=0.9)
    ranked = search.rank_measured_feasible_first(search.finals)
    violations = [search.worst_bound_violation(search.finals[c]) for c in ranked]
    assert violations == sorted(violations) and violations[0] > 0 and search.best is None


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_effects_of_changes_that_do_not_interact_add_up_exactly(drawn):
    from effc.compiler.driver.tuning.alternatives import UNCHANGED, Alternative, Candidate

    shape, numbers = Alternative("shape"), Alternative("numbers")
    unchanged = Candidate(UNCHANGED, UNCHANGED, UNCHANGED)
    one, other = Candidate(shape, UNCHANGED, UNCHANGED), Candidate(UNCHANGED, UNCHANGED, numbers)
    trials = {
        unchanged: Trial({"m": (3.0, 3.0), "a": (0.5, 0.5)}),
        one: Trial({"m": (3.0 * math.exp(drawn[0]), 3.0), "a": (0.5 + drawn[2], 0.5)}),
        other: Trial({"m": (3.0 * math.exp(drawn[1]), 3.0), "a": (0.5 + drawn[3], 0.5)}),
    }
    effects = Effects(trials, unchanged, frozenset({"a"}))
    both = Candidate(shape, UNCHANGED, numbers)
    assert effects.predict(both, "m") == pytest.approx(3.0 * math.exp(drawn[0] + drawn[1]))
    assert effects.predict(both, "a") == pytest.approx(0.5 + drawn[2] + drawn[3])


def test_a_combination_of_a_change_that_was_not_measured_is_not_foretold():
    from effc.compiler.driver.tuning.alternatives import UNCHANGED, Alternative, Candidate

    unchanged = Candidate(UNCHANGED, UNCHANGED, UNCHANGED)
    effects = Effects({unchanged: Trial({"m": (1.0, 1.0)})}, unchanged, frozenset())
    assert effects.predict(Candidate(Alternative("new"), UNCHANGED, UNCHANGED), "m") is None


@pytest.mark.parametrize("distance, tied", [(0.02, True), (0.3, False)])
def test_a_finalist_whose_time_can_t_be_told_from_the_winner_s_is_named(tmp_path, distance, tied):
    from effc.compiler.driver.tuning.summary import indistinguishable_finalists_text
    from effc.compiler.driver.tuning.tune import Compiled, Tuned

    search = searched(tmp_path, "ranges", minutes=10)
    first, second = search.candidates[:2]
    ranges = {"decode.p50": (0.48, 0.52)}, {"decode.p50": (0.48 + distance, 0.52 + distance)}
    search.finals = {
        c: Trial({QUALITY: (10.0, 10.0), "decode.p50": (10.0, 20.0)}, ranges=r)
        for c, r in zip((first, second), ranges, strict=True)
    }
    text = indistinguishable_finalists_text(Tuned(search.wish, search, {first: Compiled(tmp_path / "w.effspec", ())}))
    assert (second.name in text and "0.48 to 0.52" in text) == tied and bool(text) == tied
