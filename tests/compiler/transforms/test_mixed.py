"""Allocation of formats to modules: the knapsack against all choices, and the loop around it."""

import itertools

import pytest
import torch
from effc.compiler.driver import api
from effc.compiler.transforms.lowering.mixed import (
    Allocator,
    Option,
    _linear_with_weight,
    choose_option_indices,
    wanda_pruned_weight,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("scipy")
NUMBERS = st.floats(0.01, 10)
MODULES = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), min_size=1, max_size=4)


RECIPE = """effspec 1
model base = zoo("tiny-llama")
data calib = synthetic({rows}, length: 64, seed: 1)
pipeline small(base) {{ cpu = lower.mixed(keep: 20% of bytes, data: calib) }}
emit small {{ native("small") }}
"""


def test_the_plan_counts_all_rows_that_norms_and_four_bits_are_read_from(tmp_path):
    seconds = []
    for rows in (8, 4096):
        (tmp_path / "r.effspec").write_text(RECIPE.format(rows=rows))
        (plan,) = api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache", threads=1)
        seconds.append(plan.stages[0].seconds)
    assert seconds[1] > 1.5 * seconds[0]


@given(MODULES, st.floats(0.1, 1.2))
def test_the_solution_is_the_least_of_all_choices_within_the_budget(modules, share):
    losses = {str(i): [loss for loss, _ in options] for i, options in enumerate(modules)}
    costs = {str(i): [cost for _, cost in options] for i, options in enumerate(modules)}
    budget = share * sum(max(c) for c in costs.values())
    chosen = choose_option_indices(losses, costs, budget)
    every = itertools.product(*(range(len(options)) for options in modules))
    kept = [c for c in every if sum(costs[str(i)][o] for i, o in enumerate(c)) <= budget]
    if not kept:
        assert all(costs[path][index] == min(costs[path]) for path, index in chosen.items())
        return
    total = sum(losses[path][index] for path, index in chosen.items())
    assert sum(costs[path][index] for path, index in chosen.items()) <= budget * (1 + 1e-6)
    assert total == pytest.approx(min(sum(losses[str(i)][o] for i, o in enumerate(c)) for c in kept), rel=1e-4)


class Scaled(nn.Module):
    """Module that stands for itself on an option."""

    def __init__(self, loss: float):
        super().__init__()
        self.loss = loss


def allocated(interaction: float, budget: float = 2.0):
    """Three modules with a cheap and a dear option; the first two lose more if both are cheap."""
    singles = {"a": 0.10, "b": 0.11, "c": 0.30}
    model = nn.ModuleDict({path: Scaled(0.0) for path in singles})

    def loss() -> float:
        together = interaction * (model["a"].loss > 0 and model["b"].loss > 0)
        return sum(m.loss for m in model.values()) + together

    options = {path: [Option("cheap"), Option("dear")] for path in singles}
    costs = {path: [0.5, 1.0] for path in singles}

    def pack(path: str, option: Option) -> nn.Module:
        return Scaled(singles[path] if option.kernel == "cheap" else 0.0)

    before = {path: model.get_submodule(path) for path in singles}
    chosen, history = Allocator(model, options, costs, budget, pack, loss).allocate_and_list_round_losses()
    assert {path: model.get_submodule(path) for path in singles} == before, "the model is not as it was"
    return {path: option.kernel for path, option in chosen.items()}, history


def test_where_modules_do_not_interact_the_first_solution_stands():
    chosen, history = allocated(0.0)
    assert chosen == {"a": "cheap", "b": "cheap", "c": "dear"} and history == [pytest.approx(0.21)]


def test_modules_that_lose_more_together_are_parted():
    chosen, history = allocated(0.5)
    assert chosen["c"] == "cheap" and sorted((chosen["a"], chosen["b"])) == ["cheap", "dear"]
    assert history == [pytest.approx(0.71), pytest.approx(0.40)]


def test_masks_take_what_matters_least_for_what_a_module_is_given():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert wanda_pruned_weight(weight, 0.5, torch.tensor([10.0, 1.0, 1.0, 1.0])).tolist() == [[1.0, 0.0, 0.0, 4.0]]


def test_losses_are_those_of_whole_forwards_though_layers_in_front_of_a_change_are_not_run():
    from effc.compiler.ir.capture.capture import capture
    from effc.compiler.transforms.search.prefix import Prefix
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=64
    )
    program = capture(LlamaForCausalLM(config).eval())
    rows, paths = torch.randint(64, (2, 8)), [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    weights = {path: program.model.get_submodule(path).weight.detach().clone() for path in paths}

    def halved(path: str, option: Option) -> nn.Module:
        return _linear_with_weight(weights[path] * (1 - option.zeros), None)

    def losses(prefix) -> dict[str, list[float]]:
        def loss() -> float:
            with torch.no_grad():
                return float(program.model(input_ids=rows)["logits"].square().mean())

        options = {path: [Option("dense", zeros) for zeros in (0.25, 0.5)] for path in paths}
        return Allocator(program.model, options, {}, 1.0, halved, loss, prefix=prefix).measure_option_losses(0)

    prefix = Prefix(program, 1 << 20)
    assert losses(lambda: prefix) == losses(lambda: None)
    assert prefix.chain and prefix.layers_run < 7 * 3, "every forward began at the first layer"
