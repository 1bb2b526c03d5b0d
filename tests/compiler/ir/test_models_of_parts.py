"""Models whose parts are models of other kinds, and those that keep something from one call for the next."""

import json

import pytest
import torch
from effc.compiler.artifacts.verify import (
    attention_name_or_json,
    make_probe_inputs,
    opener_script_path,
    probe_in_fresh_process,
)
from effc.compiler.artifacts.verify_child import probe_model
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.capture.meta_capture import capture_on_meta
from effc.compiler.models.checkpoints.model_folder import origin_of_folder
from effc.compiler.plugin.target import Form
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    LevitConfig,
    LevitForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
)

from tests import worlds
from tests.architectures.test_unseen import assert_sliced_is_silenced

torch.set_num_threads(1)


def detr() -> DetrForObjectDetection:
    """With a ResNet, which knows no fused attention."""
    seen = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"], num_labels=2
    )
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE.items()}
    config = DetrConfig(
        backbone_config=seen, use_timm_backbone=False, d_model=32, num_queries=4, num_labels=3, backbone=None, **sides
    )
    return DetrForObjectDetection(config).eval()


SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detr")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detr().save_pretrained(folder)
    return origin_of_folder(folder, "here", "auto", worlds.context(folder.parent).settings)


def test_a_part_without_fused_attention_runs_its_own_and_the_rest_the_fused_one(opened):
    model = opened.load()
    assert model.config._attn_implementation == "sdpa"
    assert model.config.backbone_config._attn_implementation == "eager"


def test_a_check_opens_parts_with_the_attention_that_they_have_in_memory(opened):
    model = opened.load()
    said = attention_name_or_json(model)
    assert json.loads(said) == {"": "sdpa", "backbone_config": "eager"}
    given = make_probe_inputs(model)
    found, wanted = (
        probe_in_fresh_process(opened.folder, opener_script_path(Form("model", "plain")), given, said),
        probe_model(model, given),
    )
    assert wanted.keys() <= found.keys()
    assert all(torch.allclose(found[name], want, atol=1e-5) for name, want in wanted.items())


def test_models_of_one_attention_say_it_in_a_word():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    assert attention_name_or_json(LlamaForCausalLM(config)) == "sdpa"


def test_a_layer_that_asks_for_numbers_only_while_it_trains_is_captured(opened):
    units = set(capture_on_meta(opened).units)
    assert {f"model.{side}.layers.{n}" for side in ("encoder", "decoder") for n in range(2)} <= units


@pytest.fixture
def levit() -> LevitForImageClassification:
    """A LeViT, whose attentions keep their biases in a dict, by device, once they have run."""
    config = LevitConfig(
        image_size=64,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 2, 3],
        depths=[2, 1, 1],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 4, 2, 2, 2]],
        num_labels=3,
    )
    return LevitForImageClassification(config).eval()


def test_what_a_forward_keeps_in_a_dict_of_its_module_is_no_value_of_a_trace(levit):
    program = capture(levit)
    assert [*program.units] == [f"levit.encoder.stages.{n}" for n in range(3)] and not program.opaque
    tables = [m.attention_bias_cache for m in levit.modules() if hasattr(m, "attention_bias_cache")]
    assert tables and all(type(held) is torch.Tensor for table in tables for held in table.values())


def test_tensors_that_a_forward_keeps_in_a_dict_are_computed_anew_behind_a_cut(levit):
    for parameter in levit.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    assert_sliced_is_silenced(capture(levit), "heads")
