"""What the target `native` writes, reopened in a fresh process."""

import copy
from dataclasses import replace

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.ir.capture.capture import capture
from effc.compiler.targets.native import SHARES, Native
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny
from tests.recipes_in_memory import context_of, recipe_of

torch.set_num_threads(1)


def emitted(tmp_path, model, **options):
    """The folder of an emitted artifact, without a manifest, and its target."""
    target, folder = Native(path="cpu", **options), tmp_path / "cpu"
    folder.mkdir(parents=True)
    target.emit(capture(model), folder, context_of(tmp_path, model, recipe_of([])))
    return folder, target


@pytest.mark.parametrize(
    "name,dtype,options",
    [
        pytest.param("gpt2", torch.float32, {}, marks=pytest.mark.heavy),
        ("gemma2", torch.float16, {"weights": "int8"}),
        ("qwen3", torch.bfloat16, {"weights": "int8", "inputs": "int16"}),
        ("qwen3", torch.float32, {"head": "int4"}),
        pytest.param("llama", torch.bfloat16, {}, marks=pytest.mark.heavy),
    ],
)
def test_a_fresh_process_computes_what_the_model_does(tmp_path, name, dtype, options):
    model = tiny.model(name).to(dtype)
    folder, target = emitted(tmp_path, copy.deepcopy(model), **options)
    checks = verify_forms(folder, model, target.forms())
    assert len(checks) == 6 and all(check.holds and check.reason for check in checks)


@pytest.mark.slow
def test_a_model_whose_numbers_bfloat16_does_not_keep_is_held_to_what_torch_makes_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(SHARES, "bf16", 1e-4)  # as if all numbers were harder to keep
    model = tiny.model("llama")
    folder, target = emitted(tmp_path, copy.deepcopy(model))
    checks = verify_forms(folder, model, target.forms())
    assert all("torch's own bfloat16 is off by" in check.reason for check in checks if "logits" in check.what)
    with pytest.raises(Reject, match="logits of a batch differ by"):
        verify_forms(folder, tiny.model("llama", seed=1), target.forms())


@pytest.mark.slow
def test_weights_of_another_model_are_found_by_the_fresh_process(tmp_path):
    folder, target = emitted(tmp_path, tiny.model("llama"))
    with pytest.raises(Reject, match="logits of a batch differ by"):
        verify_forms(folder, tiny.model("llama", seed=1), target.forms())


def test_equal_programs_give_equal_files(tmp_path):
    first, second = (emitted(tmp_path / part, tiny.model("qwen3"))[0] for part in ("a", "b"))
    for file in ("plan.json", "weights.bin"):
        assert (first / "native" / file).read_bytes() == (second / "native" / file).read_bytes()


def test_it_holds_no_dtype_but_its_own(tmp_path):
    folder, _ = emitted(tmp_path, tiny.model("llama"))
    with pytest.raises(Reject, match="packed weights, which have no other dtype"):
        load(folder / "native", dtype=torch.float32)


def test_it_keeps_as_many_sequences_as_it_is_loaded_for(tmp_path):
    folder, _ = emitted(tmp_path, tiny.model("llama"))
    assert (
        load(folder / "native").num_free_sequences == 16
        and load(folder / "native", max_sequences=3, threads=1).num_free_sequences == 3
    )


def test_it_is_refused_on_a_device_that_has_no_engine(tmp_path):
    folder, _ = emitted(tmp_path, tiny.model("llama"))
    with pytest.raises(Reject, match="run by the native engine, which cuda:0 has not"):
        load(folder / "native", device="cuda:0")


def test_an_artifact_of_the_target_is_known_by_its_plan():
    from effc.compiler.artifacts.load import has_checkpoint

    assert has_checkpoint(Manifest(kind="native", files={"native/plan.json": (1, "")}))
    assert not has_checkpoint(Manifest(kind="native"))


_MIXTURE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    "moe_intermediate_size": 64,
    "num_shared_expert": 1,
}


def mixture(name: str, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """Of random numbers, whose routers are undecided more often than a trained model's."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, dtype=dtype, **_MIXTURE)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.08)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,dtype",
    [
        ("hunyuan_v1_moe", torch.bfloat16),
        pytest.param("hunyuan_v1_moe", torch.float32, marks=pytest.mark.heavy),
        pytest.param("minimax_m2", torch.bfloat16, marks=pytest.mark.heavy),
    ],
)
def test_a_mixture_is_written_though_rounding_sends_some_tokens_to_other_experts(tmp_path, name, dtype):
    """Which model has such tokens depends on how a processor rounds: the first of some that has is looked for."""
    for seed in range(8):
        model = mixture(name, dtype, seed)
        folder, target = emitted(tmp_path / str(seed), copy.deepcopy(model))
        (form,) = target.forms()
        assert form.routes(folder / form.folder)
        assert all(check.holds for check in verify_forms(folder, model, target.forms()))
        try:
            verify_forms(folder, model, [replace(form, routes=lambda folder: False)])  # as another model is compared
        except Reject as refused:
            assert "differ by" in refused.diagnostics[0].message
            return
    raise AssertionError("no token of eight models met another expert")


@pytest.mark.slow
def test_a_model_that_never_read_its_mask_takes_padding_for_text(tmp_path):
    model = tiny.model("rwkv")
    folder, target = emitted(tmp_path, copy.deepcopy(model))
    assert all(check.holds for check in verify_forms(folder, model, target.forms()))
    native, ids = load(folder / "native"), torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        torch.testing.assert_close(native(ids, mask).logits, model(ids, attention_mask=mask).logits, atol=2e-2, rtol=0)


def doubled(model):
    model.model.layers[2].self_attn.o_proj.weight.mul_(2)


def swapped(model):
    for parameter in model.model.layers[2].mlp.experts.parameters():
        parameter[:2] = parameter[:2].flip(0).clone()


@pytest.mark.slow
@pytest.mark.parametrize("spoil", (doubled, swapped))
def test_a_mixture_with_a_layer_doubled_or_two_experts_swapped_is_found(tmp_path, spoil):
    model = mixture("hunyuan_v1_moe", torch.bfloat16, 0)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        spoil(wrong)
    folder, target = emitted(tmp_path, wrong)
    with pytest.raises(Reject, match="logits of a batch differ by"):
        verify_forms(folder, model, target.forms())
