"""`param` lines, their values from outside, and `matrix`."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault
from ..syntax.nearest import nearest_name_help
from ..syntax.source import Span
from .limits import is_allowed_or_report
from .literals import InvalidLiteral, parse_range_limits
from .overrides import Override, incompatible_override, unknown_override
from .scope import POISON, CheckState, Scope, ScopeEntry, Variant, unknown_name, use_before_definition
from .typed import typed_value
from .value_text import plain_value_text
from .vocabulary import Param

unknown_type = Fault("unknown-type", "A `param` has a type that the language doesn't know.")
invalid_matrix = Fault("bad-matrix", "A `matrix` gives a param no list of values, or one twice.")
matrix_too_large = Fault("matrix-too-large", "A `matrix` expands into more variants than the language allows.")

TYPES = ("int", "float", "ratio", "bytes", "duration", "string", "bool", "choice", "selector", "shares")
HANDLES = {"data": "data", "metric": "a metric"}  # a recipe gives these to a module, nothing outside can
MAX_VARIANTS = 64  # variants of one recipe


@dataclass(frozen=True)
class Argument:
    """A value for a param from elsewhere: an override, a matrix or the arguments of a call."""

    value: Any
    span: Span
    origin: str
    usage: bool = False  # from the command line: its faults are the caller's, not the recipe's


def declare_param(node: ast.Param, scope: Scope) -> None:
    """Add a param with its value: the one given from elsewhere, else its default."""
    name = node.name.path
    entry = ScopeEntry("param", name, node.name.span, POISON, node)
    scope.declare(node.name, entry)
    param = param_of_declaration(node, scope)
    if param is None:
        return
    bounds = _allowed_range_or_values(node, param, scope)
    argument = scope.arguments.get(name)
    if argument is None:
        argument = Argument(typed_value(node.default, param, scope), node.default.span, "recipe")
    if bounds is POISON or argument.value is POISON:
        return
    faults: list[Diagnostic] = []
    declared = node.bounds.span if node.bounds else node.span
    if is_allowed_or_report(argument.value, bounds, name, argument.span, faults.append, declared):
        entry.value = argument.value
        scope.origins[name] = argument.origin
    for fault in faults:
        scope.report(replace(fault, fault=incompatible_override) if argument.usage else fault)


def param_of_declaration(node: ast.Param, scope: Scope | None = None) -> Param | None:
    """Declared type of a param; None for an unknown type, reported where a scope is passed."""
    name = node.type.path
    if name not in (*TYPES, *HANDLES):
        if scope and name:
            scope.report(
                unknown_type(
                    f"no type is called `{name}`",
                    node.type.span,
                    help=nearest_name_help(name, [*TYPES, *HANDLES], "types"),
                )
            )
        return None
    choices: tuple[str, ...] = ()
    if name == "choice" and isinstance(node.bounds, ast.Items):
        choices = tuple(
            i.path if isinstance(i, ast.Name) else i.value
            for i in node.bounds.items
            if isinstance(i, (ast.Name, ast.Text))
        )
    return Param(node.name.path, (name,), node.doc.value if node.doc else "", choices=choices, lines=True)


def _allowed_range_or_values(node: ast.Param, param: Param, scope: Scope) -> Any:
    """The range or the values that a declaration allows, typed as the param; None where it says nothing."""
    match node.bounds:
        case None:
            return None
        case ast.Items(items):
            values = tuple(typed_value(i, param, scope) for i in items)
            return POISON if POISON in values else values
        case ast.Interval(low, high):
            limits = [typed_value(e, param, scope) for e in (low, high)]
            if POISON in limits:
                return POISON
            try:
                return parse_range_limits(node.bounds, *limits)
            except InvalidLiteral as error:
                scope.report(error.diagnostic)
    return POISON


def param_arguments_of_variants(file: ast.File, session: CheckState) -> list[dict[str, Argument]]:
    """Arguments of each variant's params: overrides for all of them, and one point of the matrix."""
    params = {s.name.path: s for s in file.statements if isinstance(s, ast.Param)}
    fixed: dict[str, Argument] = {}
    for override in session.overrides.by_name.values():
        if (node := params.get(override.name)) is None:
            session.report(
                unknown_override(
                    f"the recipe has no param `{override.name}`",
                    override.name_span,
                    help=nearest_name_help(override.name, params, "it has"),
                )
            )
        elif node.type.path in HANDLES:
            session.report(
                incompatible_override(
                    f"`{override.name}` is {HANDLES[node.type.path]} of the recipe, which nothing outside of it has",
                    override.name_span,
                    help="change the recipe",
                )
            )
        elif param := param_of_declaration(node):
            fixed[override.name] = _typed_override(override, param, session)
    axes = _matrix_values_by_param(file, params, session)
    free = {name: values for name, values in axes.items() if name not in fixed}
    size = 1
    for values in free.values():
        size *= len(values)
    if size > MAX_VARIANTS:
        matrix_span = next(s.span for s in file.statements if isinstance(s, ast.Matrix))
        session.report(
            matrix_too_large(
                f"the matrix makes {size} variants, the limit is {MAX_VARIANTS}",
                matrix_span,
                help="split the recipe, or fix a param with `--set`",
            )
        )
        free = {name: values[:1] for name, values in free.items()}
    return [fixed | dict(zip(free, point, strict=True)) for point in product(*free.values())]


def variant_name(arguments: dict[str, Argument]) -> str:
    """`keep=80%,align=32`: the params that the matrix sets."""
    return ",".join(f"{name}={plain_value_text(g.value)}" for name, g in arguments.items() if g.origin == "matrix")


def _typed_override(override: Override, param: Param, session: CheckState) -> Argument:
    """An override with its type; its faults are those of the command line."""
    scratch = replace(session, faults=[])
    expr = override.value
    if param.types == ("string",) and not isinstance(expr, ast.Text):
        expr = ast.Text(expr.span.text.strip(), span=expr.span)
    value = typed_value(expr, param, Scope(scratch, Variant()))
    for fault in scratch.faults:
        session.report(replace(fault, fault=incompatible_override, fix=None))
    return Argument(value, expr.span, override.origin, usage=True)


def _matrix_values_by_param(
    file: ast.File, params: dict[str, ast.Param], session: CheckState
) -> dict[str, list[Argument]]:
    """The values that the matrix gives to each param."""
    axes: dict[str, list[Argument]] = {}
    scope = Scope(session, Variant())
    for entry in (e for s in file.statements if isinstance(s, ast.Matrix) for e in s.entries):
        name, node = entry.name.path, params.get(entry.name.path)
        if node is None:
            if name:
                session.report(
                    unknown_name(
                        f"no param is called `{name}`",
                        entry.name.span,
                        help=nearest_name_help(name, params, "there is")
                        or f"declare it above, as in `param {name}: ratio = 85%`, and use it in a step",
                    )
                )
            continue
        if node.span.start > entry.span.start:
            session.report(
                use_before_definition(
                    f"`{name}` is used before it is declared",
                    entry.name.span,
                    related=((node.name.span, "declared here"),),
                    help="move the declaration up",
                )
            )
        if node.type.path in HANDLES:
            session.report(
                invalid_matrix(
                    f"`{name}` is {HANDLES[node.type.path]}, a matrix varies values",
                    entry.span,
                    help="write a pipeline for each",
                )
            )
        elif name in axes or not isinstance(entry.value, ast.Items) or not entry.value.items:
            message = "stands twice in the matrix" if name in axes else "has no list of values"
            session.report(invalid_matrix(f"`{name}` {message}", entry.span, help=f"write `{name}: [...]` once"))
        elif param := param_of_declaration(node):
            values = [(typed_value(i, param, scope), i.span) for i in entry.value.items]
            axes[name] = [Argument(v, span, "matrix") for v, span in values if v is not POISON]
            _report_equal_values(name, axes[name], session)
    return {name: values for name, values in axes.items() if values}


def _report_equal_values(name: str, values: list[Argument], session: CheckState) -> None:
    """Two variants of one value would be the same, in one folder."""
    for i, one in enumerate(values):
        if any(one.value == other.value for other in values[:i]):
            message = f"`{plain_value_text(one.value)}` stands twice among the values of `{name}`"
            session.report(invalid_matrix(message, one.span, help="drop one of them"))
