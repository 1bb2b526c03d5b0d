"""Recipes written in Python: the same syntax tree, and the same text, as a recipe file.

    r = recipe("Prune SmolLM2, keep it as good")
    base = r.model("base", call("hf", "./ckpt"))
    heldout = r.data("heldout", call("text", "heldout.txt", length=512))
    lean = r.pipeline("lean", base)
    slim = lean.step("slim", "prune.blocks", remove=4, score=call("perplexity", heldout))
    mlps = select("*.mlp") - "layers.0.*"
    lean.step("thin", "prune.channels", on=mlps, keep=percent(85).of("channels"), from_=slim)
    lean.expect("perplexity(heldout) <= 1.15 * base")
    lean.emit(call("hf", "hf"))
    Path("slim.effspec").write_text(str(r))

Python numbers, strings, booleans and lists stand for themselves, a dict for named shares; what was declared
or made by a step is a handle. An argument whose name Python keeps for itself takes a trailing underscore:
`from_=slim`.
"""

from dataclasses import dataclass, field

from . import ast
from .diagnostics import Reject
from .edition import EDITION
from .format import format_file
from .json_form import json_form, reparse_canonical_text
from .parse import parse
from .source import Source, Span

_NAME = "recipe.py"
_NOWHERE = Span(Source(_NAME, ""), 0, 0)


@dataclass(frozen=True)
class Value:
    """A value of the language. `|`, `-` and `&` join selectors."""

    node: ast.Expr

    def of(self, base: str) -> "Value":
        """A share: `percent(85).of("channels")` is `85% of channels`."""
        return Value(ast.Of(self.node, _name_node(base), span=_NOWHERE))

    def to(self, high) -> "Value":
        """A range: `percent(60).to(percent(100))` is `60%..100%`."""
        return Value(ast.Interval(self.node, _to_node(high), span=_NOWHERE))

    def allow_empty(self) -> "Value":
        """The selector, though it may match nothing."""
        return Value(ast.AllowEmpty(self.node, span=_NOWHERE))

    def __or__(self, other) -> "Value":
        return Value(ast.Combine("|", self.node, _to_node(other), span=_NOWHERE))

    def __sub__(self, other) -> "Value":
        return Value(ast.Combine("-", self.node, _to_node(other), span=_NOWHERE))

    def __and__(self, other) -> "Value":
        return Value(ast.Combine("&", self.node, _to_node(other), span=_NOWHERE))

    def __str__(self) -> str:
        from .write import expression_text

        return expression_text(self.node)


def call(plugin_name: str, *args, **named) -> Value:
    """`call("text", "calib.txt", length=512)` is `text("calib.txt", length: 512)`."""
    return Value(_call_node(plugin_name, args, named))


def name(path: str) -> Value:
    """A name that is not a handle: `name("avx512_bf16")`."""
    return Value(_name_node(path))


def select(pattern: str) -> Value:
    """A selector, to join with others: `select("*.mlp") - "layers.0.*"`."""
    return Value(ast.Text(pattern, span=_NOWHERE))


def literal(text: str) -> Value | None:
    """Value that a text is in a recipe: `literal("15% of params")`. None where it is none."""
    parsed = parse(Source(_NAME, f"effspec {EDITION} data x = f({text}\n)"))
    match parsed.file.statements:
        case (ast.Declare(call=ast.Call(args=(ast.Arg("", value),))),) if not parsed.diagnostics:
            return Value(value)
    return None


def quantity(value: int | float, unit: str) -> Value:
    """`quantity(24, "GiB")` is `24GiB`."""
    return Value(ast.Number(repr(value), unit, span=_NOWHERE))


def percent(value: int | float) -> Value:
    """`percent(85)` is `85%`."""
    return quantity(value, "%")


def recipe(doc: str = "") -> "Recipe":
    return Recipe(doc)


@dataclass
class Recipe:
    """Statements in the order they are made in. `str()` is the canonical text, `file` the syntax tree."""

    doc: str = ""
    statements: list = field(default_factory=list)

    def use(self, target: str, alias: str = "") -> None:
        """A module of the recipe library by its dotted name, or a file by its path."""
        is_path = "/" in target or target.endswith(".effspec")
        node = ast.Text(target, span=_NOWHERE) if is_path else _name_node(target)
        self.statements.append(ast.Use(node, _name_node(alias) if alias else None, span=_NOWHERE))

    def param(self, param_name: str, type: str, default, within=None, doc: str = "") -> Value:
        """`within` is a range, `percent(60).to(percent(100))`, or a list of the values allowed."""
        bounds = None if within is None else _to_node(within)
        sentence = ast.Text(doc, span=_NOWHERE) if doc else None
        self.statements.append(
            ast.Param(_name_node(param_name), _name_node(type), _to_node(default), bounds, sentence, span=_NOWHERE)
        )
        return name(param_name)

    def model(self, model_name: str, source: Value) -> Value:
        return self._declare("model", model_name, source)

    def data(self, data_name: str, source: Value) -> Value:
        return self._declare("data", data_name, source)

    def _declare(self, kind: str, declared_name: str, source: Value) -> Value:
        self.statements.append(ast.Declare(kind, _name_node(declared_name), _to_node(source), span=_NOWHERE))
        return name(declared_name)

    def profile(self, profile_name: str, **entries) -> Value:
        self.statements.append(ast.Profile(_name_node(profile_name), _entry_nodes(entries), span=_NOWHERE))
        return name(profile_name)

    def matrix(self, **entries) -> None:
        self.statements.append(ast.Matrix(_entry_nodes(entries), span=_NOWHERE))

    def pipeline(self, pipeline_name: str, model: Value, doc: str = "") -> "Pipeline":
        pipeline = Pipeline(pipeline_name, model, doc)
        self.statements.append(pipeline)
        return pipeline

    @property
    def file(self) -> ast.File:
        """The syntax tree, with places in its canonical text. Raises Reject for what no recipe can say."""
        return reparse_canonical_text(self._file(), _NAME)

    def __str__(self) -> str:
        return format_file(self.file)

    def _file(self) -> ast.File:
        nodes = [n for s in self.statements for n in (s.statement_nodes() if isinstance(s, Pipeline) else [s])]
        doc = ast.Text(self.doc, span=_NOWHERE) if self.doc else None
        return ast.File(_NOWHERE.source, EDITION, doc, tuple(nodes))


@dataclass
class Pipeline:
    """Steps, and what is expected and emitted of their result."""

    name: str
    model: Value
    doc: str = ""
    steps: list[ast.Step] = field(default_factory=list)
    bounds: list[ast.Bound] = field(default_factory=list)
    targets: list[ast.Call] = field(default_factory=list)

    def step(self, step_name: str, pass_call: str | Value, *args, **named) -> Value:
        """`step("slim", "prune.blocks", remove=4)` is `slim = prune.blocks(remove: 4)`; or such a call."""
        body = pass_call.node if isinstance(pass_call, Value) else _call_node(pass_call, args, named)
        self.steps.append(ast.Step(_name_node(step_name), body, span=_NOWHERE))
        return name(step_name)

    def expect(self, *bounds: str) -> None:
        """Bounds as a recipe writes them: `expect("params <= 0.8 * base on zen4")`."""
        for text in bounds:
            parsed = parse(Source(_NAME, f"effspec {EDITION} expect x {{ {text} }}"))
            if parsed.diagnostics:
                raise Reject(*parsed.diagnostics)
            statement, *extra = parsed.file.statements
            if extra:
                raise json_form("a bound holds a whole statement", extra[0].span).rejection()
            self.bounds += statement.bounds

    def emit(self, *targets: Value) -> None:
        self.targets += [_to_node(target) for target in targets]

    def statement_nodes(self) -> list:
        sentence = ast.Text(self.doc, span=_NOWHERE) if self.doc else None
        statements = [
            ast.Pipeline(_name_node(self.name), _to_node(self.model), sentence, tuple(self.steps), span=_NOWHERE)
        ]
        if self.bounds:
            statements.append(ast.Expect(_name_node(self.name), tuple(self.bounds), span=_NOWHERE))
        if self.targets:
            statements.append(ast.Emit(_name_node(self.name), tuple(self.targets), span=_NOWHERE))
        return statements


def _name_node(path: str) -> ast.Name:
    return ast.Name(path, span=_NOWHERE)


def _entry_nodes(entries: dict) -> tuple[ast.Entry, ...]:
    return tuple(ast.Entry(_name_node(word), _to_node(value), span=_NOWHERE) for word, value in entries.items())


def _call_node(plugin_name: str, args: tuple, named: dict) -> ast.Call:
    arguments = [ast.Arg("", _to_node(value), span=_NOWHERE) for value in args]
    arguments += [ast.Arg(key.removesuffix("_"), _to_node(value), span=_NOWHERE) for key, value in named.items()]
    return ast.Call(_name_node(plugin_name), tuple(arguments), span=_NOWHERE)


def _to_node(value) -> ast.Expr:
    """A Python value as a node."""
    match value:
        case Value():
            return value.node
        case bool():
            return ast.Bool(value, span=_NOWHERE)
        case int() | float():
            return ast.Number(repr(value), span=_NOWHERE)
        case str():
            return ast.Text(value, span=_NOWHERE)
        case list() | tuple():
            return ast.Items(tuple(_to_node(item) for item in value), span=_NOWHERE)
        case dict() if all(isinstance(word, str) for word in value):
            return ast.Pairs(_entry_nodes(value), span=_NOWHERE)
    raise json_form(
        f"a recipe holds no {type(value).__name__}",
        help="numbers, strings, booleans, lists, dicts by name and what this module makes",
    ).rejection()
