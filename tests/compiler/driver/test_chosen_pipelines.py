"""`--pipeline NAME`: some pipelines of a recipe, as if the recipe had no others."""

import effc
import pytest
from effc.compiler.cli.main import main
from effc.dsl.syntax.diagnostics import Reject

RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline narrow(base) { s = prune.channels(keep: 50% of channels) }
pipeline plain(base) { }
emit narrow { hf("narrow") }
emit plain { hf("plain") }
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "two.effspec"
    file.write_text(RECIPE)
    return file


def test_a_plan_of_one_pipeline_says_nothing_of_the_others(recipe, tmp_path, capsys):
    assert [p.pipeline.name for p in effc.plan(recipe, pipelines=["plain"], cache_dir=tmp_path)] == ["plain"]
    assert main(["plan", str(recipe), "--pipeline", "plain", "--cache-dir", str(tmp_path), "--format", "json"]) == 0
    assert '"narrow"' not in capsys.readouterr().out


@pytest.mark.slow
def test_compile_of_one_pipeline_leaves_the_others_alone(recipe, tmp_path):
    (tmp_path / "out" / "narrow").mkdir(parents=True)
    (tmp_path / "out" / "narrow" / "notes.txt").write_text("of somebody else: a compile of both is refused")
    (result,) = effc.compile(recipe, tmp_path / "out", pipelines=["plain"], cache_dir=tmp_path / "cache")
    assert [a.path.name for a in result.artifacts] == ["plain"]
    assert [file.name for file in (tmp_path / "out" / "narrow").iterdir()] == ["notes.txt"]
    measured = {m.metric for m in result.artifacts[0].manifest.measures}
    assert measured == {"params", "bytes"}  # nobody asked how fast the original is beside itself


def test_a_name_of_no_pipeline_is_refused_with_the_nearest(recipe, tmp_path, capsys):
    with pytest.raises(Reject) as refused:
        effc.plan(recipe, pipelines=["narow", "plain"], cache_dir=tmp_path)
    (diagnostic,) = refused.value.diagnostics
    assert (diagnostic.slug, diagnostic.exit) == ("no-such-pipeline", 2)
    assert "`narow`" in diagnostic.message and "`narrow`" in diagnostic.help
    assert main(["compile", str(recipe), "--pipeline", "x", "--cache-dir", str(tmp_path)]) == 2
    assert "`narrow`, `plain`" in capsys.readouterr().err
    with pytest.raises(Reject, match="bad-option"):
        effc.compile(recipe, pipelines="plain")


def test_a_lock_of_all_pipelines_holds_for_one(recipe, tmp_path):
    assert main(["lock", str(recipe), "--cache-dir", str(tmp_path)]) == 0
    assert effc.plan(recipe, pipelines=["plain"], locked=True, cache_dir=tmp_path)
