"""An embedding that is tied to an int8 head: it reads the head's rows, and no table is stored beside them."""

import copy
from pathlib import Path

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.linears import NumberFormats
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.plan_files import read_plan, write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.kernels.ops import KERNELS
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
ZOO = Path(__file__).parents[4] / "recipes" / "zoo" / "tiny-llama"
FACTS = {"class": "X", "model_type": "llama", "params": 1}
HEADS = {"int8": "dense_linear_int8", "int8_int16": "dense_linear_int8_int16"}
by_numbers = pytest.mark.parametrize("numbers", HEADS)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ZOO, local_files_only=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    """Rows [8, 128] of held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(ZOO, local_files_only=True)
    ids = tokenizer((ZOO / "heldout.txt").read_text(), return_tensors="pt").input_ids[0]
    return ids[: 8 * 128].view(8, 128)


def plan_of(model, numbers):
    return Reader(capture(model), NumberFormats(numbers)).build_plan()


def with_table(plan, table=None):
    """The plan with a bfloat16 table, or another one, that its embedding reads: as effc 0.2 wrote them."""
    (step,) = (step for step in plan.steps if step["op"] == "embedding")
    step["table"] = "model.embed_tokens.rows"
    if table is not None:
        entry = plan.entries[step["table"]]
        plan.entries[step["table"]] = type(entry)("f32", entry.shape, lambda: table)
    return plan


def opened(folder, plan):
    folder.mkdir()
    write_plan(plan, folder, FACTS)
    return open_native(folder, threads=1)


@torch.no_grad()
def logits(model, rows):
    return model(input_ids=rows).logits.float()


def divergence(expected, actual) -> float:
    """Mean KL divergence of a token's prediction, in nats."""
    p, q = (x.log_softmax(-1) for x in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


@by_numbers
def test_no_table_is_stored_beside_a_head_that_has_its_rows(model, numbers, tmp_path):
    opened(tmp_path / "a", plan_of(model, numbers))
    stored = read_plan(tmp_path / "a")
    (table,) = (step["table"] for step in stored.plan["steps"] if step["op"] == "embedding")
    assert table == stored.plan["steps"][-1]["weight"]
    matrices = [entry["kind"] for entry in stored.entries.values() if len(entry["shape"]) == 2]
    assert set(matrices) == {"packed"}
    bytes = sum(entry["bytes"] for entry in stored.entries.values())
    assert bytes < 1.1 * sum(p.numel() for p in model.parameters())  # a byte for each, and 8 for 128 of an output


@by_numbers
def test_an_embedding_reads_the_codes_of_the_head_times_their_scales(model, numbers, rows, tmp_path):
    shared, exact = plan_of(model, numbers), plan_of(model, numbers)
    kernel = KERNELS[HEADS[numbers]]
    table = kernel.unpack(kernel.pack(model.lm_head.weight))
    actual = logits(opened(tmp_path / "shared", shared), rows[:2])
    assert torch.equal(actual, logits(opened(tmp_path / "exact", with_table(exact, table)), rows[:2]))


@pytest.mark.slow
@by_numbers
def test_it_costs_less_than_a_ten_thousandth_of_a_nat(model, numbers, rows, tmp_path):
    original = logits(model, rows)
    shared = logits(opened(tmp_path / "shared", plan_of(model, numbers)), rows)
    exact = logits(opened(tmp_path / "exact", with_table(plan_of(model, numbers))), rows)
    assert divergence(original, shared) - divergence(original, exact) < 1e-4


def test_a_head_of_its_own_leaves_the_embedding_its_table(model, tmp_path):
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    plan = plan_of(untied, "int8")
    (step,) = (step for step in plan.steps if step["op"] == "embedding")
    assert plan.entries[step["table"]].kind == "bf16"


def test_artifacts_of_earlier_versions_open_with_the_table_that_they_have(model, rows, tmp_path):
    actual = logits(opened(tmp_path / "a", with_table(plan_of(model, "int8_int16"))), rows[:2])
    assert divergence(logits(model, rows[:2]), actual) < 1e-2
