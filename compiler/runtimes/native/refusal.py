"""Why a program has no plan: the node, the module it belongs to and where that is written."""

import inspect
from pathlib import Path
from typing import Any

from torch import fx, nn

from ....dsl.syntax.diagnostics import Fault, Reject

cannot_run_natively = Fault(
    "cannot-run-natively",
    "A model computes something that the native engine has no step for.\n\n"
    "The engine runs plans made of a closed list of steps: embeddings, norms, linear layers, rotary "
    "positions, attention over a cache, routers and experts, convolutions, scans and delta rules with a state, "
    "activations, means, sums and products. What a model computes is read from its graph; attention to few chosen "
    "keys, recurrences of other kinds and layers that run several times in one forward are not among the steps.",
    exit="environment",
)

_REMEDY = "`hf` and `pt2` write what torch runs"


def rejection(node: fx.Node, model: nn.Module, reason: str) -> Reject:
    """A Reject that names the node, the innermost module that runs it, and where its forward is written."""
    path, module = innermost(node, model)
    location = f"{path or type(model).__name__} ({type(module).__name__}{_source_line(module)})"
    return cannot_run_natively(f"node `{node.name}` of {location}: {reason}", help=_REMEDY).rejection()


def model_rejection(model: nn.Module, reason: str, help: str = _REMEDY) -> Reject:
    return cannot_run_natively(f"{type(model).__name__}: {reason}", help=help).rejection()


def innermost(node: fx.Node, model: nn.Module) -> tuple[str, nn.Module]:
    """The module that a node runs, where it is a call of one, else the one that it stands in."""
    scope = node.meta.get("scope", ())
    path = str(node.target) if node.op == "call_module" else (scope[-1] if scope else "")
    return path, model.get_submodule(path)


def _source_line(module: nn.Module) -> str:
    forward: Any = inspect.unwrap(type(module).forward)
    try:
        return f", {Path(inspect.getfile(forward)).name}:{inspect.getsourcelines(forward)[1]}"
    except (OSError, TypeError):  # a class without a source file
        return ""
