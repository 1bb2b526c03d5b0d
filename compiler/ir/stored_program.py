"""A program in the cache and back: its edits as data, its changed tensors as blobs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.cache import LARGE, Cache, tensor_hash
from ..core.events import iterate_and_report
from ..models.checkpoints.origin import Origin
from . import graph_json
from .capture.capture import retrace_units
from .capture.sample import sample_inputs
from .edits import Edits, replay_edits
from .program import Program
from .unit import Unit, graph_code_hash
from .weights import assign_tensors, distinct_tensors


def store_and_map_parameters(program: Program, cache: Cache, origin: Origin) -> dict[str, Any]:
    """Body of a program's cache entry; its large parameters then lie in the files that were written.

    Tensors that the original has under any name are not stored again.
    """
    known = tensor_names_by_content_hash(origin, cache)
    tensors, borrowed = {}, {}
    for name, tensor in iterate_and_report(distinct_tensors(program.model), "tensors", len(program.model.state_dict())):
        content_hash = tensor_hash(tensor)
        if content_hash in known:
            borrowed[name] = known[content_hash]
        else:
            tensors[name] = cache.store_tensor(tensor)
    _memory_map_parameters(program, cache, tensors)
    return {"tensors": tensors, "borrowed": borrowed, "edits": program.edits.to_json()}


def _memory_map_parameters(program: Program, cache: Cache, tensors: Mapping[str, str]) -> None:
    """Let large parameters lie in the files that were just written: the steps behind, the writing of artifacts and
    the processes that reopen them find the memory free. Packed weights stay, where kernels read them fastest."""
    for name, tensor in distinct_tensors(program.model):
        if (
            name in tensors
            and isinstance(tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.nbytes >= LARGE
        ):
            tensor.data = cache.map_stored_tensor(tensors[name])


def restore_program(body: Mapping[str, Any], cache: Cache, origin: Origin) -> Program:
    """The original, edited again, with the step's tensors mapped in."""
    model = origin.load()
    original = dict(model.state_dict(keep_vars=True))
    edits = Edits.from_json(body["edits"])
    replay_edits(model, edits)
    values: dict[str, Tensor] = {}
    sources: set[str] = set()
    for name, source in body["borrowed"].items():
        tensor = original[source].detach()
        values[name] = tensor.clone() if source in sources else tensor  # tensors of equal numbers stay apart
        sources.add(source)
    device = next(model.parameters()).device
    current = model.state_dict(keep_vars=True)
    values |= {name: cache.load_verified_tensor(blob) for name, blob in body["tensors"].items()}
    for name, value in values.items():
        assert value.shape == current[name].shape, f"{name} is of another shape"
    assign_tensors(model, {name: value.to(device) for name, value in values.items()})
    program = Program(model, sample_inputs(model), edits=edits, notes=list(body["notes"].get("program", ())))
    program.units = {path: edited_unit_from_entry(path, entry) for path, entry in edits.graphs.items()}
    retrace_units(program)
    return program


def edited_unit_from_entry(path: str, entry: Mapping[str, Any]) -> Unit:
    """A unit whose graph was edited, from what `Edits.graphs` says of it."""
    graph = graph_json.graph_from_json(entry["graph"])
    return Unit(path, graph, tuple(entry["placeholders"]), dict(entry["statics"]), graph_code_hash(graph), edited=True)


def tensor_names_by_content_hash(origin: Origin, cache: Cache) -> dict[str, str]:
    """Names of the original model's tensors by the hash of their content; made once per model."""
    parts = {"tensors of": origin.identity, "dtype": origin.dtype}
    known = cache.read_value(parts)
    if known is None:
        model = origin.load()
        known = {
            tensor_hash(t): name
            for name, t in iterate_and_report(
                distinct_tensors(model), "tensors of the original", len(model.state_dict())
            )
        }
        origin.refuse_changed_files()
        cache.store_value(parts, known)
    return known
