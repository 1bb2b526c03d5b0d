"""Reference pages of the site, written from headers, faults, flags and signatures; nothing is copied by hand."""

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import effc
import effc.callbacks
import effc.plugin
from effc.compiler.artifacts.load import LoadOptions
from effc.compiler.cli.explain import (
    STATEMENTS,
    bound_texts,
    declared_fault,
    default_text,
    fact_sentences,
    manual_section,
    slug_and_call_of_all_faults,
    type_text,
)
from effc.compiler.cli.main import make_app
from effc.compiler.cli.verbs.exit_codes import MEANINGS
from effc.compiler.cli.verbs.flags import SharedFlags
from effc.compiler.cli.verbs.help_sections import SECTIONS
from effc.compiler.driver.optimize import Optimized
from effc.compiler.driver.session_options import Options
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.vocabulary import Param, Word
from effc.dsl.syntax.diagnostics import EXITS
from typer.main import get_command

KINDS = {"target": "Targets", "metric": "Metrics", "data": "Data", "model": "Models"}


def reference_pages() -> dict[str, str]:
    """Markdown of all generated pages, by path in the site."""
    vocabulary, families = Registry().vocabulary, defaultdict(list)
    for word in vocabulary.words("pass").values():
        families[word.name.partition(".")[0]].append(word)
    pages = {f"reference/passes/{name}.md": word_list(f"`{name}`: passes", words) for name, words in families.items()}
    for kind, title in KINDS.items():
        pages[f"reference/{title.lower()}.md"] = word_list(title, vocabulary.words(kind).values())
    return pages | {
        "reference/statements.md": statements(),
        "reference/faults.md": faults(),
        "reference/verbs.md": verbs(),
        "reference/functions.md": functions(),
    }


def word_list(title: str, words: Iterable[Word]) -> str:
    ordered = sorted(words, key=lambda word: word.name)
    index = table(("word", ""), [(f"[`{w.name}`](#{anchor(w.name)})", cell(w.summary)) for w in ordered])
    return "\n\n".join([f"# {title}", index, *map(word_section, ordered)]) + "\n"


def word_section(word: Word) -> str:
    blocks = [f"## `{word.name}` {{ #{anchor(word.name)} }}", docstring(word.doc)]
    if word.params:
        blocks.append(table(("parameter", "type", "default", ""), [parameter_row(p) for p in word.params]))
    blocks.append("\n".join(f"- {sentence}" for sentence in fact_sentences(word)))
    return "\n\n".join(blocks)


def parameter_row(param: Param) -> tuple[str, str, str, str]:
    kinds = [type_text(param), *bound_texts(param)]
    value = "required" if param.required else f"`{default_text(param)}`"
    return f"`{param.name}`", cell(", ".join(kinds)), value, cell(param.doc)


def docstring(text: str) -> str:
    """A docstring as Markdown: its example and its result become code."""
    text = re.sub(r"^Example: (.*(?:\n +.*)*)", lambda m: fenced(textwrap.dedent(m[1])), text.strip(), flags=re.M)
    return re.sub(
        r"^Result:\n((?: +.*\n?)+)", lambda m: f"Result:\n{fenced(textwrap.dedent(m[1]), 'text')}", text, flags=re.M
    )


def fenced(text: str, language: str = "effspec") -> str:
    return f"\n```{language}\n{text.rstrip()}\n```\n"


def statements() -> str:
    rows = [
        (f"`{name}`", cell(f"`{form.partition(': ')[0]}`"), form.partition(": ")[2])
        for name, form in STATEMENTS.items()
    ]
    return "# Statements\n\n" + table(("statement", "is written", "and says"), rows) + "\n"


def faults() -> str:
    blocks = ["# Faults", "Each diagnostic carries its slug; `effc explain SLUG` prints the same page."]
    for slug, call in sorted(slug_and_call_of_all_faults(), key=lambda pair: pair[0]):
        fault = declared_fault(call)
        end = f"exit code {EXITS[fault.exit]}" if fault.severity == "error" else f"a {fault.severity}"
        sentence, _, body = fault.doc.partition("\n\n")
        blocks += [f"## `{slug}` {{ #{slug} }}", f"{sentence} *({end})*", body, manual_section(slug)]
    return "\n\n".join(block.strip("\n") for block in blocks if block.strip()) + "\n"


def verbs() -> str:
    command = get_command(make_app())
    blocks = ["# Verbs and flags"]
    shared_flags: dict[str, Any] = {}
    for title, names in SECTIONS.items():
        blocks.append(f"## {title}")
        for name in names:
            blocks += verb_blocks(f"effc {name}", command.commands[name])
            shared_flags |= {
                p.name: p for p in command.commands[name].params if p.name in SharedFlags.__dataclass_fields__
            }
    codes = [(str(code), MEANINGS[name]) for name, code in EXITS.items()]
    shared = table(("flag", ""), [flag_row(p) for p in shared_flags.values()])
    return "\n\n".join([*blocks, "## Shared flags", shared, "## Exit codes", table(("code", "meaning"), codes)]) + "\n"


def verb_blocks(path: str, command: Any) -> Iterator[str]:
    yield f"### `{path}` {{ #{anchor(path)} }}"
    yield inspect.cleandoc(command.help or "").replace("\b", "")
    shared = {*SharedFlags.__dataclass_fields__}
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    own, common = [p for p in shown if p.name not in shared], [p for p in shown if p.name in shared]
    if own:
        yield table(("flag", ""), [flag_row(p) for p in own])
    if common:
        yield "[Shared flags](#shared-flags): " + ", ".join(f"`{p.opts[0]}`" for p in common) + "."
    for name, inner in getattr(command, "commands", {}).items():
        yield from verb_blocks(f"{path} {name}", inner)


def flag_row(param: Any) -> tuple[str, str]:
    if param.param_type_name == "argument":
        return f"`{param.make_metavar().strip('[]')}`", cell(param.help or "")
    value = f" {param.metavar}" if param.metavar else ""
    return ", ".join(f"`{name}{value}`" for name in (*param.opts, *param.secondary_opts)), cell(param.help or "")


def functions() -> str:
    blocks = [
        "# Functions",
        "Of the package `effc`. Words of recipes are functions, too: `effc.prune.multi(...)` takes what"
        " [`prune.multi`](passes/prune.md#prune-multi) takes.",
    ]
    for name in ("optimize", "check", "plan", "compile", "load", "recipe", "Reject"):
        blocks += object_blocks(f"effc.{name}", getattr(effc, name))
    blocks += object_blocks("effc.optimize's result", Optimized)
    for name in effc.callbacks.__all__:
        blocks += object_blocks(f"effc.callbacks.{name}", getattr(effc.callbacks, name))
    for title, options in (
        ("Options of check, plan and compile, and but for `set` and `params` of optimize", Options),
        ("Options of load", LoadOptions),
    ):
        blocks += [f"## {title}", described(options)]
    blocks += ["## For plug-ins: `effc.plugin`"]
    rows = [(f"`{name}`", first_sentence(getattr(effc.plugin, name))) for name in effc.plugin.__all__]
    return "\n\n".join([*blocks, table(("name", ""), rows)]) + "\n"


def object_blocks(name: str, value: Any) -> Iterator[str]:
    yield f"## `{name}` {{ #{anchor(name)} }}"
    if inspect.isfunction(value):
        yield f"```python\n{signature(name, value)}\n```"
    yield described(value)


def signature(name: str, function: Any) -> str:
    """A signature as its source has it, folded."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    parameters = ast.unparse(definition.args).replace("'", "")
    return textwrap.fill(f"{name}({parameters})", 88, subsequent_indent="    ", break_on_hyphens=False)


def described(value: Any) -> str:
    """A docstring as Markdown; its columns of names and sentences become a table."""
    blocks = []
    for block in (inspect.getdoc(value) or "").split("\n\n"):
        rows = re.findall(r"^([\w.]+) {2,}(.*(?:\n {4,}.*)*)", block, re.M)
        if rows and re.match(r"[\w.]+ {2,}", block):
            blocks.append(table(("name", ""), [(f"`{name}`", cell(text)) for name, text in rows]))
        else:
            blocks.append(block if block.startswith("    ") else block.strip())
    return "\n\n".join(blocks)


def first_sentence(value: Any) -> str:
    return cell((inspect.getdoc(value) or "").split("\n\n")[0])


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
