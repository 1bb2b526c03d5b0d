"""Which branch answers: the laws R1 and R2 of the digest, and thresholds that come from a dev set."""

import json

import pytest
from effc.compiler.apps.rttc.calibration import fit_and_check_policy
from effc.compiler.apps.rttc.policy import (
    BRANCHES,
    Decision,
    Policy,
    Trial,
    calibrate_thresholds,
    choose_answer,
    measure,
    points_of_threshold_pairs,
)
from effc.compiler.apps.rttc.scaling import fit_platt_scaling
from effc.compiler.core.safe_read import MALFORMED, parse_strict_json
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.json_types import from_json
from hypothesis import given
from hypothesis import strategies as st

INFINITE = float("inf")
rewards = st.floats(-5, 5, allow_nan=False)
trials = st.builds(
    lambda r, c, s: Trial(
        dict(zip(BRANCHES, r, strict=True)), dict(zip(BRANCHES, c, strict=True)), dict(zip(BRANCHES, s, strict=True))
    ),
    st.tuples(rewards, rewards, rewards),
    st.tuples(*[st.booleans()] * 3),
    st.tuples(*[st.floats(0.01, 10)] * 3),
)


def run(policy, table, missing=()):
    """The branches that were made, in order, and the decision."""
    made, decision = [], Decision()

    def answer(branch):
        made.append(branch)
        return None if branch in missing else branch

    text = choose_answer(policy, answer, lambda branch: table[branch], decision)
    return made, decision, text


@given(table=st.fixed_dictionaries(dict.fromkeys(BRANCHES, rewards)))
def test_a_threshold_below_all_rewards_never_retrieves_and_one_above_all_always_goes_on(table):
    assert run(Policy(direct=-INFINITE), table)[0] == ["direct"]
    assert run(Policy(direct=INFINITE, rag=INFINITE), table)[0] == ["direct", "rag", "ttt"]
    assert run(Policy(direct=INFINITE, rag=-INFINITE), table)[0] == ["direct", "rag"]


@given(many=st.lists(trials, min_size=1, max_size=12), low=rewards, high=rewards)
def test_branches_grow_dearer_as_a_threshold_rises(many, low, high):
    low, high = sorted((low, high))
    spent = [measure(many, Policy(direct=at, rag=0.0)).seconds for at in (low, high)]
    assert spent[0] <= spent[1] + 1e-9


@given(many=st.lists(trials, min_size=1, max_size=12))
def test_with_a_perfect_reward_every_question_that_some_branch_can_answer_is_answered(many):
    perfect = [Trial({b: float(t.right[b]) for b in BRANCHES}, t.right, t.seconds) for t in many]
    oracle = sum(any(t.right.values()) for t in many) / len(many)
    for policy in (Policy("best"), Policy("sequential", direct=0.5, rag=0.5)):
        assert measure(perfect, policy).accuracy == pytest.approx(oracle)


@given(many=st.lists(trials, min_size=1, max_size=12), value=rewards)
def test_with_a_constant_reward_the_first_branch_answers(many, value):
    flat = [Trial(dict.fromkeys(BRANCHES, value), t.right, t.seconds) for t in many]
    assert measure(flat, Policy("best")).shares == {"direct": 1.0, "rag": 0.0, "ttt": 0.0}


@given(many=st.lists(trials, min_size=2, max_size=12))
def test_calibration_is_no_worse_than_any_point_of_its_curve_and_than_the_fixed_branches_it_contains(many):
    policy, points = calibrate_thresholds(many)
    found = measure(many, policy)
    assert found.accuracy == max(p.accuracy for p in points)
    assert found.accuracy >= measure(many, Policy("direct")).accuracy - 1e-12  # "always stop" is on the curve
    assert found.accuracy >= measure(many, Policy("best")).accuracy - 1e-12  # and so is "never stop"
    assert all(sum(p.shares.values()) == pytest.approx(1) for p in points)


def test_a_second_that_costs_enough_buys_no_dear_branch():
    many = [
        Trial(
            {"direct": 0.1, "rag": 0.5, "ttt": 0.9},
            {"direct": False, "rag": False, "ttt": True},
            {"direct": 0.1, "rag": 0.2, "ttt": 9.0},
        )
    ] * 4
    assert measure(many, calibrate_thresholds(many)[0]).shares["ttt"] == 1
    assert measure(many, calibrate_thresholds(many, price_per_second=1.0)[0]).shares["direct"] == 1


@pytest.mark.slow
@given(many=st.lists(trials, min_size=2, max_size=12), value=rewards)
def test_a_reward_that_says_nothing_leaves_the_branch_that_is_right_most_often_once_it_has_scales(many, value):
    flat = [Trial(dict.fromkeys(BRANCHES, value), t.right, t.seconds) for t in many]
    found = measure(flat, Policy("best", scales=fit_platt_scaling(flat))).accuracy
    assert found == pytest.approx(max(measure(flat, Policy(branch)).accuracy for branch in BRANCHES))


def test_a_branch_whose_answers_the_reward_belittles_is_taken_by_its_chance():
    """As a model's likelihood does: the words that a training taught are right, and unlikely to it."""
    many = [
        Trial(
            {"direct": -0.5 - 0.01 * i, "rag": -0.6, "ttt": -3.0 + (i % 3)},
            {"direct": i % 4 == 0, "rag": i % 4 == 1, "ttt": i % 3 > 0},
            {"direct": 1.0, "rag": 2.0, "ttt": 8.0},
        )
        for i in range(48)
    ]
    scales = fit_platt_scaling(many)
    assert measure(many, Policy("best")).shares["ttt"] == 0
    assert measure(many, Policy("best", scales=scales)).accuracy > 0.6
    raw, scaled = calibrate_thresholds(many)[0], calibrate_thresholds(many, scales=scales)[0]
    assert measure(many, scaled).accuracy > measure(many, raw).accuracy + 0.2 and scaled.scales == scales
    decision = Decision()
    choose_answer(scaled, lambda branch: branch, lambda branch: many[1].rewards[branch], decision)
    assert set(decision.chances) == set(decision.rewards) and all(0 <= c <= 1 for c in decision.chances.values())


@pytest.mark.parametrize(
    ("right", "words"),
    [
        ((False, False, False), "none of the 12 answers to 4 dev questions is right"),
        ((True, True, True), "all of the 12 answers to 4 dev questions are right"),
        ((True, False, False), "AUC is 0.500 over the 12 answers to 4 dev questions, of which 4 are right"),
    ],
)
def test_a_reward_that_tells_nothing_is_refused_and_why_is_said(right, words):
    answers = dict(zip(BRANCHES, right, strict=True))
    many = [Trial(dict.fromkeys(BRANCHES, 0.5), answers, dict.fromkeys(BRANCHES, 1.0))] * 4
    with pytest.raises(Reject, match=words):
        fit_and_check_policy(many, Policy(), 0.0, force=False)
    assert fit_and_check_policy(many, Policy(), 0.0, force=True)[1]


def test_a_policy_with_scales_is_the_same_from_its_file():
    policy = Policy(direct=0.4, scales={"direct": (1.5, -0.25), "ttt": (-2.0, 1.0)})
    assert from_json(json.loads(json.dumps(policy.to_json())), Policy) == policy


def test_a_branch_that_can_not_answer_is_passed_over():
    table = {"direct": 0.0, "rag": 0.0, "ttt": 1.0}
    made, decision, text = run(Policy(direct=1, rag=1), table, missing=("rag",))
    assert made == list(BRANCHES) and decision.branch == text == "ttt"
    for kind in ("rag", "ttt"):
        assert run(Policy(kind), table, missing=("rag", "ttt"))[1].branch == "direct"


def test_the_curve_holds_both_ends():
    many = [
        Trial(dict.fromkeys(BRANCHES, float(i)), dict.fromkeys(BRANCHES, True), dict.fromkeys(BRANCHES, 1.0))
        for i in range(5)
    ]
    seconds = {p.seconds for p in points_of_threshold_pairs(many)}
    assert min(seconds) == 1.0 and max(seconds) == 3.0


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"kind": "magic"}',
        b'{"count": 0}',
        b'{"direct": "0"}',
        b'{"colour": 1}',
        b'{"scales": {"direct": [1]}}',
        b'{"scales": {"colour": [1, 2]}}',
        b'{"scales": {"direct": [1, NaN]}}',
        b'{"scales": 3}',
        b"[" * 9999,
    ],
)
def test_a_policy_of_another_form_is_refused(text):
    with pytest.raises(MALFORMED):
        from_json(parse_strict_json(text), Policy)
