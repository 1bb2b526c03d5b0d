"""Names of a recipe and what they stand for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.nearest import nearest_name, nearest_name_help
from ..syntax.source import Source, Span
from .recipe import Invocation
from .skeleton import Skeleton
from .vocabulary import Vocabulary

unknown_name = Fault("unknown-name", "A name is used that the recipe doesn't declare.")
duplicate_name = Fault("duplicate-name", "A name is declared twice; each stands for one thing.")
use_before_definition = Fault("use-before-definition", "A name is used above the line that declares it.")


class Poison:
    """Stands where a value would, after its fault was reported: whatever uses it stays silent."""


POISON = Poison()
LABELS = {
    "param": "a param",
    "model": "a model",
    "data": "data",
    "profile": "a profile",
    "pipeline": "a pipeline",
    "step": "a step",
    "module": "a module",
}


@dataclass
class ScopeEntry:
    """Entry of a name. `name` is that in the checked recipe: `mine.calib` of a module."""

    kind: str
    name: str
    span: Span
    value: Any = None  # param: its value; model, data: Invocation or None; profile: its entries
    node: Any = None  # param, pipeline: the syntax
    scope: "Scope | None" = None  # module: its names; pipeline: where its names are looked up
    used: bool = False


@dataclass
class CheckState:
    """One `check`: what it was given and what it has found so far."""

    vocabulary: Vocabulary
    library: Callable[[str], Source | None]
    skeleton: Callable[[Invocation], Skeleton | None]
    faults: list[Diagnostic] = field(default_factory=list)
    parsed: dict[str, ast.File | None] = field(default_factory=dict)  # modules by name
    open: list[str] = field(default_factory=list)  # modules being read, to see cycles
    module_count: int = 0  # modules so far, each as often as it is used
    overrides: Any = None
    unparsed: frozenset[str] = frozenset()  # names of declarations that the parser could not read
    broken: bool = False  # whether there is anything that it could not read

    def report(self, fault: Diagnostic) -> None:
        self.faults.append(fault)


@dataclass
class Variant:
    """The parts of a recipe under construction: what was declared, and what was reached in modules."""

    models: dict[str, Invocation] = field(default_factory=dict)
    data: dict[str, Invocation] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def entries_of_kind(self, kind: str) -> dict[str, Any]:
        tables: dict[str, dict[str, Any]] = {"model": self.models, "data": self.data, "profile": self.profiles}
        return tables[kind]

    def add_module_entry(self, entry: ScopeEntry, instance: str = "") -> str:
        """Take an entry of a module into the recipe; the name it has there.

        Two calls of one module with other params may make other data of one name: the later is then
        named after its step.
        """
        if entry.value is None or entry.kind not in ("model", "data", "profile"):
            return entry.name
        table = self.entries_of_kind(entry.kind)
        name = entry.name
        if table.setdefault(name, entry.value) != entry.value:
            name = f"{instance}.{name.rsplit('.', 1)[-1]}"
            table[name] = entry.value
        return name


@dataclass
class Scope:
    """Names declared so far; a pipeline has one of its own inside its file's.

    prefix     put before names that enter the recipe: "mine." in a module
    instance   the step that a module's pipeline is called by, "" outside of one
    later      names that lines further down declare
    arguments  param -> params.Argument: overrides, a point of the matrix, arguments of a call
    """

    session: CheckState
    variant: Variant
    parent: "Scope | None" = None
    prefix: str = ""
    instance: str = ""
    names: dict[str, ScopeEntry] = field(default_factory=dict)
    later: dict[str, Span] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    early: set[str] = field(default_factory=set)  # names used above their declaration

    def report(self, fault: Diagnostic) -> None:
        self.session.report(fault)

    def make_inner_scope(self, declared_later: dict[str, Span]) -> "Scope":
        return Scope(
            self.session, self.variant, self, self.prefix, self.instance, later=declared_later, early=self.early
        )

    def declare(self, name: ast.Name, entry: ScopeEntry) -> None:
        """Add a name; the first declaration stays where there are two."""
        if name.path == "":
            return  # the parser reported that it is missing
        if old := self.local_entry(name.path):
            self.report(
                duplicate_name(
                    f"`{name.path}` is declared twice",
                    name.span,
                    related=((old.span, f"{LABELS[old.kind]} of this name"),),
                    help="give one of them another name",
                )
            )
        else:
            self.names[name.path] = entry

    def local_entry(self, path: str) -> ScopeEntry | None:
        """The entry of a name without following modules."""
        return self.names.get(path) or (self.parent.local_entry(path) if self.parent else None)

    def resolve_name(self, path: str) -> ScopeEntry | None:
        """The entry of a name, `alias.name` in a module included; marks it as used."""
        entry = self.local_entry(path)
        if entry is None and "." in path:
            alias, _, remainder = path.partition(".")
            module = self.local_entry(alias)
            if module and module.kind == "module":
                module.used = True
                return module.scope.resolve_name(remainder) if module.scope else None
        if entry:
            entry.used = True
        return entry

    def is_in_unreadable_module(self, path: str) -> bool:
        """Whether a name lies in a module that could not be read: its fault was reported there."""
        module = self.local_entry(path.partition(".")[0])
        is_unread = module is not None and module.kind == "module" and module.scope is None
        if is_unread:
            module.used = True
        return is_unread

    def entries_by_usable_name(self) -> dict[str, ScopeEntry]:
        """Every name that may be used here, those of modules included."""
        out = self.parent.entries_by_usable_name() if self.parent else {}
        for name, entry in self.names.items():
            out[name] = entry
            if entry.kind == "module" and entry.scope:
                out |= {f"{name}.{n}": e for n, e in entry.scope.names.items()}
        return out

    def span_where_declared_later(self, path: str) -> Span | None:
        return self.later.get(path) or (self.parent.span_where_declared_later(path) if self.parent else None)

    def report_unknown_name(
        self,
        name: ast.Name,
        accepted_kinds: Iterable[str],
        other_words: Iterable[str] = (),
        noun: str = "name",
        is_string_accepted: bool = False,
        value_help: str = "",
    ) -> None:
        """Report a name that stands for nothing.

        accepted_kinds        of entries that would fit; the nearest of them is suggested
        other_words           names that are no entries, and would fit as well
        is_string_accepted    whether the name in quotes would do
        value_help            remedy where no name is near
        """
        if name.path == "" or self.is_in_unreadable_module(name.path) or name.path in self.session.unparsed:
            return
        if span := self.span_where_declared_later(name.path):
            self.early.add(name.path)
            self.report(
                use_before_definition(
                    f"`{name.path}` is used before it is declared",
                    name.span,
                    related=((span, "declared here"),),
                    help="move the declaration up",
                )
            )
            return
        accepted_kinds, known = tuple(accepted_kinds), self.entries_by_usable_name()
        fitting = [n for n, e in known.items() if e.kind in accepted_kinds]
        if entry := known.get(nearest_name(name.path, fitting)):
            entry.used = True  # or the typo would be reported a second time, as unused
        closest = nearest_name(name.path, [*fitting, *other_words])
        text = f'write `"{name.path}"`' if is_string_accepted else value_help
        self.report(
            unknown_name(
                f"no {noun} is called `{name.path}`",
                name.span,
                help=nearest_name_help(name.path, [*fitting, *other_words], "" if is_string_accepted else "there is")
                or text,
                offer=Fix(name.span, closest)
                if closest
                else Fix(name.span, f'"{name.path}"')
                if is_string_accepted
                else None,
            )
        )
