"""State-space mixers opened up: the graph of a prefill without a cache, from which scans and their parts are read.

In a unit's graph such a mixer is one node, because whether it has a state decides which way its forward goes.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from ....ir.capture.first_calls import UnitCall, split_traced_and_constant
from ....ir.capture.sample import meta_forward_patches
from ....ir.capture.signature import call_signature, module_signature
from ....ir.capture.trace import trace_forward
from ....ir.layers.leaves import is_state_space
from ....ir.unit import positional_argument_names
from ....models.rows.forward import in_eval_mode

if TYPE_CHECKING:
    from ....ir.program import Program

SCAN, CONV = "ssm_scan", "ssm_conv"
CACHE = "cache"


@dataclass(frozen=True)
class MixerGraph:
    """A mixer's graph, targets below the mixer; `reason` says why there is none."""

    path: str
    graph: fx.Graph | None
    reason: str = ""


_known: "WeakKeyDictionary[nn.Module, dict[Hashable, tuple[fx.Graph | None, str]]]" = WeakKeyDictionary()


def mixer_graphs(program: "Program") -> dict[str, MixerGraph]:
    """Every module that is one node for the state that it keeps, by path; equal ones are traced once."""
    return program.analysis(_trace_mixers)


def _trace_mixers(program: "Program") -> dict[str, MixerGraph]:
    model = program.model
    mixers = {path: model.get_submodule(path) for path in program.opaque if _module_exists(model, path)}
    mixers = {path: mixer for path, mixer in mixers.items() if is_state_space(mixer)}
    known = _known.setdefault(model, {})
    signatures = {path: module_signature(mixer) for path, mixer in mixers.items()}
    calls = _record_mixer_calls(program, mixers)
    graphs = {}
    for path, call in calls.items():
        key = (signatures[path], call_signature(call.free))
        if key not in known:
            known[key] = _trace_mixer(program, mixers[path], call)
        graphs[path] = MixerGraph(path, *known[key])
    return graphs


def _module_exists(model: nn.Module, path: str) -> bool:
    """Whether a pass has left the module: notes of opaque ones outlive them."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _record_mixer_calls(program: "Program", mixers: dict[str, nn.Module]) -> dict[str, UnitCall]:
    """Arguments of each mixer in a forward of the program's inputs."""
    calls: dict[str, UnitCall] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = dict(zip(positional_argument_names(type(mixer)), args, strict=False)) | kwargs
            calls.setdefault(path, split_traced_and_constant(arguments))

        return keep

    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in mixers.items()]
    try:
        if mixers:
            with torch.no_grad(), in_eval_mode(program.model), meta_forward_patches(program.model):
                program.model(**program.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _MixerTrace(NamedTuple):
    """`refusal` is "" where there is a graph."""

    graph: fx.Graph | None
    refusal: str


def _trace_mixer(program: "Program", mixer: nn.Module, call: UnitCall) -> _MixerTrace:
    free = {name: value for name, value in call.free.items() if name != CACHE}
    family = type(program.model).__module__
    try:
        with in_eval_mode(program.model), meta_forward_patches(program.model):
            return _MixerTrace(
                trace_forward(
                    mixer, free, {**call.statics, CACHE: None}, model_module=family, inline_stateful_modules=True
                ).graph,
                "",
            )
    except Exception as error:  # a forward may raise anything
        return _MixerTrace(None, f"it can't be captured without its state: {error}")


def scan_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.meta.get("role") == SCAN]
