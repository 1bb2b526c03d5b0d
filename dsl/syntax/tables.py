"""Lark's tables of the grammar, kept as JSON: reading them takes a tenth of the time that building them takes.

    python -m effc.dsl.syntax.tables       write them again, after grammar.lark changed

They fit one grammar and one version of lark; with another the tables are built from the grammar, which is slower.
"""

import hashlib
import json
from pathlib import Path

import lark
from lark import Lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

GRAMMAR = Path(__file__).with_name("grammar.lark")
FILE = Path(__file__).with_name("grammar.json")


def build_parser() -> Lark:
    text = GRAMMAR.read_text(encoding="utf-8")
    return Lark(text, parser="lalr", lexer="basic", propagate_positions=True, maybe_placeholders=True)


def load_precomputed_parser() -> Lark | None:
    """The parser of the tables; None where they are of another grammar or lark."""
    try:
        body = json.loads(FILE.read_bytes())
    except (OSError, ValueError):
        return None
    if (body.get("lark"), body.get("grammar")) != (lark.__version__, _grammar_sha256()):
        return None
    states = body["data"]["parser"]["parser"]
    states["states"] = {int(number): row for number, row in states["states"].items()}  # JSON's keys are texts
    return Lark._load_from_dict(body["data"], {int(number): item for number, item in body["memo"].items()})


def parser_tables_text() -> str:
    """Required content of the file."""
    data, memo = build_parser().memo_serialize([TerminalDef, Rule])
    return (
        json.dumps(
            {"lark": lark.__version__, "grammar": _grammar_sha256(), "data": data, "memo": memo}, separators=(",", ":")
        )
        + "\n"
    )


def _grammar_sha256() -> str:
    return hashlib.sha256(GRAMMAR.read_bytes()).hexdigest()


if __name__ == "__main__":
    FILE.write_text(parser_tables_text(), encoding="utf-8")
