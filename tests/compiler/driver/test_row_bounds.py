"""Bounds on quality say how sure they are: by the rows that were measured, and in one voice everywhere."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from effc.compiler.artifacts.card import model_card
from effc.compiler.artifacts.manifest import Manifest, Measure
from effc.compiler.cli.verbs.compile import artifact_summary_text
from effc.compiler.cli.verbs.output import Screen
from effc.compiler.core.quantity import interval_text
from effc.compiler.driver.emission import Page, expectation
from effc.compiler.driver.judging.gate import judge_bound, metric_label, unmet_bound_diagnostics
from effc.compiler.driver.judging.scores import Score
from effc.compiler.driver.pipeline import Result
from effc.compiler.evaluation.confidence import metric_interval
from effc.compiler.plugin.row_scores import RowScores
from effc.dsl.checker.recipe import Bound
from effc.dsl.checker.values import DataRef, MetricRef, Range

CHOICE = MetricRef("choice", (("data", DataRef("quiz")),))
LOSS = MetricRef("perplexity", (("data", DataRef("text")),))


def answers(*right):
    return Score(sum(right) / len(right), RowScores([float(r) for r in right], [1.0] * len(right), "share", "question"))


def judged(bound, score, original=None):
    outcome = judge_bound(bound, original and original.value, score.value)
    return replace(outcome, rows=score.row_count_text, interval=score.interval(original))


def test_forty_questions_at_chance_hold_and_are_not_certain():
    rng = random.Random(0)
    base, small = (answers(*(rng.random() < 0.25 for _ in range(40))) for _ in range(2))
    outcome = judged(Bound(CHOICE, ">=", 0.8, "base"), small, base)
    assert outcome.state == "ok"
    low, high = (end / base.value for end in outcome.interval)
    assert (
        outcome.uncertainty_reason
        == f"not certain: 40 questions leave {low:.1f} to {high:.1f}, the limit is 0.8 * base"
    )
    (warning,) = unmet_bound_diagnostics([outcome])
    assert (warning.slug, warning.severity, warning.note) == ("bound-uncertain", "warning", outcome.uncertainty_reason)


def test_a_bound_that_holds_on_too_few_rows_is_warned_of_and_not_missed():
    base = answers(*[True] * 4)
    warnings = tuple(unmet_bound_diagnostics([judged(Bound(CHOICE, ">=", 0.99, "base"), base, base)]))
    result = Result(plan=None, reports=[Page(Path("page.html"), warnings)])
    assert [d.slug for d in result.bound_diagnostics] == ["bound-uncertain"] and result.missed == []


def test_one_question_of_sixty_is_no_loss_of_three_percent_for_certain():
    base, small = answers(*[True] * 60), answers(*[True] * 58, False, False)
    outcome = judged(Bound(CHOICE, ">=", 0.97, "base"), small, base)
    assert outcome.state == "missed" and "60 questions leave 0.89 to 1.02" in outcome.uncertainty_reason
    (error,) = unmet_bound_diagnostics([outcome])
    assert error.slug == "expectation-missed" and outcome.uncertainty_reason in error.note


@pytest.mark.parametrize(
    ("bound", "certain"),
    [
        (Bound(LOSS, "<=", 1.1, "base"), True),
        (Bound(LOSS, "<=", 1.02, "base"), False),
        (Bound(LOSS, "in", Range(1.0, 1.1), "base"), True),
        (Bound(LOSS, "in", Range(1.0, 1.02), "base"), False),
        (Bound(LOSS, "<=", 10.0), True),
        (Bound(LOSS, "<=", 7.6), False),
    ],
)
def test_a_bound_is_certain_where_all_of_its_interval_gets_one_verdict(bound, certain):
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 200)
    nats = rng.normal(2.0, 0.3, 200) * tokens
    base, small = (
        Score(rows.value, rows)
        for rows in (
            RowScores(nats, tokens, "exp"),
            RowScores(nats + rng.normal(0.02, 0.05, 200) * tokens, tokens, "exp"),
        )
    )
    outcome = judged(bound, small, base if bound.baseline else None)
    assert (outcome.uncertainty_reason == "") == certain


def test_a_few_rows_are_said_to_be_too_few():
    outcome = judged(Bound(CHOICE, ">=", 0.5), answers(*[True] * 7))
    assert outcome.uncertainty_reason == "not certain: 7 questions are too few to say"


@pytest.mark.parametrize(("right", "lost"), [(0.9, 0.05), (0.5, 0.1), (0.98, 0.02)])
def test_the_interval_of_a_ratio_of_right_answers_holds_the_truth_19_times_in_20(right, lost):
    rng, missed = np.random.default_rng(1), 0
    for _ in range(600):
        base = rng.random(60) < right
        small = base & (rng.random(60) >= lost)
        low, high = metric_interval(answers(*small).rows, answers(*base).rows)
        missed += not low <= 1 - lost <= high
    assert missed <= 0.06 * 600


def test_scores_of_rows_are_kept_and_a_value_that_lacks_them_is_measured_again():
    score = answers(True, False, True)
    assert Score.from_json(json.loads(json.dumps(score.to_json())), rowwise=True) == score
    assert Score.from_json(0.66, rowwise=True) is None and Score.from_json({"sums": [1.0]}, rowwise=True) is None
    assert Score.from_json(0.66, rowwise=False) == Score(0.66)


def test_a_profiled_count_and_a_time_have_no_rows():
    outcome = judged(Bound(MetricRef("params"), "<=", 5.0), Score(4.0))
    assert outcome.interval is None and outcome.uncertainty_reason == ""


@pytest.mark.parametrize(
    ("value", "ends", "text"),
    [
        (0.97, (0.9, 1.02), "0.97 (0.90 to 1.02)"),
        (1.0149, (1.00712, 1.02), "1.015 (1.007 to 1.020)"),
        (32.61, (29.8, 35.2), "32.6 (29.8 to 35.2)"),
        (3210.0, (2900.0, 3500.0), "3210 (2900 to 3500)"),
        (1.0, (1.0, 1.0), "1"),
    ],
)
def test_an_interval_is_said_with_the_digits_that_its_width_has(value, ends, text):
    assert interval_text(value, ends) == text


def uncertain_manifest():
    base, small = answers(*[True] * 60), answers(*[True] * 59, False)
    outcome = judged(Bound(CHOICE, ">=", 0.97, "base"), small, base)
    measure = Measure(
        metric_label(outcome.bound), "", 1.0, small.value, small.value, "higher", interval=outcome.interval
    )
    return outcome, Manifest("hf", "small", measures=(measure,), expectations=(expectation(outcome),))


def test_terminal_card_page_and_reports_say_one_thing_of_a_bound_that_is_not_certain():
    from effc.compiler.artifacts.pages.origin import measure_table_rows
    from effc.compiler.artifacts.pages.page import _worst_verdict
    from effc.compiler.artifacts.pages.report_data import ReportData
    from effc.compiler.cli.verbs.gate_report import verdict_value_text

    outcome, manifest = uncertain_manifest()
    ratio = "0.98 (0.92 to 1.03)"
    assert outcome.state == "ok" and outcome.uncertainty_reason.startswith(
        "not certain: 60 questions leave 0.92 to 1.03"
    )
    terminal = artifact_summary_text("out", manifest, Screen())
    assert ratio in terminal and terminal.endswith("holds, not certain")
    card = model_card(manifest)
    assert ratio in card and f"holds ({outcome.uncertainty_reason})" in card
    (row,) = measure_table_rows(ReportData("small", manifest))
    assert row.spread == ratio and row.good == "" and row.bounds[0][2:] == ("holds", outcome.uncertainty_reason)
    assert _worst_verdict(manifest.expectations).text == "The expectation holds, not certain"
    assert ratio in verdict_value_text(outcome)
    body = outcome.to_json()
    assert (body["state"], body["rows"], body["uncertain"]) == ("ok", "60 questions", outcome.uncertainty_reason)


def test_an_artifact_keeps_intervals_and_one_without_them_is_read():
    _, manifest = uncertain_manifest()
    steady, volatile = manifest.to_json(), json.loads(json.dumps(manifest.measures_json()))
    steady["files"] = {}
    (measure,) = Manifest.from_json(json.loads(json.dumps(steady)), volatile).measures
    assert tuple(measure.interval) == manifest.measures[0].interval
    del volatile["measures"][0]["interval"]
    (old,) = Manifest.from_json(json.loads(json.dumps(steady)), volatile).measures
    assert old.interval is None
    volatile["measures"][0]["interval"] = [0.9, 1e400]
    with pytest.raises(ValueError, match="measures"):
        Manifest.from_json(json.loads(json.dumps(steady)), volatile)
