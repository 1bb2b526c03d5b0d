"""Mixtures of experts in spellings of their own: a plan follows what is computed between a router and the sum."""

import pytest
import torch
import torch.nn.functional as F
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from tests import tiny
from tests.compiler.runtimes.native.survey import verdict

torch.set_num_threads(1)
STOCK = MixtralSparseMoeBlock.__module__  # whose classes are traced


class AllExperts(MixtralExperts):
    """Rows in the order of the experts, as many for each."""

    __module__ = STOCK

    def forward(self, rows):
        gate, up = torch.bmm(rows.view(self.num_experts, -1, self.hidden_dim), self.gate_up_proj.mT).chunk(2, -1)
        return torch.bmm(self.act_fn(gate) * up, self.down_proj.mT).view(-1, self.hidden_dim)


class SortedExperts(AllExperts):
    """Rows in the order of the experts, and how many each of them takes."""

    __module__ = STOCK

    def forward(self, rows, sizes):
        parts = []
        for expert, part in enumerate(rows.split(sizes)):
            gate, up = F.linear(part, self.gate_up_proj[expert]).chunk(2, -1)
            parts.append(F.linear(self.act_fn(gate) * up, self.down_proj[expert]))
        return torch.cat(parts)


class OutputsByScores(MixtralSparseMoeBlock):
    """Every expert is given the tokens that chose it and zeros for others; scores multiply what it makes."""

    __module__ = STOCK
    experts_class = AllExperts

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits, weights, numbers = self.gate(x)
        scores = torch.zeros_like(logits).scatter(1, numbers, weights).t().reshape(-1, 1)
        outputs = self.experts(x.repeat(logits.shape[1], 1) * (scores != 0)) * scores
        return outputs.view(logits.shape[1], *hidden_states.shape).sum(0)


class InputsAndOutputsByScores(OutputsByScores):
    """A choice that multiplies twice is no weighted sum."""

    __module__ = STOCK

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits, weights, numbers = self.gate(x)
        scores = torch.zeros_like(logits).scatter(1, numbers, weights).t().reshape(-1, 1)
        outputs = self.experts(x.repeat(logits.shape[1], 1) * scores) * scores
        return outputs.view(logits.shape[1], *hidden_states.shape).sum(0)


class SortingRouter(nn.Module):
    """Tokens in the order of their experts, with sizes in a list, as no graph has it."""

    def __init__(self, gate):
        super().__init__()
        self.weight, self.top_k = gate.weight, gate.top_k

    def forward(self, x):
        weights, numbers = F.linear(x, self.weight).sigmoid().topk(self.top_k, -1)
        order = numbers.flatten().argsort(stable=True)
        sizes = numbers.flatten().bincount(minlength=len(self.weight)).tolist()
        return order // self.top_k, weights.flatten()[order], sizes


class Sorted(MixtralSparseMoeBlock):
    """Whole experts before whom tokens stand in line."""

    __module__ = STOCK
    experts_class = SortedExperts

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        tokens, weights, sizes = self.sorting(x)
        outputs = self.experts(x[tokens], sizes) * weights[:, None]
        return torch.zeros_like(x).index_add(0, tokens, outputs).view(hidden_states.shape)


class LinearGate(MixtralSparseMoeBlock):
    """A gate that is a linear layer, whose choice the layer writes out."""

    __module__ = STOCK
    experts_class = MixtralExperts

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        shares = F.softmax(self.linear(x), -1, dtype=torch.float32)
        weights, numbers = shares.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True) * 1.5
        return self.experts(x, numbers, weights).view(hidden_states.shape)


def respelled(block):
    """Mixtral's model, with layers that compute their mixture otherwise."""
    model = tiny.model("mixtral").bfloat16().float()
    for layer in model.model.layers:
        layer.mlp.__class__ = block
        layer.mlp.experts.__class__ = block.experts_class
        linear = nn.Linear(*layer.mlp.gate.weight.shape[::-1], bias=False)
        linear.weight = layer.mlp.gate.weight
        layer.mlp.linear, layer.mlp.sorting = linear, SortingRouter(layer.mlp.gate)
    return model


@pytest.mark.parametrize("block", [OutputsByScores, Sorted, LinearGate])
def test_a_mixture_is_known_by_what_it_computes_whatever_its_layer_writes(block):
    model = respelled(block)
    assert verdict(model) == ("ok", "")
    steps = [step["op"] for step in Reader(capture(model), "bf16").build_plan().to_json()["steps"]]
    assert steps.count("route") == len(model.model.layers)


def test_a_sum_of_experts_by_something_else_than_a_routers_weights_is_refused():
    with pytest.raises(Reject, match="experts are chosen in a way that the engine does not have"):
        Reader(capture(respelled(InputsAndOutputsByScores)), "bf16").build_plan()
