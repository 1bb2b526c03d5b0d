"""The attentions of a program's layers: where they are, and exchanging what they call."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from ....dsl.checker.values import Selector
from ....dsl.syntax.diagnostics import Fault
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning.selection import branches
from ...ir.layers import leaves
from ...ir.layers.attention import UNKNOWN
from ..editing.rewrite import Rewriter

if TYPE_CHECKING:
    from ...ir.program import Program

no_attention = Fault("no-attention", "A pass exchanges how layers attend, and none of them attends in a way it knows.")


@dataclass(frozen=True)
class AttentionCall:
    """A call of attention in a unit's graph, by the name of its node there."""

    unit: str
    site: str
    node: str


def attention_calls(program: "Program", selector: Selector | None) -> tuple[AttentionCall, ...]:
    """The calls inside of the branches that `selector` selects."""
    chosen = {(b.unit, b.site) for b in branches(skeleton_of(program), selector) if b.role == "attention"}
    result = []
    for path, unit in program.units.items():
        for node in unit.graph.nodes:
            if node.target is leaves.attention:
                site = ".".join(x for x in (path, (node.meta.get("scope") or ("",))[-1]) if x)
                if selector is None or (path, site) in chosen:
                    result.append(AttentionCall(path, site, node.name))
    return tuple(result)


def rewrite_attentions_and_list_refusals(
    program: "Program",
    calls: Sequence[AttentionCall],
    refusal_reason: Callable[[fx.Node], str],
    rewrite_call: Callable[[fx.Graph, fx.Node], None],
) -> dict[str, str]:
    """Let `rewrite_call` rewrite each call in a copy of its graph; site -> why of those that `refusal_reason` has a
    reason against.

    Raises Reject (no-attention) where none is left.
    """
    refusals: dict[str, str] = {}
    with Rewriter(program) as rewrite:
        for path in dict.fromkeys(a.unit for a in calls):
            graph = copy.deepcopy(program.units[path].graph)
            nodes = {node.name: node for node in graph.nodes}
            changed = False
            for one in (a for a in calls if a.unit == path):
                if reason := refusal_reason(nodes[one.node]):
                    refusals[one.site] = reason
                else:
                    rewrite_call(graph, nodes[one.node])
                    changed = True
            if changed:
                rewrite.set_unit_graph(path, graph)
    if len(refusals) == len(calls):
        first = next(
            (f"{site}: {reason}" for site, reason in refusals.items()), "no layer calls attention as one operation"
        )
        raise no_attention(
            f"no attention of {skeleton_of(program).model_type} can be exchanged; {first}", help="leave the step out"
        ).rejection()
    return refusals


def unsupported_option_reason(attention_call: fx.Node) -> str:
    """An option of a call that changes what attention computes, as a reason; "" where there is none."""
    name = next((n for n in UNKNOWN if attention_call.kwargs.get(n) is not None), "")
    return f"it attends with `{name}`, which only the model's own attention knows" if name else ""


def query_and_key_heads(attention_call: fx.Node) -> tuple[int, int]:
    """Query heads and key heads of a call."""
    return attention_call.args[1].meta["shape"][1], attention_call.args[2].meta["shape"][1]


def replace_attention_call(
    graph: fx.Graph, attention_call: fx.Node, target: Any, args: tuple[Any, ...], extra_kwargs: dict[str, Any]
) -> None:
    """Put a call of another leaf in a call's place; it stands for the same values."""
    with graph.inserting_before(attention_call):
        new = graph.call_function(target, args, {**attention_call.kwargs, **extra_kwargs})
    new.meta = dict(attention_call.meta)
    attention_call.replace_all_uses_with(new)
    graph.erase_node(attention_call)


def exclusive_cache_update(attention_call: fx.Node) -> fx.Node | None:
    """The cache update whose two results a call attends to, if it is one and nothing else reads them."""
    sources = [
        x.args[0] if isinstance(x, fx.Node) and x.op == "call_function" and x.args else None
        for x in attention_call.args[2:4]
    ]
    update = sources[0]
    if not isinstance(update, fx.Node) or update is not sources[1]:
        return None
    if update.target is not leaves.cache_update:
        return None
    readers = [user for x in attention_call.args[2:4] for user in x.users]
    return update if all(user is attention_call for user in readers) and len(update.users) == 2 else None
