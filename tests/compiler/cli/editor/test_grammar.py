"""The extension's colours are generated, and are those of the language's own tokens."""

import importlib.util
import json
import re
from pathlib import Path

from effc.dsl.syntax.edition import HEADS
from effc.dsl.syntax.lexer import tokenize
from effc.dsl.syntax.source import Source

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "editors" / "vscode"
GRAMMAR = json.loads((FOLDER / "syntaxes" / "effspec.tmLanguage.json").read_text())


def generator():
    spec = importlib.util.spec_from_file_location("vscode_grammar", FOLDER / "grammar.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scopes(text: str) -> list[str]:
    """The scope of every character, by the rules of TextMate: line by line, the earliest match, the first of equals."""
    out, inside = [], None
    for line in text.splitlines(keepends=True):
        at = 0
        while at < len(line):
            rules = inside["patterns"] if inside else GRAMMAR["patterns"]
            found = [(m.start(), i, m, r) for i, r in enumerate(rules) if (m := matched(r, line, at))]
            if inside and (end := re.compile(inside["end"], re.M).search(line, at)):
                found.append((end.start(), -1, end, None))
            if not found:
                out += [inside["name"] if inside else ""] * (len(line) - at)
                break
            start, _, match, rule = min(found, key=lambda f: f[:2])
            out += [inside["name"] if inside else ""] * (start - at)
            names = [rule["name"]] if rule and "name" in rule else []
            piece = names * len(match[0]) if names else captured(match, rule, inside)
            out += piece
            at = match.end()
            if rule is None:
                inside = None
            elif "begin" in rule:
                inside = rule
            elif match.end() == match.start():
                at += 1
    return out


def matched(rule: dict, line: str, at: int):
    return re.compile(rule.get("match") or rule["begin"], re.M).search(line, at)


def captured(match: re.Match, rule: dict | None, inside: dict | None) -> list[str]:
    out = [inside["name"] if inside else ""] * len(match[0])
    for number, capture in (rule or {}).get("captures", {}).items():
        start, end = match.span(int(number))
        for i in range(start, end):
            out[i - match.start()] = capture["name"]
    return out


def test_the_grammar_of_the_extension_is_what_the_language_s_grammar_gives():
    assert generator().main(["--check"]) == 0, "run editors/vscode/grammar.py"


def test_tokens_of_every_shipped_recipe_have_the_colour_of_their_kind():
    begins = {
        "NUMBER": "constant.numeric",
        "STRING": "string.quoted",
        "LONG_STRING": "string.quoted",
        "COMPARE": "keyword.operator",
    }
    seen = set()
    for path in [*sorted((ROOT / "recipes").rglob("*.effspec")), ROOT / "tests/dsl/tour.effspec"]:
        text = path.read_text()
        colours = scopes(text)
        assert len(colours) == len(text)
        tokens, comments = tokenize(Source(path.name, text))
        for comment in comments:
            assert colours[comment.span.start].startswith("comment"), (path.name, comment)
        for token in tokens[2:-1]:
            if wanted := begins.get(token.type):
                assert colours[token.start_pos].startswith(wanted), (path.name, token, token.line)
                seen.add(token.type)
            if token in HEADS and token.column == 1:
                assert colours[token.start_pos].startswith("keyword.declaration"), (path.name, token.line)
    assert seen == set(begins)


def test_a_word_of_the_language_is_a_name_where_a_parameter_is_meant_and_a_torn_string_ends_with_its_line():
    text = 'data calib = text("x.txt",\n  data: "y\nmodel base = zoo("z")\n'
    colours = scopes(text)
    assert colours[0] == "keyword.declaration.effspec"
    assert colours[text.index("data:")] == "variable.parameter.effspec"
    assert colours[text.index("model")] == "keyword.declaration.effspec"


def test_the_extension_starts_what_effc_has_and_sets_what_the_server_reads():
    from effc.compiler.cli.main import VERBS

    about = json.loads((FOLDER / "package.json").read_text())["contributes"]
    settings = about["configuration"]["properties"]
    assert settings["effc.command"]["default"] == ["effc", "lsp"] and "lsp" in VERBS
    assert settings["effc.command"]["scope"] == "machine"  # a folder that is opened says nothing of what runs
    assert about["languages"][0]["extensions"] == [".effspec"]
    client = (FOLDER / "extension.js").read_text()
    for name in ("hints.plan", "hints.defaults"):
        assert f"effc.{name}" in settings and f'"{name}"' in client
