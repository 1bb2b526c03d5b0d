"""Capture: from a model to a `Program`.

The repeated units are found by running a tiny left-padded batch (left-padded because without padding the mask
is None, and a graph captured so is wrong for padded batches): they are the elements of module lists that are
called once with a floating-point tensor. One layer is traced per distinct signature.
"""

import copy
import linecache
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..dsl.diagnostics import Fault, Reject
from .dropout import adopt, drops
from .patches import modeling_files
from .program import Program, Unit, argument_names, code_key
from .refresh import describe_again
from .sample import evaluating, prepared, sample
from .signature import call_signature, module_signature
from .trace import Trace, trace

unsupported_model = Fault("unsupported-model", "A model does something that effc can't capture as a graph.",
                          exit="environment")

_RETRIES = 8    # how many modules of one unit may turn out opaque before the unit is given up


@dataclass
class Call:
    """The arguments of a unit's first call: `free` become placeholders, `statics` are baked."""

    free: dict[str, Any] = field(default_factory=dict)
    statics: dict[str, Any] = field(default_factory=dict)


def capture(model: nn.Module, *, inputs: dict[str, Any] | None = None) -> Program:
    """The program of a model; works on the meta device, too.

    inputs   keyword arguments of the forward; by default a left-padded batch [2, 7] made from the config
    Raises Reject (unsupported-model) with the module path and the source line that broke.
    """
    program = Program(model, sample(model) if inputs is None else inputs)
    recapture(program)
    if not program.units:
        raise Reject(unsupported_model(
            f"{type(model).__name__} has no repeated layers: no element of a module list is called just once",
            help="effc needs a model whose layers are the elements of an nn.ModuleList"))
    return program


def recapture(program: Program, touched: set[str] | None = None) -> None:
    """Trace the units again (all, or those `touched`), keep edited graphs, and raise the version."""
    program.inputs = _in_vocabulary(program.model, program.inputs)
    calls = record(program.model, program.inputs)
    program.opaque.update(calls.odd)
    known: dict[Any, Unit] = {}
    units: dict[str, Unit] = {}
    for path in calls.order:
        old = program.units.get(path)
        if old is not None and old.edited:
            call = calls.first[calls.signatures[path]]
            with evaluating(program.model):
                values = tuple(map(call.free.get, old.placeholders))
                describe_again(old.graph, old.module(program.model), values)
        if old is not None and (old.edited or (touched is not None and path not in touched)):
            units[path] = old
            continue
        signature = calls.signatures[path]
        if signature not in known:
            known[signature] = _traced_unit(program, path, calls.first[signature], calls.family)
        like = known[signature]
        units[path] = Unit(path, like.graph, like.placeholders, like.statics, like.key)
    program.units = _shared(units)
    program.changed()


def _shared(units: dict[str, Unit]) -> dict[str, Unit]:
    """Graphs that are equal in code and in what is noted of their values become one object."""
    graphs: dict[Any, Any] = {}
    for unit in units.values():
        if not unit.edited:
            notes = tuple(tuple(node.meta.items()) for node in unit.graph.nodes)
            unit.graph = graphs.setdefault((unit.key, notes), unit.graph)
    return units


def _in_vocabulary(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with ids that the model still knows: an edit may have taken rows of the embedding."""
    if "input_ids" not in inputs:
        return inputs
    return {**inputs, "input_ids": inputs["input_ids"] % model.config.get_text_config().vocab_size}


# -- the first call of every unit ----------------------------------------------------------------------------

@dataclass
class Calls:
    family: str
    order: list[str] = field(default_factory=list)               # unit paths as they were called
    signatures: dict[str, Any] = field(default_factory=dict)     # unit path -> signature
    first: dict[Any, Call] = field(default_factory=dict)         # signature -> the first call that had it
    odd: dict[str, str] = field(default_factory=dict)            # path -> why a list element is no unit


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of module lists that lie in no other element, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module) is nn.ModuleList and not any(path.startswith(f"{outer}.") for outer in found):
            found |= {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    return found


def record(model: nn.Module, inputs: dict[str, Any]) -> Calls:
    """Run the model once and keep, per distinct signature, the arguments of a unit's first call."""
    calls = Calls(type(model).__module__)
    counts: dict[str, int] = {}

    def hook(path: str):
        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts[path] = counts.get(path, 0) + 1
            given = dict(zip(argument_names(type(layer)), args, strict=False)) | kwargs
            if counts[path] > 1 or not any(map(_is_stream, given.values())):
                return
            calls.order.append(path)
            signature = (structure[path], call_signature(given))
            calls.signatures[path] = signature
            if signature not in calls.first:
                calls.first[signature] = _split(given)
        return keep

    layers = candidates(model)
    # Before our own hooks make layers differ.
    structure = {path: module_signature(layer) for path, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(hook(path), with_kwargs=True)
               for path, layer in layers.items()]
    try:
        with torch.no_grad(), evaluating(model), prepared(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for path in [path for path in calls.order if counts[path] > 1]:
        calls.order.remove(path)
        calls.odd[path] = f"called {counts[path]} times in one forward"
    return calls


def _is_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1


def _is_free(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_free, value))
    return isinstance(value, (torch.Tensor, Cache))


def _split(given: dict[str, Any]) -> Call:
    """Free and baked arguments; copied, because the rest of the forward goes on writing to the cache."""
    memo: dict[int, Any] = {}
    call = Call()
    for name, value in given.items():
        if _is_free(value):
            call.free[name] = copy.deepcopy(value, memo)
        else:
            call.statics[name] = value
    return call


# -- tracing -------------------------------------------------------------------------------------------------

def _traced_unit(program: Program, path: str, call: Call, family: str) -> Unit:
    layer = program.model.get_submodule(path)
    with evaluating(program.model), prepared(program.model):
        traced, opaque = _traced(layer, path, call, family, program.model)
        if drops(traced.graph, layer):
            adopt(traced.graph, lambda: _traced(layer, path, call, family, program.model)[0].graph, layer)
    program.opaque.update(opaque)
    return Unit(path, traced.graph, tuple(call.free), call.statics, code_key(traced.graph))


def _traced(layer: nn.Module, path: str, call: Call, family: str, model: nn.Module,
            pick: Any = lambda result: result) -> tuple[Trace, dict[str, str]]:
    """Trace; on an exception make the innermost module that failed a leaf, and try again."""
    opaque: dict[str, str] = {}
    for _ in range(_RETRIES):
        # Every try gets its own copy: a trace writes to the cache that it is given.
        free = {name: copy.deepcopy(value) for name, value in call.free.items()}
        try:
            return trace(layer, free, call.statics, family=family, opaque=frozenset(opaque), pick=pick), {
                f"{path}.{below}" if path else below: why for below, why in opaque.items()}
        except Exception as error:
            where = f"{type(error).__name__}: {error} at {_source_line(error, model, family)}"
            below = error.effc_path
            if not below or below in opaque:
                full = ".".join(part for part in (path, below) if part) or type(model).__name__
                raise Reject(unsupported_model(f"{full} can't be captured: {where}")) from error
            opaque[below] = where
    raise Reject(unsupported_model(f"{path} has more than {_RETRIES} modules that can't be captured",
                                   note="; ".join(opaque.values())))


def _source_line(error: Exception, model: nn.Module, family: str) -> str:
    files = {source.__file__ for source in modeling_files(model.modules(), family)}
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename in files), frames[-1])
    name = frame.filename.rpartition("/")[2]
    return f"{name}:{frame.lineno}: `{linecache.getline(frame.filename, frame.lineno).strip()}`"


def capture_flat(program: Program) -> Unit:
    """The whole model as one graph."""
    model = program.model
    call = Call({name: v for name, v in program.inputs.items() if _is_free(v)},
                {name: v for name, v in program.inputs.items() if not _is_free(v)})
    names = argument_names(type(model))
    cached = any(dtype == "cache" for unit in program.units.values() for dtype in _dtypes(unit))
    if cached and "cache" in names:
        call.free["cache"] = DynamicCache(config=model.config)
    with evaluating(model), prepared(model):
        traced, opaque = _traced(model, "", call, type(model).__module__, model, _main_output)
    program.opaque.update(opaque)
    return Unit("", traced.graph, tuple(call.free), call.statics, code_key(traced.graph))


def _dtypes(unit: Unit) -> Iterator[Any]:
    return (node.meta["dtype"] for node in unit.graph.nodes if node.op == "placeholder")


def _main_output(result: Any) -> Any:
    for name in ("logits", "last_hidden_state"):
        if name in result:
            return result[name]
    return next(iter(result.values()))
