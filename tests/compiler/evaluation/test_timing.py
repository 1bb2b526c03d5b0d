"""Metrics that read a clock: what is timed, percentiles, and two models in turns."""

import pytest
import torch
from effc.compiler.evaluation import timing
from effc.compiler.models.rows.decoding import CACHES
from effc.compiler.plugin.interfaces import Metric
from effc.compiler.plugin.registry import Registry
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny, worlds

torch.set_num_threads(1)  # tests run side by side: threads that wait for each other take 100 times longer


@pytest.mark.parametrize("name", ["prefill.p50", "prefill.p95", "decode.p50", "decode.p95", "throughput"])
def test_times_are_positive(tmp_path, name):
    args = {"prompt": 8, **({"repeats": 3} if "prefill" in name else {"steps": 3})}
    assert (
        Registry().import_plugin_class("metric", name)(**args).measure(tiny.model("llama"), worlds.context(tmp_path))
        > 0
    )


def test_decoding_uses_the_cache():
    model, seen = tiny.model("llama"), []
    forward = model.forward

    def watched(input_ids, **more):
        seen.append((input_ids.shape[1], *(k for k in more if k in CACHES)))
        return forward(input_ids, **more)

    watched.__signature__ = __import__("inspect").signature(forward)
    model.forward = watched
    step = timing.make_decode_step(model, 8)
    for _ in range(timing.WARMUP + 4):
        step()
    assert seen[0] == (8,) and len(seen) == 1 + timing.WARMUP + 4
    assert all(length == 1 and len(cache) == 1 for length, *cache in seen[1:])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_architecture_decodes_with_its_cache(name):
    step = timing.make_decode_step(tiny.model(name), 5, batch=2)
    assert step() > 0 and step() > 0


def test_a_module_without_a_cache_is_not_decoded():
    class Plain(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    assert worlds.slug(lambda: timing.make_decode_step(Plain(), 4)) == "no-cache"


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=50), percent=st.integers(1, 100))
def test_a_percentile_is_one_of_the_values_with_its_share_below(values, percent):
    found = timing.percentile(values, percent)
    assert found in values
    assert sum(v <= found for v in values) * 100 >= percent * len(values)
    assert sum(v < found for v in values) * 100 < percent * len(values)


SEEN: list[str] = []


class Drifting(Metric):
    """Reads a clock that slows down by a tenth with every step; the second model takes twice as long."""

    def measure(self, model, ctx):
        return timing.measure_single(self.clock(model), model)

    def clock(self, model):
        def step():
            SEEN.append(model.name)
            return (2.0 if model.name == "b" else 1.0) * 1.1 ** len(SEEN)

        return timing.Clock(step, 4, lambda seconds: sum(seconds) / len(seconds))


def test_models_take_turns_step_by_step_and_drift_cancels():
    a, b = torch.nn.Identity(), torch.nn.Identity()
    a.name, b.name = "a", "b"
    turns = timing.measure_interleaved({"a": a, "b": b}, Drifting(), rounds=3)
    assert SEEN[:8] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(SEEN) == 3 * 2 * (timing.WARMUP + 4)
    assert turns.ratio == pytest.approx(2.0, rel=0.02)
    assert turns.spread == (pytest.approx(turns.ratio), pytest.approx(turns.ratio))


def test_what_takes_long_is_timed_in_fewer_rounds():
    a, b = torch.nn.Identity(), torch.nn.Identity()
    a.name, b.name = "a", "b"
    assert len(timing.measure_interleaved({"a": a, "b": b}, Drifting(), rounds=3, max_seconds=0.0).rounds) == 1
    assert len(timing.measure_interleaved({"a": a, "b": b}, Drifting(), rounds=3, max_seconds=60.0).rounds) == 3


def test_models_that_memory_does_not_hold_together_take_turns_by_the_round(monkeypatch):
    a, b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    a.name, b.name, begun = "a", "b", len(SEEN)
    monkeypatch.setattr("effc.compiler.core.memory.total_memory_bytes", lambda: 5 * 72 * 4)
    assert timing.fit_in_memory_together([a, b])
    monkeypatch.setattr("effc.compiler.core.memory.total_memory_bytes", lambda: 2 * 72 * 4)
    turns = timing.measure_interleaved({"a": a, "b": b}, Drifting(), rounds=2)
    half = timing.WARMUP + 4
    assert SEEN[begun:] == 2 * (half * ["a"] + half * ["b"]) and len(turns.rounds) == 2


def test_rounds_may_divide_the_timings_among_them():
    a, b = torch.nn.Identity(), torch.nn.Identity()
    a.name, b.name, begun = "a", "b", len(SEEN)
    turns = timing.measure_interleaved({"a": a, "b": b}, Drifting(), rounds=3, calls_per_round=3)
    assert len(SEEN) - begun == 3 * 2 * (timing.WARMUP + 2)
    assert turns.ratio == pytest.approx(2.0, rel=0.05) and len(turns.rounds) == 3


def test_a_deeper_model_takes_longer():
    shallow, deep = tiny.model("llama", num_hidden_layers=1), tiny.model("llama", num_hidden_layers=12)
    metric = Registry().import_plugin_class("metric", "prefill.p50")(prompt=16, repeats=5)
    assert timing.measure_interleaved({"shallow": shallow, "deep": deep}, metric, rounds=7).ratio > 1.5
