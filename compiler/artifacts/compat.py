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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...dsl.checker.skeleton import Branch, Group, Scan, Skeleton, is_submodule
from ...dsl.syntax.diagnostics import Reject
from ..analysis.discovery.bypass import other_operand_of_join
from ..analysis.discovery.discover import skeleton_of
from ..analysis.discovery.experts import expert_width_problems
from ..analysis.discovery.mixers.graphs import mixer_graphs
from ..analysis.discovery.mixers.scanless import graph_without_scan, skip_parameter_path
from ..analysis.planning import shrink
from ..ir.capture.meta_capture import capture_without_weights
from ..ir.graphs import ancestors
from ..ir.layers.leaves import packed_attention
from ..ir.program import Program
from ..ir.unit import Unit
from ..ir.weights import distinct_tensors
from ..models.checkpoints.pretrained import pretrained
from ..models.checkpoints.tensor_files import LazyTensor
from ..transforms.editing.rewrite import Rewriter
from ..transforms.editing.scan_removal import drop_scan
from .stock import empty_model_or_reason, modules_reading_stream_width, stock_config, stock_model

_MLP_WIDTHS = re.compile(r"intermediate|inner|ffn")  # a head's width may not change, only their number
Axis = tuple[str, int]  # tensor and axis
Shapes = Mapping[str, tuple[int, ...]]  # of tensors by name


@dataclass
class Padding:
    """Padding of a program to the stock model of `config`; none where `reasons` has one.

    shapes   of the stock model's tensors, tied ones once
    positions  for each cut axis, where its indices lie in the original width
    dead     tensors of branches that nothing calls any more, also those that are still in the tree
    ones     of those that are not there, the ones that are filled with ones, not zeros
    """

    config: Any
    shapes: Shapes
    positions: dict[Axis, list[int]] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    ones: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        """Number of parameters in the checkpoint."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def padded_tensor_pieces(self, program: Program) -> Iterator[LazyTensor]:
        """Yield every tensor of the stock model, padded with zeros when it is written."""
        tensors = program.model.state_dict(keep_vars=True)
        for name, shape in self.shapes.items():
            tensor = None if name in self.dead else tensors.get(name)
            if tensor is not None and tuple(tensor.shape) == shape:
                yield LazyTensor.of(name, tensor)
            else:
                dtype = tensor.dtype if tensor is not None else pretrained(program.model).dtype
                yield LazyTensor(name, dtype, shape, partial(self._padded_tensor, name, tensor, dtype))

    def _padded_tensor(self, name: str, tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        shape = self.shapes[name]
        if tensor is None:
            return (torch.ones if name in self.ones else torch.zeros)(shape, dtype=dtype)
        value = tensor.detach().cpu()
        for axis, size in enumerate(shape):
            if value.shape[axis] != size:
                wide = torch.zeros((*value.shape[:axis], size, *value.shape[axis + 1 :]), dtype=value.dtype)
                value = wide.index_copy_(axis, torch.tensor(self.positions[name, axis]), value)
        return value


def plan_padding_to_stock(program: Program, stock_base: Any = None) -> Padding:
    """Padding of a program: to widths that the widest layer needs, else to the original ones.

    stock_base   the config that `stock_config` finds, where it is known
    """
    reasons = [
        f"{path} is a {entry['class'].rpartition(':')[2]}, which transformers doesn't have"
        for path, entry in program.edits.swapped.items()
    ]
    if reasons:
        return Padding(program.model.config, {}, reasons=reasons)
    stock_base, original = stock_base or stock_config(program.model)[0], pretrained(program.model).config
    first = _padding_to_config(program, stock_base)
    differs = stock_base.to_dict() != original.to_dict()
    filled = _padding_to_config(program, original) if first.reasons and differs else first
    return filled if filled.reasons else _narrow_config(program, filled)


def _narrow_config(program: Program, padding: Padding) -> Padding:
    """Padding with smaller values in the config, where no layer needs the stated width."""
    for candidates in _smaller_config_values(program, padding):
        for changes in candidates:
            config = copy.deepcopy(padding.config)
            for name, value in changes.items():
                setattr(config, name, value)
            candidate = _padding_to_config(program, config, max_numbers=padding.numbers)
            if not candidate.reasons:
                padding = candidate
                break
    return padding


def _smaller_config_values(program: Program, padding: Padding) -> Iterator[list[dict[str, int]]]:
    """Yield for each width of the config the smaller values that would explain a tensor's widest layer, least first."""
    shapes = {name: tuple(t.shape) for name, t in program.model.state_dict(keep_vars=True).items()}
    widest: dict[tuple[str, int, int], int] = {}
    for name, shape in padding.shapes.items():
        for axis, size in enumerate(shape):
            kind = re.sub(r"\.\d+\.", ".*.", name), axis, size
            left = shapes[name][axis] if name in shapes and name not in padding.dead else 0
            widest[kind] = max(widest.get(kind, 0), left)
    ratios = {(left, size) for (_, _, size), left in widest.items() if 0 < left < size}
    values = {name: value for name, value in sorted(vars(padding.config).items()) if type(value) is int}
    step = max((g.multiple for g in skeleton_of(program).groups), default=1)
    for name, value in values.items():
        candidates = {value * left // size for left, size in ratios if value * left % size == 0}
        fits = sorted(candidates | {n for n in (-(-n // step) * step for n in candidates) if n < value})
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


def _padding_to_config(program: Program, config: Any, max_numbers: int | None = None) -> Padding:
    """Padding of a program to the widths of a config, in fewer numbers than `max_numbers`."""
    model = program.model
    empty = empty_model_or_reason(type(pretrained(model)), config, model.dtype)
    if isinstance(empty, str):  # not even the config would load
        return Padding(config, {}, reasons=[empty])
    if max_numbers is not None and (reason := _reason_against_narrowing(model, empty, max_numbers)):
        return Padding(config, {}, reasons=[reason])
    try:
        stock = capture_without_weights(empty, partial(stock_model, type(pretrained(model)), config, model.dtype))
    except Reject as rejection:
        return Padding(config, {}, reasons=[d.message for d in rejection.diagnostics])
    stock_module = stock.model
    shapes = {name: tuple(t.shape) for name, t in distinct_tensors(stock_module)}
    old_shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    plan = Padding(config, shapes)
    plan.reasons += expert_width_problems(skeleton_of(program), shapes)
    plan.reasons += [f"{name} is new" for name in old_shapes if name not in stock_module.state_dict()]
    plan.reasons += [*_config_dependent_numbers(model, stock_module), *modules_reading_stream_width(model, config)]
    plan.reasons += _head_width_conflict_texts(skeleton_of(program), skeleton_of(stock))
    if not plan.reasons:
        scans = _removed_scans(skeleton_of(program), skeleton_of(stock))
        for scan in scans:
            _set_scanless_positions(plan, stock, scan, old_shapes)
        for cluster in _axis_clusters(skeleton_of(stock)):
            _infer_kept_positions(plan, skeleton_of(stock), cluster, old_shapes)
        plan.reasons += _unpaddable_shapes(plan, old_shapes, skeleton_of(stock).facts.get("refused", ()))
        missing = _missing_branches(skeleton_of(program), skeleton_of(stock))
        for branch in missing:
            used = _calls_that_output_needs(program.units[branch.unit])
            dead = {name for name in shapes if _is_tensor_of_lost_branch(name, branch, used)}
            plan.dead |= dead
            plan.reasons += _tied_tensor_reasons(branch, dead, skeleton_of(stock), old_shapes)
            if not dead:
                plan.reasons.append(f"{branch.site} still runs, for what it hands on besides its output")
        plan.reasons += _differing_graphs(program, stock, missing, scans)
    return plan


def _reason_against_narrowing(model: nn.Module, narrow_model: nn.Module, max_numbers: int) -> str:
    """Why a narrower model is not worth a capture, which takes much longer than this look at its shapes."""
    shapes = {name: tuple(t.shape) for name, t in distinct_tensors(narrow_model)}
    if sum(map(math.prod, shapes.values())) >= max_numbers:
        return "it is no smaller"
    old_shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items() if name in shapes}
    wide = [name for name, shape in old_shapes.items() if any(a > b for a, b in zip(shape, shapes[name], strict=False))]
    return f"{wide[0]} is wider" if wide else ""


# -- where indices lie ---------------------------------------------------------------------------------------


def _axis_clusters(skeleton: Skeleton) -> list[list[Group]]:
    """Groups that share an axis, together; query heads before the KV heads that they hang on."""
    clusters: list[list[Group]] = []
    # Experts have no part in it: a router would choose one of zeros. Nor have heads and states of mixers over which a
    # norm takes a mean.
    candidates = [g for g in skeleton.groups if g.kind not in ("experts", "ssm_heads") and not _has_norm(g, skeleton)]
    for group in sorted(candidates, key=lambda g: g.kind != "heads"):
        axes = {(m.tensor, m.axis) for m in group.members}
        adjacent = [c for c in clusters if any((m.tensor, m.axis) in axes for g in c for m in g.members)]
        clusters = [c for c in clusters if c not in adjacent] + [[g for c in adjacent for g in c] + [group]]
    return clusters


def _has_norm(group: Group, skeleton: Skeleton) -> bool:
    """Whether a norm runs over the states of a mixer: its weight, or a buffer of its own, has an entry for each."""
    kinds = {p.path: p.kind for p in skeleton.parts}
    owners = (m.tensor.rpartition(".")[0] for m in group.members)
    return group.kind == "ssm_state" and any("Norm" in kinds.get(path, "Norm") for path in owners)


def _infer_kept_positions(padding: Padding, skeleton: Skeleton, cluster: list[Group], shrunk_shapes: Shapes) -> None:
    """Find how many items of each group are left, and where they go in the original width."""
    axes = {(m.tensor, m.axis) for g in cluster for m in g.members if m.tensor in shrunk_shapes}
    if all(shrunk_shapes[t][a] == padding.shapes[t][a] for t, a in axes if t in padding.shapes):
        return
    small = _skeleton_of_cluster(skeleton, cluster)
    goal = {axis: shrunk_shapes[axis[0]][axis[1]] for axis in axes}
    for counts in _remaining_counts(cluster, goal, padding.shapes):
        positions = {axis: list(range(padding.shapes[axis[0]][axis[1]])) for axis in axes}
        _drop_last_positions(small, counts, positions)
        if all(len(positions[axis]) == size for axis, size in goal.items()):
            padding.positions |= positions
            return


def _skeleton_of_cluster(skeleton: Skeleton, cluster: list[Group]) -> Skeleton:
    """Only what the cluster touches: cheap to cut over and over."""
    owners = {m.tensor.rpartition(".")[0] for g in cluster for m in g.members}
    parts = tuple(p for p in skeleton.parts if p.path in owners)
    return replace(skeleton, parts=parts, groups=tuple(cluster), branches=(), tied=(), opaque=())


def _remaining_counts(cluster: list[Group], sizes_after: Mapping[Axis, int], full: Shapes) -> Iterator[tuple[int, ...]]:
    """Counts that may be left; query heads as heads per KV head."""
    if len(cluster) == 1:
        (group,) = cluster
        for member in group.members:
            axis = member.tensor, member.axis
            if axis in sizes_after:
                width = sum(size for _, size in member.segments)
                removed = (full[axis[0]][axis[1]] - sizes_after[axis]) // width
                yield from (n for n in [(group.count - removed,)] if 0 < n[0] <= group.count)
    elif [g.kind for g in cluster] == ["heads", "kv_heads"]:
        heads, kv = cluster
        yield from ((b, k) for k in range(kv.count, 0, -1) for b in range(heads.per_block, 0, -1))


def _drop_last_positions(skeleton: Skeleton, counts: tuple[int, ...], positions: dict[Axis, list[int]]) -> None:
    """Cut the original as the program was cut, keeping the first items of each group or block."""
    for group_index, count in enumerate(counts):
        # One head per KV head is one group of both: then what was second is the only one.
        group = skeleton.groups[0 if group_index == 0 else -1]
        block = group.per_block if group_index == 0 and len(counts) > 1 else group.count
        if group.per_block and len(counts) == 1:  # as many of every group of B and C, or of every KV head
            block, count = group.per_block, count * group.per_block // group.count
        removed = [i for i in range(group.count) if i % block >= count]
        for member in group.members:
            if (axis := (member.tensor, member.axis)) in positions:
                dead = {index for item in removed for index in member.indices(item)}
                positions[axis] = [p for index, p in enumerate(positions[axis]) if index not in dead]
        if removed:
            skeleton = shrink.with_narrowed_group(skeleton, group, group.count - len(removed))


# -- reasons against it --------------------------------------------------------------------------------------


def _unpaddable_shapes(padding: Padding, old_shapes: Shapes, site_refusals: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Tensors whose shape no cut of whole items gives; with what discovery says of their site."""
    for name, shape in padding.shapes.items():
        mine = old_shapes.get(name, shape)
        differing_axes = [a for a in range(len(shape)) if len(mine) != len(shape) or mine[a] != shape[a]]
        if any(len(padding.positions.get((name, a), ())) != (mine[a] if a < len(mine) else -1) for a in differing_axes):
            known = next((f": {reason}" for site, reason in site_refusals if name.startswith(f"{site}.")), "")
            yield f"{name} is {_shape_text(mine)}, which can't be filled up to {_shape_text(shape)}{known}"


def _config_dependent_numbers(model: nn.Module, stock_module: nn.Module) -> Iterator[str]:
    """Numbers that a config of other widths would also change: a scale that follows from the number of heads."""
    stock_modules = dict(stock_module.named_modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            other = vars(stock_modules[path]).get(name) if path in stock_modules else None
            if type(value) is type(other) is float and value != other:
                yield f"{path}.{name} is {value:g}, by the config it is {other:g}"


def _head_width_conflict_texts(current: Skeleton, stock: Skeleton) -> Iterator[str]:
    """Attention whose heads would have another width by the config, though all of them together fit."""

    def widths(skeleton: Skeleton) -> dict[Axis, int]:
        # The widest part: a fused projection has a part for q, and for k and v where each of its heads has its own.
        return {
            (m.tensor, m.axis): max(size for _, size in m.segments)
            for g in skeleton.groups
            if g.kind == "heads"
            for m in g.members
        }

    current_widths, stock_widths = widths(current), widths(stock)
    yield from (
        f"a head of {tensor} is {current_widths[tensor, axis]} wide, by the config {stock_widths[tensor, axis]}"
        for tensor, axis in current_widths.keys() & stock_widths.keys()
        if current_widths[tensor, axis] != stock_widths[tensor, axis]
    )


def _tied_tensor_reasons(branch: Branch, dead: set[str], stock: Skeleton, shrunk_shapes: Shapes) -> Iterator[str]:
    """Tensors of a lost branch that other layers still have: they can't be zero here and a weight there."""
    for same in stock.tied:
        dead_name = next((name for name in same if name in dead), None)
        live_name = next((name for name in same if name in shrunk_shapes), None)
        if dead_name and live_name:
            yield f"{branch.site} is gone, but {dead_name} is also {live_name}, which stays"
            return


def _missing_branches(current: Skeleton, stock: Skeleton) -> list[Branch]:
    """Branches of the stock model that the program has lost."""
    left = {(b.unit, b.site) for b in current.branches}
    return [b for b in stock.branches if (b.unit, b.site) not in left]


def _calls_that_output_needs(unit: Unit) -> list[str]:
    """Calls that the output of a unit depends on; others may only update a cache."""
    output = next(node for node in unit.graph.nodes if node.op == "output")
    prefix = f"{unit.path}." if unit.path else ""
    return [f"{prefix}{node.target}" for node in ancestors(output) if node.op in ("call_module", "get_attr")]


def _is_tensor_of_lost_branch(name: str, branch: Branch, live: Iterable[str]) -> bool:
    """Whether a tensor is of a lost branch, and not of what that shared, as parallel branches share a norm."""
    return any(is_submodule(name, part) for part in branch.parts) and not any(is_submodule(name, path) for path in live)


def _removed_scans(current: Skeleton, stock: Skeleton) -> list[Scan]:
    """Scans of the stock model that the program has lost while it kept the rest of the mixer."""
    left, present_parts = {s.site for s in current.scans}, {part for b in current.branches for part in b.parts}
    return [s for s in stock.scans if s.site not in left and any(is_submodule(part, s.site) for part in present_parts)]


def _set_scanless_positions(padding: Padding, stock: Program, scan: Scan, shrunk_shapes: Shapes) -> None:
    """Positions of a scanless mixer's rows in a full one, and the values that fill the rest."""
    mixer_graph, mixer = mixer_graphs(stock)[scan.site], stock.model.get_submodule(scan.site)
    skip, less = skip_parameter_path(mixer_graph), graph_without_scan(mixer_graph, mixer)
    if skip is None:
        padding.reasons.append(f"{scan.site} has no skip that could hand its input on")
        return
    padding.ones.add(f"{scan.site}.{skip}")
    for (tensor, axis), keep in less.keep.items():
        name = f"{scan.site}.{tensor}"
        if shrunk_shapes.get(name, ())[axis : axis + 1] == (len(keep),):
            padding.positions[name, axis] = keep


def _differing_graphs(
    program: Program, stock: Program, missing_branches: Iterable[Branch], scans: Iterable[Scan]
) -> Iterator[str]:
    """Units that compute something else than the stock unit without its missing branches and scans."""
    rewriter = Rewriter(stock)
    for scan in scans:
        if program.units[scan.unit].edited:
            drop_scan(stock, rewriter, scan)
    for branch in missing_branches:
        if program.units[branch.unit].edited:
            graph = stock.units[branch.unit].graph
            rewriter.drop_branch(branch.unit, branch.join, other_operand_of_join(graph, branch))
    for path, unit in program.units.items():
        if unit.edited and _call_descriptions(unit) != _call_descriptions(stock.units[path]):
            yield f"{path} runs another graph than its class, and not for a dropped part alone"


def _call_descriptions(unit: Unit) -> list[str]:
    reads = (node for node in unit.graph.nodes if node.op in ("call_module", "get_attr"))
    pruned = ["a cache that forgets" for node in unit.graph.nodes if node.target is packed_attention]
    return sorted(f"{node.op} {node.target}" for node in reads) + pruned


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if math.prod(shape) != 1 or shape else "a number"
