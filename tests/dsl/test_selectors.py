"""Selectors select what sets of paths would: laws over generated trees, and the examples of the manual."""

import re
import time

import pytest
from effc.dsl.checker.selectors import InvalidGlob, glob_matches_path, parse_glob, resolve_selector, unmatched_parts
from effc.dsl.checker.values import Selector
from hypothesis import given
from hypothesis import strategies as st

LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(4)
    for part in ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.up_proj", "mlp.gate_proj")
]

components = st.sampled_from(["model", "layers", "0", "1", "12", "mlp", "attn", "q_proj", "k_proj"])
path = st.lists(components, min_size=1, max_size=5).map(".".join)
paths = st.lists(path, max_size=12, unique=True)
pieces = st.sampled_from(["*", "**", "mlp", "q_proj", "*_proj", "{q,k}_proj", "{0..1}", "layers", "attn", "1*"])
glob = st.lists(pieces, min_size=1, max_size=4).map(".".join)


def one(text: str, op: str = "|") -> Selector:
    return Selector(((op, text),))


@given(st.lists(st.tuples(st.sampled_from("|-&"), glob), min_size=1, max_size=5), paths)
def test_operators_are_those_of_sets_from_left_to_right(terms, tree):
    terms[0] = ("|", terms[0][1])
    expected: set[str] = set()
    for op, text in terms:
        found = {p for p in tree if glob_matches_path(text, p)}
        expected = {"|": expected | found, "-": expected - found, "&": expected & found}[op]
    assert resolve_selector(Selector(tuple(terms)), tree) == tuple(p for p in tree if p in expected)


@given(path, path)
def test_a_path_matches_itself_and_anything_that_ends_in_it(end, front):
    assert glob_matches_path(end, end)
    assert glob_matches_path(end, f"{front}.{end}")


@given(path, components)
def test_what_ends_otherwise_does_not_match(text, other):
    last = text.rsplit(".", 1)[-1]
    assert glob_matches_path(text, f"{text}.{other}") == (f".{text}.{other}".endswith(f".{text}"))
    assert not glob_matches_path(text, f"{text}x")
    assert not glob_matches_path(f"x{last}", text)


@given(glob, paths)
def test_braces_are_the_union_of_their_alternatives(text, tree):
    both = f"{text}.{{mlp,attn}}"
    assert resolve_selector(one(both), tree) == resolve_selector(
        Selector((("|", f"{text}.mlp"), ("|", f"{text}.attn"))), tree
    )


@given(path, path, st.lists(components, max_size=3))
def test_two_stars_stand_for_any_number_of_names_none_included(front, end, between):
    assert glob_matches_path(f"{front}.**.{end}", ".".join([front, *between, end]))


@given(glob, paths)
def test_a_selector_without_dead_parts_matches_something(text, tree):
    if not unmatched_parts(one(text), tree):
        assert resolve_selector(one(text), tree)


@given(paths, paths)
def test_the_order_is_that_of_the_paths_each_once(tree, again):
    assert resolve_selector(one("**"), [*tree, *again]) == tuple(dict.fromkeys([*tree, *again]))


@pytest.mark.parametrize(
    "text, count",
    [
        ("layers.*.mlp", 4),
        ("*_proj", 16),
        ("*.{q,o}_proj", 8),
        ("layers.{1..2}.mlp", 2),
        ("layers.0.**", 6),
        ("layers.0.*", 2),
        ("mlp", 4),
        ("model", 0),
        ("layers.0.**.up_proj", 1),
        ("*", 24),
        ("lp", 0),
    ],
)
def test_examples(text, count):
    assert len(resolve_selector(one(text), LAYERS)) == count


def test_an_alternative_that_matches_nothing_is_dead_and_has_its_place():
    (part,) = unmatched_parts(one("*.{q,upp}_proj"), LAYERS)
    assert (part.text, part.start) == ("upp", 5)
    assert unmatched_parts(one("layers.{0..5}.mlp"), LAYERS)[0].text == "4"


def test_a_difference_that_takes_nothing_away_is_dead():
    selector = Selector((("|", "*.mlp"), ("-", "*.q_proj")))
    assert [d.subtracts for d in unmatched_parts(selector, LAYERS)] == [True]
    assert unmatched_parts(Selector((("|", "*.mlp"), ("-", "layers.0.mlp"))), LAYERS) == ()


@pytest.mark.parametrize(
    "text",
    ["", "a..b", ".a", "a.", "{a", "a}", "{a,{b,c}}", "a|b", "^a$", "a[0]", "{3..1}", "{0..511}.{0..511}", "a b"],
)
def test_what_is_no_glob_says_so(text):
    with pytest.raises(InvalidGlob):
        parse_glob(text)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        resolve_selector(one(text), LAYERS)
    except InvalidGlob as bad:
        assert 0 <= bad.start <= bad.end <= len(text)


@pytest.mark.parametrize(
    "glob",
    [
        ".".join(["**", "a"] * 40),
        "*a" * 40 + "b",
        ".".join(["**"] * 40) + ".x",
        "{" + ",".join(["**.*a*a*a*"] * 50) + "}",
    ],
)
def test_stars_cost_no_more_time_than_a_table_has_fields(glob):
    paths = [".".join(["a" * 60] * 60), ".".join(["a"] * 120), ".".join("ab" * 60)]
    started = time.process_time()
    for path in paths:
        glob_matches_path(glob, path)
    assert time.process_time() - started < 1


def as_expression(glob: str) -> re.Pattern:
    """The regular expression that a glob without braces stands for."""
    text = ""
    for component in glob.split("."):
        parts = "[^.]*".join(map(re.escape, re.split(r"\*+", component)))
        text += r"(?:[^.]+\.)*" if component == "**" else parts + r"\."
    return re.compile(r"(?:[^.]+\.)*" + text)


NAMES = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=5).map(".".join)


@given(glob=st.lists(st.text("ab*", min_size=1, max_size=4), min_size=1, max_size=4).map(".".join), path=NAMES)
def test_a_glob_matches_what_its_expression_matches(glob, path):
    assert glob_matches_path(glob, path) == bool(as_expression(glob).fullmatch(f"{path}."))
