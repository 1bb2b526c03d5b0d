"""Steps that decide by a machine's latency run on that machine, or not at all."""

import json
import platform

import pytest
import torch
from effc.compiler.core.cache import Cache
from effc.compiler.driver import api
from effc.compiler.evaluation.metrics.decode.p50 import P50
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny

RECIPE = """effspec 1
model base = config("tiny.json", seed: 3)
data rows = synthetic(4, length: 12, seed: 1)
profile there {{ {there} }}

pipeline lean(base) {{
  slim = prune.multi(remove: 20% of latency, order: [blocks], score: perplexity(rows), machine: there,
                     clock: decode.p50(prompt: 8, steps: 8))
}}

emit lean {{ hf("lean", form: compact) }}
"""
ELSEWHERE = "avx2" if platform.machine() in ("aarch64", "arm64") else "neon"


@pytest.fixture
def recipe(tmp_path):
    config = tiny.config("llama", num_hidden_layers=4).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    path = tmp_path / "tiny.effspec"

    def write(there):
        path.write_text(RECIPE.format(there=there))
        return path

    return write


def test_a_latency_of_another_machine_is_refused_before_anything_runs(recipe):
    path, events = recipe(f"isa: {ELSEWHERE}"), []
    with pytest.raises(Reject, match=f"another-machine.*asks for {ELSEWHERE}") as refused:
        api.compile(path, path.parent / "out", cache_dir=path.parent / "cache", on_event=events.append)
    assert refused.value.exit == 5
    assert "prune.multi" in refused.value.diagnostics[0].span.text
    assert not [e for e in events if type(e).__name__ == "StageBegan"]


def test_a_machine_is_part_of_what_a_step_depends_on(recipe):
    def key(there):
        path = recipe(there)
        (plan,) = api.plan(path, cache_dir=path.parent / "cache")
        return plan.stages[0].key

    assert key("threads: 1") == key("threads: 1") != key("threads: 2")


@pytest.mark.slow
def test_latency_is_measured_with_the_threads_of_the_machine(recipe, monkeypatch):
    seen, before, real = set(), torch.get_num_threads(), P50.clock
    monkeypatch.setattr(P50, "clock", lambda self, model: (seen.add(torch.get_num_threads()), real(self, model))[1])
    path = recipe(f"threads: {before + 1}")
    opened = api.open_session(path, cache_dir=path.parent / "cache", threads=before)
    (plan,) = api.plan_all_pipelines(opened)
    from effc.compiler.driver.pipeline import Build

    build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(path.parent / "cache"))
    try:
        build.run_step_unless_cached(plan.stages[0])
    except Reject as refused:  # the clock of a busy machine may say that no branch takes any time
        assert refused.diagnostics[0].slug == "out-of-reach"
    assert seen == {before + 1} and torch.get_num_threads() == before
