"""The kept tables of the grammar read every recipe as tables do that are built anew."""

import json
from pathlib import Path

import lark
import pytest
from effc.dsl.syntax import lexer, tables
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source

TEXTS = [f.read_text(encoding="utf-8") for f in sorted(Path(__file__).parents[2].glob("recipes/**/*.effspec"))]
here = pytest.mark.skipif(
    json.loads(tables.FILE.read_bytes())["lark"] != lark.__version__, reason="kept for another version of lark"
)


@here
def test_the_kept_tables_are_of_this_grammar():
    assert tables.load_precomputed_parser() is not None, "python -m effc.dsl.syntax.tables"


@here
def test_texts_whole_and_broken_are_read_alike(monkeypatch):
    texts = [*TEXTS, *(text[: len(text) * 2 // 3] for text in TEXTS), *(text.replace(")", "", 1) for text in TEXTS)]
    kept = [parse.__wrapped__(Source("a", text)) for text in texts]
    built = tables.build_parser()
    monkeypatch.setattr(lexer, "load_or_build_parser", lambda: built)
    assert [parse.__wrapped__(Source("a", text)) for text in texts] == kept
    assert len(texts) > 60 and any(parsed.diagnostics for parsed in kept)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"lark": "0"}'])
def test_tables_of_another_lark_are_built(monkeypatch, tmp_path, damage):
    (tmp_path / "grammar.json").write_bytes(damage)
    monkeypatch.setattr(tables, "FILE", tmp_path / "grammar.json")
    assert tables.load_precomputed_parser() is None
