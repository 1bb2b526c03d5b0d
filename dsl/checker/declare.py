"""The declarations of a file, in order: `use`, `param`, `model`, `data`, `profile`, `pipeline`."""

from collections.abc import Callable

from ..syntax import ast
from ..syntax.diagnostics import Fault, Fix
from ..syntax.nearest import nearest_name, nearest_name_help
from ..syntax.source import Span
from . import profiles
from .calls import check_plugin_call
from .modules import declare_used_module
from .params import declare_param
from .scope import POISON, Scope, ScopeEntry, duplicate_name
from .typed import typed_value
from .vocabulary import Param

unknown_key = Fault("unknown-key", "A profile says something that profiles don't have.")


def declare_names_in_order(
    file: ast.File, scope: Scope, after_each_statement: Callable[[ast.Statement], None] = lambda _: None
) -> None:
    """Add every name of a file to the scope; `after_each_statement` sees each statement with the names known then."""
    scope.later = {name.path: name.span for s in file.statements if (name := declared_name(s))}
    for statement in file.statements:
        if name := declared_name(statement):
            scope.later.pop(name.path, None)
        _declare_statement_name(statement, scope, file)
        after_each_statement(statement)


def declared_name(statement: ast.Statement) -> ast.Name | None:
    """The name that a statement declares."""
    if isinstance(statement, (ast.Param, ast.Declare, ast.Profile, ast.Pipeline)):
        return statement.name
    return None


def _declare_statement_name(statement: ast.Statement, scope: Scope, file: ast.File) -> None:
    match statement:
        case ast.Use():
            declare_used_module(statement, scope, file.source.name)
        case ast.Param():
            declare_param(statement, scope)
        case ast.Declare(kind, name, call):
            _, invocation = check_plugin_call(kind, call, scope)
            _declare_entry(ScopeEntry(kind, scope.prefix + name.path, name.span, invocation, statement), name, scope)
        case ast.Profile(name, entries):
            _declare_entry(
                ScopeEntry("profile", scope.prefix + name.path, name.span, _read_profile_entries(entries, scope)),
                name,
                scope,
            )
        case ast.Pipeline(name):
            scope.declare(name, ScopeEntry("pipeline", scope.prefix + name.path, name.span, None, statement, scope))


def _declare_entry(entry: ScopeEntry, name: ast.Name, scope: Scope) -> None:
    """Define a name; what the recipe itself declares is a part of it, what a module declares once reached."""
    scope.declare(name, entry)
    if not scope.prefix and entry.value is not None and scope.names.get(name.path) is entry:
        scope.variant.entries_of_kind(entry.kind)[entry.name] = entry.value


def _read_profile_entries(entries: tuple[ast.Entry, ...], scope: Scope) -> dict:
    out = {}
    spans: dict[str, Span] = {}
    for entry in entries:
        name = entry.name.path
        param: Param | None = profiles.profile_key_param(name)
        if param is None:
            known = [k.name for k in profiles.KEYS]
            closest = nearest_name(name, known)
            scope.report(
                unknown_key(
                    f"a profile has no `{name}`",
                    entry.name.span,
                    help=nearest_name_help(name, known, "it has"),
                    fix=Fix(entry.name.span, closest) if closest else None,
                )
            )
        elif name in spans:
            scope.report(
                duplicate_name(
                    f"`{name}` is given twice",
                    entry.name.span,
                    related=((spans[name], "the first"),),
                    help="drop one of them",
                )
            )
        else:
            spans[name] = entry.name.span
            value = typed_value(entry.value, param, scope)
            if value is not POISON:
                out[name] = value
    return out
