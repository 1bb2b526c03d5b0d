"""search.* over families: fronts of choices, the same for a seed and after a kill, each point a model of its own."""

import shutil
import time

import pytest
import torch
from effc.compiler.core.front_chart import ascii_scatter_plot, svg_scatter_plot
from effc.compiler.driver import api
from effc.compiler.driver import pick as picking
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.transforms.supernet.explorer import beats, crowding_distances, non_dominated, thin_front
from effc.dsl.checker.values import MetricRef, Ratio
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.grids import wide
from tests.killing import kill_often
from tests.passes.test_elastic import SHARES
from tests.passes.test_heal import loss, rows_of
from tests.passes.test_supernet import ROWS
from tests.recipes_in_memory import SCORE, context_of, recipe_of
from tests.worlds import defaults, refused

NET = {"channels": SHARES, "heads": [Ratio(1.0), Ratio(0.5)], "depth": "blocks", "data": ROWS, "steps": 0}
METHODS = ("random", "hill", "heuristic", "predict", "nsga2")
PARAMS = MetricRef("params")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A family that nothing was trained of, and a context."""
    from tests.passes.test_supernet import through

    return through(tmp_path_factory.mktemp("net"), tiny.model("llama"), ("supernet.elastic", NET))


def search(family, folder, method, **args):
    """The front of a search, and what it evaluated."""
    if method == "nsga2":
        pytest.importorskip("pymoo")
        args = {"population": 6, **args}
    word = f"search.{method}"
    made = {**defaults("pass", word), "measure": [SCORE, PARAMS], "evals": 24, **args}
    recipe = recipe_of([("few", word, made)])
    folder.mkdir(exist_ok=True)
    ctx = context_of(folder, family.program.model, recipe, rows_of(1))
    front = ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).result_of(family, ctx)
    return front, family.program.notes[-1]["evaluated"]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_search_goes_on_to_the_front_that_the_seed_decides(net, tmp_path, method):
    whole, evaluated = search(net, tmp_path / "whole", method)
    journal = (tmp_path / "whole/work/genomes.jsonl").read_bytes()
    (tmp_path / "killed/work").mkdir(parents=True)
    lines = journal.splitlines(keepends=True)
    (tmp_path / "killed/work/genomes.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:9])
    again, _ = search(net, tmp_path / "killed", method)
    assert [(p.choice, p.measures) for p in whole.points] == [(p.choice, p.measures) for p in again.points]
    assert (tmp_path / "killed/work/genomes.jsonl").read_bytes() == journal
    assert evaluated <= 24 and len(lines) == evaluated == len(set(lines))
    values = [tuple(v for v, _, _ in p.measures.values()) for p in whole.points]
    assert not any(beats(a, b) for a in values for b in values) and values == sorted(values)


@pytest.mark.slow
def test_measures_of_a_point_are_those_of_the_model_that_it_is(net, tmp_path):
    from tests.passes.test_elastic import alone

    front, _ = search(net, tmp_path, "random", at_most=Ratio(0.8, "params"), points=3)
    assert 1 <= len(front.points) <= 3
    for point in front.points:
        model = alone(net, point.choice).model
        (nats, _, _), (params, _, _) = point.measures.values()
        assert (
            params
            == sum(p.numel() for p in model.parameters())
            <= 0.8 * sum(p.numel() for p in net.program.model.parameters())
        )
        assert abs(torch.tensor(loss(model)).exp() / nats - 1) < 1e-3


@pytest.mark.heavy
def test_a_table_of_latencies_tells_its_error(net, tmp_path):
    few, notes = search(net, tmp_path, "random", measure=[SCORE, MetricRef("prefill.p50", ())], evals=4)[0], net
    assert few.points and notes.program.notes[-1]["latency_error"] >= 0


@pytest.mark.parametrize(
    ("args", "slug", "help_"),
    [
        ({"at_most": Ratio(0.05, "params")}, "none-small-enough", "`at_most: "),
        ({"report": [SCORE]}, "report-is-selection", "other rows"),
    ],
)
def test_searches_that_can_not_be_are_refused(net, tmp_path, args, slug, help_):
    found = refused(lambda: search(net, tmp_path, "random", **args)).diagnostics[0]
    assert found.slug == slug and help_ in found.help


@given(st.lists(st.tuples(*[st.integers(0, 9).map(float)] * 2), min_size=1, max_size=30), st.integers(1, 6))
def test_a_thin_front_keeps_its_ends_and_nothing_on_it_is_beaten(values, most):
    known = {(i,): v for i, v in enumerate(values)}
    front = non_dominated(known)
    assert all(any(beats(known[f], v) or known[f] == v for f in front) for v in values)
    thin = thin_front(front, known, most)
    assert len(thin) == min(most, len(front)) and set(thin) <= set(front)
    if most >= 2:
        assert {front[0], front[-1]} <= set(thin) and len(crowding_distances([known[g] for g in thin])) == len(thin)


RECIPE = """effspec 1
model base = zoo("tiny-llama")
data few = text("{zoo}/calib.txt", samples: 4, length: 32, seed: 7)
data test = text("{zoo}/heldout.txt", samples: 2, length: 32)
pipeline lean(base) {{
  net = supernet.elastic(channels: [100%, 50%], per: model, ranks: [4, 2], data: few, steps: 3, batch: 2, lr: 1e-3)
  front = search.hill(measure: [perplexity(few), params], report: [perplexity(test)], evals: 6, points: 2)
}}
emit lean {{ front("sizes") }}
"""


@pytest.mark.heavy
def test_a_front_of_choices_is_emitted_and_one_is_picked_later(tmp_path):
    (tmp_path / "lean.effspec").write_text(RECIPE.format(zoo=zoo_folders_by_name()["tiny-llama"]))
    (result,) = api.compile(tmp_path / "lean.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    manifest = result.artifacts[0].manifest
    measures = [{name: value for name, value, *_ in m["measures"]} for m in manifest.members]
    assert len(measures) == 2 and all(check.holds for check in manifest.checks)
    least = min(m["params"] for m in measures)
    limit = (picking.Limit("params", f"{int(least)}"),)
    name, _ = picking.copy_point(tmp_path / "out/sizes", tmp_path / "picked", limits=limit)
    assert name == "choice_2" and "perplexity(test)" in measures[1]
    assert picking.point_folder_or_copy(tmp_path / "out/sizes", f"params={int(least)}").name == name
    drawn = [(str(i), m["params"], m["perplexity(few)"]) for i, m in enumerate(measures, 1)]
    assert svg_scatter_plot(drawn, "params", "perplexity(few)").count("<circle") == 2 and "+----" in ascii_scatter_plot(
        drawn, "a", "b"
    )
    assert sum(p.numel() for p in api.load(tmp_path / "picked").parameters()) == least


@pytest.mark.slow
@pytest.mark.parametrize("method", wide(("random", "hill", "predict", "nsga2"), ("hill",)))
def test_killed_many_times_a_compile_goes_on_to_the_same_front(tmp_path, method):
    from tests.passes.test_workers import NET, stepped, written

    if method == "nsga2":
        pytest.importorskip("pymoo")
    recipe = written(tmp_path, NET, f"search.{method}(measure: [perplexity(rows), params], evals: 60)")
    began = time.monotonic()
    whole, _, _ = stepped(recipe, "whole")
    kill_often(
        lambda: stepped(recipe, "killed"),
        lambda: shutil.rmtree(tmp_path / "killed"),
        time.monotonic() - began,
        seed=5,
        times=2,
    )
    assert stepped(recipe, "killed")[0] == whole
