"""Plans read from graphs, run by a naive interpreter: the model's own logits, whatever the architecture."""

import pytest
import torch
from effc.compiler.artifacts.verify_child import position_ids_if_accepted
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject

from tests import mixers, tiny
from tests.compiler.runtimes.native.naive import Naive

torch.set_num_threads(1)
ATOL = 2e-4  # of logits of a few units: float32 sums in other orders, over three layers
NATIVE = (
    *tiny.NAMES,
    "smollm3",
    "olmo2",
    "cohere",
    "granite",
    "glm4",
    "nemotron",
    "ministral",
    "stablelm",
    "starcoder2",
    "phi",
    "exaone4",
)
STATEFUL = ("mamba", "falcon_mamba", "mamba2", "bamba", "zamba2", "falcon_h1", "nemotron_h", "qwen3_next")


WRITTEN = ("bloom", "mpt", "gpt_neo")  # whose attention is written out in products
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoehybrid", "jamba")


def made(name):
    return halved(mixers.model(name))


def halved(model):
    """The model with weights that bfloat16 holds exactly, computing in float32."""
    return model.bfloat16().float()


def naive(program, **options):
    plan = Reader(program, "bf16").build_plan()
    return Naive(plan.to_json(), {name: entry.make() for name, entry in plan.live_weight_entries().items()}, **options)


@pytest.fixture(scope="module", params=(*NATIVE, *STATEFUL, *WRITTEN, *MIXTURES))
def pair(request):
    model = made(request.param)
    return model, naive(capture(model))


def rows_of(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **position_ids_if_accepted(model, mask)).logits


def test_a_plan_computes_the_logits_of_its_model_for_sequences_of_different_lengths(pair):
    model, engine = pair
    ids = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    wanted = rows_of(model, ids, mask)
    # Token by token in turn, so that both sequences grow at once.
    for column in range(14):
        rows = [row for row in (0, 1) if mask[row, column]]
        found = engine.run([int(ids[row, column]) for row in rows], rows, [True] * len(rows))
        assert torch.allclose(found, wanted[rows, column], atol=ATOL, rtol=1e-4)


REFUSED = {"doge": "DogeCDMoE"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_has_no_step_for_is_refused_by_node_module_and_line(name):
    with pytest.raises(Reject) as refused:
        Reader(capture(tiny.model(name)), "bf16").build_plan()
    said = refused.value.diagnostics[0].message
    assert said.startswith("node `") and REFUSED[name] in said and f"modeling_{name}.py:" in said
