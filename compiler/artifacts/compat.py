"""A changed model as a checkpoint of even widths: what was cut away is there again, as zeros.

The widths are those of the widest layer where a config can say them, else the original ones.

Why the logits are the same. A group's items (channels, heads) meet the rest of the model only through the
columns of the layers that read them. Those columns are zero for a filled-in item, and its own value is
finite, because all that makes it is zero too: a head with zero queries attends evenly over zero values,
act(0) * 0 is 0. So it adds exactly 0 to every sum; only the order in which a matrix product adds may change,
hence a tolerance. Per-head norms (qk-norm) see one head at a time and keep their weight. A dropped branch
comes back with all its tensors zero, norms and biases included: whatever its last layer is, it gives exactly
0, and x + 0 = x. A mixer that lost its scan gets one that is the identity: with C = 0 its states are read by nobody,
and with D = 1 its skip hands x on. States come back with C = 0, too.

Where it is not so, there is no such checkpoint, and the reason is said. Discovery makes no group of channels
over which a norm takes a mean, nor of experts (a router would choose a zero one): what was cut outside all
groups can't be filled up. Nor can exchanged modules, or graphs that were edited otherwise.
"""

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...dsl.checker.skeleton import Branch, Group, Scan, Skeleton, is_below
from ...dsl.syntax.diagnostics import Reject
from ..analysis.discovery.bypass import staying
from ..analysis.discovery.discover import skeleton_of
from ..analysis.discovery.experts import odd_widths
from ..analysis.discovery.mixers.graphs import mixer_graphs
from ..analysis.discovery.mixers.scanless import scanless, skip_of
from ..analysis.planning import shrink
from ..ir.capture.capture import capture
from ..ir.graphs import sources
from ..ir.layers.leaves import packed_attention
from ..ir.program import Program
from ..ir.unit import Unit
from ..ir.weights import distinct
from ..models.checkpoints.pretrained import pretrained
from ..models.checkpoints.tensor_files import Piece
from ..transforms.editing.rewrite import Rewriter
from ..transforms.editing.scan_removal import drop_scan
from .stock import stock_config, stock_model

_MLP_WIDTHS = re.compile(r"intermediate|inner|ffn")  # a head's width may not change, only their number
Axis = tuple[str, int]  # tensor and axis
Shapes = Mapping[str, tuple[int, ...]]  # of tensors by name


@dataclass
class Padding:
    """How to fill a program up to the stock model of `config`; none where `why` has a reason.

    shapes   of the stock model's tensors, tied ones once
    places   for each cut axis, where its indices lie in the original width
    dead     tensors of branches that nothing calls any more, also those that are still in the tree
    ones     of those that are not there, the ones that are filled with ones, not zeros
    """

    config: Any
    shapes: Shapes
    places: dict[Axis, list[int]] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    ones: set[str] = field(default_factory=set)
    why: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pieces(self, program: Program) -> Iterator[Piece]:
        """Every tensor of the stock model, made when it is written."""
        ours = program.model.state_dict(keep_vars=True)
        for name, shape in self.shapes.items():
            tensor = None if name in self.dead else ours.get(name)
            if tensor is not None and tuple(tensor.shape) == shape:
                yield Piece.of(name, tensor)
            else:
                dtype = tensor.dtype if tensor is not None else pretrained(program.model).dtype
                yield Piece(name, dtype, shape, partial(self._filled, name, tensor, dtype))

    def _filled(self, name: str, tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        shape = self.shapes[name]
        if tensor is None:
            return (torch.ones if name in self.ones else torch.zeros)(shape, dtype=dtype)
        value = tensor.detach().cpu()
        for axis, size in enumerate(shape):
            if value.shape[axis] != size:
                wide = torch.zeros((*value.shape[:axis], size, *value.shape[axis + 1 :]), dtype=value.dtype)
                value = wide.index_copy_(axis, torch.tensor(self.places[name, axis]), value)
        return value


def padding(program: Program, near: Any = None) -> Padding:
    """How to fill a program up: to widths that the widest layer needs, else to the original ones.

    near   the config that `stock_config` finds, where it is known
    """
    why = [
        f"{path} is a {entry['class'].rpartition(':')[2]}, which transformers doesn't have"
        for path, entry in program.edits.swapped.items()
    ]
    if why:
        return Padding(program.model.config, {}, why=why)
    near, own = stock_config(program.model)[0] if near is None else near, pretrained(program.model).config
    first = _padding(program, near)
    filled = _padding(program, own) if first.why and near.to_dict() != own.to_dict() else first
    return filled if filled.why else _narrowed(program, filled)


def _narrowed(program: Program, filled: Padding) -> Padding:
    """The same with smaller values in the config, where no layer needs the width that it says."""
    for candidates in _smaller(program, filled):
        for changes in candidates:
            config = copy.deepcopy(filled.config)
            for name, value in changes.items():
                setattr(config, name, value)
            found = _padding(program, config, below=filled.numbers)
            if not found.why:
                filled = found
                break
    return filled


def _smaller(program: Program, filled: Padding) -> Iterator[list[dict[str, int]]]:
    """For each width of the config the smaller values that would explain a tensor's widest layer, least first."""
    ours = {name: tuple(t.shape) for name, t in program.model.state_dict(keep_vars=True).items()}
    widest: dict[tuple[str, int, int], int] = {}
    for name, shape in filled.shapes.items():
        for axis, size in enumerate(shape):
            kind = re.sub(r"\.\d+\.", ".*.", name), axis, size
            left = ours[name][axis] if name in ours and name not in filled.dead else 0
            widest[kind] = max(widest.get(kind, 0), left)
    ratios = {(left, size) for (_, _, size), left in widest.items() if 0 < left < size}
    values = {name: value for name, value in sorted(vars(filled.config).items()) if type(value) is int}
    step = max((g.multiple for g in skeleton_of(program).groups), default=1)
    for name, value in values.items():
        found = {value * left // size for left, size in ratios if value * left % size == 0}
        fits = sorted(found | {n for n in (-(-n // step) * step for n in found) if n < value})
        if _MLP_WIDTHS.search(name):
            yield [{name: n} for n in fits]
        elif name == "num_key_value_heads" and {"num_attention_heads", "hidden_size"} <= values.keys():
            heads = values["num_attention_heads"]
            each = values.get("head_dim") or values["hidden_size"] // heads
            yield [
                {name: n, "num_attention_heads": heads * n // value, "head_dim": each}
                for n in fits
                if heads % value == 0
            ]


def _padding(program: Program, config: Any, below: int | None = None) -> Padding:
    """How to fill a program up to the widths of a config, in fewer numbers than `below`."""
    model = program.model
    empty = stock_model(type(pretrained(model)), config, model.dtype)
    if isinstance(empty, str):  # not even the config would load
        return Padding(config, {}, why=[empty])
    if below is not None and (why := _no_gain(model, empty, below)):
        return Padding(config, {}, why=[why])
    try:
        stock = capture(empty.eval())
    except Reject as refused:
        return Padding(config, {}, why=[d.message for d in refused.diagnostics])
    made = stock.model
    shapes = {name: tuple(t.shape) for name, t in distinct(made)}
    ours = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    plan = Padding(config, shapes)
    plan.why += odd_widths(skeleton_of(program), shapes)
    plan.why += [f"{name} is new" for name in ours if name not in made.state_dict()]
    plan.why += _other_numbers(model, made)
    plan.why += _other_heads(skeleton_of(program), skeleton_of(stock))
    if not plan.why:
        scans = _lost_scans(skeleton_of(program), skeleton_of(stock))
        for scan in scans:
            _place_identity(plan, stock, scan, ours)
        for cluster in _clusters(skeleton_of(stock)):
            _place(plan, skeleton_of(stock), cluster, ours)
        plan.why += _unexplained(plan, ours, skeleton_of(stock).facts.get("refused", ()))
        missing = _missing(skeleton_of(program), skeleton_of(stock))
        for branch in missing:
            used = _used(program.units[branch.unit])
            dead = {name for name in shapes if _is_dead(name, branch, used)}
            plan.dead |= dead
            plan.why += _shared(branch, dead, skeleton_of(stock), ours)
            if not dead:
                plan.why.append(f"{branch.site} still runs, for what it hands on besides its output")
        plan.why += _odd_graphs(program, stock, missing, scans)
    return plan


def _no_gain(model: nn.Module, empty: nn.Module, below: int) -> str:
    """Why a narrower model is not worth a capture, which takes much longer than this look at its shapes."""
    shapes = {name: tuple(t.shape) for name, t in distinct(empty)}
    if sum(map(math.prod, shapes.values())) >= below:
        return "it is no smaller"
    ours = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items() if name in shapes}
    wide = [name for name, shape in ours.items() if any(a > b for a, b in zip(shape, shapes[name], strict=False))]
    return f"{wide[0]} is wider" if wide else ""


# -- where indices lie ---------------------------------------------------------------------------------------


def _clusters(skeleton: Skeleton) -> list[list[Group]]:
    """Groups that share an axis, together; query heads before the KV heads that they hang on."""
    clusters: list[list[Group]] = []
    # Experts have no part in it: a router would choose one of zeros. Nor have heads and states of mixers over which a
    # norm takes a mean.
    told = [g for g in skeleton.groups if g.kind not in ("experts", "ssm_heads") and not _normed(g, skeleton)]
    for group in sorted(told, key=lambda g: g.kind != "heads"):
        axes = {(m.tensor, m.axis) for m in group.members}
        near = [c for c in clusters if any((m.tensor, m.axis) in axes for g in c for m in g.members)]
        clusters = [c for c in clusters if c not in near] + [[g for c in near for g in c] + [group]]
    return clusters


def _normed(group: Group, skeleton: Skeleton) -> bool:
    """Whether a norm runs over the states of a mixer: its weight, or a buffer of its own, has an entry for each."""
    kinds = {p.path: p.kind for p in skeleton.parts}
    owners = (m.tensor.rpartition(".")[0] for m in group.members)
    return group.kind == "ssm_state" and any("Norm" in kinds.get(path, "Norm") for path in owners)


def _place(plan: Padding, skeleton: Skeleton, cluster: list[Group], ours: Shapes) -> None:
    """Find how many items of each group are left, and where they go in the original width."""
    axes = {(m.tensor, m.axis) for g in cluster for m in g.members if m.tensor in ours}
    if all(ours[t][a] == plan.shapes[t][a] for t, a in axes if t in plan.shapes):
        return
    small = _part(skeleton, cluster)
    goal = {axis: ours[axis[0]][axis[1]] for axis in axes}
    for counts in _candidates(cluster, goal, plan.shapes):
        places = {axis: list(range(plan.shapes[axis[0]][axis[1]])) for axis in axes}
        _cut(small, counts, places)
        if all(len(places[axis]) == size for axis, size in goal.items()):
            plan.places |= places
            return


def _part(skeleton: Skeleton, cluster: list[Group]) -> Skeleton:
    """Only what the cluster touches: cheap to cut over and over."""
    owners = {m.tensor.rpartition(".")[0] for g in cluster for m in g.members}
    parts = tuple(p for p in skeleton.parts if p.path in owners)
    return replace(skeleton, parts=parts, groups=tuple(cluster), branches=(), tied=(), opaque=())


def _candidates(cluster: list[Group], goal: Mapping[Axis, int], full: Shapes) -> Iterator[tuple[int, ...]]:
    """Counts that may be left; query heads as heads per KV head."""
    if len(cluster) == 1:
        (group,) = cluster
        for member in group.members:
            axis = member.tensor, member.axis
            if axis in goal:
                width = sum(size for _, size in member.segments)
                lost = (full[axis[0]][axis[1]] - goal[axis]) // width
                yield from (n for n in [(group.count - lost,)] if 0 < n[0] <= group.count)
    elif [g.kind for g in cluster] == ["heads", "kv_heads"]:
        heads, kv = cluster
        yield from ((b, k) for k in range(kv.count, 0, -1) for b in range(heads.per_block, 0, -1))


def _cut(skeleton: Skeleton, counts: tuple[int, ...], places: dict[Axis, list[int]]) -> None:
    """Cut the original as the program was cut, keeping the first items of each group or block."""
    for place, count in enumerate(counts):
        # One head per KV head is one group of both: then what was second is the only one.
        group = skeleton.groups[0 if place == 0 else -1]
        block = group.per_block if place == 0 and len(counts) > 1 else group.count
        if group.per_block and len(counts) == 1:  # as many of every group of B and C, or of every KV head
            block, count = group.per_block, count * group.per_block // group.count
        gone = [i for i in range(group.count) if i % block >= count]
        for member in group.members:
            if (axis := (member.tensor, member.axis)) in places:
                dead = {index for item in gone for index in member.indices(item)}
                places[axis] = [p for index, p in enumerate(places[axis]) if index not in dead]
        if gone:
            skeleton = shrink.narrowed(skeleton, group, group.count - len(gone))


# -- reasons against it --------------------------------------------------------------------------------------


def _unexplained(plan: Padding, ours: Shapes, refused: Iterable[Sequence[str]]) -> Iterator[str]:
    """Tensors whose shape no cut of whole items gives; with what discovery says of their site."""
    for name, shape in plan.shapes.items():
        mine = ours.get(name, shape)
        odd = [a for a in range(len(shape)) if len(mine) != len(shape) or mine[a] != shape[a]]
        if any(len(plan.places.get((name, a), ())) != (mine[a] if a < len(mine) else -1) for a in odd):
            known = next((f": {reason}" for site, reason in refused if name.startswith(f"{site}.")), "")
            yield f"{name} is {_by(mine)}, which can't be filled up to {_by(shape)}{known}"


def _other_numbers(model: nn.Module, made: nn.Module) -> Iterator[str]:
    """What a config of other widths would also change: a scale that follows from the number of heads."""
    theirs = dict(made.named_modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            other = vars(theirs[path]).get(name) if path in theirs else None
            if type(value) is type(other) is float and value != other:
                yield f"{path}.{name} is {value:g}, by the config it is {other:g}"


def _other_heads(now: Skeleton, stock: Skeleton) -> Iterator[str]:
    """Attention whose heads would have another width by the config, though all of them together fit."""

    def widths(skeleton: Skeleton) -> dict[Axis, int]:
        # The widest part: a fused projection has a part for q, and for k and v where each of its heads has its own.
        return {
            (m.tensor, m.axis): max(size for _, size in m.segments)
            for g in skeleton.groups
            if g.kind == "heads"
            for m in g.members
        }

    ours, theirs = widths(now), widths(stock)
    yield from (
        f"a head of {tensor} is {ours[tensor, axis]} wide, by the config {theirs[tensor, axis]}"
        for tensor, axis in ours.keys() & theirs.keys()
        if ours[tensor, axis] != theirs[tensor, axis]
    )


def _shared(branch: Branch, dead: set[str], stock: Skeleton, ours: Shapes) -> Iterator[str]:
    """Tensors of a lost branch that other layers still have: they can't be zero here and a weight there."""
    for same in stock.tied:
        here = next((name for name in same if name in dead), None)
        there = next((name for name in same if name in ours), None)
        if here and there:
            yield f"{branch.site} is gone, but {here} is also {there}, which stays"
            return


def _missing(now: Skeleton, stock: Skeleton) -> list[Branch]:
    """Branches of the stock model that the program has lost."""
    left = {(b.unit, b.site) for b in now.branches}
    return [b for b in stock.branches if (b.unit, b.site) not in left]


def _used(unit: Unit) -> list[str]:
    """What the output of a unit is computed by: not all its calls, as one may be there to update a cache."""
    output = next(node for node in unit.graph.nodes if node.op == "output")
    prefix = f"{unit.path}." if unit.path else ""
    return [f"{prefix}{node.target}" for node in sources(output) if node.op in ("call_module", "get_attr")]


def _is_dead(name: str, branch: Branch, used: Iterable[str]) -> bool:
    """Whether a tensor is of a lost branch, and not of what that shared, as parallel branches share a norm."""
    return any(is_below(name, part) for part in branch.parts) and not any(is_below(name, path) for path in used)


def _lost_scans(now: Skeleton, stock: Skeleton) -> list[Scan]:
    """Scans of the stock model that the program has lost while it kept the rest of the mixer."""
    left, kept = {s.site for s in now.scans}, {part for b in now.branches for part in b.parts}
    return [s for s in stock.scans if s.site not in left and any(is_below(part, s.site) for part in kept)]


def _place_identity(plan: Padding, stock: Program, scan: Scan, ours: Shapes) -> None:
    """Where the rows of a mixer without its scan lie in a whole one, and what fills the rest."""
    found, mixer = mixer_graphs(stock)[scan.site], stock.model.get_submodule(scan.site)
    skip, less = skip_of(found), scanless(found, mixer)
    if skip is None:
        plan.why.append(f"{scan.site} has no skip that could hand its input on")
        return
    plan.ones.add(f"{scan.site}.{skip}")
    for (tensor, axis), keep in less.keep.items():
        name = f"{scan.site}.{tensor}"
        if ours.get(name, ())[axis : axis + 1] == (len(keep),):
            plan.places[name, axis] = keep


def _odd_graphs(program: Program, stock: Program, missing: Iterable[Branch], scans: Iterable[Scan]) -> Iterator[str]:
    """Units that compute something else than the stock unit without its missing branches and scans."""
    rewriter = Rewriter(stock)
    for scan in scans:
        if program.units[scan.unit].edited:
            drop_scan(stock, rewriter, scan)
    for branch in missing:
        if program.units[branch.unit].edited:
            graph = stock.units[branch.unit].graph
            rewriter.drop_branch(branch.unit, branch.join, staying(graph, branch))
    for path, unit in program.units.items():
        if unit.edited and _calls(unit) != _calls(stock.units[path]):
            yield f"{path} runs another graph than its class, and not for a dropped part alone"


def _calls(unit: Unit) -> list[str]:
    reads = (node for node in unit.graph.nodes if node.op in ("call_module", "get_attr"))
    pruned = ["a cache that forgets" for node in unit.graph.nodes if node.target is packed_attention]
    return sorted(f"{node.op} {node.target}" for node in reads) + pruned


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if math.prod(shape) != 1 or shape else "a number"
