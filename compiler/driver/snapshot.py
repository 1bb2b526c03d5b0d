"""A step's result in the cache and back: a program's edits as data, its changed tensors as blobs.

Adapters are kept beside the key of the program that they belong to, a front as the keys of its points.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from ...dsl.syntax.diagnostics import Reject
from ..core.cache import LARGE, Cache, tensor_hash
from ..core.events import follow
from ..core.json_errors import first_line
from ..core.safe_read import MALFORMED
from ..core.sealed_json import cache_damaged
from ..ir import graph_json
from ..ir.capture.capture import recapture
from ..ir.capture.sample import sample_inputs
from ..ir.edits import Edits, replay_edits
from ..ir.outcome import Front, Model, Outcome, Point
from ..ir.program import Program
from ..ir.unit import Unit, code_key
from ..ir.weights import assign_tensors, distinct_tensors
from ..models.checkpoints.origin import Origin
from ..transforms.supernet.family import Family
from ..transforms.supernet.form_checks import check_adapters, check_family
from ..transforms.training.adapters import Shape
from ..transforms.training.unmerged import Unmerged


def save_outcome(
    outcome: Outcome, cache: Cache, key: str, parts: Mapping[str, Any], origin: Origin, notes: Mapping[str, Any]
) -> None:
    """Store a finished step. Raises Reject (model-changed) where it was computed from other files than were hashed."""
    body: dict[str, Any]
    if isinstance(outcome, Front):
        body = {
            "points": [
                {
                    "name": p.name,
                    "key": p.key,
                    "measures": [[name, *m] for name, m in p.measures.items()],
                    "choice": p.choice and dict(p.choice),
                }
                for p in outcome.points
            ],
            "needs": sorted({point.key for point in outcome.points}),
        }
    elif isinstance(outcome, Unmerged):
        body = {
            "adapters": {"base": outcome.base, "shape": asdict(outcome.shape)},
            "needs": [outcome.base] if outcome.base else [],
            "tensors": {name: cache.store_tensor(tensor) for name, tensor in outcome.tensors.items()},
        }
    elif isinstance(outcome, Family):
        body = {
            "family": outcome.to_json(),
            "needs": [outcome.base] if outcome.base else [],
            "tensors": {n: cache.store_tensor(t) for n, t in outcome.stored.items()},
        }
    else:
        assert isinstance(outcome, Model), f"not kept: {outcome.kind}"
        body = _program_record(outcome.program, cache, origin)
        _map_large_tensors(outcome.program, cache, body["tensors"])
    origin.refuse_changed_files()
    cache.finish(key, parts, {"tensors": {}, "borrowed": {}, "edits": {}, **body, "notes": dict(notes)})


def _map_large_tensors(program: Program, cache: Cache, tensors: Mapping[str, str]) -> None:
    """Let large parameters lie in the files that were just written: the steps behind, the writing of artifacts and
    the processes that reopen them find the memory free. Packed weights stay, where kernels read them fastest."""
    for name, tensor in distinct_tensors(program.model):
        if (
            name in tensors
            and isinstance(tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.nbytes >= LARGE
        ):
            tensor.data = cache.mapped(tensors[name])


def _program_record(program: Program, cache: Cache, origin: Origin) -> dict[str, Any]:
    """Tensors that the original has under any name are not stored again."""
    known = original_tensors(origin, cache)
    tensors, borrowed = {}, {}
    for name, tensor in follow(distinct_tensors(program.model), "tensors", len(program.model.state_dict())):
        content_hash = tensor_hash(tensor)
        if content_hash in known:
            borrowed[name] = known[content_hash]
        else:
            tensors[name] = cache.store_tensor(tensor)
    return {"tensors": tensors, "borrowed": borrowed, "edits": program.edits.to_json()}


def restore_outcome(
    cache: Cache, key: str, origin: Origin, reach: Callable[[str], Program], load: Callable[[Point], Program]
) -> Outcome:
    """The result of a finished step; `reach` makes the program of another one, `load` that of a point."""
    body = cache.read_step(key)
    assert body is not None, f"step {key} is not in the cache"
    try:
        return _outcome(body, cache, origin, reach, load)
    except (*MALFORMED, AssertionError) as error:
        raise Reject(
            cache_damaged(
                f"step {key[:12]} of the cache does not fit its model: {type(error).__name__}: {first_line(error)}",
                help=f"remove {cache.folder / 'steps' / key}.json, then compile again",
            )
        ) from error


def _outcome(
    body: Mapping[str, Any],
    cache: Cache,
    origin: Origin,
    reach: Callable[[str], Program],
    load: Callable[[Point], Program],
) -> Outcome:
    if "points" in body:
        points = (
            Point(p["name"], p["key"], {n: tuple(m) for n, *m in p["measures"]}, p.get("choice"))
            for p in body["points"]
        )
        return Front(tuple(points), load)
    if "adapters" in body:
        tensors = {name: cache.load_tensor(blob) for name, blob in body["tensors"].items()}
        base, shape = body["adapters"]["base"], Shape(**body["adapters"]["shape"])
        adapted = Unmerged(reach(base or origin.identity), base, shape, tensors)
        check_adapters(adapted.program, shape, tensors)
        adapted.program.notes = list(body["notes"].get("program", ()))
        return adapted
    if "family" in body:
        tensors = {name: cache.load_tensor(blob) for name, blob in body["tensors"].items()}
        family = Family.from_json(body["family"], reach(body["family"]["base"] or origin.identity), tensors)
        check_family(family)
        family.program.notes = list(body["notes"].get("program", ()))
        return family
    return Model(_restore_program(body, cache, origin))


def _restore_program(body: Mapping[str, Any], cache: Cache, origin: Origin) -> Program:
    """The original, edited again, with the step's tensors mapped in."""
    model = origin.load()
    original = dict(model.state_dict(keep_vars=True))
    edits = Edits.from_json(body["edits"])
    replay_edits(model, edits)
    values = {name: original[source].detach() for name, source in body["borrowed"].items()}
    device = next(model.parameters()).device
    current = model.state_dict(keep_vars=True)
    values |= {name: cache.load_tensor(blob) for name, blob in body["tensors"].items()}
    for name, value in values.items():
        assert value.shape == current[name].shape, f"{name} is of another shape"
    assign_tensors(model, {name: value.to(device) for name, value in values.items()})
    program = Program(model, sample_inputs(model), edits=edits, notes=list(body["notes"].get("program", ())))
    program.units = {path: edited_unit(path, entry) for path, entry in edits.graphs.items()}
    recapture(program)
    return program


def edited_unit(path: str, entry: Mapping[str, Any]) -> Unit:
    """A unit whose graph was edited, from what `Edits.graphs` says of it."""
    graph = graph_json.graph_from_json(entry["graph"])
    return Unit(path, graph, tuple(entry["placeholders"]), dict(entry["statics"]), code_key(graph), edited=True)


def original_tensors(origin: Origin, cache: Cache) -> dict[str, str]:
    """Names of the original model's tensors by the hash of their content; made once per model."""
    parts = {"tensors of": origin.identity, "dtype": origin.dtype}
    known = cache.value(parts)
    if known is None:
        model = origin.load()
        known = {
            tensor_hash(t): name
            for name, t in follow(distinct_tensors(model), "tensors of the original", len(model.state_dict()))
        }
        origin.refuse_changed_files()
        cache.keep(parts, known)
    return known
