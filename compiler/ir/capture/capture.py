"""Capture: from a model to a `Program`.

The repeated units are found by running a tiny left-padded batch (left-padded because without padding the mask
is None, and a graph captured so is wrong for padded batches): they are the elements of module lists that are
called once with a floating-point tensor. One layer is traced per distinct signature. A plain PyTorch module
without such layers is one unit itself.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from torch import fx, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ....dsl.checker.skeleton import is_submodule
from ....dsl.syntax.diagnostics import Diagnostic
from ...models.checkpoints.pretrained import pretrained
from ...models.rows.forward import in_eval_mode, main_tensor_of_output
from ...models.rows.inputs import is_encoder_decoder, use_cache_false_kwargs, vocabulary_size
from ..graphs import target_name
from ..program import Program
from ..surgery import unshare_config
from ..unit import Unit, graph_code_hash, positional_argument_names
from .dropout import adopt_dropout_probabilities, has_attention_dropout
from .failed_forward import failing_source_line, unsupported_model
from .first_calls import (
    Calls,
    UnitCall,
    outermost_list_elements,
    record_first_calls,
    record_further_unit_calls,
    run_with_pre_forward_hooks,
    split_traced_and_constant,
)
from .patches import patch_module_calls
from .refresh import refresh_shapes_and_dtypes
from .sample import meta_forward_patches, sample_inputs
from .trace import Trace, trace_forward

_TAKE_NONE = ("scaled_dot_product_attention",)
_RETRIES = 8  # how many modules of one unit may turn out opaque before the unit is given up
_REMEDY = (
    "put what that line does into a module of its own, which then stays one node, or write it with torch "
    "functions that don't ask what numbers a tensor holds"
)
_ONE_GRAPH = (
    "one graph must hold for all calls of a layer: in a model of your own, pass the same arguments each time "
    "and put what differs into a module of its own; in place of a library's, take another model"
)


def capture(model: nn.Module, *, inputs: dict[str, Any] | None = None) -> Program:
    """The program of a model, which gets a config of its own; works on the meta device, too.

    inputs   keyword arguments of the forward; by default a left-padded batch [2, 7] made from the config
    Raises Reject (unsupported-model) with the module path and the source line that broke.
    """
    if any(p.is_meta for p in model.parameters()):
        model.to("meta")  # norms of weights take numbers apart that have none, and are left elsewhere
    unshare_config(model)
    program = Program(model, sample_inputs(model) if inputs is None else inputs)
    retrace_units(program)
    if not program.units and not program.shared:
        raise _no_layers_diagnostic(program).rejection()
    return program


def _no_layers_diagnostic(program: Program) -> Diagnostic:
    """Diagnostic of a model none of whose layers is called."""
    name, paths = type(program.model).__name__, _layers_called_past_hooks(program.model, program.inputs)
    if paths:
        return unsupported_model(
            f"{name} runs the `forward` of {paths[0]} itself and doesn't call the layer, so no layer can be seen",
            help="in a model of your own call the layer itself; in place of a library's, take another model",
        )
    return unsupported_model(
        f"{name} has no repeated layers: no element of a module list is called",
        help="effc needs a transformers model whose layers are the elements of an nn.ModuleList",
    )


def _layers_called_past_hooks(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Paths of layers whose `forward` a model runs itself, as SqueezeBERT does: calls that no hook hears."""
    layers, paths = outermost_list_elements(model), []

    def noting(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            paths.append(path)
            return forward(*args, **kwargs)

        return run

    patched = {layer: vars(layer).get("forward") for layer in layers.values()}  # None: its class's
    for path, layer in layers.items():
        vars(layer)["forward"] = noting(path, layer.forward)
    try:
        run_with_pre_forward_hooks(model, inputs, lambda path: lambda *call: None, {})
    finally:
        for layer, forward in patched.items():
            vars(layer)["forward"] = forward
            if forward is None:
                del vars(layer)["forward"]
    return paths


@patch_module_calls()
def retrace_units(program: Program, changed_paths: set[str] | None = None) -> None:
    """Trace the units again (all, or those `changed_paths`), keep edited graphs, and raise the version."""
    program.inputs = _ids_wrapped_into_vocabulary(program.model, program.inputs)
    calls = record_first_calls(program.model, program.inputs)
    program.shared = not calls.order and bool(calls.irregular)
    if not program.shared:  # where all are, the whole is seen through them
        program.opaque.update(calls.irregular)
    known: dict[Any, _Traced] = {}
    further = record_further_unit_calls(program.model, program.inputs, _units_with_new_signatures(program, calls))
    units: dict[str, Unit] = {}
    for path in calls.order:
        old = program.units.get(path)
        if old is not None and old.edited:
            call = calls.first[calls.signatures[path]].with_masks_as_arguments()
            with in_eval_mode(program.model):
                values = tuple(map(call.free.get, old.placeholders))
                refresh_shapes_and_dtypes(old.graph, old.module(program.model), values)
        if old is not None and (old.edited or (changed_paths is not None and path not in changed_paths)):
            units[path] = old
            continue
        signature = calls.signatures[path]
        if signature in known and known[signature].of_this_layer:
            further |= record_further_unit_calls(program.model, program.inputs, [path])
            del known[signature]
        if signature not in known:
            known[signature] = _trace_unit_over_calls(
                program,
                path,
                [calls.first[signature], *further.get(path, ())],
                optional=old.optional if old else frozenset(),
            )
        units[path] = known[signature].unit(program, path)
    program.units = _share_equal_graphs(units)
    program.changed()


def _units_with_new_signatures(program: Program, calls: Calls) -> list[str]:
    """One unit for each signature that none of the program's units has been traced with."""
    new = {calls.signatures[path]: path for path in reversed(calls.order) if path not in program.units}
    return [path for path in calls.order if path in new.values()]


def _share_equal_graphs(units: dict[str, Unit]) -> dict[str, Unit]:
    """Graphs that are equal in code and in what is noted of their values become one object."""
    graphs: dict[Any, Any] = {}
    for unit in units.values():
        if not unit.edited:
            notes = tuple(tuple(node.meta.items()) for node in unit.graph.nodes)
            unit.graph = graphs.setdefault((unit.key, notes), unit.graph)
    return units


def _ids_wrapped_into_vocabulary(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with ids that the model still knows: an edit may have taken rows of the embedding."""
    if "input_ids" not in inputs or not isinstance(model, PreTrainedModel):
        return inputs
    known = {name: vocabulary_size(model, decoder=name != "input_ids") for name in ("input_ids", "decoder_input_ids")}
    return {name: value % known[name] if known.get(name) else value for name, value in inputs.items()}


# -- tracing -------------------------------------------------------------------------------------------------


class Differs(Exception):
    """A module runs other operations in another call. `effc_path` is where."""

    def __init__(self, path: str, difference: str):
        super().__init__(difference)
        self.effc_path = path


@dataclass(frozen=True)
class _Traced:
    """A traced layer: its graph and, below it, what had to stay a leaf and why."""

    graph: fx.Graph
    call: UnitCall
    opaque: dict[str, str]
    of_this_layer: bool
    optional: frozenset[str] = frozenset()

    def unit(self, program: Program, path: str) -> Unit:
        program.opaque.update({f"{path}.{inner}" if path else inner: reason for inner, reason in self.opaque.items()})
        return Unit(
            path,
            self.graph,
            tuple(self.call.free),
            self.call.statics,
            graph_code_hash(self.graph),
            optional=self.optional,
        )


def _trace_unit_over_calls(
    program: Program, unit_path: str, calls: list[UnitCall], *, optional: frozenset[str] = frozenset()
) -> _Traced:
    model, layer = program.model, program.model.get_submodule(unit_path)
    known = {
        p.removeprefix(f"{unit_path}."): reason for p, reason in program.opaque.items() if is_submodule(p, unit_path)
    }
    with in_eval_mode(model), meta_forward_patches(model):
        traced = _trace_until_consistent(model, unit_path, calls, known, optional=optional)
        if has_attention_dropout(traced.graph, layer):
            adopt_dropout_probabilities(
                traced.graph,
                lambda: (
                    _trace_until_consistent(model, unit_path, calls[:1], traced.opaque, optional=traced.optional).graph
                ),
                layer,
            )
    return traced


def _trace_until_consistent(
    model: nn.Module,
    path: str,
    calls: list[UnitCall],
    opaque: dict[str, str],
    *,
    optional: frozenset[str] = frozenset(),
    select_result: Callable[[Any], Any] = lambda result: result,
) -> _Traced:
    """Trace all calls; the innermost module that fails, or that runs other operations in another call, becomes
    a leaf, and all is traced again."""
    layer, opaque, calls = model.get_submodule(path), dict(opaque), _move_fullest_call_first(calls)
    optional |= frozenset(name for call in calls if call.plain for name in calls[0].free if name not in call.free)
    full, optional = calls[0].with_masks_as_arguments(), optional | calls[0].masks.keys()

    def trace(call: UnitCall, first: UnitCall) -> Trace:
        return trace_forward(
            layer,
            _copied_arguments_of(call, first),
            first.statics,
            model_module=type(model).__module__,
            opaque_paths=frozenset(opaque),
            select_result=select_result,
            optional_arguments=optional,
        )

    for _ in range(_RETRIES):
        traces: list[Trace] = []
        try:
            for call in (call for call in calls if not call.plain):
                traces.append(trace(call, calls[0]))
                _check_graphs_agree(traces[0].graph, traces[-1].graph)
            graph = trace(full, full).graph if calls[0].masks else traces[0].graph
            _check_users_accept_none(graph, optional)
            return _Traced(graph, full, opaque, any(t.of_this_layer for t in traces), optional)
        except Exception as error:  # a forward may raise anything
            inner, reason = vars(error)["effc_path"], f"{error} at {failing_source_line(error, model)}"
            if isinstance(error, Differs):
                reason = str(error)
            if not inner or inner in opaque:
                failing = ".".join(part for part in (path, inner) if part) or type(model).__name__
                remedy = _ONE_GRAPH if isinstance(error, Differs) else _REMEDY
                raise unsupported_model(f"{failing} can't be captured: {reason}", help=remedy).rejection() from error
            opaque[inner] = reason
    raise unsupported_model(
        f"{path} has more than {_RETRIES} modules that can't be captured", note="; ".join(opaque.values()), help=_REMEDY
    ).rejection()


def _move_fullest_call_first(calls: list[UnitCall]) -> list[UnitCall]:
    """The call with most arguments first, where the first one lacks some: a mask is None where it hides nothing, and
    CANINE's hides nothing of a short row. Calls without those arguments are taken as calls of whole rows."""
    fullest = max(calls, key=lambda call: len(call.free))
    lacking = set(fullest.free) - set(calls[0].free)
    if not set(fullest.free) > set(calls[0].free) or not all("mask" in name for name in lacking):
        return calls  # a second stream, as XLNet's, is another computation
    plain_calls = [replace(call, plain=call.plain or call.free.keys() != fullest.free.keys()) for call in calls]
    return [fullest, *(call for call, original in zip(plain_calls, calls, strict=True) if original is not fullest)]


def _copied_arguments_of(call: UnitCall, first_call: UnitCall) -> dict[str, Any]:
    """A copy of a call's arguments (a trace writes to the cache that it is given), named as in the first call."""
    extra = set(call.free) - set(first_call.free)
    if extra:
        raise Differs("", f"it is given {', '.join(sorted(extra))} in some calls only")
    return {name: copy.deepcopy(call.free.get(name)) for name in first_call.free}


def _check_graphs_agree(graph: fx.Graph, other_graph: fx.Graph) -> None:
    for a, b in zip_longest(
        map(_scope_and_call_text, graph.nodes), map(_scope_and_call_text, other_graph.nodes), fillvalue=((), "")
    ):
        if a[1] != b[1]:
            # The one that does more at this point is further inside.
            scope = max(a[0], b[0], key=len)
            raise Differs(scope[-1] if scope else "", "it runs other operations on other sizes, or while decoding")


def _check_users_accept_none(graph: fx.Graph, optional_arguments: frozenset[str]) -> None:
    """Whether all that reads an argument that may be None takes a None: leaves and modules that stay whole do."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in optional_arguments:
            for user in node.users:
                accepts_none = (
                    user.op in ("call_module", "output") or user.meta.get("role") or target_name(user) in _TAKE_NONE
                )
                if not accepts_none:
                    scope = user.meta.get("scope") or ("",)
                    raise Differs(scope[-1], f"it runs other operations where it is given no `{node.target}`")


def _scope_and_call_text(node: fx.Node) -> tuple[tuple[str, ...], str]:
    return node.meta.get("scope", ()), f"{node.op} {node.target} {node.args} {node.kwargs}"


def full_model_unit(program: Program) -> Unit:
    """The whole model as one graph that returns logits or the last hidden state; made once for a version."""
    return program.analysis(_trace_whole_model)


def _trace_whole_model(program: Program) -> Unit:
    model = program.model
    call = split_traced_and_constant(program.inputs)
    call.statics |= {name: call.free.pop(name) for name in ("use_cache",) if name in call.free}
    if is_encoder_decoder(model):  # the decoder's masks ask its two caches what a graph of both would not know
        call.statics |= use_cache_false_kwargs(model)
    has_state = any(
        node.meta["dtype"] == "cache"
        for unit in program.units.values()
        for node in unit.graph.nodes
        if node.op == "placeholder"
    )
    cached = not is_encoder_decoder(model) and (
        has_state or (program.shared and getattr(model, "can_generate", bool)())
    )
    if cached and "cache" in positional_argument_names(type(model)):
        call.free["cache"] = _empty_cache(model)
    with in_eval_mode(model), meta_forward_patches(model):
        # What is opaque in a unit is so here: finding it again would take a trace for each.
        return _trace_until_consistent(model, "", [call], program.opaque, select_result=main_tensor_of_output).unit(
            program, ""
        )


def _model_specific_cache_class(model: nn.Module) -> type[DynamicCache] | None:
    """The one kind of cache that is written beside a model, which takes no other."""
    beside = vars(sys.modules[type(model).__module__]).values()
    kinds = [kind for kind in beside if isinstance(kind, type) and issubclass(kind, DynamicCache)]
    local = [kind for kind in kinds if kind.__module__ == type(model).__module__]
    return local[0] if len(local) == 1 else None


def _empty_cache(model: nn.Module) -> DynamicCache | EncoderDecoderCache:
    model_config = pretrained(model).config
    config = model_config.get_text_config(decoder=True)
    if not is_encoder_decoder(model):
        kind = _model_specific_cache_class(model)
        return DynamicCache(config=model_config) if kind is None else kind()
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
