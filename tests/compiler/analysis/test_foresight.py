"""Estimates of candidates: their terms are what calculus says, and racing trusts them as far as scores bear them out."""

import math
from contextlib import contextmanager

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search import gradients
from effc.compiler.transforms.search.choice import Exact, Racing, Round
from effc.compiler.transforms.search.gradients import Estimate, GradientSweep
from effc.compiler.transforms.search.prefix import Prefix
from effc.compiler.transforms.search.score_estimates import MARGIN, MIN_SAMPLES, SLACK, TRUST, ScoreEstimates
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny

IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(2))


class Dimmed:
    """An MLP whose output is a little smaller."""

    def __init__(self, model, unit, part):
        self.module, self.unit, self.part = model.get_submodule(f"{unit}.mlp"), unit, part
        self.name = self.location = f"{unit}.mlp"

    @contextmanager
    def applied(self):
        handle = self.module.register_forward_hook(lambda _m, _a, output: (1 - self.part) * output)
        try:
            yield
        finally:
            handle.remove()


def nats(model):
    """Of all predicted tokens."""
    with torch.no_grad():
        said = model(IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return -said.gather(2, IDS[:, 1:, None]).sum().item()


def divergence(model, before):
    """KL of what was predicted from what is, summed over tokens that are followed by one."""
    with torch.no_grad():
        after = model(IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return (before.exp() * (before - after)).sum().item()


def swept(model, part, draws):
    program = capture(model)
    prefix = Prefix(program, 1 << 30)

    def run():
        with torch.no_grad():
            return float(sum(model(ids, use_cache=False)[0].sum() for ids in IDS.split(2)))

    prefix.measure_from(run)
    candidates = [Dimmed(model, unit, part) for unit in program.units]
    return candidates, {c.name: e for c, e in GradientSweep(prefix, 0, draws).estimate_if_supported(candidates)}


def test_the_first_term_is_the_slope_of_the_loss():
    model = tiny.model("llama").double()
    candidates, found = swept(model, 1e-3, 1)
    for candidate in candidates:
        with candidate.applied():
            more = nats(model)
        candidate.part = -candidate.part
        with candidate.applied():
            less = nats(model)
        slope = (more - less) / 2 / IDS[:, 1:].numel()
        assert found[candidate.name].first == pytest.approx(slope, rel=1e-3)  # rounded to float32 on the way


@pytest.mark.slow
def test_the_second_term_is_half_of_the_fisher_information(monkeypatch):
    monkeypatch.setattr(gradients, "WINDOW", IDS.shape[1])
    model, part = tiny.model("llama").double(), 1e-2
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    candidates, found = swept(model, part, 400)
    for candidate in candidates:
        with candidate.applied():
            moved = divergence(model, before) / IDS[:, 1:].numel()
        assert found[candidate.name].second == pytest.approx(moved, rel=0.15)  # 4 rows and 400 draws: 4% of noise


@pytest.mark.slow
def test_windows_tell_about_as_much_and_are_less_noisy(monkeypatch):
    def told(window, draws):
        monkeypatch.setattr(gradients, "WINDOW", window)
        return torch.tensor([e.second for e in swept(tiny.model("llama").double(), 1e-2, draws)[1].values()])

    truth = told(IDS.shape[1], 400)
    near, far = (told(window, 400) for window in (4, 1))
    assert torch.allclose(near, truth, rtol=0.3) and torch.allclose(far, truth, rtol=0.4)
    whole, parts = ([(told(window, 2) / truth).log().abs().mean() for _ in range(3)] for window in (IDS.shape[1], 4))
    assert sum(parts) < sum(whole)


def test_weights_take_gradients_again_after_a_sweep():
    model = tiny.model("llama")
    swept(model, 0.1, 1)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Fixed:
    """A candidate that is only a name, a place, a layer and a size."""

    joins = True

    def __init__(self, name, size=1.0):
        self.name = self.location = self.unit = name
        self.size = size

    def saves(self, _of):
        return self.size


def foreseen(estimates):
    """A foresight over scores that are one and the nats on top."""
    score_estimates = ScoreEstimates()
    score_estimates.set_estimates({n: (e, 1.0) for n, e in estimates.items()}, lambda score, nats: score + nats)
    return score_estimates


def choose(choice, growths, left=math.inf):
    candidates = [Fixed(n) for n in growths]
    now = Round(candidates, lambda: 1.0, lambda asked: [1.0 + growths[c.name] for c in asked], 1.0, left)
    return choice.score_and_choose(now), now


terms = st.tuples(st.floats(-1, 1), st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(terms, st.floats(-SLACK, 3)), min_size=1, max_size=MIN_SAMPLES - 1))
def test_what_keeps_to_its_bound_is_never_missed(lots):
    estimates = {str(i): Estimate(*pair) for i, (pair, _) in enumerate(lots)}
    growths = {n: e.growth + off * e.terms for (n, e), (_, off) in zip(estimates.items(), lots, strict=True)}
    best, now = choose(Racing("params", foreseen(estimates), patience=99), growths)
    exact, _ = choose(Exact("params"), growths)
    assert growths[best.name] == pytest.approx(growths[exact.name], abs=1e-9)
    for name in growths.keys() - now.scores.keys():  # all that was left out was above the best by its bound
        assert estimates[name].growth - SLACK * estimates[name].terms >= growths[best.name] - 1e-9


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(terms, st.floats(-3, 3)), min_size=1, max_size=40))
def test_what_is_left_out_is_above_the_best_by_the_bound_that_scores_made(lots):
    estimates = {str(i): Estimate(*pair) for i, (pair, _) in enumerate(lots)}
    growths = {n: e.growth + off * e.terms for (n, e), (_, off) in zip(estimates.items(), lots, strict=True)}
    racing = Racing("params", foreseen(estimates), patience=99)
    best, now = choose(racing, growths)
    assert growths[best.name] == pytest.approx(min(v - 1 for v in now.scores.values()), abs=1e-9)
    for name in growths.keys() - now.scores.keys():
        assert racing.score_estimates.expected_growth_and_bound(Fixed(name), now)[1] >= growths[best.name] - 1e-9


def test_what_can_not_win_is_not_scored():
    estimates = {str(i): Estimate(0.0, 1.0 + 0.9 * i) for i in range(9)}
    best, now = choose(Racing("params", foreseen(estimates)), {n: e.growth for n, e in estimates.items()})
    assert best.name == "0" and list(now.scores) == ["0", "1"]  # 2.8 * (1 - SLACK) is more than 1


def test_a_round_ends_after_three_fruitless_scores_however_hopeful_the_rest():
    estimates = {str(i): Estimate(0.0, 1.0 + i / 100) for i in range(9)}
    growths = {n: 1.0 if n == "1" else 1.2 for n in estimates}
    best, now = choose(Racing("params", foreseen(estimates)), growths)
    assert best.name == "1" and list(now.scores) == ["0", "1", "2", "3", "4"]


def test_a_score_below_its_bound_widens_it_for_all_and_is_named():
    estimates = {"low": Estimate(0.0, 1.0), "wrong": Estimate(0.0, 1.5), "right": Estimate(0.0, 3.5)}
    racing = Racing("params", foreseen(estimates))
    best, now = choose(racing, {"low": 1.0, "wrong": 0.1, "right": 0.05})
    assert racing.score_estimates.slack == pytest.approx(MARGIN + 3.45 / 3.5)
    assert best.name == "right"  # outside of the first bound, inside of the wider one
    assert racing.pop_facts(now)["below"] == ["wrong"] and racing.pop_facts(now)["left_out"] == 0


@given(st.lists(st.floats(-3, 3), min_size=MIN_SAMPLES, max_size=60))
def test_nine_of_ten_scores_lie_above_the_bound_that_they_make(offs):
    score_estimates = foreseen({str(i): Estimate(0.5, 1.0) for i in range(len(offs))})
    now = Round([], lambda: 1.0, lambda _asked: [], 1.0)
    for i, off in enumerate(offs):
        score_estimates.update_slack_by_score(Fixed(str(i)), 1.5 + 1.5 * off, now)
    least = [score_estimates.expected_growth_and_bound(Fixed(str(i)), now)[1] for i in range(len(offs))]
    above = sum(1.5 + 1.5 * off >= bound for off, bound in zip(offs, least, strict=True))
    assert above >= TRUST * len(offs) and score_estimates.slack <= max(0.0, MARGIN - min(offs)) + 1e-9


def test_a_score_that_is_no_number_teaches_nothing():
    score_estimates = foreseen({"a": Estimate(0.0, 1.0)})
    score_estimates.update_slack_by_score(Fixed("a"), math.inf, Round([], lambda: 1.0, lambda _asked: [], 1.0))
    assert score_estimates.slack == SLACK and not score_estimates.missed


def test_companions_cost_about_the_same_lie_in_other_layers_and_fit_into_the_budget():
    racing = Racing("params", max_joint=3)
    growths = {"a": 1.0, "b": 1.2, "c": 1.3, "d": 1.4, "e": 9.0}
    best, now = choose(racing, growths)
    assert [c.name for c, _ in racing.joint_companions_and_growths(now, best)] == ["b", "c"]
    _, now = choose(Racing("params", max_joint=3), growths, left=2.5)
    assert [c.name for c, _ in racing.joint_companions_and_growths(now, best)] == ["b"]
    racing.adapt_joint_count(False)
    assert racing.joint_companions_and_growths(now, best)[1:] == []


def test_where_the_best_costs_nothing_companions_cost_what_half_of_the_budget_will_cost_anyway():
    racing = Racing("params", max_joint=9)
    growths = {"a": 0.0, "b": 0.1, "c": 0.2, "d": 0.9, "e": 2.0}
    best, now = choose(racing, growths, left=6.0)
    assert [c.name for c, _ in racing.joint_companions_and_growths(now, best)] == ["b", "c", "d"]
    best, now = choose(racing, growths, left=2.0)
    assert [c.name for c, _ in racing.joint_companions_and_growths(now, best)] == ["b"]


def test_what_has_no_score_is_nobodys_companion():
    racing = Racing("params", max_joint=9)
    growths = {"a": 0.0, "b": 0.1, "c": math.inf}
    best, now = choose(racing, growths, left=9.0)
    assert [c.name for c, _ in racing.joint_companions_and_growths(now, best)] == []
    best, now = choose(racing, growths, left=2.0)
    assert [c.name for c, _ in racing.joint_companions_and_growths(now, best)] == ["b"]
