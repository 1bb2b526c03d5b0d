"""Numbers of layers, by which attentions find their keys in a cache: each its own, whatever was cut."""

import pytest
from effc.compiler.ir.surgery import write_cache_slots
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


class Attention(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.layer_idx = index


class Layer(nn.Module):
    """A layer with `count` attentions, numbered as LongCat does."""

    def __init__(self, index: int, count: int):
        super().__init__()
        self.layer_idx = index
        self.attentions = nn.ModuleList([Attention(count * index + i) for i in range(count)])


def model_of(layers: int, count: int) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(index, count) for index in range(layers)])
    return model


def numbers(model: nn.Module) -> list[int]:
    return [attention.layer_idx for layer in model.layers for attention in layer.attentions]


def number_in_place(model: nn.Module) -> None:
    write_cache_slots(model, {f"layers.{index}": index for index in range(len(model.layers))})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_whole_model_keeps_its_numbers(count):
    model = model_of(3, count)
    number_in_place(model)
    assert numbers(model) == list(range(3 * count))


@given(st.lists(st.sets(st.sampled_from([0, 1])), min_size=1, max_size=4))
def test_what_is_left_of_several_attentions_of_a_layer_has_slots_of_its_own_from_the_first_on(remaining):
    model = model_of(len(remaining), 2)
    for layer, indices in zip(model.layers, remaining, strict=True):
        layer.attentions = nn.ModuleList([layer.attentions[index] for index in sorted(indices)])
    for _ in range(2):  # a second time changes nothing
        number_in_place(model)
        assert len(set(numbers(model))) == len(numbers(model))
        if any(len(indices) == 2 for indices in remaining):
            assert numbers(model) == list(range(len(numbers(model))))


def test_a_layer_that_moves_to_another_slot_takes_all_its_attentions_along():
    model = model_of(2, 2)
    write_cache_slots(model, {"layers.0": 1, "layers.1": 0})
    assert numbers(model) == [2, 3, 0, 1] and [layer.layer_idx for layer in model.layers] == [1, 0]
