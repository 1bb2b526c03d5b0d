"""A program in the cache and back: its edits as data, its changed tensors as blobs."""

from collections.abc import Mapping
from typing import Any

from ..capture.capture import recapture
from ..capture.sample import sample
from ..checkpoints.origin import Origin
from ..ir import graph_json
from ..ir.edits import Edits, replay
from ..ir.program import Program
from ..ir.unit import Unit, code_key
from ..ir.weights import assign, distinct
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
