"""Laws of the syntax: text, tree and JSON say the same; formatting is stable and loses no comment; nothing crashes."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.check import check_recipe_file
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.format import format_file
from effc.dsl.syntax.json_form import file_from_json, file_to_json
from effc.dsl.syntax.parse import MAX_ITEMS, parse
from effc.dsl.syntax.render import apply_fixes, render
from effc.dsl.syntax.source import Source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.clock import own_time
from tests.dsl import tiny_llama
from tests.dsl.strategies import files

VOCABULARY = Registry().vocabulary
MANUAL = sorted((Path(__file__).parents[2] / "dsl" / "suites").glob("*.md"))
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("**/*.effspec"))
TOUR = Path(__file__).with_name("tour.effspec")
TEXTS = [path.read_text(encoding="utf-8") for path in [*RECIPES, TOUR]]
EXAMPLES = [text for page in MANUAL for text in re.findall(r"^```effspec\n(.*?)^```", page.read_text(), re.M | re.S)]
often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(text: str):
    parsed = parse(Source("made", text))
    assert not parsed.diagnostics, render(parsed.diagnostics)
    return parsed.file


@given(files)
@often
@pytest.mark.slow
def test_a_tree_survives_its_text(file):
    text = format_file(file)
    again = read(text)
    assert again == file
    assert format_file(again) == text


@given(files)
@often
@pytest.mark.slow
def test_a_tree_survives_json(file):
    for spans in (False, True):
        assert file_from_json(json.loads(json.dumps(file_to_json(file, spans)))) == file


@given(files)
@often
@pytest.mark.slow
def test_formatted_lines_have_no_trailing_space_and_blank_lines_stand_alone(file):
    text = re.sub(r'"(?:[^"\\]|\\.)*?"', '""', format_file(file.__class__(file.source, 1, None, file.statements)))
    if '""""' not in text:
        assert "\n\n\n" not in text
        assert not re.search(r"[ \t]$", text, re.MULTILINE)


# Comments between any two tokens


def tokens(text: str) -> list[tuple[int, int]]:
    from effc.dsl.syntax.lexer import tokenize

    return [(t.start_pos, t.end_pos) for t in tokenize(Source("made", text))[0][:-1]]


def sprinkle(text: str, places: list[tuple[int, int, bool]]) -> tuple[str, list[str]]:
    """Comments put behind tokens, on the same line or the next; after `effspec 1`, so that this stays one line."""
    ends, said = tokens(text)[1:], []
    comments: dict[int, str] = {}
    for number, (at, blanks, own) in enumerate(places):
        said.append(f"c{number}")
        comments.setdefault(ends[at % len(ends)][1], ("\n" * (blanks + own)) + f" # c{number}\n" + "\n" * blanks)
    for at in sorted(comments, reverse=True):
        text = text[:at] + comments[at] + text[at:]
    return text, sorted(re.findall(r"# (c\d+)\n", "".join(comments.values())))


@pytest.mark.slow
@given(
    st.one_of(files.map(format_file), st.sampled_from(TEXTS)),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 2), st.booleans()), min_size=1, max_size=8),
)
@often
def test_comments_survive_anywhere_and_formatting_is_stable(text, places):
    before = read(text)
    strewn, said = sprinkle(text, places)
    file = read(strewn)
    assert file == before
    formatted = format_file(file)
    again = read(formatted)
    assert again == before
    kept = sorted(c.text for c in again.comments)
    assert kept == sorted(c.text for c in file.comments) and set(said) <= set(kept)
    assert format_file(again) == formatted


# Text that is no recipe

PIECES = [
    "=",
    ":",
    ",",
    "(",
    ")",
    "{",
    "}",
    "[",
    "]",
    '"',
    '"""',
    "#",
    "\n",
    " ",
    "..",
    "|",
    "-",
    "%",
    "'",
    "\t",
    "\\",
    "\0",
    "é",
    "日",
    "\r\n",
    "pipeline",
    "expect",
    "data",
    "true",
    "None",
    "of",
    "in",
    "allow empty",
    "1",
    "85%",
    "x",
    "a.b",
    "==",
]


def mutated(text: str, dice: random.Random) -> str:
    for _ in range(dice.randint(1, 4)):
        at, length = dice.randrange(len(text) + 1), dice.choice([0, 1, 1, 2, 5, 20])
        piece = dice.choice([*PIECES, "", "", text[at - 20 : at], dice.choice(PIECES) * 3])
        text = text[:at] + piece + text[at + length :]
    return text


def survives(text: str) -> None:
    started = time.process_time()
    source = Source("fuzzed", text)
    parsed = parse(source)
    broken = any(d.severity == "error" for d in parsed.diagnostics)
    checked = check_recipe_file(parsed.file, VOCABULARY, find_skeleton=tiny_llama.of, has_syntax_errors=broken)
    took = time.process_time() - started
    assert took < 1, f"{took:.2f} s"
    assert len(parsed.diagnostics) <= MAX_ITEMS + 3 * text.count("\\") + 1
    render(checked.diagnostics)
    render(parsed.diagnostics), render(parsed.diagnostics, "github"), render(parsed.diagnostics, "json")
    for d in parsed.diagnostics:
        assert d.span is not None and 0 <= d.span.start <= d.span.end <= len(text)
        assert d.message and not d.message.endswith(".") and "Token(" not in d.message
    if broken:
        apply_fixes(text, parsed.diagnostics)
        return
    formatted = format_file(parsed.file)
    assert read(formatted) == parsed.file
    assert format_file(read(formatted)) == formatted


def fuzz(cases: int, seed: int) -> None:
    dice = random.Random(seed)
    with own_time():
        for _ in range(cases):
            text = mutated(dice.choice(dice.choice((TEXTS, EXAMPLES))), dice)
            try:
                survives(text)
            except Exception as error:
                raise AssertionError(f"this text does not survive:\n{text!r}") from error


@pytest.mark.slow
def test_mutated_recipes_are_read_or_refused_within_a_second():
    fuzz(300, seed=7)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_many_mutated_recipes_are_read_or_refused_within_a_second():
    fuzz(10_000, seed=8)


@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join))
@often
def test_any_text_is_read_or_refused(text):
    survives(text)
    survives("effspec 1\n" + text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["node", "path", "value", "name", "args", "call", "x"]),
                inner | st.sampled_from(["Call", "Name", "Step", "Use", "Declare", "Text", "Number"]),
                max_size=4,
            )
        ),
        max_leaves=10,
    )
)
@often
def test_any_json_is_read_or_refused(data):
    for form in (data, {"format": 1, "statements": [data]}):
        try:
            file_from_json(form)
        except Reject as refusal:
            assert refusal.diagnostics
