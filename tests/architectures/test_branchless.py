"""Nets without residual branches: a step that cuts several kinds acts on those that there are."""

import json

import pytest
from effc.compiler.cli.verbs.new import GOALS, NamedSource, choose_evaluation
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

from tests.architectures import table
from tests.architectures.checks import refused


def checked(tmp_path, name, step):
    model = table.model(name)
    body = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    (tmp_path / "config.json").write_text(json.dumps(body))
    (tmp_path / "r.effspec").write_text(
        'effspec 1\nmodel base = config("./config.json")\ndata rows = synthetic(count: 4)\n'
        f'pipeline small(base) {{ slim = {step} }}\nemit small {{ hf("small") }}\n'
    )
    (plan,) = api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache", threads=1)
    return plan


@pytest.mark.parametrize("order", ["", ", order: [channels]"])
@pytest.mark.parametrize("name", ["efficientnet", "mobilenet_v1"])
def test_channels_of_a_net_without_branches_are_cut_by_a_recipe(tmp_path, name, order):
    plan = checked(tmp_path, name, f"prune.multi(remove: 5% of params, group: 4, score: similarity(rows){order})")
    assert plan.stages[0].matched


@pytest.mark.slow
def test_a_recipe_for_a_net_whose_last_states_become_narrower_compares_them(tmp_path):
    model = table.model("mobilenet_v1")
    model.save_pretrained(tmp_path / "model")
    session = api.open_session(tmp_path / "r.effspec", cache_dir=tmp_path / "cache")
    call = NamedSource("hf", "./model").call(session)
    score = choose_evaluation(session.resolve_model_origin(call), session.skeleton(call)).metric_on_rows("rows")
    assert score == "similarity(rows, by: cka)"
    bound = choose_evaluation(session.resolve_model_origin(call), session.skeleton(call)).adapt_line(
        GOALS["smaller"][2][1]
    )
    assert bound == "similarity(heldout, by: cka) >= 0.80"
    (tmp_path / "r.effspec").write_text(
        'effspec 1\nmodel base = hf("./model")\ndata rows = synthetic(count: 4)\n'
        f"pipeline small(base) {{ slim = prune.multi(remove: 20% of params, group: 8, score: {score}) }}\n"
        f'expect small {{ {score} >= 0.01 }}\nemit small {{ hf("small") }}\n'
    )
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    assert not result.missed


def test_a_net_without_branches_and_groups_is_refused_with_all_kinds(tmp_path):
    absent = "works on residual branches, channels and heads, none of which is found in this model"
    with pytest.raises(Reject, match=absent) as refusal:
        checked(tmp_path, "albert", "prune.multi(remove: 5% of params, score: similarity(rows))")
    (error,) = (d for d in refusal.value.diagnostics if d.severity == "error")
    assert error.note == "it has no repeated layers that effc recognises"


def test_the_matrix_takes_what_check_refuses_for_a_refusal(tmp_path):
    from tests.architectures.passes import arguments

    model = table.model("efficientnet")
    reject = refused(model, "prune.channels", arguments("prune.channels", model), tmp_path)
    assert reject is not None and "is more than the 2 channels of" in str(reject)
