"""Pictures of models in text: the module tree as a person would draw it, and a layer's program."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....dsl.checker.skeleton import Branch, Group, Part, Skeleton
from .shrink import param_count

if TYPE_CHECKING:
    from torch import fx

    from ...ir.unit import Unit

_INLINED = ("size", "int")  # nodes of these types are written where they are used
_LABELLED_KINDS = ("opaque", "experts", "router", "ssm_scan", "ssm_conv")  # roles that a call's name may not show


# -- the tree ------------------------------------------------------------------------------------------------


@dataclass
class _Module:
    """A module of the tree. `n_copies` counts equal neighbours that are drawn as one."""

    name: str
    path: str
    part: Part | None = None
    children: list["_Module"] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    kind: str = ""
    tied: tuple[str, ...] = ()  # its tensors that another module owns, too, and that counted there
    n_copies: int = 1

    def get_or_add_child(self, name: str) -> "_Module":
        for known in self.children:
            if known.name == name:
                return known
        self.children.append(_Module(name, f"{self.path}.{name}" if self.path else name))
        return self.children[-1]

    def equality_key(self) -> Any:
        """Equal for modules that look the same but for their name."""
        return (
            self.kind,
            self.notes,
            self.tied,
            self.part and self.part.tensors,
            tuple((c.name, c.n_copies, c.equality_key()) for c in self.children),
        )

    def param_count(self) -> int:
        """Numbers that it holds, without those that are another module's, too."""
        tensors = self.part.tensors if self.part else ()
        total = sum(math.prod(shape) for name, shape in tensors if name not in self.tied)
        return total + sum(child.param_count() * child.n_copies for child in self.children)


def draw_skeleton(skeleton: Skeleton, *, width: int = 100) -> str:
    """The tree of modules with shapes, roles and groups; equal neighbours are drawn once.

    width   columns; longer lines end in an ellipsis
    """
    root = _module_tree(skeleton)
    rows = [row for i, child in enumerate(root.children) for row in _tree_rows(child, "", i + 1 == len(root.children))]
    kinds = max((len(row.kind) for row in rows if row.shape), default=0)
    cells = [(row.tree, f"{row.kind.ljust(kinds)}  {row.shape}" if row.shape else row.kind, row.count) for row in rows]
    sizes = [max((len(cell[i]) for cell in cells), default=0) for i in range(3)]
    lines = [_model_title(skeleton)]
    lines += [f"{tree.ljust(sizes[0])}  {role.ljust(sizes[1])}  {count.rjust(sizes[2])}" for tree, role, count in cells]
    lines += [f"{', '.join(same[1:])} is {same[0]}" for same in skeleton.tied] + unprunable_part_lines(skeleton)
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)


def _model_title(skeleton: Skeleton) -> str:
    facts = skeleton.facts
    parts = [f"{human_count(param_count(skeleton))} parameters"]
    parts += [f"{facts['layers']} layers"] if facts.get("layers") else []
    parts += [f"hidden {facts['hidden']}"] if facts.get("hidden") else []
    parts += [facts["dtype"]] if facts.get("dtype") else []
    return f"{skeleton.model_type}: {', '.join(parts)}"


def _module_tree(skeleton: Skeleton) -> _Module:
    root = _Module("", "")
    copies = {name for same in skeleton.tied for name in same[1:]}
    notes = _module_annotations(skeleton)
    kinds = dict.fromkeys(skeleton.units, skeleton.facts.get("layer_class") or "")
    for part in skeleton.parts:
        at = root
        for name in part.path.split(".") if part.path else ():
            at = at.get_or_add_child(name)
        at.part, at.kind = part, part.kind
        at.tied = tuple(name for name, _ in part.tensors if f"{part.path}.{name}" in copies)
    _annotate(root, notes, kinds)
    return _collapse_module_tree(root)


def _annotate(module: _Module, notes: dict[str, list[str]], type_by_path: dict[str, str]) -> None:
    module.notes = (*notes.get(module.path, ()), *module.notes)
    module.kind = module.kind or type_by_path.get(module.path, "")
    for child in module.children:
        _annotate(child, notes, type_by_path)


def _module_annotations(skeleton: Skeleton) -> dict[str, list[str]]:
    """Annotations of a module: the role of its branch and its groups."""
    notes: dict[str, list[str]] = {}
    for branch in skeleton.branches:
        notes.setdefault(branch.site, []).append(_role(branch, skeleton))
    for group in skeleton.groups:
        text = group_text(group, skeleton)
        if text:
            notes.setdefault(group.site, []).append(text)
    return {site: [": ".join(texts[:2]), *texts[2:]] for site, texts in notes.items()}


def _role(branch: Branch, skeleton: Skeleton) -> str:
    beside = [b for b in skeleton.branches if b.unit == branch.unit and b.join == branch.join]
    return f"{branch.role}, parallel" if len(beside) > 1 else branch.role


def group_text(group: Group, skeleton: Skeleton) -> str:
    """A group in words; "" where another group says it better."""
    if group.kind == "channels":
        return f"{group.count} channels"
    size = sum(size for _, size in group.members[-1].segments)
    if group.kind == "heads" and not group.per_block:
        return f"{group.count} heads of {size}"
    if group.kind == "heads":
        return f"{group.count} heads of {size} in {group.count // group.per_block} KV groups"
    return (
        "" if any(g.kind == "heads" and g.site == group.site for g in skeleton.groups) else (f"{group.count} KV groups")
    )


def _collapse_module_tree(module: _Module) -> _Module:
    """Equal numbered neighbours become one: `0..29`."""
    children: list[_Module] = []
    for child in map(_collapse_module_tree, module.children):
        last = children[-1] if children else None
        if (
            last
            and child.name.isdigit()
            and _has_next_index(last, child)
            and last.equality_key() == child.equality_key()
        ):
            last.name, last.n_copies = f"{last.name.split('..')[0]}..{child.name}", last.n_copies + 1
        else:
            children.append(child)
    module.children = children
    if len(children) == 1 and module.part is None and module.name and not module.notes and module.n_copies == 1:
        only = children[0]
        only.name = f"{module.name}.{only.name}"
        return only
    return module


def _has_next_index(previous: _Module, child: _Module) -> bool:
    end = previous.name.split("..")[-1]
    return end.isdigit() and int(end) + 1 == int(child.name)


@dataclass(frozen=True)
class _Row:
    tree: str
    kind: str
    shape: str
    count: str


def _tree_rows(module: _Module, indent: str, is_last: bool) -> Iterator[_Row]:
    """The line of a module and those of what lies below it."""
    kind = f"{module.kind} x{module.n_copies}" if module.n_copies > 1 else module.kind
    kind = ", ".join(x for x in (kind.strip(), *module.notes) if x)
    count = "tied" if module.tied and not module.param_count() else human_count(module.param_count())
    count = count if module.n_copies == 1 else f"{module.n_copies} x {count}"
    tree = f"{indent}{'└─ ' if is_last else '├─ '}{module.name}"
    yield _Row(tree, kind, _shape_text(module.part) if module.part else "", count)
    inner_indent = indent + ("   " if is_last else "│  ")
    for i, child in enumerate(module.children):
        yield from _tree_rows(child, inner_indent, i + 1 == len(module.children))


def _shape_text(part: Part) -> str:
    """`64 x 64`, with the names of what is no plain weight."""
    parts = []
    for name, shape in part.tensors:
        sizes = " x ".join(map(str, shape)) or "scalar"
        parts.append(sizes if name == "weight" else name if name == "bias" else f"{name} {sizes}")
    return " + ".join(parts)


def unprunable_part_lines(skeleton: Skeleton) -> list[str]:
    """Parts that no pass changes, with the reason: modules that can't be narrowed, and those that are one node of a
    graph."""
    lines: list[str] = []
    reasons: dict[str, list[str]] = {}
    for path, reason in skeleton.facts.get("refused", ()):
        reasons.setdefault(f"can't be narrowed: {reason}", []).append(path)
    for path, reason in skeleton.opaque:
        reasons.setdefault(f"opaque: {reason}", []).append(path)
    for reason, paths in reasons.items():
        further = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"{paths[0]}{further} {reason}")
    return lines


def human_count(count: int) -> str:
    """A count in three digits: 960, 8.19 k, 134 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit * 0.9995:
            scaled = count / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return str(count)


# -- a layer's program ---------------------------------------------------------------------------------------


def unit_as_code(unit: "Unit") -> str:
    """The program of a unit, one line per step, with the shapes that it had in the captured run."""
    texts: dict[Any, str] = {}
    lines: list[tuple[str, str]] = []
    for node in unit.graph.nodes:
        if node.op == "output":
            lines.append((f"return {_argument_text(node.args[0], texts)}", ""))
        elif node.op == "get_attr" or node.meta.get("dtype") in _INLINED:
            texts[node] = _node_expression(node, texts)
        elif _is_getitem(node):
            texts[node] = _getitem_expression(node, texts)
        else:
            texts[node] = node.name
            if node.op != "placeholder":
                lines.append((f"{_result_names(node)} = {_node_expression(node, texts)}", _comment(node)))
    column = min(max(len(text) for text, _ in lines), 64)
    head = f"{unit.path or 'model'}({', '.join(unit.placeholders)})"
    return "\n".join([head, *(f"    {text.ljust(column)}  {comment}".rstrip() for text, comment in lines)])


def _is_getitem(node: "fx.Node") -> bool:
    """Whether a node only takes one of several results."""
    if node.op != "call_function" or node.target.__name__ != "getitem":
        return False
    return isinstance(node.args[1], int) and isinstance(node.args[0].meta.get("dtype"), tuple)


def _result_names(node: "fx.Node") -> str:
    """The names that a node's results are given: of several, those that are used."""
    if not _all_users_are_getitem(node):
        return node.name
    used = {user.args[1] for user in node.users}
    return ", ".join(f"{node.name}_{i}" if i in used else "_" for i in range(len(node.meta["dtype"])))


def _all_users_are_getitem(node: "fx.Node") -> bool:
    """Whether each of a node's results goes its own way."""
    return (
        node.op != "placeholder"
        and isinstance(node.meta.get("dtype"), tuple)
        and bool(node.users)
        and all(map(_is_getitem, node.users))
    )


def _getitem_expression(node: "fx.Node", texts: dict[Any, str]) -> str:
    source: Any = node.args[0]
    return f"{source.name}_{node.args[1]}" if _all_users_are_getitem(source) else _node_expression(node, texts)


def _comment(node: "fx.Node") -> str:
    shape, role = node.meta.get("shape"), node.meta.get("role", "")
    return " ".join(x for x in (_tensor_shape_text(shape), role if role in _LABELLED_KINDS else "") if x)


def _tensor_shape_text(shape: Any) -> str:
    if not shape:
        return ""
    if all(isinstance(n, int) for n in shape):
        return f"[{', '.join(map(str, shape))}]"
    return ", ".join(filter(None, map(_tensor_shape_text, shape)))


def _called(node: "fx.Node") -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


def _node_expression(node: "fx.Node", texts: dict[Any, str]) -> str:
    args = [_argument_text(x, texts) for x in node.args]
    if node.op == "call_method" and len(args) == 2 and isinstance(node.args[1], tuple):
        args = [args[0], *(_argument_text(x, texts) for x in node.args[1])]  # view((a, b)) is view(a, b)
    named = [f"{key}={_argument_text(x, texts)}" for key, x in node.kwargs.items()]
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join(args + named)})"
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:] + named)})"
    name = _called(node)
    if name == "getattr":
        return f"{args[0]}.{node.args[1]}"
    if name == "getitem":
        prefix, from_front = args[0].removesuffix("]").rpartition("[:-")[::2]
        if prefix and from_front.isdigit() and isinstance(node.args[1], int) and node.args[1] >= 0:
            return f"{prefix}[{node.args[1]}]"  # x.shape[:-1][0]
        inner = args[1][1:-1] if isinstance(node.args[1], tuple) else args[1]
        return f"{args[0]}[{inner.rstrip(',')}]"
    if name in _INFIX and len(args) == 2:
        return f"{args[0]} {_INFIX[name]} {args[1]}"
    return f"{name}({', '.join(args + named)})"


_INFIX = {"add": "+", "iadd": "+", "sub": "-", "mul": "*", "imul": "*", "truediv": "/", "floordiv": "//"}


def _argument_text(value: Any, texts: dict[Any, str]) -> str:
    """An argument as a person would type it."""
    if value in texts if not isinstance(value, (list, dict, slice, tuple)) else False:
        return texts[value]
    if isinstance(value, slice):
        limits = ["" if x is None else _argument_text(x, texts) for x in (value.start, value.stop)]
        return ":".join(limits)
    if value is ...:
        return "..."
    if isinstance(value, tuple):
        return f"({', '.join(_argument_text(x, texts) for x in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(_argument_text(x, texts) for x in value)}]"
    return repr(value)


def unit_as_dot(unit: "Unit") -> str:
    """The data flow of a unit for Graphviz: sizes and settings left out."""
    visible = {n for n in unit.graph.nodes if n.op != "get_attr" and n.meta.get("dtype") not in _INLINED}
    lines = [f'digraph "{unit.path or "model"}" {{', "  node [shape=box, fontname=monospace];"]
    for node in unit.graph.nodes:
        if node in visible:
            label = node.name if node.op in ("placeholder", "output") else _called(node)
            sizes = _tensor_shape_text(node.meta.get("shape"))
            lines.append(f'  {node.name} [label="{label}{chr(92) + "n" + sizes if sizes else ""}"];')
            lines += [f"  {x.name} -> {node.name};" for x in node.all_input_nodes if x in visible]
    return "\n".join([*lines, "}"])
