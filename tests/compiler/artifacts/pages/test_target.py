"""The target `report`: after the artifacts, of its own result, a file that --force alone replaces."""

from pathlib import Path

import pytest
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

pytest.importorskip("vl_convert")
pytestmark = pytest.mark.heavy
RECIPE = """effspec 1
use std.text
model base = zoo("tiny-llama")
pipeline small(base) { thin = prune.channels(keep: 50% of channels)  low = prune.heads(keep: 50% of kv_heads) }
expect small { params <= 0.9 * base }
emit small { report("pages/small.html")  hf("small")  report("thin.html", from: thin) }
"""


def test_a_page_comes_after_its_artifacts_and_speaks_of_its_own_result(tmp_path: Path):
    (tmp_path / "r.effspec").write_text(RECIPE)
    made = {"out": tmp_path / "out", "cache_dir": tmp_path / "cache", "threads": 1}
    (result,) = api.compile(tmp_path / "r.effspec", **made)
    assert [a.path.name for a in result.artifacts] == ["small"]
    small, thin = (told.path.read_text() for told in result.reports)
    measured = {m.metric: m.compiled for m in result.artifacts[0].manifest.measures}
    assert f"{measured['params'] / 1e6:.2f} M" in small and "KV heads went (50 %)" in small
    assert "KV heads went" not in thin and "channels went (50 %)" in thin
    with pytest.raises(Reject):
        api.compile(tmp_path / "r.effspec", **made)
    api.compile(tmp_path / "r.effspec", force=True, **made)
