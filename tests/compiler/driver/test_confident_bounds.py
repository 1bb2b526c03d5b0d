"""Bounds `with 95% confidence` are decided by as few rows as make them clear, on either side and in every form."""

from types import SimpleNamespace

import numpy as np
import pytest
from effc.compiler.driver.judging.baseline import _is_compared_with_baseline
from effc.compiler.driver.judging.gate import measure_and_judge_bounds, unmet_bound_diagnostics
from effc.compiler.driver.judging.reading import read_until_decided
from effc.compiler.plugin.row_scores import RowScores
from effc.dsl.checker.recipe import Bound, Pipeline
from effc.dsl.checker.value_text import bound_text
from effc.dsl.checker.values import DataRef, MetricRef

from tests import worlds

REF = MetricRef("losses", (("data", DataRef("text")),))
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(20, 60, 400).astype(float)
NATS = RNG.normal(2.0, 0.4, 400) * TOKENS
RIGHT = (RNG.random(400) < 0.8).astype(float)


class Losses:
    """Stands in for a metric file: the scores of a model are the model."""

    unit, rowwise = "", True

    def __init__(self, form, count=400):
        self.form, self.count, self.read = form, count, []

    def row_count(self, ctx):
        return self.count

    def score_rows(self, model, ctx, indices):
        self.read += indices
        sums, counts = model
        return RowScores([sums[i] for i in indices], [counts[i] for i in indices], self.form)


CTX = SimpleNamespace(
    seed=0,
    settings=SimpleNamespace(device="cpu"),
    emit_event=lambda event: None,
    each=lambda items, label, total=None: iter(items),
    record=lambda name, value, unit="": None,
)
BASE = {"exp": (NATS, TOKENS), "mean": (NATS, TOKENS), "share": (RIGHT, np.ones(400))}
WORSE = {
    "exp": (NATS + RNG.normal(0.05, 0.1, 400) * TOKENS, TOKENS),
    "mean": (NATS * RNG.normal(1.05, 0.1, 400), TOKENS),
    "share": (RIGHT * (RNG.random(400) < 0.9), np.ones(400)),
}


def reading(form, op, limit, baseline=True, count=400, confidence=0.95):
    bound = Bound(REF, op, limit, "base" if baseline else None, confidence=confidence)
    return read_until_decided(bound, limit, Losses(form, count), WORSE[form], BASE[form] if baseline else None, CTX)


@pytest.mark.parametrize(
    ("form", "op", "limit", "outcome"),
    [
        ("exp", "<=", 1.2, "holds"),
        ("exp", "<=", 1.0, "missed"),
        ("exp", ">=", 1.0, "holds"),
        ("exp", ">=", 1.2, "missed"),
        ("mean", "<=", 1.2, "holds"),
        ("mean", "<", 1.0, "missed"),
        ("mean", ">", 1.0, "holds"),
        ("mean", ">=", 1.2, "missed"),
        ("share", ">=", 0.75, "holds"),
        ("share", ">=", 0.99, "missed"),
        ("share", "<=", 0.99, "holds"),
        ("share", "<=", 0.75, "missed"),
    ],
)
def test_a_ratio_that_is_clear_is_decided_before_all_rows_are_read(form, op, limit, outcome):
    result = reading(form, op, limit)
    assert result.verdict.outcome == outcome and result.verdict.rows < 400
    assert result.row_count_text == f"{result.verdict.rows} of 400 rows"
    ratio = [end / result.original.value for end in result.interval]
    assert (ratio[1] <= limit) == ((op[0] == "<") == (outcome == "holds"))
    assert ratio[0] < result.score.value / result.original.value < ratio[1] or form == "share"


@pytest.mark.parametrize(("form", "op", "limit"), [("exp", "<=", 12.0), ("mean", "<=", 3.0), ("share", ">=", 0.5)])
def test_a_plain_limit_needs_no_other_model(form, op, limit):
    result = reading(form, op, limit, baseline=False)
    assert result.verdict.outcome == "holds" and result.original is None
    low, high = result.interval
    assert (high <= limit) if op == "<=" else (low >= limit)


def test_rows_are_read_once_each_and_by_both_models_alike():
    metric = Losses("exp")
    bound = Bound(REF, "<=", 1.2, "base", confidence=0.95)
    result = read_until_decided(bound, 1.2, metric, WORSE["exp"], BASE["exp"], CTX)
    assert len(metric.read) == 2 * result.verdict.rows and len(set(metric.read)) == result.verdict.rows
    assert metric.read[: result.verdict.rows] != sorted(metric.read[: result.verdict.rows])


def test_more_confidence_takes_more_rows():
    assert reading("exp", "<=", 1.08, confidence=0.999).verdict.rows > reading("exp", "<=", 1.08).verdict.rows


def test_a_perplexity_of_nothing_is_never_reached():
    assert reading("exp", "<=", 0.0, baseline=False).verdict.outcome == "missed"


def gate(bound, count=400):
    context = SimpleNamespace(**vars(CTX), metric=lambda ref: Losses("exp", count))
    context.recipe = SimpleNamespace(profiles={})
    (outcome,) = measure_and_judge_bounds(Pipeline("lean", "base", (), (bound,)), WORSE["exp"], context)
    return outcome


def test_what_all_rows_leave_open_is_undecided_with_its_own_sentence():
    mean = float(np.exp(WORSE["exp"][0][:100].sum() / TOKENS[:100].sum()))
    outcome = gate(Bound(REF, "<=", mean, confidence=0.95), 100)
    assert (outcome.state, outcome.passed) == ("undecided", False)
    assert outcome.undecided == "100 of 100 rows leave 6.7 to 8.5 with 95 % confidence, the limit is 7.493"
    (error,) = unmet_bound_diagnostics([outcome])
    assert (error.slug, error.exit) == ("bound-undecided", 4) and "undecided by its rows" in error.message
    (warning,) = unmet_bound_diagnostics([outcome], undecided_policy="pass")
    assert (warning.slug, warning.severity) == ("bound-left-open", "warning")


def test_seven_rows_are_too_few_to_decide_anything():
    outcome = gate(Bound(REF, "<=", 1e6, confidence=0.95), 7)
    assert outcome.state == "undecided" and outcome.undecided == "7 of 7 rows are too few to say"
    assert outcome.interval is None


def test_a_decided_bound_says_how_many_rows_that_took():
    held, missed = (gate(Bound(REF, "<=", limit, confidence=0.95)) for limit in (50.0, 2.0))
    assert (
        held.state == "ok"
        and held.decided_by_text == "decided by 24 of 400 rows"
        and not unmet_bound_diagnostics([held])
    )
    (error,) = unmet_bound_diagnostics([missed])
    assert (error.slug, error.note) == ("expectation-missed", "decided by 24 of 400 rows")


def test_a_bound_is_spelled_with_its_confidence():
    assert bound_text(Bound(REF, "<=", 1.02, "base", confidence=0.95)).endswith("<= 1.02 * base with 95% confidence")
    assert bound_text(Bound(REF, "<=", 2.0, confidence=0.999)).endswith("<= 2 with 99.9% confidence")


def test_a_baseline_holds_no_value_of_rows_that_hang_on_the_model():
    def compared(*bounds):
        plan = SimpleNamespace(pipeline=SimpleNamespace(expects=bounds))
        return _is_compared_with_baseline(
            "losses(text)", SimpleNamespace(plan=plan, compared=SimpleNamespace(ratios={}))
        )

    sure, plain = Bound(REF, "<=", 1.0, confidence=0.95), Bound(REF, "<=", 1.0)
    assert not compared(sure) and compared(plain) and compared(sure, plain)


@pytest.mark.parametrize("name", ["perplexity", "divergence", "agreement"])
def test_metrics_of_a_model_are_decided_by_its_rows(tmp_path, name):
    from effc.compiler.inputs.sources.hf import Hf

    worlds.tokenizer(worlds.llama(tmp_path / "m"))
    origin = Hf(name="./m").resolve(worlds.context(tmp_path))
    ctx = worlds.context(tmp_path, origin, {"noise": ("synthetic", {"count": 60, "length": 12, "seed": 3})})
    metric = ctx.registry.import_plugin_class("metric", name)(data=DataRef("noise"))
    op, limit = (">=", 0.5) if name == "agreement" else ("<=", 1e4)
    bound = Bound(MetricRef(name), op, limit, confidence=0.95)
    result = read_until_decided(bound, limit, metric, origin.load(), None, ctx)
    assert (result.verdict.outcome, result.row_count_text) == ("holds", "24 of 60 rows")
