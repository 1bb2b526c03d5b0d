"""`native(weights: int4)`: the model that quantisation left, in its own codes, in few bytes."""

import copy

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.linears import NumberFormats
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.plan_files import read_plan, write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels import packed
from effc.kernels.grid import Grid
from torch import nn

from tests import tiny
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults

torch.set_num_threads(1)
IDS = torch.arange(3, 27)


def on_grid(model: nn.Module, group: int) -> nn.Module:
    """A copy whose linear modules inside layers are on grids, as `quantize.round` leaves them."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            weight = module.weight.data
            weight.copy_(Grid(4, group, False, True).fit_scales(weight).round(weight))
    return model


def native(folder, model: nn.Module, numbers: NumberFormats):
    folder.mkdir()
    write_plan(Reader(capture(model), numbers).build_plan(), folder, {"class": "X", "model_type": "llama", "params": 1})
    return open_native(folder, threads=1)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS[None]).logits[0].float()


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama", tie_word_embeddings=True)


@pytest.mark.slow
def test_a_quantised_program_runs_on_its_own_codes_and_a_plain_one_is_rounded_to_the_same(llama, tmp_path):
    quantised = on_grid(llama, 32)
    wanted, before = logits(quantised), logits(llama)
    kept = native(tmp_path / "kept", quantised, NumberFormats("int4", 64))
    rounded = native(tmp_path / "rounded", llama, NumberFormats("int4", 32))
    by_bf16 = native(tmp_path / "bf16", quantised, NumberFormats("bf16"))
    assert torch.equal(logits(kept), logits(rounded))
    # Inputs are rounded to 127 steps of the largest of 32, a head's codes to 127 steps: against a grid's 15 that is little.
    assert off(logits(kept), wanted) < 0.03 < off(wanted, before)
    assert off(logits(by_bf16), wanted) < 0.01


@pytest.mark.slow
def test_the_head_is_int8_unless_it_is_asked_for_otherwise_and_an_embedding_reads_it(llama, tmp_path):
    sizes = {}
    for head, kernel in {"": "dense_linear_int8", "int4": "dense_linear_int4", "bf16": "dense_linear"}.items():
        model = native(tmp_path / (head or "auto"), llama, NumberFormats("int4", 32, head))
        step = read_plan(tmp_path / (head or "auto")).plan["steps"]
        table = next(s["table"] for s in step if s["op"] == "embedding")
        assert packed.kernel_of(model.weights.get_buffer(table.replace(".", "/"))) == kernel
        assert table == next(s["weight"] for s in reversed(step) if s["op"] == "linear")
        sizes[head] = (tmp_path / (head or "auto") / "weights.bin").stat().st_size
    assert sizes["int4"] < sizes[""] < sizes["bf16"]


def test_groups_that_no_kernel_has_are_refused_by_a_plan(tmp_path):
    recipe = recipe_of([])
    ctx = context_of(tmp_path, tiny.model("llama"), recipe)
    from effc.compiler.targets.native import Native

    with pytest.raises(Reject, match="no kernel has groups of 48 inputs"):
        Native(path="x", **{**defaults("target", "native"), "group": 48}).foresee(ctx)
