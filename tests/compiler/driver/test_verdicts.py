"""Bounds that one artifact was judged by, beside the numbers of another."""

import json

import pytest
import torch
from effc.compiler.core.cache import Cache
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.judging.verdicts import Verdicts
from torch import nn

from tests import tiny

RECIPE = """effspec 1
model base = config("tiny.json", seed: 3)
pipeline lean(base) { thin = prune.channels(keep: 75% of channels, align: 16) }
expect lean {
  params <= 1 * base
  decode.p50(prompt: 4, steps: 2) <= 1000ms
}
emit lean { hf("h")  pt2("pt") }
"""


class Forward(nn.Module):
    """What a later target may open: no generation, and more numbers than the result has."""

    def __init__(self, model: nn.Module, more: int = 0):
        super().__init__()
        self.inner, self.more = model.model, nn.Parameter(torch.zeros(more))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The verdicts of a pipeline whose first artifact was judged, its second target, and the model."""
    tmp_path = tmp_path_factory.mktemp("judged")
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    (tmp_path / "r.effspec").write_text(RECIPE)
    session = api.open_session(tmp_path / "r.effspec", settings=Settings(tmp_path / "cache", threads=1))
    (plan,) = api.plan_all_pipelines(session)
    ctx = session.context(plan.recipe, plan.pipeline)
    verdicts = Verdicts(plan, Cache(tmp_path / "cache"), ctx)
    first, later = plan.pipeline.emits
    shown, new = verdicts.judge_model(first, ctx.origin.load, is_rounded=False)
    assert [o.state for o in new] == ["ok", "ok"] and shown.outcomes == new
    return verdicts, later, ctx.origin.load()


def test_a_bound_is_judged_again_where_an_artifact_measures_something_else(judged):
    verdicts, target, model = judged
    shown, new = verdicts.judge_model(target, lambda: Forward(model, more=10**6), is_rounded=False)
    params = next(m for m in shown.measures if m.metric == "params")
    (missed,) = [o for o in shown.outcomes if not o.passed]
    assert missed.value == params.compiled > missed.high and missed in new and missed.where == "pt"


def test_what_another_artifact_measures_alike_is_not_said_twice(judged):
    verdicts, target, model = judged
    shown, new = verdicts.judge_model(target, lambda: model, is_rounded=False)
    assert [o.state for o in shown.outcomes if o.bound.metric.name == "params"] == ["ok"] and new == ()


def test_times_of_another_artifact_are_not_shown(judged):
    verdicts, target, model = judged
    shown, _ = verdicts.judge_model(target, lambda: Forward(model), is_rounded=False)
    assert not [m.metric for m in shown.measures if m.metric.startswith("decode")]
    assert not [o for o in shown.outcomes if o.bound.metric.name.startswith("decode")]
