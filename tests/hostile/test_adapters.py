"""Adapters of strangers: names, ranks and shapes are held against the tensors before room is made for them."""

import json
import math
import pickle
import resource

import pytest
import torch
from effc.compiler.artifacts import adapter
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import load_file, save_file

from tests import worlds

pytest.importorskip("peft")
PATH, RANK = "model.layers.0.mlp.up_proj", 2
DOWN, UP = (f"base_model.model.{PATH}.{side}.weight" for side in ("lora_A", "lora_B"))


@pytest.fixture
def base(tmp_path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(worlds.llama(tmp_path / "base")).eval()


@pytest.fixture
def folder(base, tmp_path):
    """An adapter on one linear layer."""
    out, inner = base.get_submodule(PATH).weight.shape
    place = tmp_path / "adapter"
    place.mkdir()
    write_config(place, peft_type="LORA", r=RANK, lora_alpha=4, target_modules=[PATH])
    save_file({DOWN: torch.ones(RANK, inner), UP: torch.ones(out, RANK)}, place / adapter.WEIGHTS)
    return place


def write_config(folder, **fields) -> None:
    file = folder / adapter.CONFIG
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | fields))


def write_tensors(folder, **changes) -> None:
    """Other tensors of both sides; None for none."""
    tensors = load_file(folder / adapter.WEIGHTS)
    tensors |= {{"down": DOWN, "up": UP}.get(name, name): tensor for name, tensor in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / adapter.WEIGHTS)


def test_an_adapter_is_read(base, folder):
    adapter.check_adapter_folder(folder)
    assert any("lora_A" in name for name, _ in adapter.load_peft_adapters(folder, base).named_parameters())


@pytest.mark.parametrize(
    "fields, scale",
    [
        ({}, 4 / RANK),
        ({"target_modules": ["up_proj"]}, 4 / RANK),
        ({"target_modules": "all-linear"}, 4 / RANK),
        ({"use_rslora": True}, 4 / math.sqrt(RANK)),
        ({"r": 8, "rank_pattern": {"up_proj": RANK}}, 4 / RANK),
        ({"alpha_pattern": {PATH: 6}}, 6 / RANK),
        ({"fan_in_fan_out": True, "init_lora_weights": "gaussian", "modules_to_save": None, "layers_to_transform": [0]}, 4 / RANK),
    ],
)  # fmt: skip
def test_what_a_linear_module_computes_is_the_sum_that_the_config_describes(base, folder, fields, scale):
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = base.get_submodule(PATH)(x) + scale * x @ torch.ones(32, RANK) @ torch.ones(RANK, 48)
    write_config(folder, **fields)
    adapted = adapter.load_peft_adapters(folder, base).get_base_model().get_submodule(PATH)
    torch.testing.assert_close(adapted(x), expected)


@pytest.mark.parametrize("rank", [1, 3, 1 << 16])
def test_a_rank_that_the_tensors_do_not_have_is_refused_before_room_is_made(base, folder, rank):
    write_config(folder, r=rank)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reading in (lambda: adapter.check_adapter_folder(folder), lambda: adapter.load_peft_adapters(folder, base)):
        with pytest.raises(Reject, match=f"the rank of .* is {rank}"):
            reading()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"peft_type": "IA3"}, "it is no LoRA"),
        ({"peft_type": ["LORA"]}, "it is no LoRA"),
        ({"r": 0}, "its rank is no number from 1 to 65536"),
        ({"r": True}, "its rank is no number from 1 to 65536"),
        ({"lora_alpha": 1e300}, "of an ordinary size"),
        ({"lora_alpha": "4"}, "of an ordinary size"),
        ({"rank_pattern": {"up_proj": "2"}}, "its `rank_pattern` has no numbers"),
        ({"target_modules": []}, "it names no modules"),
        ({"target_modules": [3]}, "it names no modules"),
        ({"target_modules": ["q_proj"]}, "does not name `model.layers.0.mlp.up_proj`"),
        ({"target_modules": r".*\.q_proj"}, "does not name `model.layers.0.mlp.up_proj`"),
        ({"target_modules": ["up_proj", "nowhere"]}, "names `nowhere`, which has no tensors"),
        ({"use_dora": True}, "doesn't compute what its `use_dora` says"),
        ({"init_lora_weights": "pissa"}, "doesn't compute what its `init_lora_weights` says"),
        ({"bias": "all"}, "doesn't compute what its `bias` says"),
        ({"modules_to_save": ["lm_head"]}, "doesn't compute what its `modules_to_save` says"),
        ({"of_a_later_peft": 1}, "doesn't compute what its `of_a_later_peft` says"),
    ],
)
def test_a_config_of_anything_but_a_lora_of_linear_modules_is_refused(folder, fields, sentence):
    write_config(folder, **fields)
    with pytest.raises(Reject) as refused:
        adapter.check_adapter_folder(folder)
    assert sentence in refused.value.diagnostics[0].message


@pytest.mark.parametrize("expression", [r".*\.up_proj", "all-linear", r".*(up|down)_proj", "(a+)+$"])
def test_an_expression_that_names_the_modules_or_could_run_for_long_is_taken(folder, expression):
    write_config(folder, target_modules=expression)
    adapter.check_adapter_folder(folder)


@pytest.mark.parametrize(
    "tensors, sentence",
    [
        ({"up": torch.ones(48, RANK + 1)}, "and the rank of adapter_config.json is 2"),
        ({"up": torch.ones(47, RANK)}, "of [47, 2]; the model has 48 in place of 47"),
        ({"down": torch.ones(RANK, 64)}, "of [2, 64]; the model has 32 in place of 64"),
        ({"down": torch.full((RANK, 32), math.nan)}, "holds NaN or infinity"),
        ({"up": torch.full((48, RANK), math.inf)}, "holds NaN or infinity"),
        ({"down": torch.ones(RANK, 32, dtype=torch.int8)}, "which is no matrix of floats"),
        ({"down": torch.ones(RANK, 32, 1)}, "which is no matrix of floats"),
        ({"up": None}, "is no LoRA of linear modules"),
        ({"up": None, "down": None}, "is no LoRA of linear modules"),
        ({"base_model.model.model.norm.weight": torch.ones(1, 32)}, "is no LoRA of linear modules"),
    ],
)
def test_tensors_of_other_names_shapes_and_numbers_are_refused(base, folder, tensors, sentence):
    write_tensors(folder, **tensors)
    with pytest.raises(Reject) as refused:
        adapter.load_peft_adapters(folder, base)
    assert sentence in refused.value.diagnostics[0].message


@pytest.mark.parametrize("path", ["model.layers.9.mlp.up_proj", "model.norm", "model.embed_tokens", "", "..", "model"])
def test_what_is_no_linear_module_of_the_model_is_refused(base, folder, path):
    write_config(folder, target_modules="all-linear")
    names = {side: f"base_model.model.{path}.{side}.weight" for side in ("lora_A", "lora_B")}
    save_file({names["lora_A"]: torch.ones(RANK, 32), names["lora_B"]: torch.ones(32, RANK)}, folder / adapter.WEIGHTS)
    with pytest.raises(Reject, match=r"which the model (doesn't have|has as no linear module)"):
        adapter.load_peft_adapters(folder, base)


def test_a_cut_file_and_a_pickle_are_refused_with_what_they_are(folder):
    whole = (folder / adapter.WEIGHTS).read_bytes()
    (folder / adapter.WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(Reject) as refused:
        adapter.check_adapter_folder(folder)
    assert refused.value.diagnostics[0].slug == "damaged-weights"
    (folder / adapter.WEIGHTS).unlink()
    (folder / adapter.PICKLE).write_bytes(pickle.dumps(print))
    with pytest.raises(Reject, match="is a pickle, which can run code"):
        adapter.check_adapter_folder(folder)


def test_a_config_of_a_million_names_is_read_at_once(folder):
    """Strangers' names are looked up: none is a pattern, and none is compared with every module."""
    import time

    names = [f"up_proj{i}" for i in range(50_000)]
    write_config(folder, target_modules=["up_proj"], alpha_pattern=dict.fromkeys(names, 4), exclude_modules="(a+)+$")
    begun = time.process_time()
    adapter.check_adapter_folder(folder)
    write_config(folder, target_modules=["up_proj", *names[:30_000]], alpha_pattern={})
    with pytest.raises(Reject, match="which has no tensors"):
        adapter.check_adapter_folder(folder)
    assert time.process_time() - begun < 2
