"""`use`: names of another file, from the recipe library or beside the recipe."""

from dataclasses import replace
from posixpath import dirname, join, normpath

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Reject
from ..syntax.source import Span
from .package_paths import paths_outside_package
from .scope import Scope, ScopeEntry

unknown_module = Fault("unknown-module", "A `use` names a file that isn't there.")
circular_use = Fault("circular-use", "A file uses itself, directly or through others.")
foreign_module = Fault(
    "foreign-module",
    "A `use` names a file outside the recipe's folder, and the file is no recipe.\n\n"
    "Nothing of such a file is shown: whoever wrote the recipe may not be allowed to read it.",
)
too_many_modules = Fault(
    "too-many-modules",
    "A recipe uses modules that use modules, more than 2,000 times in all.\n\n"
    "Each `use`, and each call of a module's pipeline, has names of its own, so that a file that two others use counts "
    "twice.",
)
_MAX_VALUE = 2000
nameless_module = Fault("nameless-module", "A `use` of a path gives the module no name.")


def declare_used_module(node: ast.Use, scope: Scope, file_name: str) -> None:
    """Add the module that a line names. `file_name` is the name of the file that the line stands in."""
    alias = node.alias or _name_node_without_alias(node)
    if alias is None:
        scope.report(
            nameless_module(
                "the module has no name here", node.target.span, help=f"write `use {node.target.span.text} as name`"
            )
        )
        return
    entry = ScopeEntry("module", alias.path, alias.span)
    scope.declare(alias, entry)
    name = resolved_module_name(node.target, file_name)
    if file := _parse_module(node, name, scope):
        entry.node = file
        entry.scope = instantiate_module(file, scope, alias.path, {}, "")


def resolved_module_name(target: ast.Name | ast.Text, using_file_name: str) -> str:
    """`std.text` as it is; a path relative to the file that uses it."""
    return target.path if isinstance(target, ast.Name) else normpath(join(dirname(using_file_name), target.value))


def not_a_recipe_diagnostic(span: Span | None, name: str) -> Diagnostic:
    """Diagnostic for a file outside the recipe's folder that is no recipe; it quotes nothing of the file."""
    return foreign_module(
        f"{name} lies outside the recipe's folder, and is no recipe",
        span,
        help="copy the module into the recipe's folder, or check it by its own path",
    )


def _name_node_without_alias(node: ast.Use) -> ast.Name | None:
    """`std.text` is called `text`."""
    if isinstance(node.target, ast.Text):
        return None
    last = node.target.path.rsplit(".", 1)[-1]
    return ast.Name(last, span=node.target.span)


def _parse_module(node: ast.Use, name: str, scope: Scope) -> ast.File | None:
    session = scope.session
    if name not in session.parsed and name not in session.open:
        try:
            source = session.library(name)
        except Reject as error:  # a package that is gone, or is another
            session.faults += [d.at(node.target.span) for d in error.diagnostics]
            session.parsed[name] = None
            return None
        if source is None:
            scope.report(
                unknown_module(f"there is no {name}", node.target.span, help=_module_path_help(node.target, name))
            )
            session.parsed[name] = None
        else:
            from ..syntax.parse import parse

            parsed = parse(source)
            if source.foreign and any(d.severity == "error" for d in parsed.diagnostics):
                scope.report(not_a_recipe_diagnostic(node.target.span, name))
                session.parsed[name] = None
            else:
                session.faults += [*parsed.diagnostics, *paths_outside_package(parsed.file)]
                session.parsed[name] = parsed.file
    file = session.parsed.get(name)
    path = file.source.name if file else name  # `std.text` is open under its path
    if path in session.open:
        chain = " -> ".join([*session.open[session.open.index(path) :], path])
        scope.report(
            circular_use(f"the use is circular: {chain}", node.target.span, help="move what both need to a third file")
        )
        return None
    return file


def instantiate_module(file: ast.File, scope: Scope, alias: str, arguments: dict, instance: str) -> Scope:
    """The names of a module's file, under `alias.`; `arguments` sets its params."""
    from .declare import declare_names_in_order

    session = scope.session
    inner = Scope(session, scope.variant, prefix=f"{scope.prefix}{alias}.", instance=instance, arguments=arguments)
    session.module_count += 1
    if session.module_count > _MAX_VALUE:
        if session.module_count == _MAX_VALUE + 1:
            fewer = "use each file once, where its names are needed"
            scope.report(
                too_many_modules(f"modules are used {_MAX_VALUE} times already", Span(file.source, 0, 0), help=fewer)
            )
        return inner
    session.open.append(file.source.name)
    declare_names_in_order(file, inner)
    session.open.pop()
    return inner


def module_call_arguments(call: ast.Call, file: ast.File, scope: Scope) -> dict | None:
    """Arguments of a call to a module's pipeline as values of its params; None where one is wrong."""
    from ..syntax.nearest import nearest_name_help
    from .calls import unknown_parameter
    from .params import Argument, param_of_declaration
    from .scope import POISON
    from .typed import typed_value

    params = {s.name.path: s for s in file.statements if isinstance(s, ast.Param)}
    out, sound = {}, True
    for arg in call.args:
        if arg.name == "from":
            continue
        node = params.get(arg.name)
        if node is None:
            message = f"has no param `{arg.name}`" if arg.name else "takes its params by name"
            scope.report(
                unknown_parameter(
                    f"`{call.name.path}` {message}",
                    arg.name_span or arg.span,
                    help=nearest_name_help(arg.name, params, "it has"),
                )
            )
            sound = False
        elif param := param_of_declaration(node):
            value = typed_value(arg.value, replace(param, name=arg.name), scope)
            sound &= value is not POISON
            out[arg.name] = Argument(value, arg.value.span, "call")
    return out if sound else None


def _module_path_help(target: ast.Text | ast.Name, name: str) -> str:
    """Expected path of a module of this name."""
    if isinstance(target, ast.Text):
        return "a path is relative to the file that uses it"
    if name.startswith("std."):
        return "`effc recipes` lists the library"
    return f"names of the library begin with `std.`; `effc add` brings a package such as `{name.partition('.')[0]}`"
