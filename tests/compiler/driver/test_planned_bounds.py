"""Bounds on sizes that a plan decides: refused before a weight is read, where no artifact can keep them."""

import json
import re

import pytest
from effc.compiler.cli.main import main
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline small(base) {{
  {step}
}}
expect small {{ {bounds} }}
emit small {{ {targets} }}
"""
HALF = "thin = prune.channels(keep: 50% of channels)"


def recipe_file(tmp_path, bounds: str, step: str = HALF, targets: str = 'hf("small")'):
    file = tmp_path / "r.effspec"
    file.write_text(RECIPE.format(bounds=bounds, step=step, targets=targets))
    return file


@pytest.mark.parametrize(
    "bounds, targets",
    [
        ("bytes <= 1MB", 'hf("small")'),
        ("bytes <= 0.1 * base", 'hf("small")'),
        ("params <= 0.5 * base", 'hf("small")'),
        ("params in 1K..10K", 'hf("small")'),
        ("bytes >= 4MB", 'native("small", weights: int8)'),
        ("bytes <= 2MB in hf", 'native("a", weights: int8) hf("b")'),
    ],
)
def test_a_bound_that_the_planned_size_misses_is_refused_with_its_place(bounds, targets, tmp_path, capsys):
    file = recipe_file(tmp_path, bounds, targets=targets)
    with pytest.raises(Reject) as rejection:
        api.plan(file, cache_dir=tmp_path / "cache")
    (diagnostic,) = rejection.value.diagnostics
    assert diagnostic.slug == "unreachable-bound" and diagnostic.span.text == bounds
    saved = tmp_path / "plan.json"
    assert main(["plan", str(file), "--cache-dir", str(tmp_path / "cache"), "-o", str(saved)]) == 3
    captured = capsys.readouterr()
    assert "thin = prune.channels" in captured.out and "r.effspec:6:" in captured.err and not saved.exists()


@pytest.mark.parametrize(
    "bounds, step, targets",
    [
        ("bytes <= 6MB params <= 0.8 * base", HALF, 'hf("small")'),
        ("bytes <= 3MB", HALF, 'native("small", weights: int8)'),
        ("bytes <= 3MB in native", HALF, 'native("a", weights: int8) hf("b")'),
        ("bytes <= 1MB", "cpu = lower.sparse_cpu(format: sparse_int8)", 'native("small")'),  # known once it has run
    ],
)
def test_what_may_still_be_kept_is_planned(bounds, step, targets, tmp_path):
    file = recipe_file(tmp_path, bounds, step, targets)
    assert len(api.plan(file, cache_dir=tmp_path / "cache")) == 1


def test_the_answer_in_json_has_the_plan_and_the_bound(tmp_path, capsys):
    file = recipe_file(tmp_path, "bytes <= 1MB")
    assert main(["plan", str(file), "--cache-dir", str(tmp_path / "cache"), "--format", "json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == "error" and answer["plans"] and answer["diagnostics"][0]["slug"] == "unreachable-bound"


@pytest.mark.parametrize(
    "bounds, context",
    [("decode.p50 <= 2 * base", 128), ("throughput(batch: 2) >= 1", 162), ("prefill.p50(prompt: 99) <= 2 * base", 98)],
)
def test_a_bound_that_times_more_tokens_than_an_artifact_continues_is_refused_in_plan(bounds, context, tmp_path):
    def plan_with(context):
        file = recipe_file(tmp_path, bounds, targets=f'pt2("small", context: {context})')
        return api.plan(file, cache_dir=tmp_path / "cache")

    with pytest.raises(Reject) as rejection:
        plan_with(context)
    (diagnostic,) = rejection.value.diagnostics
    assert diagnostic.slug == "bound-beyond-context" and diagnostic.span.text == bounds
    assert len(plan_with(int(re.search(r"context: (\d+)", diagnostic.help)[1]))) == 1
