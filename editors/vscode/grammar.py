"""Write syntaxes/effspec.tmLanguage.json from dsl/syntax/grammar.lark: `python editors/vscode/grammar.py [--check]`.

Keywords, signs, numbers, strings and comments are the terminals of the grammar; only their colours are chosen here.
"""

import json
import sys
from pathlib import Path

from effc.dsl.syntax.lexer import load_or_build_parser, terminal_by_keyword
from effc.dsl.syntax.parse import HEADS

OUT = Path(__file__).with_name("syntaxes") / "effspec.tmLanguage.json"
ESCAPE = r"\\(?:u[0-9a-fA-F]{4}|.)"


def terminal(name: str) -> str:
    """The pattern of a terminal, as Oniguruma reads it: its possessive `*+` is Python's."""
    return next(t.pattern.to_regexp() for t in load_or_build_parser().terminals if t.name == name)


def words(names) -> str:
    return rf"\b(?:{'|'.join(sorted(names))})\b"


def plain(pattern: str, scope: str) -> dict:
    return {"match": pattern, "name": f"{scope}.effspec"}


def string(quotes: str) -> dict:
    return {
        "begin": quotes,
        "end": rf"{quotes}|$" if quotes == '"' else quotes,  # a plain string ends with its line, closed or not
        "name": "string.quoted.double.effspec" if quotes == '"' else "string.quoted.triple.effspec",
        "patterns": [plain(ESCAPE, "constant.character.escape")],
    }


def made() -> str:
    known = terminal_by_keyword()
    inner = set(known) - set(HEADS) - {"effspec", "true", "false"}
    name, dotted = terminal("NAME"), terminal("DOTTED")
    assert "#" in terminal("COMMENT") and '"""' in terminal("LONG_STRING"), "comments and strings are as below"
    patterns = [
        plain(terminal("COMMENT"), "comment.line.number-sign"),
        string('"""'),
        string('"'),
        plain(r"^\s*effspec\b(?=\s+\d)", "keyword.control"),
        {
            "match": rf"^\s*({'|'.join(HEADS)})\b(?:\s+({dotted}|{name})\b)?(?!\s*[:,)])",
            "captures": {"1": {"name": "keyword.declaration.effspec"}, "2": {"name": "entity.name.section.effspec"}},
        },
        {"match": rf"({dotted}|{name})(?=\()", "captures": {"1": {"name": "entity.name.function.effspec"}}},
        plain(rf"{name}(?=\s*:)", "variable.parameter"),
        plain(rf"{name}(?=\s*=[^=])", "entity.name.variable"),
        plain(words(known.keys() & {"true", "false"}), "constant.language"),
        plain(words(inner), "keyword.operator.word"),
        plain(terminal("NUMBER"), "constant.numeric"),
        plain(terminal("COMPARE") + r"|\.\.|[|&*=-]", "keyword.operator"),
        plain(dotted, "variable.other.member"),
        plain(name, "variable.other"),
    ]
    body = {
        "information_for_contributors": "written by grammar.py from dsl/syntax/grammar.lark",
        "scopeName": "source.effspec",
        "name": "effspec",
        "fileTypes": ["effspec"],
        "patterns": patterns,
    }
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    text = made()
    if "--check" in arguments:
        return int(not OUT.is_file() or OUT.read_text(encoding="utf-8") != text)
    OUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
