"""Which integers of modules and configs must follow when a group loses items.

A literal in a `view`, `split` or slice describes positions; labels tell which of them vanish with an item,
hence the value the literal must take. The attributes to change are the fewest whose change with the group's
count gives every literal of the unit the value it needs, through the source expressions recorded at capture
(`meta["ints"]`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..dsl.skeleton import Group
from .integers import evaluate
from .labels import Labelling, name_of, tensors_in

# What the library's attention functions read from the module they are called with.
REPEAT = "num_key_value_groups"
MOST_ATTRIBUTES = 4

Name = tuple[str, str]             # module below the unit, attribute: ("attn", "config.num_attention_heads")


class Baked(Exception):
    """A literal must change and no attribute gives it."""


@dataclass(frozen=True)
class Need:
    """A literal that is `value` now and must be `needed` once the probed items are gone."""

    node: fx.Node
    value: int
    needed: int
    source: str

    def names(self) -> dict[str, Name]:
        """The attributes of the source expression."""
        found: dict[str, Name] = {}

        def note(path: str) -> int:
            found[path] = named(path, self.node.meta.get("scope", ()))
            return 1
        evaluate(self.source, note)
        return found


def named(path: str, scope: tuple[str, ...]) -> Name:
    if path.startswith("config."):
        return (scope[-1] if scope else "", path)
    return path.rpartition(".")[0], path.rpartition(".")[2]


def read(root: nn.Module, name: Name) -> int:
    found: Any = root.get_submodule(name[0])
    for part in name[1].split("."):
        found = getattr(found, part)
    return found


def attributes_of(group: Group, items: list[frozenset[int]], labelling: Labelling, roots: np.ndarray,
                  root: nn.Module) -> tuple[tuple[str, str, float], ...]:
    """(module, attribute, value per item) below the unit. Raises Baked."""
    if group.count < 2:
        return ()
    probe = range(0, group.count, group.per_block or group.count)
    gone = np.zeros(labelling.count, bool)
    gone[[r for i in probe for r in items[i]]] = True
    needs = list(_needs(labelling, torch.from_numpy(gone[roots]), root))
    share = Fraction(group.count - len(probe), group.count)
    return tuple((*name, read(root, name) / group.count) for name in _fewest(needs, share, root))


def _fewest(needs: list[Need], share: Fraction, root: nn.Module) -> tuple[Name, ...]:
    changing = [need for need in needs if need.value != need.needed]
    candidates = list(dict.fromkeys(name for need in changing for name in need.names().values()))
    for size in range(min(len(candidates), MOST_ATTRIBUTES) + 1):
        for chosen in combinations(candidates, size):
            if all(_met(need, chosen, share, root) for need in needs):
                return chosen
    worst = changing[0]
    raise Baked(f"`{name_of(worst.node)}` has the fixed number {worst.value}, which must follow its count")


def _met(need: Need, chosen: tuple[Name, ...], share: Fraction, root: nn.Module) -> bool:
    names = need.names()

    def value(path: str) -> int:
        now = read(root, names[path])
        after = now * share if names[path] in chosen else Fraction(now)
        if after.denominator != 1:
            raise ValueError(f"{path} would be no whole number")
        return int(after)
    try:
        return evaluate(need.source, value) == need.needed
    except ValueError:
        return False


def _needs(labelling: Labelling, gone: Tensor, root: nn.Module) -> Iterator[Need]:
    """`gone` says for each label whether it vanishes."""
    for node in labelling.values:
        literals = _LITERALS.get(name_of(node)) if node.op in ("call_function", "call_method") else None
        if literals is None or not any(True for _ in tensors_in(labelling.values[node])):
            continue
        sources = {place: source for place, _, source in node.meta.get("ints", ())}
        for place, value, needed in literals(node, labelling, gone):
            yield Need(node, value, needed, sources.get(place, str(value)))
    for attention in labelling.attentions:
        module = root.get_submodule(attention.module)
        if REPEAT in vars(module):
            alive = [int((~gone[torch.from_numpy(labels)]).sum()) for labels in (attention.q, attention.kv)]
            source = f"{attention.module}.{REPEAT}" if attention.module else REPEAT
            if alive[1]:
                yield Need(attention.node, vars(module)[REPEAT], alive[0] // alive[1], source)


def vanished(x: Tensor, axis: int, gone: Tensor) -> Tensor:
    """For each position along the axis, whether all that lies there vanishes."""
    return gone[x].movedim(axis, 0).flatten(1).all(1)


def _sizes(node: fx.Node, labelling: Labelling, gone: Tensor) -> Iterator[tuple[str, int, int]]:
    """view, reshape and expand: a size literal counts the positions of its axis."""
    out = labelling.values[node]
    nested = isinstance(node.args[1], (tuple, list))
    for axis, size in enumerate(node.args[1] if nested else node.args[1:]):
        if isinstance(size, int) and size > 1:
            place = f"args.1.{axis}" if nested else f"args.{axis + 1}"
            yield place, size, size - int(vanished(out, axis, gone).sum())


def _splits(node: fx.Node, labelling: Labelling, gone: Tensor) -> Iterator[tuple[str, int, int]]:
    axis = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    sizes, place = (node.args[1], "args.1") if len(node.args) > 1 else (
        node.kwargs.get("split_size", node.kwargs.get("split_size_or_sections")), "kwargs.split_size")
    lost = [int(vanished(x, axis, gone).sum()) for x in labelling.values[node]]
    if isinstance(sizes, int):
        for n in sorted(set(lost)):          # two answers for one literal are met by no attribute
            yield place, sizes, sizes - n
    else:
        for i, size in enumerate(sizes):
            if isinstance(size, int):
                yield f"{place}.{i}", size, size - lost[i]


def _slices(node: fx.Node, labelling: Labelling, gone: Tensor) -> Iterator[tuple[str, int, int]]:
    x, index = labelling.values[node.args[0]], node.args[1]
    if not isinstance(x, Tensor):
        return
    nested = isinstance(index, tuple)
    index = index if nested else (index,)
    spread = x.ndim - sum(i is not None and i is not ... for i in index)
    axis = 0
    for at, part in enumerate(index):
        place = f"args.1.{at}" if nested else "args.1"
        bounds = {place: part}
        if isinstance(part, slice):
            bounds = {f"{place}.start": part.start, f"{place}.stop": part.stop}
        for where, bound in bounds.items():
            if type(bound) is int:
                lost = vanished(x, axis, gone)
                before, behind = int(lost[:bound].sum()), int(lost[bound:].sum())
                yield where, bound, bound - before if bound >= 0 else bound + behind
        axis += spread if part is ... else 0 if part is None else 1


_LITERALS = {"view": _sizes, "reshape": _sizes, "expand": _sizes, "split": _splits,
             "split_with_sizes": _splits, "getitem": _slices}
