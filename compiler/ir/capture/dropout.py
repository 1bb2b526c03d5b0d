"""Dropout of a unit while training, though it is traced in evaluation mode.

Attention is handed `0.0 if not self.training else self.attention_dropout`: the trace sees the 0.0. A second
trace in training mode gives the probability; the `attention` leaf applies it only while its module trains.
Nothing else is taken from that trace: other branches on `training` (noise, layer drop) keep their quiet side.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ....dsl.syntax.diagnostics import Reject

_OPTION = "dropout"


def has_attention_dropout(graph: fx.Graph, layer: nn.Module) -> bool:
    """Whether attention in the unit may drop anything in training, judged by attributes that say so."""
    if not any(_OPTION in node.kwargs for node in _attention_nodes(graph)):
        return False
    holders = [vars(module) for module in layer.modules()]
    holders += [vars(members["config"]) for members in holders if "config" in members]
    holders += [{"dropout": module.p} for module in layer.modules() if isinstance(module, nn.Dropout)]
    return any(
        "drop" in name and isinstance(value, float) and value > 0
        for members in holders
        for name, value in members.items()
    )


def adopt_dropout_probabilities(graph: fx.Graph, trace_layer: Callable[[], fx.Graph], layer: nn.Module) -> None:
    """Give the attention nodes the probabilities that they have in training mode, if the two traces agree.

    DETR has none of that mode: there it asks whether all that it computed is finite.
    """
    try:
        with _training_mode(layer), torch.random.fork_rng(devices=[]):
            second = trace_layer()
    except Reject:
        return
    nodes, training_nodes = _attention_nodes(graph), _attention_nodes(second)
    if [node.name for node in nodes] == [node.name for node in training_nodes]:
        for node, trained in zip(nodes, training_nodes, strict=True):
            probability = trained.kwargs.get(_OPTION)
            if isinstance(probability, float):
                node.kwargs = {**node.kwargs, _OPTION: probability}


def _attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.meta.get("role") == "attention"]


@contextmanager
def _training_mode(layer: nn.Module) -> Iterator[Any]:
    """Training mode, which may write to buffers, as batch norms do to their statistics: they come back as they were."""
    before = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    layer.train()
    try:
        yield
    finally:
        layer.eval()
        for buffer, values in before:
            buffer.copy_(values)
