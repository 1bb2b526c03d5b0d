"""The search: prefix reuse is exact, choices are what they say, budgets are kept, killed runs go on."""

import copy
import math

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.trial import with_branch_skipped
from effc.compiler.transforms.search.choice import Exact, Racing, Round
from effc.compiler.transforms.search.prefix import Prefix
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.grids import wide

IDS = torch.randint(3, 128, (6, 12), generator=torch.Generator().manual_seed(2))


def scorer(model, batch=2):
    """A metric that no part of effc knows: mean square of the outputs over rows, `batch` at a time."""

    def run():
        with torch.no_grad():
            return sum(model(ids, use_cache=False)[0].double().pow(2).mean().item() for ids in IDS.split(batch))

    return run


@pytest.mark.parametrize(
    "name", wide([*tiny.NAMES, "mamba2", "bamba", "mixtral"], {"llama", "gpt2", "bamba", "mixtral"})
)
@pytest.mark.parametrize("room", [1 << 30, 20_000, 0], ids=["all", "some", "none"])
def test_a_score_from_the_middle_equals_the_whole_forwards_bit_for_bit(name, room):
    program = capture(tiny.model(name))
    run = scorer(program.model)
    prefix = Prefix(program, room)
    assert prefix.measure_from(run) == run()
    assert prefix.chain
    for branch in reversed(skeleton_of(program).branches):
        with with_branch_skipped(program, branch):
            expected = run()
        assert prefix.measure_from(run, branch.unit, lambda b=branch: with_branch_skipped(program, b)) == expected
    assert prefix.bytes_stored <= room + IDS.numel() * 64 * 4  # and the outputs of the layer last asked for


def test_layers_before_the_changed_one_do_not_run():
    program = capture(tiny.model("llama", num_hidden_layers=4))
    run, ran = scorer(program.model), []
    prefix = Prefix(program, 1 << 30)
    prefix.measure_from(run)
    for index, layer in enumerate(program.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=index: ran.append(i))
    before = prefix.layers_run
    prefix.measure_from(run, "model.layers.2")
    assert set(ran) == {2, 3}
    assert prefix.layers_run - before == 2


def test_what_layers_gave_before_a_cut_is_not_used_after_it():
    program = capture(tiny.model("llama"))
    run = scorer(program.model)
    prefix = Prefix(program, 1 << 30)
    prefix.measure_from(run, "model.layers.2")
    with torch.no_grad():
        program.model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    prefix.forget_outputs_from(1)
    assert prefix.measure_from(run, "model.layers.2") == run()


class Looking(torch.nn.Module):
    """A layer that also looks at what an earlier layer left somewhere else than in the stream."""

    def __init__(self, layer, memory):
        super().__init__()
        self.layer, self.memory = layer, memory

    def forward(self, hidden_states, *args, **kwargs):
        self.memory.append(hidden_states)
        out = self.layer(hidden_states, *args, **kwargs)
        return (out[0] + self.memory[-1], *out[1:]) if isinstance(out, tuple) else out + self.memory[0]


def test_a_model_whose_layers_talk_past_the_stream_is_measured_whole():
    program = capture(tiny.model("llama"))
    layers, memory = program.model.model.layers, []
    for i, layer in enumerate(list(layers)):
        layers[i] = Looking(layer, memory)
    program.model.model.register_forward_pre_hook(lambda *_: memory.clear())
    run = scorer(program.model)
    expected = run()
    prefix = Prefix(program, 1 << 30)
    prefix.measure_from(run)
    assert prefix.chain is False
    assert prefix.measure_from(run, "model.layers.2") == expected


class Remembering(torch.nn.Module):
    """A layer that looks up what the first one left elsewhere, and fails where it did not run."""

    def __init__(self, layer, memory, first):
        super().__init__()
        self.layer, self.memory, self.first = layer, memory, first

    def forward(self, hidden_states, *args, **kwargs):
        if self.first:
            self.memory["first"] = hidden_states
        return self.layer(hidden_states, *args, **kwargs) + 0 * self.memory["first"]


def test_a_layer_that_fails_when_it_is_entered_is_measured_whole():
    program = capture(tiny.model("llama"))
    layers, memory = program.model.model.layers, {}
    for i, layer in enumerate(list(layers)):
        layers[i] = Remembering(layer, memory, i == 0)
    program.model.model.register_forward_pre_hook(lambda *_: memory.clear())
    run = scorer(program.model)
    prefix = Prefix(program, 1 << 30)
    assert prefix.measure_from(run, "model.layers.2") == run()
    assert prefix.chain is False


def test_a_metric_whose_forwards_depend_on_what_the_model_says_is_measured_whole():
    program = capture(tiny.model("llama"))

    def run():
        with torch.no_grad():
            said = program.model(IDS, use_cache=False).logits[:, -1:].argmax(-1)
            return program.model(torch.cat([IDS, said], 1), use_cache=False).logits.double().mean().item()

    prefix = Prefix(program, 1 << 30)
    prefix.measure_from(run)
    for branch in skeleton_of(program).branches[::-1]:
        with with_branch_skipped(program, branch):
            expected = run()
        assert prefix.measure_from(run, branch.unit, lambda b=branch: with_branch_skipped(program, b)) == expected


class Fixed:
    """A candidate that is only a name, a place and a size."""

    def __init__(self, name, size=1.0):
        self.name = self.location = name
        self.size = size

    def saves(self, _of):
        return self.size


def choose(choice, losses, base=1.0, sizes=None):
    """The chosen name and the names that were scored, in order."""
    candidates = [Fixed(n, (sizes or {}).get(n, 1.0)) for n in losses]
    now = Round(candidates, lambda: base, lambda asked: [losses[c.name] for c in asked], 1.0)
    best = choice.score_and_choose(now)
    return best and best.name, list(now.scores)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 9, allow_nan=False), min_size=1, max_size=8))
def test_an_exact_choice_scores_all_and_takes_the_first_of_the_best(values):
    losses = {str(i): v for i, v in enumerate(values)}
    name, scored = choose(Exact(), losses)
    assert scored == list(losses)
    assert int(name) == values.index(min(values))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0.001, 9), min_size=6, max_size=6), min_size=2, max_size=5))
@example([[2.0, 1.0, 1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 2.0, 1.0, 1.0, 1.0]])  # equals in another order of asking
def test_racing_finds_the_best_as_long_as_damage_never_shrinks(rounds):
    racing, exact = Racing("params", patience=99), Exact("params")
    losses = [1.0] * 6
    for growth in rounds:
        losses = [a + g for a, g in zip(losses, growth, strict=True)]  # every cost grows
        named = {str(i): v for i, v in enumerate(losses)}
        assert choose(racing, named)[0] == choose(exact, named)[0]


def test_racing_asks_only_those_that_may_win():
    racing = Racing("params")
    losses = {str(i): 2.0 + i for i in range(20)}
    choose(racing, losses)
    _, scored = choose(racing, {**losses, "0": 2.5})
    assert scored == ["0"]


def test_a_cut_that_saves_ten_times_as_much_may_cost_more():
    losses, sizes = {"small": 1.1, "large": 1.5}, {"small": 1.0, "large": 10.0}
    assert choose(Racing("params"), losses, sizes=sizes)[0] == "large"
    assert choose(Racing(""), losses, sizes=sizes)[0] == "small"


@pytest.mark.parametrize("choice", [Exact(), Exact("params"), Racing("params")])
def test_candidates_without_a_finite_score_are_never_chosen(choice):
    assert choose(choice, {"a": math.nan, "b": 3.0, "c": math.inf})[0] == "b"
    assert choose(copy.deepcopy(choice), {"a": math.nan, "c": math.inf})[0] is None


def test_what_is_saved_beyond_the_budget_is_worth_nothing():
    candidates = [Fixed("small", 1.0), Fixed("large", 10.0)]
    losses = {"small": 1.1, "large": 1.5}
    for choice in (Exact("params"), Racing("params")):
        for left, name in ((10.0, "large"), (1.0, "small")):
            now = Round(candidates, lambda: 1.0, lambda asked: [losses[c.name] for c in asked], 1.0, left)
            assert copy.deepcopy(choice).score_and_choose(now).name == name
