"""Adapters of strangers: ranks and names are held against the tensors before room is made for them."""

import json
import resource

import pytest
import torch
from effc.compiler.artifacts import adapter
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save_file

from tests import worlds

pytest.importorskip("peft")
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture
def base(tmp_path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(worlds.llama(tmp_path / "base")).eval()


@pytest.fixture
def folder(base, tmp_path):
    """An adapter of rank 2 on one linear layer."""
    out, inner = base.get_submodule(PATH).weight.shape
    place = tmp_path / "adapter"
    place.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [PATH]}
    (place / adapter.CONFIG).write_text(json.dumps(config))
    sides = {"lora_A": torch.ones(2, inner), "lora_B": torch.ones(out, 2)}
    save_file({f"base_model.model.{PATH}.{s}.weight": t for s, t in sides.items()}, place / adapter.WEIGHTS)
    return place


def test_an_adapter_is_read(base, folder):
    adapter.check(folder)
    assert any("lora_A" in name for name, _ in adapter.load_peft_adapters(folder, base).named_parameters())


@pytest.mark.parametrize("rank", [1, 3, 1 << 16])
def test_a_rank_that_the_tensors_do_not_have_is_refused_before_room_is_made(base, folder, rank):
    config = json.loads((folder / adapter.CONFIG).read_text())
    (folder / adapter.CONFIG).write_text(json.dumps(config | {"r": rank}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reading in (lambda: adapter.check(folder), lambda: adapter.load_peft_adapters(folder, base)):
        with pytest.raises(Reject, match=f"the rank of .* is {rank}"):
            reading()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB
