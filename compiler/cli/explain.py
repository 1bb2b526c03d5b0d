"""`effc explain`: the page of a word, or of a fault by its slug. Reads sources and the manual, no torch."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...dsl.checker.rules import Conflict, MissingStep, Rules, Unread
from ...dsl.checker.type_phrases import expected_phrase, sample_value_text
from ...dsl.checker.value_text import plain_value_text, value_text
from ...dsl.checker.values import Bytes, Duration, MetricRef, Ratio
from ...dsl.checker.vocabulary import Param, Vocabulary, Word
from ...dsl.syntax.diagnostics import EXITS, Fault
from ...dsl.syntax.nearest import nearest_name_help
from ..plugin.interfaces import Close
from ..plugin.registry import SHELVES, Registry

unknown_page = Fault("unknown-page", "`effc explain` was asked for something that has no page.", exit="usage")

TITLES = {
    "pass": "a pass",
    "target": "a target",
    "metric": "a metric",
    "data": "a kind of data",
    "model": "a source of models",
}
STATEMENTS = {
    "use": 'use std.text, use "./mine.effspec" as mine: names of another file',
    "param": 'param NAME: TYPE = VALUE in RANGE "sentence": what `--set NAME=VALUE` may change',
    "model": "model NAME = SOURCE(...): where the model comes from",
    "data": "data NAME = KIND(...): rows for passes and metrics",
    "profile": "profile NAME { isa: ...  threads: ... }: a machine that bounds and passes may name",
    "matrix": "matrix NAME: [A, B]: one variant of the recipe for each value of a `param`",
    "pipeline": "pipeline NAME(MODEL) { step = pass(...) ... }: steps work on the one before, or say `from: step`",
    "expect": "expect NAME { METRIC <= FACTOR * base in TARGET on PROFILE ... }: bounds on what a pipeline makes",
    "emit": 'emit NAME { TARGET("folder") ... }: the artifacts of a pipeline',
}
CHAPTERS = {  # pages of the manual, by what they are about
    "selector": "selectors",
    "from": "names_and_order",
    "step": "names_and_order",
    "types": "values",
    "type": "values",
    "value": "values",
    "shares": "shares",
    "param": "params_and_matrix",
    "matrix": "params_and_matrix",
    "use": "params_and_matrix",
    "recipe": "syntax",
    "bound": "expect_and_emit",
    "expect": "expect_and_emit",
    "emit": "expect_and_emit",
    "undecided": "undecided",
}
PACKAGES = ("dsl", "compiler", "passes", "kernels")


def explain_page(name: str) -> str:
    """The page of a word, a family such as `prune`, a fault or a shipped recipe; raises Reject for another name."""
    vocabulary = Registry().vocabulary
    pages = [vocabulary.words(kind)[name] for kind in SHELVES if name in vocabulary.words(kind)]
    if pages:
        return "\n\n\n".join(word_page(w) for w in pages)
    family = [vocabulary.words(kind)[n] for kind in SHELVES for n in vocabulary.words(kind) if n.startswith(f"{name}.")]
    if family:
        return "\n".join(f"{w.name}  {w.summary}" for w in family)
    from ..plugin.recipe_library import library_file_page, library_files

    known = dict(slug_and_call_of_all_faults())
    if name in known:
        return fault_page(declared_fault(known[name]))
    if name in (recipes := library_files()):
        return library_file_page(recipes[name])
    parts = STATEMENTS.get(name, ""), manual_chapter_or_empty(name), "\n".join(_pages_with_parameter(name, vocabulary))
    if any(parts):
        return "\n\n".join(filter(None, parts))
    words = [w for kind in SHELVES for w in vocabulary.words(kind).values()]
    inner = [n for w in words for p in w.params for n in (p.name, *p.choices)]
    names = [*recipes, *CHAPTERS, *(w.name for w in words)]
    raise unknown_page(
        f"nothing is called `{name}`",
        help=nearest_name_help(name, [*names, *known])
        or nearest_name_help(name, inner)
        or "`effc passes --all` lists all words",
    ).rejection()


def _pages_with_parameter(name: str, vocabulary: Vocabulary) -> list[str]:
    """Lines for a name that is a parameter or a parameter's value: one for each page that has it."""
    lines = []
    for word in (vocabulary.words(kind)[n] for kind in SHELVES for n in vocabulary.words(kind)):
        for param in word.params:
            if name == param.name:
                lines.append(f"`{name}` is a parameter of `{word.name}`: {param.doc}")
            elif name in param.choices:
                lines.append(f"`{name}` is a value of `{param.name}` of `{word.name}`: {param.doc}")
    return [*lines, "", f"`effc explain {lines[0].split('`')[-2]}` prints a whole page"] if lines else []


def word_page(plugin: Word) -> str:
    """Docstring, parameters and what the header promises."""
    blocks = [f"{plugin.name}, {TITLES[plugin.kind]}", plugin.doc.strip()]
    if plugin.params:
        blocks.append("Parameters\n" + "\n".join(parameter_lines(p) for p in plugin.params))
    if facts := list(fact_sentences(plugin)):
        blocks.append("\n".join(facts))
    return "\n\n".join(blocks)


def parameter_lines(param: Param) -> str:
    name = param.name + (" (may stand without its name)" if param.positional else "")
    details = [
        type_text(param),
        "required" if param.required else f"default {default_text(param)}",
        *bound_texts(param),
    ]
    return f"  {name}: {', '.join(details)}\n      {param.doc}"


def default_text(param: Param) -> str:
    """A parameter's default as a recipe would write it."""
    return plain_value_text(param.default) if param.default in param.choices else value_text(param.default)


def type_text(param: Param) -> str:
    text = expected_phrase(param)
    if "shares" in param.types:
        return f"{text}, like `{sample_value_text(param)}`"
    return f"{text} of {' or '.join(param.of)}" if param.of else text


def bound_texts(param: Param) -> Iterator[str]:
    """`at least 1`: each bound, written as the first of the parameter's types that has one."""
    for words, limit in (
        ("at least", param.ge),
        ("more than", param.gt),
        ("at most", param.le),
        ("less than", param.lt),
    ):
        if limit is not None:
            yield f"{words} {_limit_text(param.types[0].removeprefix('list[').rstrip(']'), limit)}"
    if param.among:
        yield f"one of {', '.join(map(value_text, param.among))}"
    if param.multiple:
        yield f"a multiple of {param.multiple}"
    if param.parity:
        yield param.parity
    if param.least:
        yield f"{param.least} or more of them"
    if param.distinct:
        yield "each once"
    if param.falling:
        yield "each smaller than the one before"
    if param.starts_full:
        yield "each smaller than the one before, the first 100%"
    if param.spelled:
        yield "spelled as the default is"


def _limit_text(type_: str, limit: float) -> str:
    kinds: dict[str, Callable[[float], Any]] = {"ratio": Ratio, "bytes": lambda v: Bytes(int(v)), "duration": Duration}
    return value_text(kinds[type_](limit) if type_ in kinds else limit)


def fact_sentences(plugin: Word) -> Iterator[str]:
    """The header's promises as sentences."""
    facts = plugin.facts
    if plugin.kind == "pass":
        keeps = facts["keeps"]
        yield (
            f"Keeps the outputs within {value_text(keeps.atol)}."
            if isinstance(keeps, Close)
            else "May change the outputs; the report measures how much."
        )
        yield {
            "deterministic": "Deterministic.",
            "seeded": "Deterministic for a seed.",
            "nondeterministic": "Not deterministic.",
        }[facts["determinism"]]
        if facts["changes"]:
            yield f"Changes {' and '.join(facts['changes'])}."
        for name, reason in facts["after"].items():
            yield f"Comes after {name.replace('changes: ', 'every pass that changes ')}: {reason}."
    for effect, condition in _answers_with_conditions(plugin, lambda rules: rules.effects()):
        yield f"Makes {effect}{condition}."
    for (effect, reason), condition in _answers_with_conditions(plugin, lambda rules: rules.cannot_hold().items()):
        yield f"Can't hold {effect}{condition}: {reason}."
    for (effect, reason), condition in _answers_with_conditions(plugin, lambda rules: rules.cannot_measure().items()):
        yield f"Leaves out {effect}{condition}: {reason}."
    for problem in plugin.problems:
        match problem:
            case Conflict(_, message, help):
                yield f"Refused: {message} ({help})."
            case Unread(names, home):
                yield from (f"`{name}` belongs to {home}." for name in names)
            case MissingStep(step, reason):
                yield f"Needs a step `{step}` before it: {reason}."
    if plugin.kind == "metric":
        yield f"Unit: {facts['unit'] or 'none'}. Better when {facts['better']}."
    if facts.get("extra"):
        yield f'Needs the packages of `pip install "effc[{facts["extra"]}]"`.'


def _answers_with_conditions(plugin: Word, answers_of: Callable[[Rules], Iterable[Any]]) -> Iterator[tuple[Any, str]]:
    """Answers of a word's rules, each with the argument that it depends on: " with `form: stock`", "" for all."""
    arguments: dict[str, dict[str, Any]] = {}
    for param in plugin.params:
        values = {"false": False, "true": True} if param.types == ("bool",) else {c: c for c in param.choices}
        arguments |= {f" with `{param.name}: {text}`": {param.name: value} for text, value in values.items()}
        if param.default is None and not values:
            arguments[f" with `{param.name}`"] = {param.name: MetricRef("params")}
    by_argument = {condition: list(answers_of(plugin.rules(args))) for condition, args in arguments.items()}
    by_default = list(answers_of(plugin.rules({})))
    for answer in by_default:
        lacking = [condition for condition, answers in by_argument.items() if answer not in answers]
        yield answer, f" by default, not{' or'.join(lacking)}" if lacking else ""
    for condition, answers in by_argument.items():
        yield from ((answer, condition) for answer in answers if answer not in by_default)


def fault_page(fault: Fault) -> str:
    """Page of a fault: meaning, exit code and section of the manual."""
    end = f"ends with exit code {EXITS[fault.exit]}" if fault.severity == "error" else "does not end a command"
    sentence, _, body = fault.doc.partition("\n\n")
    blocks = [
        f"{fault.slug}, {'an' if fault.severity == 'error' else 'a'} {fault.severity}: {end}",
        sentence,
        body,
        manual_section(fault.slug),
    ]
    return "\n\n".join(b.strip("\n") for b in blocks if b.strip())


def manual_chapter_or_empty(name: str) -> str:
    """The manual's page of a concept, up to its first fault; "" for a name that is none."""
    pages = (folder / "suites" / f"{CHAPTERS.get(name, '')}.md" for folder in _package_folders("dsl"))
    text = next((page.read_text(encoding="utf-8") for page in pages if page.is_file()), "")
    return text.partition("\n## ")[0].strip()


def manual_section(title: str) -> str:
    """The text below a heading of the manual, "" where there is none."""
    for folder in _package_folders("dsl"):
        for page in sorted((folder / "suites").glob("*.md")):
            match = re.search(
                rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
            )
            if match:
                return match[1].strip()
    return ""


@cache
def slug_and_call_of_all_faults() -> tuple[tuple[str, ast.Call], ...]:
    """Slug and declaration of every fault of effc, from the sources: no file of theirs is imported."""
    texts = (
        path.read_text(encoding="utf-8")
        for package in PACKAGES
        for folder in _package_folders(package)
        for path in sorted(folder.rglob("*.py"))
    )
    return tuple(pair for text in texts if "Fault(" in text for pair in _slug_and_call_of_faults(ast.parse(text)))


def _slug_and_call_of_faults(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in tree.body:
        call = node.value if isinstance(node, ast.Assign) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Fault":
            yield ast.literal_eval(call.args[0]), call


def declared_fault(call: ast.Call) -> Fault:
    named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    return Fault(*(ast.literal_eval(a) for a in call.args), **named)


def _package_folders(package: str) -> list[Path]:
    spec = find_spec(f"effc.{package}")
    assert spec and spec.submodule_search_locations, f"effc.{package} is not installed"
    return [Path(p) for p in spec.submodule_search_locations]
