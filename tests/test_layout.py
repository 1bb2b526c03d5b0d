"""The house keeps its shape: imports run one way, files stay small, nobody reaches into another's private names.

The lists of exceptions may only shrink.
"""

import ast
import io
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"dsl": set(), "kernels": set(), "compiler": {"dsl", "kernels"}, "passes": {"compiler", "dsl", "kernels"}}
LINES, FUNCTION_LINES = 400, 50  # as the formatter lays them out; signatures do not count


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def files() -> tuple[Path, ...]:
    return tuple(sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py")))


def shown(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def is_type_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that can run: not what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not is_type_only(child):
            yield child
            yield from statements(child)


@cache
def imports(file: Path, type_only: bool = False) -> tuple[tuple[Path, str], ...]:
    """(file of effc, name) of each import, lazy ones included; `type_only` adds those under `if TYPE_CHECKING`."""
    out = []
    for node in ast.walk(tree(file)) if type_only else statements(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            where = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                candidates = ((where / alias.name).with_suffix(".py"), where.with_suffix(".py"), where / "__init__.py")
                target = next((c for c in candidates if c.is_file()), None)
                if target:
                    out.append((target, alias.name))
    return tuple(out)


def circles() -> list[set[str]]:
    """Groups of files that import each other, directly or around."""
    reach: dict[Path, set[Path]] = {}

    def reached(start: Path) -> set[Path]:
        seen, waiting = set(), [t for t, _ in imports(start)]
        while waiting:
            file = waiting.pop()
            if file not in seen:
                seen.add(file)
                waiting += [t for t, _ in imports(file)]
        return seen

    for file in files():
        reach[file] = reached(file)
    groups = {frozenset(f for f in reach[file] if file in reach[f]) for file in files() if file in reach[file]}
    return [{shown(f) for f in group} for group in groups]


@pytest.mark.slow
def test_packages_import_one_way():
    wrong = [
        f"{shown(file)} imports {shown(target)}"
        for file in files()
        for target, _ in imports(file)
        if (mine := shown(file).split("/")[0]) != (other := shown(target).split("/")[0]) and other not in PACKAGES[mine]
    ]
    assert not wrong


def test_a_pass_imports_no_pass():
    wrong = [
        f"{shown(file)} imports {shown(target)}"
        for file in files()
        for target, _ in imports(file)
        if shown(file).startswith("passes/") and shown(target).startswith("passes/") and target != file
    ]
    assert not wrong


# Rooms of compiler/ from the ground up: a file imports from its own room and from those above it in this list.
ROOMS = (
    "core",
    "models",
    "ir",
    "plugin",
    "analysis",
    "inputs",
    "evaluation",
    "transforms",
    "runtimes",
    "artifacts",
    "targets",
    "driver",
    "apps",
    "cli",
)
ARROWS = 91  # pairs of rooms of which one imports the other, type-only imports included; may only fall


def room(file: Path) -> str:
    return shown(file).split("/")[1]


def test_the_compilers_rooms_import_downwards():
    entrances = ("__init__.py", "_package_init.py", "_plugin.py", "_callbacks.py")  # of `effc`, `.plugin`, `.callbacks`
    inside = [f for f in files() if shown(f).startswith("compiler/") and room(f) not in entrances]
    assert {room(f) for f in inside} == set(ROOMS), "a new folder has a line in ROOMS"
    pairs = {(f, t) for f in inside for t, _ in imports(f, type_only=True) if t in inside and room(t) != room(f)}
    climbs = [f"{shown(f)} imports {shown(t)}" for f, t in pairs if ROOMS.index(room(t)) > ROOMS.index(room(f))]
    assert not climbs
    assert len({(room(f), room(t)) for f, t in pairs}) <= ARROWS


def test_files_and_functions_stay_small():
    both = (*files(), *(ROOT / "tests").rglob("*.py"))
    long = [f"{shown(f)}: {n} lines" for f in both if (n := len(f.read_text().splitlines())) > LINES]
    long += [
        f"{shown(f)}: {node.name} has {n} lines"
        for f in files()
        for node in ast.walk(tree(f))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (n := node.end_lineno - node.body[0].lineno + 1) > FUNCTION_LINES
    ]
    assert not long, long


# Words of everyday speech that say how something came about, and not what it is. torch, transformers and their like
# have 12 of them in 10,000 words of identifiers.
EVERYDAY = frozenset(
    [
        "found",
        "given",
        "said",
        "asked",
        "refused",
        "held",
        "made",
        "whole",
        "place",
        "places",
        "own",
        "most",
        "told",
        "kept",
        "wanted",
        "gone",
        "near",
        "ours",
        "theirs",
        "apart",
        "below",
        "drawn",
        "turns",
        "turn",
        "ended",
        "says",
        "say",
        "few",
        "odd",
        "lost",
        "look",
        "want",
        "what",
        "room",
        "sides",
        "holds",
        "here",
        "there",
        "every",
        "about",
        "nothing",
        "now",
        "why",
        "more",
        "bad",
        "tell",
        "moved",
        "placed",
        "counted",
        "tried",
        "heard",
        "hears",
        "meant",
        "seen",
        "shown",
        "written",
        "begun",
        "began",
        "ends",
        "ask",
        "asks",
        "misfit",
        "unfit",
        "took",
        "taken",
        "takes",
        "gives",
        "give",
        "goes",
        "came",
        "comes",
        "come",
        "things",
        "thing",
        "together",
        "alone",
        "alike",
        "again",
        "wrong",
        "rest",
        "others",
        "lie",
        "lies",
        "stands",
        "stood",
        "begins",
        "hire",
        "dismiss",
        "hands",
    ]
)
OF_10_000 = 23  # may only fall
RIDDLES = ("What ", "The same ", "How ", "Where ", "Which ", "Those ", "That ")


def test_names_are_words_of_the_field():
    words = Counter(
        word.lower()
        for file in files()
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string)
        for word in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", token.string)
        if len(word) > 2
    )
    share = sum(n for word, n in words.items() if word in EVERYDAY) / sum(words.values())
    assert round(share * 10_000) <= OF_10_000


def test_a_docstring_names_what_it_describes():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    assert not [
        f"{shown(file)}: {ast.get_docstring(node).splitlines()[0]}"
        for file in files()
        for node in ast.walk(tree(file))
        if isinstance(node, kinds) and (ast.get_docstring(node) or "").startswith(RIDDLES)
    ]


# Words that say nothing of what a name holds: for locals of a few lines, never for what others read.
EMPTY = {"asked", "beside", "found", "given", "gone", "heard", "made", "opened", "said", "seen", "taken", "told"}
NAMED = {("core/events.py", "Said"): "an event's name in files of --events"}


def names(file: Path) -> Iterator[str]:
    """The module, its functions and classes at any depth, and the fields of its classes."""
    yield file.stem
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            )


def test_names_are_nouns_or_verbs():
    empty = {
        (shown(f).removeprefix("compiler/"), name)
        for f in files()
        for name in names(f)
        if name.strip("_").lower() in EMPTY
    }
    assert empty == set(NAMED)


# Private names that another file imports: none is added.
IMPORTED_PRIVATE_NAMES: set[tuple[str, str]] = set()


def test_private_names_stay_at_home():
    reached = {
        (shown(t), name)
        for f in files()
        for t, name in imports(f)
        if name.startswith("_") and not name.startswith("__") and t != f
    }
    assert reached == IMPORTED_PRIVATE_NAMES


# Declarations inside declarations, and values inside values.
CIRCLES = [
    {"dsl/checker/declare.py", "dsl/checker/modules.py"},
    {"dsl/checker/calls.py", "dsl/checker/shares.py", "dsl/checker/typed.py"},
]


def test_no_files_import_each_other_but_those_named():
    assert sorted(map(sorted, circles())) == sorted(map(sorted, CIRCLES))


def test_benchmarks_import_each_other_where_the_type_checker_sees_them():
    """`import smol` works where a file of bench/ is run by its path, and mypy then takes all of `smol` for unknown."""
    scripts = {file.stem: file for file in (ROOT / "bench").glob("*.py")}
    bare = [
        f"{shown(file)}: {name}"
        for file in scripts.values()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name in scripts
    ]
    assert not bare, "import them as bench.NAME"
