"""A program in the cache and back: its edits as data, its changed tensors as blobs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..capture.capture import recapture
from ..capture.sample import sample
from ..checkpoints.origin import Origin
from ..ir import graph_json
from ..ir.edits import Edits, replay
from ..ir.program import Program, Unit, code_key
from ..layers.linear import settle
from ..report.progress import follow
from ..store.cache import Cache, tensor_hash


def save(program: Program, cache: Cache, key: str, parts: Mapping[str, Any], origin: Origin,
         notes: Mapping[str, Any]) -> None:
    """Store a finished step. Tensors that the original has under any name are not stored again."""
    known = original_tensors(origin, cache)
    tensors, borrowed = {}, {}
    for name, tensor in follow(distinct(program.model), "tensors", len(program.model.state_dict())):
        found = tensor_hash(tensor)
        if found in known:
            borrowed[name] = known[found]
        else:
            tensors[name] = cache.store(tensor)
    body = {"tensors": tensors, "borrowed": borrowed, "edits": program.edits.to_json(), "notes": dict(notes)}
    cache.finish(key, parts, body)


def restore(cache: Cache, key: str, origin: Origin) -> Program:
    """The program of a finished step: the original, edited again, with the step's tensors mapped in."""
    body = cache.step(key)
    assert body is not None, f"step {key} is not in the cache"
    model = origin.load()
    original = dict(model.state_dict(keep_vars=True))
    edits = Edits.from_json(body["edits"])
    replay(model, edits)
    values = {name: original[source].detach() for name, source in body["borrowed"].items()}
    device = next(model.parameters()).device
    assign(model, values | {name: cache.fetch(blob).to(device) for name, blob in body["tensors"].items()})
    program = Program(model, sample(model), edits=edits, notes=list(body["notes"].get("program", ())))
    program.units = {path: edited_unit(path, entry) for path, entry in edits.graphs.items()}
    recapture(program)
    return program


def edited_unit(path: str, entry: Mapping[str, Any]) -> Unit:
    """A unit whose graph was edited, from what `Edits.graphs` says of it."""
    graph = graph_json.load(entry["graph"])
    return Unit(path, graph, tuple(entry["placeholders"]), dict(entry["statics"]), code_key(graph), edited=True)


def distinct(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers, each storage once, in order of registration."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def assign(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in place of parameters and buffers by name, and of everything that is tied to them."""
    old = dict(model.state_dict(keep_vars=True))
    new = {id(old[name]): _like(old[name], value) for name, value in values.items()}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if id(tensor) in new:
                    store[key] = new[id(tensor)]
    settle(model)


def _like(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def original_tensors(origin: Origin, cache: Cache) -> dict[str, str]:
    """Names of the original model's tensors by the hash of their content; made once per model."""
    parts = {"tensors of": origin.identity, "dtype": origin.dtype}
    known = cache.value(parts)
    if known is None:
        model = origin.load()
        known = {tensor_hash(t): name
                 for name, t in follow(distinct(model), "tensors of the original", len(model.state_dict()))}
        cache.keep(parts, known)
    return known
