"""Integers of modules and configs that must follow when a group loses items.

A literal in a `view`, `split` or slice describes positions; labels tell which of them vanish with an item,
hence the value the literal must take. The attributes to change are the fewest whose change with the group's
count gives every literal of the unit the value it needs, through the source expressions recorded at capture
(`meta["ints"]`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ....dsl.checker.skeleton import Group
from ...ir.graphs import target_name
from ...ir.traced_integers import evaluate_expression
from .labelling import NO_LABEL, POINTWISE, Labelling, tensors_in

# What the library's attention functions read from the module they are called with.
REPEAT = "num_key_value_groups"
MAX_ATTRIBUTES = 4

Name = tuple[str, str]  # module below the unit, attribute: ("attn", "config.num_attention_heads")


class Baked(Exception):
    """A literal must change and no attribute gives it."""


@dataclass(frozen=True)
class Need:
    """A literal that is `value` now and must be `needed` once the probed items are gone."""

    node: fx.Node
    value: int
    needed: int
    source: str
    location: str = ""  # of the literal in its node: "args.1.0"

    def source_names(self) -> dict[str, Name]:
        """The attributes of the source expression."""
        names: dict[str, Name] = {}

        def note(path: str) -> int:
            names[path] = attribute_name(path, self.node.meta.get("scope", ()))
            return 1

        evaluate_expression(self.source, note)
        return names


def attribute_name(path: str, scope: tuple[str, ...]) -> Name:
    if path.startswith("config."):
        return (scope[-1] if scope else "", path)
    return path.rpartition(".")[0], path.rpartition(".")[2]


def read_attribute(root: nn.Module, name: Name) -> int:
    value: Any = root.get_submodule(name[0])
    for part in name[1].split("."):
        value = getattr(value, part)
    return value


def attribute_changes_per_item(
    group: Group,
    labels_of_items: list[frozenset[int]],
    labelling: Labelling,
    root_of_label: np.ndarray,
    root: nn.Module,
) -> tuple[tuple[str, str, float], ...]:
    """(module, attribute, value per item) below the unit. Raises Baked."""
    if group.count < 2:
        return ()
    probe = range(0, group.count, group.per_block or group.count)
    removed = np.zeros(labelling.count, bool)
    removed[[r for i in probe for r in labels_of_items[i]]] = True
    needs = list(literal_needs(labelling, torch.from_numpy(removed[root_of_label]), root))
    share = Fraction(group.count - len(probe), group.count)
    return tuple(
        (*name, read_attribute(root, name) / group.count)
        for name in _smallest_sufficient_attributes(needs, share, root)
    )


def _smallest_sufficient_attributes(needs: list[Need], remaining_share: Fraction, root: nn.Module) -> tuple[Name, ...]:
    changing = [need for need in needs if need.value != need.needed]
    candidates = list(dict.fromkeys(name for need in changing for name in need.source_names().values()))
    for size in range(min(len(candidates), MAX_ATTRIBUTES) + 1):
        for chosen in combinations(candidates, size):
            if all(_attributes_satisfy_need(need, chosen, remaining_share, root) for need in needs):
                return chosen
    worst = changing[0]
    raise Baked(f"`{target_name(worst.node)}` has the fixed number {worst.value}, which must follow its count")


def _attributes_satisfy_need(need: Need, chosen: tuple[Name, ...], remaining_share: Fraction, root: nn.Module) -> bool:
    names = need.source_names()

    def value(path: str) -> int:
        current = read_attribute(root, names[path])
        after = current * remaining_share if names[path] in chosen else Fraction(current)
        if after.denominator != 1:
            raise ValueError(f"{path} would be no whole number")
        return int(after)

    try:
        return evaluate_expression(need.source, value) == need.needed
    except ValueError:
        return False


def literal_needs(labelling: Labelling, is_removed_by_label: Tensor, root: nn.Module) -> Iterator[Need]:
    """Needs of every literal in the graph that counts positions of a label. `is_removed_by_label`:
    whether each label vanishes. Raises Baked."""
    for node, value in labelling.values.items():
        name = target_name(node) if node.op in ("call_function", "call_method") else ""
        if next(tensors_in(value), None) is None:
            continue
        if name in _LITERALS:
            yield from _LITERALS[name](node, labelling, is_removed_by_label)
        elif name in POINTWISE or name == "baddbmm":
            _refuse_external_per_item_tensors(node, labelling, is_removed_by_label)
    for attention in labelling.attentions:
        module = root.get_submodule(attention.module)
        if REPEAT in vars(module):
            alive = [
                int((~is_removed_by_label[torch.from_numpy(labels)]).sum()) for labels in (attention.q, attention.kv)
            ]
            source = f"{attention.module}.{REPEAT}" if attention.module else REPEAT
            if alive[1]:
                yield Need(attention.node, vars(module)[REPEAT], alive[0] // alive[1], source)


def _refuse_external_per_item_tensors(node: fx.Node, labelling: Labelling, is_removed_by_label: Tensor) -> None:
    """A bias or scale with an entry per item that comes from outside of the unit can't follow."""
    out = labelling.values[node]
    for argument in node.all_input_nodes:
        x = labelling.values[argument]
        if isinstance(x, Tensor) and x.ndim and not (x > NO_LABEL).any():
            for axis in range(-min(x.ndim, out.ndim), 0):
                if x.shape[axis] > 1 and is_removed_by_position(out, axis, is_removed_by_label).any():
                    raise Baked(f"`{argument.name}`, from outside of the layer, has an entry for each of them")


def is_removed_by_position(x: Tensor, axis: int, is_removed_by_label: Tensor) -> Tensor:
    """For each position along the axis, whether all that lies there vanishes."""
    if not x.numel():  # a part of a split that nothing is left of
        return torch.ones(x.shape[axis], dtype=torch.bool)
    return is_removed_by_label[x].movedim(axis, 0).reshape(x.shape[axis], -1).all(1)


def _make_need(node: fx.Node, path: str, value: int, needed: int) -> Need:
    sources = {where: source for where, _, source in node.meta.get("ints", ())}
    return Need(node, value, needed, sources.get(path, str(value) if value >= 0 else f"(0 - {-value})"), path)


def _needs_of_size_arguments(node: fx.Node, labelling: Labelling, is_removed_by_label: Tensor) -> Iterator[Need]:
    """view, reshape and expand: a size literal counts the positions of its axis."""
    out = labelling.values[node]
    for axis, argument in enumerate(_size_argument_of_each_axis(node, labelling)):
        if isinstance(argument.size, int) and argument.size > 1:
            remaining = argument.size - int(is_removed_by_position(out, axis, is_removed_by_label).sum())
            yield _make_need(argument.holder, argument.path, argument.size, remaining)


def _constant_size_needs(node: fx.Node, labelling: Labelling, is_removed_by_label: Tensor) -> Iterator[Need]:
    """Constants of a size that is written out: `torch.zeros((1, heads, t, s))`, or `torch.zeros(1, heads, t, s)`."""
    requested, out = node.args[0] if node.args else node.kwargs.get("size"), labelling.values[node]
    sizes, path = requested, "args.0." if node.args else "kwargs.size."
    if isinstance(requested, int):
        sizes, path = node.args, "args."
    if not isinstance(sizes, tuple | list):
        return
    for axis, size in enumerate(sizes[: out.ndim]):
        if isinstance(size, int) and size > 1:
            yield _make_need(
                node, f"{path}{axis}", size, size - int(is_removed_by_position(out, axis, is_removed_by_label).sum())
            )


class _SizeArgument(NamedTuple):
    """Size of one axis of a view: an int, a node or None; and the node and its argument that hold it."""

    holder: fx.Node
    path: str
    size: Any


def _size_argument_of_each_axis(view: fx.Node, labelling: Labelling) -> Iterator[_SizeArgument]:
    first = view.args[1]
    if isinstance(first, (tuple, list)):
        yield from (_SizeArgument(view, f"args.1.{i}", size) for i, size in enumerate(first))
    elif isinstance(first, fx.Node) and isinstance(labelling.values[first], tuple):
        yield from _sizes_in_size_sum(first, labelling)
    else:
        yield from (_size_argument(view, i + 1, labelling) for i in range(len(view.args) - 1))


def _size_argument(view: fx.Node, index: int, labelling: Labelling) -> _SizeArgument:
    """One argument of a view: a literal, or an entry of a sum of sizes that was unpacked."""
    size = view.args[index]
    if isinstance(size, fx.Node) and target_name(size) == "getitem":
        source, at = size.args
        if isinstance(source, fx.Node) and isinstance(labelling.values[source], tuple) and isinstance(at, int):
            return list(_sizes_in_size_sum(source, labelling))[at]
    return _SizeArgument(view, f"args.{index}", size)


def _sizes_in_size_sum(node: fx.Node, labelling: Labelling) -> Iterator[_SizeArgument]:
    """`x.size()[:-1] + (heads, head_dim)`"""
    if target_name(node) != "add":
        yield from (_SizeArgument(node, "", None) for _ in labelling.values[node])
        return
    for i, part in enumerate(node.args):
        if isinstance(part, fx.Node):
            yield from _sizes_in_size_sum(part, labelling)
        else:
            assert isinstance(part, tuple | list), f"{node.name} adds other things than sizes"
            yield from (_SizeArgument(node, f"args.{i}.{j}", size) for j, size in enumerate(part))


def _split_needs(node: fx.Node, labelling: Labelling, is_removed_by_label: Tensor) -> Iterator[Need]:
    axis = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    name = next((name for name in ("split_size", "split_size_or_sections") if name in node.kwargs), None)
    sizes, path = (node.kwargs[name], f"kwargs.{name}") if name else (node.args[1], "args.1")
    assert isinstance(axis, int), f"{node.name} splits along no axis of its own"
    counts = [int(is_removed_by_position(x, axis, is_removed_by_label).sum()) for x in labelling.values[node]]
    if isinstance(sizes, int):
        for n in sorted(set(counts)):  # two answers for one literal are met by no attribute
            yield _make_need(node, path, sizes, sizes - n)
    elif not isinstance(sizes, fx.Node):
        assert isinstance(sizes, tuple | list), f"{node.name} splits into no sizes"
        for i, size in enumerate(sizes):
            if isinstance(size, int):
                yield _make_need(node, f"{path}.{i}", size, size - counts[i])


def _removes_whole_strides(is_removed: Tensor, step: Any) -> bool:
    """Whether of each run of `step` positions all vanish or none: `x[1::2]` stays what it is then."""
    return (
        type(step) is int
        and step > 1
        and len(is_removed) % step == 0
        and bool((is_removed.view(-1, step) == is_removed.view(-1, step)[:, :1]).all())
    )


def _slice_needs(node: fx.Node, labelling: Labelling, is_removed_by_label: Tensor) -> Iterator[Need]:
    source, subscript = node.args[:2]
    assert isinstance(source, fx.Node), f"{node.name} takes an item of no value"
    x = labelling.values[source]
    if not isinstance(x, Tensor):
        return
    nested = isinstance(subscript, tuple)
    index: tuple[Any, ...] = subscript if isinstance(subscript, tuple) else (subscript,)
    spread = x.ndim - sum(i is not None and i is not ... for i in index)
    axis = 0
    for at, part in enumerate(index):
        path = f"args.1.{at}" if nested else "args.1"
        bounds = {path: part}
        if isinstance(part, slice):
            bounds = {f"{path}.start": part.start, f"{path}.stop": part.stop}
        for where, bound in bounds.items():
            if type(bound) is int:
                vanishing = is_removed_by_position(x, axis, is_removed_by_label)
                if isinstance(part, slice) and _removes_whole_strides(vanishing, part.step):
                    continue
                before, behind = int(vanishing[:bound].sum()), int(vanishing[bound:].sum())
                yield _make_need(node, where, bound, bound - before if bound >= 0 else bound + behind)
        axis += spread if part is ... else 0 if part is None else 1


_LITERALS = {
    "view": _needs_of_size_arguments,
    "reshape": _needs_of_size_arguments,
    "expand": _needs_of_size_arguments,
    "broadcast_to": _needs_of_size_arguments,
    "split": _split_needs,
    "split_with_sizes": _split_needs,
    "getitem": _slice_needs,
    "zeros": _constant_size_needs,
    "ones": _constant_size_needs,
    "full": _constant_size_needs,
}
