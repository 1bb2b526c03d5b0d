"""The gate judges a measured value against a bound, and says on which line it was missed."""

import math
from types import SimpleNamespace

import pytest
import torch
from effc.compiler.driver.judging.gate import judge_bound, measure_and_judge_bounds, unmet_bound_diagnostics
from effc.compiler.models.checkpoints.origin import Origin
from effc.dsl.checker.recipe import Bound, Invocation, Pipeline
from effc.dsl.checker.values import Bytes, DataRef, Duration, MetricRef, Range, Ratio
from effc.dsl.syntax.source import Source, Span
from hypothesis import given
from hypothesis import strategies as st

PPL = MetricRef("perplexity", (("data", DataRef("heldout")),))
finite = st.floats(-1e6, 1e6)


def bound(op="<=", limit=1.15, baseline="base", **more):
    return Bound(PPL, op, limit, baseline, **more)


def test_a_factor_multiplies_the_baseline():
    assert judge_bound(bound(limit=1.15), 20.0, 23.0).passed
    assert not judge_bound(bound(limit=1.15), 20.0, 23.1).passed


def test_a_plain_limit_stands_for_itself():
    assert judge_bound(bound(limit=21.0, baseline=None), None, 21.0).passed
    assert not judge_bound(bound("<", 21.0, None), None, 21.0).passed


@given(value=finite, limit=finite)
def test_an_operator_and_its_opposite_never_agree(value, limit):
    for op, opposite in (("<=", ">"), (">=", "<")):
        one, other = (judge_bound(bound(o, limit, None), None, value).passed for o in (op, opposite))
        assert one != other


@given(op=st.sampled_from(["<=", "<", ">=", ">", "==", "in"]), value=st.sampled_from([math.nan, 1.0]))
def test_not_a_number_keeps_no_bound(op, value):
    limit = Range(math.nan, 2.0) if op == "in" else math.nan
    assert not judge_bound(bound(op, limit, None), None, value).passed
    assert not judge_bound(bound(op, Range(0, 2) if op == "in" else 1.0, None), None, math.nan).passed


@given(value=finite, a=finite, b=finite)
def test_a_range_includes_both_ends(value, a, b):
    low, high = sorted((a, b))
    assert judge_bound(bound("in", Range(low, high), None), None, value).passed == (low <= value <= high)


def test_equality_allows_the_rounding_of_the_product():
    assert judge_bound(bound("==", 0.1), 3.0, 0.30000000000000004).passed
    assert not judge_bound(bound("==", 0.1), 3.0, 0.3001).passed


@pytest.mark.parametrize(
    ("limit", "unit", "low_enough", "too_high"),
    [
        (Duration(0.03), "ms", 30.0, 30.1),
        (Duration(0.03), "s", 0.03, 0.031),
        (Bytes(3 << 20), "MiB", 3.0, 3.1),
        (Bytes(3 << 20), "bytes", 3 << 20, (3 << 20) + 1),
        (Ratio(0.5), "", 0.5, 0.51),
        (Ratio(0.5), "%", 50.0, 51.0),
    ],
)
def test_limits_are_converted_to_the_unit_of_the_metric(limit, unit, low_enough, too_high):
    assert judge_bound(bound(limit=limit, baseline=None), None, low_enough, unit).passed
    assert not judge_bound(bound(limit=limit, baseline=None), None, too_high, unit).passed


def test_a_miss_points_at_its_line_and_names_both_values():
    text = "expect lean {\n  perplexity(heldout) <= 1.15 * base\n}\n"
    start = text.index("perplexity")
    span = Span(Source("lean.effspec", text), start, text.index("\n}"))
    (missed,) = unmet_bound_diagnostics([judge_bound(bound(span=span), 19.04, 23.4)])
    assert missed.message == "`perplexity(heldout)` is 23.4, above 21.9"
    assert missed.note == "`base` measures 19.04"
    assert (missed.exit, missed.slug, missed.span) == (4, "expectation-missed", span)


class Weights:
    """Stands in for a metric file: the sum of a module's weights."""

    unit = "bytes"
    rowwise = False

    def __init__(self):
        self.asked = []

    def measure(self, model, ctx):
        self.asked.append((model, torch.get_num_threads()))
        return sum(float(p.detach().sum()) for p in model.parameters())


def linear(value):
    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.constant_(layer.weight, value)
    return layer


class Here(SimpleNamespace):
    """A context with one model and one metric."""

    def each(self, items, label, total=None):
        return iter(items)

    def record(self, name, value, unit=""):
        pass

    def emit_event(self, event):
        pass

    def relative_to(self, call):
        return self


def context(profiles=None):
    metric, loads = Weights(), []
    origin = Origin("base", {}, None, "base", lambda: linear(1.0), lambda: loads.append(1) or linear(1.0), lambda: None)
    source = SimpleNamespace(resolve=lambda ctx: origin)
    recipe = SimpleNamespace(models={"base": Invocation("zoo", {})}, profiles=profiles or {})
    registry = SimpleNamespace(make=lambda kind, call: source)
    return Here(
        recipe=recipe,
        metric=lambda ref: metric,
        registry=registry,
        used=metric,
        loads=loads,
        settings=SimpleNamespace(device="cpu", signed_by=()),
    )


def test_the_result_is_measured_once_and_the_baseline_loaded_once():
    ctx = context()
    bounds = (bound(limit=0.6), bound(">=", 0.4), bound(limit=3, baseline=None))
    pipeline = Pipeline("lean", "base", (), bounds)
    known = {}
    outcomes = measure_and_judge_bounds(pipeline, linear(0.5), ctx, known)
    assert [(o.value, o.original) for o in outcomes] == [(2.0, 4.0), (2.0, 4.0), (2.0, None)]
    assert all(o.passed for o in outcomes)
    assert len(ctx.used.asked) == 2 and len(ctx.loads) == 1
    measure_and_judge_bounds(pipeline, linear(0.5), ctx, known)
    assert len(ctx.loads) == 1


def test_a_profile_sets_the_threads_of_the_result_and_of_the_baseline():
    ctx = context({"one": {"isa": "portable", "threads": 1}})
    pipeline = Pipeline("lean", "base", (), (bound(profile="one"),))
    before = torch.get_num_threads()
    measure_and_judge_bounds(pipeline, linear(0.5), ctx)
    assert [threads for _, threads in ctx.used.asked] == [1, 1]
    assert torch.get_num_threads() == before


def test_a_bound_for_another_machine_is_skipped_and_said_so():
    ctx = context({"far": {"isa": "sve9"}})
    pipeline = Pipeline("lean", "base", (), (bound(profile="far"),))
    (outcome,) = measure_and_judge_bounds(pipeline, linear(0.5), ctx)
    assert outcome.state == "skipped" and not ctx.loads
    (warning,) = unmet_bound_diagnostics([outcome])
    assert warning.severity == "warning" and "sve9, which this machine lacks" in warning.note
