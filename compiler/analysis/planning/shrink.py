"""Size of a model, and its skeleton after a cut: arithmetic on shapes, for `plan` and for forecasts.

Everything returns a new skeleton or a number; nothing needs torch. The rules mirror the rewriter's, and a
test holds both equal.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ....dsl.checker.skeleton import Branch, Group, Member, Part, Scan, Skeleton, is_submodule
from ...plugin.weight_sizes import Weight, Weights

_ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
_SCANNED = ("ssm_heads", "ssm_channels", "ssm_state")
_LOOKUPS = ("Embedding", "Embeddings")  # class names that end so read rows and multiply nothing


def param_count(skeleton: Skeleton) -> int:
    """Number of parameters of the model; tied tensors count once."""
    copies = {name for same in skeleton.tied for name in same[1:]}
    return sum(math.prod(shape) for name, shape in skeleton.shapes().items() if name not in copies)


def param_bytes(skeleton: Skeleton) -> int:
    """Bytes of all parameters as they are stored."""
    return param_count(skeleton) * _ITEMSIZE.get(skeleton.facts.get("dtype", "float32"), 4)


def stored_weight_specs(
    current: Skeleton, original: Skeleton, uniform_layers: bool = True, sidecar_bytes: int = 0
) -> Weights:
    """Weights from which targets estimate the size of their files."""
    names = {name: (name,) for name in current.shapes()} | {same[0]: same for same in current.tied}
    copies = {name for same in current.tied for name in same[1:]}
    kinds = {f"{part.path}.{name}".lstrip("."): part.kind for part in current.parts for name, _ in part.tensors}
    packed, grids = _fact_by_weight_name(current, "packed"), _fact_by_weight_name(current, "grids")
    vocabulary = current.facts.get("vocab")

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        same = names[name]
        looked_up = [kinds[n].endswith(_LOOKUPS) for n in same]
        matrix = (len(shape) > 1 and name.endswith("weight")) or (len(shape) == 3 and kinds[name].endswith("Experts"))
        grid = next((grids[n] for n in same if n in grids), None)
        return Weight(
            shape,
            table=any(looked_up),
            matrix=matrix and not all(looked_up),
            head=shape[:1] == (vocabulary,) and not all(looked_up),
            packed=sum(packed.get(n, 0) for n in same),
            grid=tuple(grid) if grid else None,
        )

    tensors = tuple(weight(name, shape) for name, shape in current.shapes().items() if name not in copies)
    itemsize = _ITEMSIZE.get(current.facts.get("dtype", "float32"), 4)
    sizes = param_bytes(current), param_bytes(original), itemsize
    return Weights(*sizes, tensors, uniform_layers, len(current.units), sidecar_bytes)


def _fact_by_weight_name(skeleton: Skeleton, fact: str) -> dict[str, Any]:
    """A fact of modules by the name of their weight."""
    return {f"{path}.weight": value for path, value in (skeleton.facts.get(fact) or {}).items()}


def with_sparsity(skeleton: Skeleton, sparsity: float) -> Skeleton:
    """The skeleton of a model in whose linear modules a share of zeros was made."""
    return replace(skeleton, facts={**skeleton.facts, "zeros": sparsity})


def with_packed_modules(skeleton: Skeleton, packed_bytes_by_path: Mapping[str, int]) -> Skeleton:
    """The skeleton of a model whose modules at these paths were packed for kernels, each into so many bytes."""
    return _with_facts_of_modules(skeleton, "packed", packed_bytes_by_path)


def with_module_grids(skeleton: Skeleton, grids: Mapping[str, tuple[int, int, bool]]) -> Skeleton:
    """The skeleton of a model whose modules' weights were put on grids: (bits, group, 0 is the middle code)."""
    return _with_facts_of_modules(skeleton, "grids", grids)


def _with_facts_of_modules(skeleton: Skeleton, fact: str, values: Mapping[str, Any]) -> Skeleton:
    return replace(skeleton, facts={**skeleton.facts, fact: {**(skeleton.facts.get(fact) or {}), **values}})


def packed_bytes(skeleton: Skeleton) -> int:
    """Bytes of the weights that a step packed for kernels."""
    return sum((skeleton.facts.get("packed") or {}).values())


def flops_per_token(skeleton: Skeleton, context: int) -> int:
    """Floating-point operations of one decoded token that attends to `context` positions; of models that take images
    alone, those of one image.

    Two per weight that takes part in a matrix product (a tied output head does, a looked-up embedding
    doesn't, of packed experts the active ones do) and position of an image, and queries times keys, weights times
    values; of a scan six per channel and state: decay, input and output, each multiplied and added.
    """
    positions = {part.path: part.positions for part in skeleton.parts}
    weights = sum(part.positions * _active_matmul_params(skeleton, part) for part in skeleton.parts)
    return (
        2 * weights
        + 4 * sum(_attention_products(g, positions, context) for g in skeleton.groups if g.kind == "heads")
        + 6 * sum(_scan_state_numel(skeleton, scan.site) for scan in skeleton.scans)
    )


def _scan_state_numel(skeleton: Skeleton, path: str) -> int:
    """Numbers that a scan keeps per row: its channels times the states of each."""
    inside = {g.kind: g for g in skeleton.groups if g.site == path and g.kind in _SCANNED}
    state, items = inside.get("ssm_state"), inside.get("ssm_heads", inside.get("ssm_channels"))
    if state is None or items is None:
        return 0
    return _attended_channels(items) * (state.per_block or state.count)


def _active_matmul_params(skeleton: Skeleton, part: Part) -> int:
    if part.kind.endswith(_LOOKUPS):
        return 0
    active = skeleton.facts.get("active_experts")
    total = 0
    for _, shape in part.tensors:
        if len(shape) == 3 and active and part.kind.endswith("Experts"):
            shape = (min(active, shape[0]), *shape[1:])
        total += math.prod(shape) if len(shape) > 1 else 0
    return total


def _attention_products(group: Group, positions: Mapping[str, int], context: int) -> int:
    """Channels times positions that attend times those that they attend to: of an image all to all."""
    n = positions.get(group.members[-1].tensor.rpartition(".")[0], 1)
    return _attended_channels(group) * (n * n if n > 1 else context)


def _attended_channels(group: Group) -> int:
    """Channels that the heads hand to the output projection."""
    return group.count * sum(size for _, size in group.members[-1].segments)


# -- cuts ----------------------------------------------------------------------------------------------------


def without_branch(skeleton: Skeleton, branch: Branch) -> Skeleton:
    """The skeleton when a residual branch is gone, with its modules and groups."""
    dead = set(branch.parts)
    return replace(
        _skeleton_of_live_modules(skeleton, lambda path: path not in dead),
        branches=tuple(b for b in skeleton.branches if b != branch),
    )


def without_scan(skeleton: Skeleton, scan: Scan) -> Skeleton:
    """The skeleton when a mixer hands its convolved input on instead of scanning it."""
    shapes = dict(scan.cuts)

    def left(part: Part) -> Part:
        named = [(name, shapes.get(f"{part.path}.{name}", shape)) for name, shape in part.tensors]
        return replace(part, tensors=tuple((name, shape) for name, shape in named if shape is not None))

    parts = [p for p in map(left, skeleton.parts) if p.tensors]
    return replace(
        skeleton,
        parts=tuple(parts),
        scans=tuple(s for s in skeleton.scans if s != scan),
        groups=tuple(g for g in skeleton.groups if not (g.site == scan.site and g.kind in _SCANNED)),
    )


def without_unit(skeleton: Skeleton, unit: str) -> Skeleton:
    """The skeleton when a layer is gone; the layers after it in its list move up by one."""
    left = _skeleton_of_live_modules(skeleton, lambda path: not is_submodule(path, unit))
    left = replace(
        left,
        units=tuple(u for u in skeleton.units if u != unit),
        branches=tuple(b for b in skeleton.branches if b.unit != unit),
    )
    layers = skeleton.facts.get("layers")
    if isinstance(layers, int):
        left = replace(left, facts={**left.facts, "layers": layers - 1})
    return _rename_modules(left, _renaming_after_removal(unit))


def _skeleton_of_live_modules(skeleton: Skeleton, is_alive: Callable[[str], bool]) -> Skeleton:
    """Only the modules that are alive, and what refers to them."""
    tied = (tuple(name for name in same if is_alive(name.rpartition(".")[0])) for same in skeleton.tied)
    refusals = [entry for entry in skeleton.facts.get("refused", ()) if is_alive(entry[0])]
    return replace(
        skeleton,
        parts=tuple(p for p in skeleton.parts if is_alive(p.path)),
        groups=tuple(left for g in skeleton.groups if (left := _group_of_live_modules(g, is_alive)) is not None),
        stream=skeleton.stream and _group_of_live_modules(skeleton.stream, is_alive),
        tied=tuple(same for same in tied if len(same) > 1),
        opaque=tuple(entry for entry in skeleton.opaque if is_alive(entry[0])),
        scans=tuple(s for s in skeleton.scans if is_alive(s.site)),
        facts={**skeleton.facts, "refused": refusals} if "refused" in skeleton.facts else skeleton.facts,
    )


def _group_of_live_modules(group: Group, is_alive: Callable[[str], bool]) -> Group | None:
    """A group without the tensors of modules that are gone; None where nothing is left that makes or reads it."""
    writers = len(group.members) - group.readers
    left = [i for i, m in enumerate(group.members) if is_alive(m.tensor.rpartition(".")[0])]
    if len(left) == len(group.members):
        return group
    readers = sum(i >= writers for i in left)
    if readers in (0, len(left)):
        return None
    attributes = tuple(entry for entry in group.attributes if is_alive(entry[0]))
    return replace(group, members=tuple(group.members[i] for i in left), attributes=attributes, readers=readers)


def _renaming_after_removal(unit: str) -> Callable[[str], str]:
    """The new path of a module once `unit` has left its list."""
    prefix, _, removed = unit.rpartition(".")

    def renamed(path: str) -> str:
        if not path.startswith(f"{prefix}."):
            return path
        number, dot, tail = path[len(prefix) + 1 :].partition(".")
        if not number.isdigit() or int(number) < int(removed):
            return path
        return f"{prefix}.{int(number) - 1}{dot}{tail}"

    return renamed


def _rename_modules(skeleton: Skeleton, new_path_of: Callable[[str], str]) -> Skeleton:
    facts = skeleton.facts
    if "refused" in facts:
        facts = {**facts, "refused": [[new_path_of(path), reason] for path, reason in facts["refused"]]}
    return replace(
        skeleton,
        facts=facts,
        units=tuple(map(new_path_of, skeleton.units)),
        parts=tuple(replace(p, path=new_path_of(p.path)) for p in skeleton.parts),
        branches=tuple(
            replace(b, site=new_path_of(b.site), unit=new_path_of(b.unit), parts=tuple(map(new_path_of, b.parts)))
            for b in skeleton.branches
        ),
        groups=tuple(g.renamed(new_path_of) for g in skeleton.groups),
        stream=skeleton.stream and skeleton.stream.renamed(new_path_of),
        tied=tuple(tuple(map(new_path_of, same)) for same in skeleton.tied),
        opaque=tuple((new_path_of(path), reason) for path, reason in skeleton.opaque),
        scans=tuple(
            replace(
                s,
                site=new_path_of(s.site),
                unit=new_path_of(s.unit),
                cuts=tuple((new_path_of(t), n) for t, n in s.cuts),
            )
            for s in skeleton.scans
        ),
    )


def with_kernel_size(skeleton: Skeleton, path: str, size: int) -> Skeleton:
    """The skeleton when a convolution's kernel is so high and wide."""

    def smaller(part: Part) -> Part:
        sizes = ((n, (*shape[:2], size, size) if n == "weight" else shape) for n, shape in part.tensors)
        return replace(part, tensors=tuple(sizes)) if part.path == path else part

    return replace(skeleton, parts=tuple(map(smaller, skeleton.parts)))


# -- widths --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GroupNarrowing:
    """`group` keeps `count` items: where indices of its tensors move, and how other groups change."""

    group: Group
    count: int

    def removed_count_before(self, tensor: str, axis: int, position: float) -> int:
        """Indices that vanish along an axis before position `position`."""
        removed = self.group.count - self.count
        return sum(
            removed * size
            for m in self.group.members
            if (m.tensor, m.axis) == (tensor, axis)
            for start, size in m.segments
            if start < position
        )

    def shape_after(self, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n - self.removed_count_before(tensor, axis, math.inf) for axis, n in enumerate(shape))

    def members_after(self, group: Group, count: int) -> tuple[Member, ...]:
        """The members of a group that will have `count` items: where they lie, and how wide an item is."""

        def renamed(m: Member, start: int, size: int) -> tuple[int, int]:
            end = start + group.count * size
            front, all_in_all = (self.removed_count_before(m.tensor, m.axis, at) for at in (start, end))
            return start - front, (end - start - all_in_all + front) // count

        return tuple(replace(m, segments=tuple(renamed(m, *segment) for segment in m.segments)) for m in group.members)

    def group_after(self, group: Group) -> Group:
        """Any group of the model after the cut."""
        mine = {(m.tensor, m.axis) for m in self.group.members}
        if group == self.group:
            per_block = self.count * group.per_block // group.count
            return _group_of_size(group, self.count, self.members_after(group, self.count), group.attributes, per_block)
        if not any((m.tensor, m.axis) in mine for m in group.members):
            return group
        if group.site == self.group.site and {group.kind, self.group.kind} == {"heads", "kv_heads"}:
            return self.query_or_kv_group_after(group)
        return replace(group, members=self.members_after(group, group.count))

    def query_or_kv_group_after(self, group: Group) -> Group:
        """Query heads when KV groups go; KV groups when query heads go."""
        count = self.count * group.per_block if group.kind == "heads" else group.count
        after = {(path, name): per * self.count for path, name, per in self.group.attributes}
        attributes = tuple(
            (path, name, round(after.get((path, name), per * group.count)) / count)
            for path, name, per in group.attributes
        )
        return _group_of_size(group, count, self.members_after(group, count), attributes, group.per_block)


def _group_of_size(group: Group, count: int, members: tuple[Member, ...], attributes: tuple, per_block: int) -> Group:
    """A group of one item is written plainly: it can't lose one, so nothing follows, and its runs join."""
    if count == 1:
        attributes, members = (), tuple(replace(m, segments=_merge_segments(m.segments)) for m in members)
    return replace(group, count=count, members=members, attributes=attributes, per_block=per_block)


def _merge_segments(segments: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, size in segments:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((start, size))
    return tuple(joined)


def with_narrowed_group(skeleton: Skeleton, group: Group, count: int) -> Skeleton:
    """The skeleton when `group` keeps `count` of its items, whichever they are.

    Query heads under grouped-query attention keep the same number per KV head, so `count` divides by theirs.
    """
    assert group in skeleton.groups, f"{group.site} has no such group of {group.kind}"
    assert 0 < count <= group.count, f"{count} of {group.count} {group.kind}"
    assert count * group.per_block % group.count == 0, f"{count} heads don't divide by the KV heads"
    cut = _GroupNarrowing(group, count)
    touched = {m.tensor for m in group.members}

    def part(p: Part) -> Part:
        return replace(
            p,
            tensors=tuple(
                (name, cut.shape_after(full, shape) if (full := f"{p.path}.{name}") in touched else shape)
                for name, shape in p.tensors
            ),
        )

    groups = map(cut.group_after, skeleton.groups)
    return replace(
        skeleton,
        parts=tuple(map(part, skeleton.parts)),
        groups=tuple(_merge_heads_with_single_query(list(groups))),
        scans=tuple(_scan_after_narrowing(skeleton, scan, cut) for scan in skeleton.scans),
    )


def _scan_after_narrowing(skeleton: Skeleton, scan: Scan, narrowing: _GroupNarrowing) -> Scan:
    """Scan of a narrower mixer: of an axis that it cuts, as much as before less what went
    of what it leaves; B, C and time steps, which it takes, are behind that."""
    if scan.site != narrowing.group.site:
        return scan
    shapes = skeleton.shapes()

    def left(tensor: str, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if shape is None:
            return None
        return tuple(
            after - narrowing.removed_count_before(tensor, axis, after if after < full else math.inf)
            for axis, (after, full) in enumerate(zip(shape, shapes[tensor], strict=True))
        )

    return replace(scan, cuts=tuple((tensor, left(tensor, shape)) for tensor, shape in scan.cuts))


def _merge_heads_with_single_query(groups: Sequence[Group]) -> Iterator[Group]:
    """Replace head and KV-head groups with one query head per KV head by one group of heads, with their keys and
    values."""
    plain = {g.site for g in groups if g.kind == "heads" and g.per_block == 1}
    blocks = {g.site: g for g in groups if g.kind == "kv_heads"}
    for group in groups:
        if group.site not in plain or group.site not in blocks or group.kind == "channels":
            yield group
        elif group.kind == "heads":
            yield replace(blocks[group.site], kind="heads")
