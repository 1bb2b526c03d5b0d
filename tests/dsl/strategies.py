"""Hypothesis strategies of syntax trees: everything that a recipe can say, and nothing else."""

from effc.dsl.syntax import ast
from effc.dsl.syntax.source import Source, Span
from effc.dsl.syntax.tree_builder import RESERVED
from hypothesis import strategies as st

NOWHERE = Span(Source("made", ""), 0, 0)
UNITS = ("", "%", "GiB", "MB", "ms", "s", "B", "K", "of", "in")
KEYWORDS = ("use", "param", "model", "data", "profile", "matrix", "pipeline", "expect", "emit", "effspec", "from")

words = st.one_of(st.sampled_from(KEYWORDS), st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,7}", fullmatch=True)).filter(
    lambda word: word not in RESERVED and word not in ("True", "False", "None")
)
BIDI_CONTROLS = "".join(
    map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
)  # the order in which letters are shown
letters = st.characters(
    exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters=BIDI_CONTROLS
)  # which it refuses
texts = st.one_of(st.text(letters, max_size=20), st.text('"\\\n\r\t# {}', max_size=8))


def made(kind, *parts, **named):
    """A strategy of nodes of a kind."""
    return st.builds(lambda *p, **n: kind(*p, **n, span=NOWHERE), *parts, **named)


names = made(ast.Name, words)
dotted = made(ast.Name, st.lists(words, min_size=1, max_size=3).map(".".join))
strings = made(ast.Text, texts)
digits = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["1_000", "3e-4", "0.80", "007", "1E5"]),
)
numbers = made(ast.Number, digits, st.sampled_from(UNITS))


def argument(values):
    return st.builds(
        lambda name, value: ast.Arg(name, value, span=NOWHERE),
        st.one_of(st.just(""), words, st.sampled_from(["on", "of", "in", "allow"])),
        values,
    )


def call(values):
    return made(ast.Call, dotted, st.lists(argument(values), max_size=4).map(tuple))


def _deeper(values):
    return st.one_of(
        call(values),
        made(ast.Pairs, st.lists(made(ast.Entry, names, values), max_size=4).map(tuple)),
        made(ast.Items, st.lists(values, max_size=4).map(tuple)),
        made(ast.Interval, values, values),
        made(ast.Of, values, names),
        made(ast.Combine, st.sampled_from("|-&"), values, values),
        made(ast.AllowEmpty, values),
    )


values = st.recursive(st.one_of(numbers, strings, dotted, made(ast.Bool, st.booleans())), _deeper, max_leaves=8)
calls = call(values)
entries = made(ast.Entry, names, values)
scalars = st.one_of(numbers, dotted)
limits = made(
    ast.Limit,
    st.one_of(scalars, made(ast.Interval, scalars, scalars), made(ast.Items, st.lists(values, max_size=3).map(tuple))),
    st.none() | names,
)
bounds = made(
    ast.Bound,
    dotted | calls,
    st.sampled_from(["<=", "<", ">=", ">", "==", "in"]),
    limits,
    st.none() | names,
    st.none() | names,
    st.none() | numbers,
)


def many(nodes, most=4):
    return st.lists(nodes, max_size=most).map(tuple)


statements = st.one_of(
    made(ast.Use, dotted | strings, st.none() | names),
    made(
        ast.Param,
        names,
        names,
        values,
        st.one_of(st.none(), made(ast.Interval, values, values), made(ast.Items, many(values))),
        st.none() | strings,
    ),
    made(ast.Declare, st.sampled_from(["model", "data"]), names, calls),
    made(ast.Profile, names, many(entries)),
    made(ast.Matrix, many(entries)),
    made(ast.Pipeline, names, names, st.none() | strings, many(made(ast.Step, names, calls))),
    made(ast.Expect, names, many(bounds)),
    made(ast.Emit, names, many(calls)),
)
files = st.builds(lambda doc, body: ast.File(NOWHERE.source, 1, doc, body), st.none() | strings, many(statements, 5))
