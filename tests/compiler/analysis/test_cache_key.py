"""A key names the sources that a result depends on: those that run, and no others."""

import ast
import textwrap
from pathlib import Path

from effc.compiler.analysis.planning.keys import LOADING, metric_value_key_parts
from effc.compiler.core.source_closure import (
    directly_imported_effc_files,
    effc_import_closure,
    executed_statements,
    import_closure_sha256,
)
from effc.compiler.plugin import interfaces
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.values import MetricRef

from tests.worlds import context

ROOT = Path(interfaces.__file__).resolve().parents[2]
VOCABULARY = Registry().vocabulary


def sources(kind: str, name: str) -> set[str]:
    """The closure of a word as paths below the repository, such as `compiler/models/rows/forward.py`."""
    word = VOCABULARY.word(kind, name)
    return {str(file.relative_to(ROOT)) for file in effc_import_closure(Path(word.path))}


def test_a_change_in_discovery_keeps_a_measured_perplexity_and_one_in_the_forward_over_rows_does_not():
    for name in ("perplexity", "divergence", "agreement", "choice", "decode.p50"):
        found = sources("metric", name)
        assert not any(
            file.startswith(("compiler/analysis/discovery/", "compiler/transforms/search/", "compiler/ir/capture/"))
            for file in found
        )
    assert "compiler/models/rows/forward.py" in sources("metric", "perplexity")


def test_a_measured_value_depends_on_how_weights_are_loaded(tmp_path):
    parts = metric_value_key_parts(MetricRef("params"), "a model", context(tmp_path))
    assert LOADING.name == "checkpoint.py" and parts["loading"] == import_closure_sha256(LOADING)


def test_a_pass_depends_on_discovery():
    assert "compiler/analysis/discovery/coupling.py" in sources("pass", "prune.channels")


def test_base_classes_of_plug_ins_import_their_rules_alone_but_for_types():
    """Whatever they imported would be part of every key of a finished step."""
    assert [file.name for file in directly_imported_effc_files(Path(interfaces.__file__).resolve())] == ["rules.py"]
    assert directly_imported_effc_files(ROOT / "dsl" / "checker" / "rules.py") == ()


def test_a_pass_of_another_package_depends_on_what_it_takes_from_the_interface_of_plug_ins(tmp_path):
    (tmp_path / "halve.py").write_text("from effc.plugin import Pass, replace_weight\n")
    files = {
        str(file.relative_to(ROOT)) for file in effc_import_closure(tmp_path / "halve.py") if file.is_relative_to(ROOT)
    }
    assert "compiler/transforms/search/masks.py" in files and "compiler/plugin/interfaces.py" in files
    assert not any(file.startswith("compiler/analysis/discovery/") for file in files)


def test_only_imports_that_run_are_followed(tmp_path):
    (tmp_path / "pack").mkdir()
    for name in ("types_only", "lazy", "other", "top"):
        (tmp_path / "pack" / f"{name}.py").write_text("")
    (tmp_path / "pack" / "word.py").write_text(
        "from typing import TYPE_CHECKING\nfrom . import top\n"
        "if TYPE_CHECKING:\n    from .types_only import T\nelse:\n    from .other import T\n"
        "def run():\n    from .lazy import go\n    go()\n"
    )
    assert [file.stem for file in effc_import_closure(tmp_path / "pack" / "word.py")] == [
        "lazy",
        "other",
        "top",
        "word",
    ]


def test_a_change_in_a_file_that_runs_is_another_key_and_one_in_a_file_for_types_is_not(tmp_path):
    word, runs, typed = (tmp_path / f"{name}.py" for name in ("word", "runs", "typed"))
    word.write_text(
        "from typing import TYPE_CHECKING\nfrom .runs import go\nif TYPE_CHECKING:\n    from .typed import T\n"
    )

    def key() -> str:
        import_closure_sha256.cache_clear()
        return import_closure_sha256(word)

    runs.write_text("go = 1\n")
    typed.write_text("T = int\n")
    before = key()
    typed.write_text("T = str\n")
    assert key() == before
    runs.write_text("go = 2\n")
    assert key() != before


def test_imports_are_seen_wherever_a_statement_may_stand():
    blocks = ("try:", "except A:", "else:", "finally:"), ("with a:",), ("for a in b:", "else:"), ("while a:",)
    blocks += ("class A:",), ("def a(b=lambda: 0):",), ("async def a():",), ("if a:", "elif b:", "else:")
    texts = ["\n".join(f"{head}\n    import a{i}" for i, head in enumerate(heads)) for heads in blocks]
    texts.append("match a:\n    case 1:\n        import a0\n    case _:\n        import a1")
    for text in (*texts, *("def f():\n" + textwrap.indent(text, "    ") for text in texts)):
        tree = ast.parse(text)
        expected = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
        assert {n.names[0].name for n in executed_statements(tree) if isinstance(n, ast.Import)} == expected, text


def test_every_node_but_those_for_types_is_seen():
    tree = ast.parse("if TYPE_CHECKING:\n    import a\nelif x:\n    import b\nelse:\n    import c\n")
    assert [n.names[0].name for n in executed_statements(tree) if isinstance(n, ast.Import)] == ["b", "c"]
