"""A router over what a query shows, and the picture of a curve."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from effc.compiler.apps.rttc.calibration import dev_features, points_by_price
from effc.compiler.apps.rttc.drawing import pareto_indices, svg_accuracy_chart, text_accuracy_chart
from effc.compiler.apps.rttc.generation import Settings
from effc.compiler.apps.rttc.policy import BRANCHES, Point, Policy, Trial
from effc.compiler.apps.rttc.router import Router, features, measure_router, open_router, train_router
from effc.compiler.apps.rttc.sample import Sample
from effc.compiler.apps.rttc.signals import Signals, signals
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.rttc.conftest import QUESTIONS, Config, answer_of

SECONDS = dict(zip(BRANCHES, (1.0, 2.0, 8.0), strict=True))


def world_of(rows, seed=0, noise=False):
    """Questions of two kinds that only different branches answer, told by the first coordinate; or by nothing."""
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(rows, 16, generator=draw), dim=-1)
    signs = vectors[:, 0] > 0 if not noise else torch.rand(rows, generator=draw) > 0.5
    of = torch.stack([features(v, Signals(float(torch.rand(1, generator=draw)), 1.0)) for v in vectors])
    found = [
        Trial(dict.fromkeys(BRANCHES, 0.0), {"direct": bool(s), "rag": not s, "ttt": False}, SECONDS) for s in signs
    ]
    return found, of


@pytest.mark.slow
def test_a_router_sends_each_kind_of_question_where_it_is_answered():
    (found, of), (fresh, of_fresh) = world_of(160), world_of(100, seed=1)
    router = train_router(found, of, 0.0)
    point = measure_router(router, fresh, of_fresh)
    assert router.auc > 0.8 and point.accuracy > 0.85
    assert point.shares["direct"] > 0.3 and point.shares["rag"] > 0.3 and point.shares["ttt"] == 0
    assert point.seconds == pytest.approx(point.shares["direct"] + 2 * point.shares["rag"])


@pytest.mark.slow
def test_a_dear_second_makes_the_cheapest_branch_the_only_one_and_costs_never_rise_with_the_price():
    found, of = world_of(80)
    router = train_router(found, of, 0.0)
    assert measure_router(replace(router, price=1.0), found, of).shares["direct"] == 1.0
    spent = [point.seconds for point in points_by_price(router, found, of)]
    assert spent == sorted(spent, reverse=True) and spent[-1] == 1.0


@pytest.mark.slow
def test_without_a_price_a_router_takes_no_longer_than_the_better_of_the_other_two_branches():
    (found, of), (fresh, of_fresh) = world_of(160), world_of(100, seed=1)

    def of_kind(trials, features, trained):  # some questions only `ttt` answers, the others only `rag`
        hard = features[:, 1] > features[:, 1].quantile(1 - trained)
        return [
            replace(t, right={"direct": False, "rag": not h, "ttt": bool(h)}) for t, h in zip(trials, hard, strict=True)
        ]

    mostly = train_router(of_kind(found, of, 0.8), of, None)
    assert mostly.price == 0.0  # always `ttt` is the better, and nothing is dearer
    assert measure_router(mostly, of_kind(fresh, of_fresh, 0.8), of_fresh).accuracy > 0.8
    free = train_router(of_kind(found, of, 0.2), of, 0.0)
    assert measure_router(free, fresh, of_fresh).seconds > 2.0
    fair = train_router(of_kind(found, of, 0.2), of, None)
    assert fair.price > 0.0 and measure_router(fair, fresh, of_fresh).seconds <= 2.0


@pytest.mark.slow
def test_a_router_that_knows_nothing_is_refused_unless_forced():
    found, of = world_of(60, seed=3, noise=True)
    found = [replace(t, right=dict.fromkeys(BRANCHES, t.right["direct"])) for t in found]
    with pytest.raises(Reject, match="the router's AUC is"):
        train_router(found, of, 0.0)
    assert train_router(found, of, 0.0, force=True).auc < 0.55


@pytest.mark.slow
def test_a_router_looks_at_the_first_token_only_where_that_tells_more_of_questions_held_out_than_the_vector_does():
    found, of = world_of(120)
    assert not train_router(found, of, 0.0).needs_signals  # the vector says it all, and the signals are noise
    told = torch.tensor([float(trial.right["direct"]) for trial in found])
    shown = torch.cat([torch.roll(of[:, :-2], 1, 0), 3 * told[:, None], of[:, -1:]], dim=1)  # vectors of others
    router = train_router(found, shown, 0.0)
    assert router.needs_signals and router.auc > 0.9


def test_a_client_whose_router_does_not_look_runs_the_model_for_its_answer_alone(world):
    width, runs = world.embedder.width + 2, []
    router = Router(torch.zeros(3, width), torch.zeros(3), torch.zeros(width), torch.ones(width), (1.0, 2.0, 8.0), 0, 1)
    client, counts = world.client(Config(), Policy("router", count=4, shown=2)), []
    hook = world.model.lm_head.register_forward_hook(lambda *told: runs.append(told))
    for weight in (0.0, 0.1):
        client.router = replace(router, weight=torch.full((3, width), weight))
        runs.clear()
        client.answer_conversation([{"role": "user", "content": QUESTIONS[0]}], Settings(max_tokens=2))
        counts.append(len(runs))
    hook.remove()
    assert counts[1] == counts[0] + 1


def test_a_router_of_one_dev_question_is_refused_and_one_that_is_forced_has_numbers():
    found, of = world_of(1)
    with pytest.raises(Reject, match="the router's AUC is"):
        train_router(found, of, 0.0)
    assert torch.isfinite(train_router(found, of, 0.0, force=True).probabilities_right(of)).all()


@pytest.mark.slow
def test_a_router_is_the_same_from_its_file_and_a_cut_one_is_refused(tmp_path):
    found, of = world_of(40)
    router = train_router(found, of, 0.01)
    router.save(tmp_path)
    again = open_router(tmp_path, 16)
    assert (
        torch.equal(again.probabilities_right(of), router.probabilities_right(of))
        and again.price == 0.01
        and again.auc == router.auc
    )
    with pytest.raises(Reject, match="another embedder"):
        open_router(tmp_path, 17)
    file = tmp_path / "router.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(Reject, match="holds no router"):
        open_router(tmp_path, 16)


def test_signals_are_those_of_the_first_token(world):
    ids = world.prompts.tokenize_conversation([{"role": "user", "content": QUESTIONS[0]}])
    with torch.no_grad():
        chances = world.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    first, second = chances.topk(2).values
    shown = signals(world.model, ids)
    assert shown.margin == pytest.approx(float((first / second).log()), abs=1e-4)
    assert shown.entropy == pytest.approx(float(torch.distributions.Categorical(chances).entropy()), abs=1e-4)


def test_a_client_goes_the_way_that_its_router_says(world):
    width = world.embedder.width + 2
    plain = Router(torch.zeros(3, width), torch.zeros(3), torch.zeros(width), torch.ones(width), (1.0, 2.0, 8.0), 0, 1)
    client = world.client(Config(), Policy("router", count=4, shown=2))
    for number, branch in enumerate(BRANCHES[:2]):
        client.router = replace(plain, bias=torch.eye(3)[number])
        found = client.answer_conversation([{"role": "user", "content": QUESTIONS[0]}], Settings(max_tokens=3))
        assert found.decision.branch == branch and found.decision.seconds["route"] > 0
        assert not found.decision.rewards  # no answer was made to be judged
    assert dev_features(client, [Sample(q, answer_of(q)) for q in QUESTIONS[:3]]).shape == (3, width)


def test_the_picture_of_a_curve_names_what_was_chosen_and_joins_what_nothing_beats():
    points = [Point(0, 0, a, s, {}) for a, s in ((0.5, 1), (0.4, 2), (0.7, 2), (0.7, 3), (0.9, 9))]
    assert pareto_indices(points) == [0, 2, 4]
    drawn = svg_accuracy_chart(points, {"a < b": points[2]})
    root = ElementTree.fromstring(drawn)
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 6 and "a &lt; b 0.70, 2.00 s" in drawn
    assert len(root.find("{http://www.w3.org/2000/svg}polyline").get("points").split()) == 3
    told = text_accuracy_chart(points, {"chosen": points[2]})
    assert "a  chosen: accuracy 0.700, 2.000 s a query" in told and told.count(".") > 4
    assert svg_accuracy_chart([points[0]], {"x": points[0]}) and text_accuracy_chart([points[0]], {"x": points[0]})
