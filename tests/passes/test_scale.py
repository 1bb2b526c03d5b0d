"""quantize.scale: what may be scaled, that nothing changes by it, and what rounding loses after it."""

import pytest
import torch
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import KernelLinear, weight_of
from effc.compiler.transforms.search.folds import find_folds_by_unit
from effc.dsl.checker.values import DataRef
from effc.kernels.grid import Grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests import tiny
from tests.architectures import table
from tests.grids import wide
from tests.passes.test_quantize import run
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import refused

torch.set_num_threads(1)
DATA = {"data": DataRef("rows")}
FOUR = {**DATA, "bits": 4, "group": 16, "scales": "range"}
NAMES = ("llama", "gpt2", "opt", "phi3", "mixtral", "bert")


def outlying(name, factor=12.0):
    """A model in which some channels are large behind every norm, and some that a gate gives."""
    model = table.model(name)
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            if tensor.dim() == 1 and "norm" in path.rpartition(".")[0].rpartition(".")[2]:
                tensor[::17] = factor * (1 + tensor[::17].abs())
            if path.endswith("up_proj.weight"):
                tensor[::13] *= factor
    return model


def listened(model, rows):
    """What every linear module inside the layers is given and gives, [tokens, in] and [tokens, out]."""
    found, handles = {}, []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in path:

            def hook(_module, args, output, path=path):
                found[path] = args[0].flatten(0, -2).double(), output.flatten(0, -2).double()

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    return found


def test_the_folds_of_a_llama_are_its_norms_its_values_and_the_factor_of_its_gate():
    found = find_folds_by_unit(capture(tiny.model("llama")))
    for unit, some in found.items():
        below = {f.writer.removeprefix(f"{unit}."): [r.path.removeprefix(f"{unit}.") for r in f.readers] for f in some}
        assert below == {
            "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
            "self_attn.v_proj": ["self_attn.o_proj"],
            "mlp.up_proj": ["mlp.down_proj"],
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", wide(NAMES, {"llama", "gpt2", "phi3"}))
def test_scaled_models_compute_what_they_did_bit_for_bit(tmp_path, name, dtype):
    model = outlying(name).to(dtype)
    program, note = run(tmp_path, model, ("quantize.scale", FOUR))
    assert note["scaled"] and note["folds"] >= len(note["scaled"])
    assert (
        equivalence.max_difference(
            equivalence.record_logits_of_sample_calls(model), equivalence.record_logits_of_sample_calls(program.model)
        )
        == 0
    )
    changed = [n for n, p in program.model.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert any(n.startswith(tuple(note["scaled"])) for n in changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_norms_that_multiply_by_one_more_than_their_weight_are_scaled_where_that_rounds_little(tmp_path, dtype):
    model = outlying("gemma2", 4.0).to(dtype)
    program, note = run(tmp_path, model, ("quantize.scale", FOUR))
    assert any("layernorm" in writer for writer in note["scaled"]) == (dtype == torch.float32)
    before, after = (
        equivalence.record_logits_of_sample_calls(model),
        equivalence.record_logits_of_sample_calls(program.model),
    )
    assert equivalence.max_difference(before, after) <= 1e-4 * max(float(x.abs().max()) for x in before)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 16]),
    zero=st.sampled_from(["free", "middle"]),
    search=st.booleans(),
    factor=st.sampled_from([1.0, 4.0, 12.0]),
)
@pytest.mark.slow
def test_rounding_what_was_scaled_never_loses_more_over_the_rows(tmp_path, bits, group, zero, search, factor):
    model = outlying("llama", factor)
    args = {**DATA, "bits": bits, "group": group, "zero": zero, "scales": "search" if search else "range"}
    folder = tmp_path / f"{bits}{group}{zero}{search}{factor}"
    folder.mkdir(exist_ok=True)
    program, note = run(folder, model, ("quantize.scale", args))
    rows = context_of(tmp_path, model, recipe_of([])).rows(DATA["data"])
    grid, plain, scaled = Grid(bits, group, zero == "middle", search), 0.0, 0.0
    before, after = listened(model, rows), listened(program.model, rows)
    for path, (x, y) in before.items():
        weight, other = (weight_of(m.get_submodule(path)).float() for m in (model, program.model))
        plain += float((x @ (grid.fit_scales(weight).round(weight) - weight).double().T).square().sum())
        given, gives = after[path]
        size = y.norm(dim=0) / gives.norm(dim=0)  # rows that were scaled, in the size that they had
        apart = given @ (grid.fit_scales(other).round(other) - other).double().T * size
        scaled += float(apart.square().sum())
    assert scaled <= 1.0001 * plain
    assert not note["scaled"] or scaled < plain
    assert note["scaled"] or factor < 12 or bits > 4


def test_modules_that_read_the_same_share_a_scale_which_their_norm_is_divided_by(tmp_path):
    model = outlying("llama")
    program, note = run(tmp_path, model, ("quantize.scale", FOUR))
    layer, before = "model.layers.1", dict(model.named_parameters())
    after = dict(program.model.named_parameters())
    by = before[f"{layer}.input_layernorm.weight"] / after[f"{layer}.input_layernorm.weight"]
    assert f"{layer}.input_layernorm" in note["scaled"] and by.max() > 2 * by.min()
    assert torch.equal(by.log2(), by.log2().round())
    for name in ("q_proj", "k_proj"):
        new, old = (p[f"{layer}.self_attn.{name}.weight"] for p in (after, before))
        assert torch.allclose(new, old * by, rtol=1e-5)
    own = after[f"{layer}.self_attn.v_proj.weight"] / before[f"{layer}.self_attn.v_proj.weight"] / by
    assert torch.allclose(own, own[:, :1].expand_as(own), rtol=1e-4), "rows of v are scaled as a whole"


def test_int8_kernels_lose_less_of_what_was_scaled_for_them(tmp_path):
    model = outlying("llama", 40.0)
    args = {**DATA, "bits": 8, "group": 0, "inputs": "int8", "zero": "middle", "scales": "range"}
    program, _ = run(tmp_path, model, ("quantize.scale", args))
    rows = context_of(tmp_path, model, recipe_of([])).rows(DATA["data"])

    def lost(net):
        """Of each module's outputs, the share that the kernel loses."""
        shares = {}
        for path, (x, y) in listened(net, rows).items():
            given = KernelLinear.of(net.get_submodule(path), "dense_linear_int8")(x.float())
            shares[path] = float((given - y).square().sum() / y.square().sum())
        return shares

    plain, scaled = lost(model), lost(program.model)
    assert sum(scaled.values()) < 0.5 * sum(plain.values())


def test_a_second_run_goes_on_with_the_layers_that_the_first_had_made(tmp_path):
    model = outlying("llama")
    whole, _ = run(tmp_path, model, ("quantize.scale", FOUR))
    kept = sorted((tmp_path / "work0/layers").iterdir())
    assert len(kept) == 3
    kept[1].unlink()
    again, _ = run(tmp_path, model, ("quantize.scale", FOUR))
    assert all(torch.equal(p, again.model.get_parameter(n)) for n, p in whole.model.named_parameters())


def test_groups_that_do_not_divide_are_refused(tmp_path):
    found = refused(lambda: run(tmp_path, tiny.model("llama"), ("quantize.scale", {**FOUR, "group": 24})))
    assert found.diagnostics[0].slug == "unfit-group"
