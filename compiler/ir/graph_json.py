"""fx graphs as plain JSON, over a closed list of operations, and back.

No pickle and no text that is evaluated: a stored graph may come from anybody. What is read is checked (names,
targets, order of definition, sizes) before a node is made; anything else is refused with a diagnostic.
"""

import keyword
import math
from typing import Any

import torch
from torch import fx

from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.safe_read import Unlisted, require_or_unlisted
from .operations import (
    DTYPES,
    allowlisted_function,
    check_attribute,
    checked_method_name,
    checked_path,
    name_of_allowlisted_function,
    operand_count,
)
from .size_bounds import UnboundedSize, check_growth

rejected_graph = Fault(
    "refused-graph", "A stored graph holds something outside the list of operations.", exit="environment"
)

FORMAT = 1
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_MAX_NODES, _DEEPEST, _LONGEST_TEXT = 100_000, 16, 1000
_META = ("scope", "shape", "dtype", "ints", "role")


def graph_to_json(graph: fx.Graph) -> dict[str, Any]:
    """The graph as JSON data. Raises Reject (refused-graph) if it holds what could not be read again."""
    try:
        check_growth(graph)
        return {"format": FORMAT, "nodes": [_node_to_json(node) for node in graph.nodes]}
    except (Unlisted, UnboundedSize) as error:
        raise rejected_graph(
            f"an edited layer would hold {error}, which artifacts have no word for",
            help="narrow the layer, or leave it as it is with `on:`",
        ).rejection() from error


def graph_from_json(data: Any) -> fx.Graph:
    """The graph of `graph_to_json`. Raises Reject (refused-graph) on anything that `graph_to_json` does not write."""
    try:
        graph = _Reader(data).graph
        check_growth(graph)
        return graph
    except (Unlisted, UnboundedSize) as error:
        raise _damaged_graph_rejection(str(error)) from error


def _damaged_graph_rejection(content: str) -> Reject:
    return rejected_graph(f"a stored graph holds {content}", help="compile again with this effc").rejection()


# -- writing -------------------------------------------------------------------------------------------------


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    entry = {
        "op": node.op,
        "name": node.name,
        "target": _allowlisted_target(node),
        "args": [_value_to_json(a) for a in node.args],
        "kwargs": {k: _value_to_json(a) for k, a in node.kwargs.items()},
    }
    meta = {key: _tuples_to_lists(node.meta[key]) for key in _META if key in node.meta}
    return {key: value for key, value in (entry | {"meta": meta}).items() if value != [] and value != {}}


def _allowlisted_target(node: fx.Node) -> str:
    if node.op == "call_function":
        name = name_of_allowlisted_function(node.target)
        if name == "getattr":
            check_attribute(node.args[1])
        return name
    target = str(node.target)
    return checked_method_name(target) if node.op == "call_method" else target


def _value_to_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_value_to_json(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _value_to_json(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_value_to_json(value.start), _value_to_json(value.stop), _value_to_json(value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is ...:
        return {"ellipsis": True}
    raise Unlisted(f"a {type(value).__name__} as an argument")


def _tuples_to_lists(meta: Any) -> Any:
    return [_tuples_to_lists(item) for item in meta] if isinstance(meta, (tuple, list)) else meta


# -- reading -------------------------------------------------------------------------------------------------


def _checked_text(value: Any) -> str:
    require_or_unlisted(
        isinstance(value, str) and len(value) <= _LONGEST_TEXT, "something else where a short text belongs"
    )
    return value


def _checked_identifier(value: Any) -> str:
    name = _checked_text(value)
    require_or_unlisted(
        name.isidentifier()
        and name.isascii()
        and not keyword.iskeyword(name)
        and name != "self"
        and not name.startswith("__"),
        f"the name {name[:80]!r}",
    )
    return name


class _Reader:
    """Builds a graph node by node; a name can only be used below the node that defines it."""

    def __init__(self, data: Any):
        require_or_unlisted(isinstance(data, dict) and data.get("format") == FORMAT, "another format")
        nodes = data.get("nodes")
        require_or_unlisted(isinstance(nodes, list) and 0 < len(nodes) <= _MAX_NODES, "no list of nodes")
        self.graph = fx.Graph()
        self.known: dict[str, fx.Node] = {}
        for index, entry in enumerate(nodes):
            require_or_unlisted(isinstance(entry, dict), "a node that is no object")
            last = index == len(nodes) - 1
            require_or_unlisted((entry.get("op") == "output") == last, "its output not once at the end")
            self.add_node(entry)

    def add_node(self, entry: dict[str, Any]) -> None:
        op = str(entry.get("op"))
        require_or_unlisted(op in _OPS, f"an operation {op[:80]!r}")
        name = _checked_identifier(entry.get("name"))
        require_or_unlisted(name not in self.known, f"the name {name!r} twice")
        args, kwargs = entry.get("args", []), entry.get("kwargs", {})
        require_or_unlisted(isinstance(args, list) and isinstance(kwargs, dict), "a call without arguments")
        args = tuple(self.read_value(a, 0) for a in args)
        kwargs = {_checked_identifier(k): self.read_value(a, 0) for k, a in kwargs.items()}
        if op == "output":
            require_or_unlisted(len(args) == 1 and not kwargs, "an output of other than one value")
            self.graph.output(args[0])
            return
        target = self.read_target(op, entry.get("target"), args, kwargs)
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        require_or_unlisted(node.name == name, f"the name {name!r}, which Python or fx reserves")
        node.meta.update(_node_meta_from_json(entry.get("meta", {})))
        self.known[name] = node

    def read_target(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = _checked_text(target)
        if op == "call_function":
            function = allowlisted_function(name)
            if name.startswith("operator."):
                require_or_unlisted(len(args) == operand_count(function) and not kwargs, f"{name} with other operands")
            if function is getattr:
                require_or_unlisted(
                    len(args) == 2 and not kwargs and isinstance(args[0], fx.Node) and isinstance(args[1], str),
                    "a getattr of another form",
                )
                check_attribute(args[1])
            return function
        if op == "call_method":
            require_or_unlisted(bool(args) and isinstance(args[0], fx.Node), "a method of nothing")
            return checked_method_name(name)
        if op == "placeholder":
            require_or_unlisted(args in ((), (None,)) and not kwargs, "a placeholder with a default other than None")
            before = self.known.values()
            require_or_unlisted(all(node.op == "placeholder" for node in before), "a placeholder after a call")
            require_or_unlisted(
                bool(args) or not any(node.args for node in before), "a placeholder without the default of another"
            )
            return _checked_identifier(name)
        require_or_unlisted(op == "call_module" or (not args and not kwargs), "a read with arguments")
        return checked_path(name)

    def read_value(self, value: Any, depth: int) -> Any:
        require_or_unlisted(depth < _DEEPEST, "arguments nested too deep")
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            require_or_unlisted(-(2**63) <= value < 2**64, "a number that is too large")
            return value
        if isinstance(value, str):
            return _checked_text(value)
        require_or_unlisted(isinstance(value, dict) and len(value) == 1, "an argument of another form")
        ((kind, body),) = value.items()
        if kind == "node":
            require_or_unlisted(isinstance(body, str) and body in self.known, "a use before the definition")
            return self.known[body]
        return self.read_tagged_value(kind, body, depth + 1)

    def read_tagged_value(self, kind: str, body: Any, depth: int) -> Any:
        if kind in ("tuple", "list", "slice"):
            require_or_unlisted(
                isinstance(body, list) and (kind != "slice" or len(body) == 3), f"a {kind} of another form"
            )
            items = [self.read_value(item, depth) for item in body]
            return slice(*items) if kind == "slice" else items if kind == "list" else tuple(items)
        if kind == "dict":
            require_or_unlisted(isinstance(body, dict), "a dict of another form")
            return {_checked_identifier(key): self.read_value(item, depth) for key, item in body.items()}
        if kind == "dtype" and isinstance(body, str) and body in DTYPES:
            return DTYPES[body]
        if kind == "device" and body in ("cpu", "cuda", "meta", "mps", "xpu"):
            return torch.device(body)
        if kind == "float" and body in ("inf", "-inf", "nan"):
            return float(body)
        if kind == "ellipsis" and body is True:
            return ...
        raise Unlisted(f"an argument of kind {kind[:80]!r}")


def _node_meta_from_json(data: Any) -> dict[str, Any]:
    require_or_unlisted(isinstance(data, dict) and set(data) <= set(_META), "notes of another form")
    return {key: _lists_to_tuples(value, 0) for key, value in data.items()}


def _lists_to_tuples(value: Any, depth: int) -> Any:
    require_or_unlisted(depth < _DEEPEST, "notes nested too deep")
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item, depth + 1) for item in value)
    require_or_unlisted(value is None or isinstance(value, (bool, int, str)), "notes of another form")
    return value
