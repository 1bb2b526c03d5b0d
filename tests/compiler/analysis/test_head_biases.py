"""Attentions that are given a bias with an entry for each head: whose heads go together, and whose stay."""

import pytest
import torch
from effc.compiler.analysis.discovery.discover import discover
from effc.compiler.ir.capture.capture import capture
from torch import nn

from tests.compiler.analysis.test_discovery import ScorePairs


class Biased(ScorePairs):
    """The same with torch's attention, and a bias of constants with an entry for each head."""

    def forward(self, x, bias=None):
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, self.heads, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        bias = torch.zeros(1, self.heads, t, t) if bias is None else bias
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.o(found.transpose(1, 2).reshape(b, t, -1)), bias


class Quiet(Biased):
    """The same without a word of its bias."""

    def forward(self, x, bias=None):
        return super().forward(x, bias)[0]


class Handed(nn.Module):
    """Layers of which the first makes a bias that all are given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Biased(), Biased(), Biased()])

    def forward(self, x):
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return {"logits": x}


class Outside(nn.Module):
    """Layers that are given a bias which none of them makes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Quiet(), Quiet()])

    def forward(self, x):
        bias = torch.zeros(1, 2, x.shape[1], x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return {"logits": x}


def test_heads_of_all_layers_that_are_given_a_bias_of_one_of_them_go_together():
    (group,) = discover(capture(Handed(), inputs={"x": torch.randn(2, 3, 8)})).groups
    assert (group.kind, group.count) == ("heads", 2) and group.readers == 3
    assert group.attributes == tuple((f"layers.{i}", "heads", 1.0) for i in range(3))


@pytest.mark.parametrize(
    "made",
    [
        lambda h, t: torch.zeros(1, h, t, t),
        lambda h, t: torch.zeros(size=(1, h, t, t)),
        lambda h, t: torch.full((1, h, t, t), 3.0),
    ],
)
def test_the_size_of_a_bias_of_constants_is_found_however_it_is_written(made, monkeypatch):
    def forward(self, x, bias=None):
        return forward_with(self, x, made(self.heads, x.shape[1]) if bias is None else bias)

    forward_with = Biased.forward
    monkeypatch.setattr(Biased, "forward", forward)
    (group,) = discover(capture(Handed(), inputs={"x": torch.randn(2, 3, 8)})).groups
    assert group.attributes == tuple((f"layers.{i}", "heads", 1.0) for i in range(3))


def test_heads_that_are_given_a_bias_from_outside_of_their_layer_stay():
    found = discover(capture(Outside(), inputs={"x": torch.randn(2, 3, 8)}))
    assert found.groups == ()
    said = "`bias`, from outside of the layer, has an entry for each of its heads"
    assert found.facts["refused"] == [["layers.0", said], ["layers.1", said]]
