"""A model folder comes from anybody: its config makes a model of transformers that the weights have room for, or none."""

import json
import math
import shutil
import time

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.models.checkpoints.checkpoint import config_and_model_class
from effc.compiler.models.checkpoints.config_bounds import refuse_excessive_config_numbers
from effc.compiler.models.checkpoints.config_classes import drop_unsafe_config_keys, model_class_names
from effc.compiler.models.checkpoints.model_folder import origin_of_folder
from effc.compiler.models.checkpoints.sidecar_files import copy_sidecar_files
from effc.dsl.syntax.diagnostics import Reject
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PatchTSTConfig, PatchTSTForPrediction

from tests import tiny, worlds
from tests.worlds import refused

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    worlds.llama(folder)
    worlds.tokenizer(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def reconfigured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def opened(folder):
    """As `hf("./model")` does: looked at without weights, then read."""
    origin = origin_of_folder(folder, "here", "auto", worlds.context(folder.parent).settings)
    with torch.device("meta"):
        origin.build()
    return origin.load()


def test_a_sound_folder_opens(folder):
    assert type(opened(folder)) is LlamaForCausalLM


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "evil"},
        {"hidden_act": 3},
        {"hidden_act": None},
        {"hidden_size": 0},
        {"hidden_size": -128},
        {"hidden_size": 10**9},
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"hidden_size": [32]},
        {"head_dim": 0},
        {"head_dim": -1},
        {"head_dim": 10**9},
        {"num_hidden_layers": 10**4},
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_labels": 10**9},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**8},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"vocab_size": 10**12},
        {"vocab_size": 0},
        {"intermediate_size": 10**9},
        {"intermediate_size": 0},
        {"rope_parameters": {"rope_type": "evil"}},
        {"rope_parameters": []},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_scaling": {"type": "x", "factor": 0}},
        {"layer_types": ["full_attention"] * 10**5},
        {"layer_types": ["evil", "evil"]},
        {"rms_norm_eps": "a"},
        {"torch_dtype": "evil"},
        {"dtype": 7},
        {"pad_token_id": 10**9},
        {"tie_word_embeddings": "maybe"},
        {"attention_bias": True},
        {"model_type": "evil"},
        {"model_type": "timm_wrapper"},
        {"model_type": "dinat", "architectures": ["DinatBackbone"]},
        {"model_type": "gpt2"},
        {"vocab_size": 0},
        {"architectures": 3},
        {"architectures": [["x"]]},
        {"max_position_embeddings": -5},
        {"num_experts": 10**7},
        {"rms_norm_eps": math.nan},
        {"num_hidden_layers": -3},
        {"num_key_value_heads": 3},
    ],
    ids=lambda changes: json.dumps(changes)[:50],
)
def test_a_config_that_the_weights_do_not_fit_is_refused_at_once(folder, changes):
    """Or makes a model of these very weights, where it changes what is computed alone."""
    started = time.process_time()
    try:
        model = opened(reconfigured(folder, **changes))
    except Reject as reject:
        assert reject.diagnostics[0].slug in ("bad-config", "other-weights", "unknown-architecture", "odd-rows")
    else:
        assert sum(p.numel() for p in model.parameters()) < 10**6
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "detr"},
        {"model_type": "detr", "backbone_config": {"model_type": "timm_backbone", "backbone": "hf_hub:evil/x"}},
        {"model_type": "conditional_detr"},
        {"model_type": "edgetam"},
    ],
    ids=str,
)
def test_no_part_of_a_model_is_made_by_timm(config):
    with pytest.raises(Reject, match="comes from timm"):
        config_and_model_class(config)


CODE = {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}}


@pytest.mark.parametrize(
    "name",
    [
        "AutoModelForCausalLM",
        "pipeline",
        "Trainer",
        "AutoTokenizer",
        "PreTrainedModel",
        "GPT2LMHeadModel",
        "LlamaConfig",
        "modeling_utils",
        "LlamaTokenizer",
    ],
)
def test_a_class_is_one_that_transformers_lists_for_the_model_type(folder, name):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    reject = refused(lambda: opened(reconfigured(folder, architectures=[name], **CODE)))
    assert reject.diagnostics[0].slug == "unknown-architecture"


def test_a_class_that_nobody_knows_is_the_model_types_own(folder):
    """Folders name the classes of code that came with them long after transformers has its own."""
    assert type(opened(reconfigured(folder, architectures=["EvilForCausalLM", 3], **CODE))) is LlamaForCausalLM


def notes(folder):
    return origin_of_folder(folder, "here", "auto", worlds.context(folder.parent).settings).notes


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["os.system"], "names os.system, which transformers doesn't have: opened as LlamaForCausalLM"),
        ([7], "names 7, which transformers doesn't have: opened as LlamaForCausalLM"),
        ([], "names no class: opened as LlamaForCausalLM"),
        (["EvilForCausalLM", "LlamaForCausalLM"], ""),
        (["LlamaForSequenceClassification"], ""),
    ],
    ids=str,
)
def test_a_class_that_is_taken_in_place_of_the_configs_is_told(folder, named, said):
    found = notes(reconfigured(folder, architectures=named))
    assert len(found) == bool(said) and said in "".join(found)


@pytest.mark.parametrize("named", ["LlamaForCausalLM", 3, {"a": "LlamaForCausalLM"}, True], ids=str)
def test_classes_are_named_in_a_list(folder, named):
    (found,) = refused(lambda: notes(reconfigured(folder, architectures=named))).diagnostics
    assert found.slug == "bad-config" and "`architectures` of" in found.message and "is no list" in found.message


def test_a_class_of_another_model_type_is_called_so(folder):
    (found,) = refused(lambda: opened(reconfigured(folder, architectures=["GPT2LMHeadModel"]))).diagnostics
    assert found.message.startswith("GPT2LMHeadModel is no model class of transformers ")
    assert found.message.endswith(" for a `llama`, which the config is of: it is one of `gpt2`")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 33}, "The hidden size (33) is not a multiple of the number of attention heads (4)"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str (value: '32')"),
    ],
    ids=str,
)
def test_a_note_says_what_is_wrong_with_a_value(folder, changes, said):
    (found,) = refused(lambda: opened(reconfigured(folder, **changes))).diagnostics
    assert found.slug == "bad-config" and found.note == said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("max_window_layers", 80), ("expert_capacity", 64), ("moe_layer_interval", 500), ("attn_layer_period", 500)),
        ("log_scaling_n_floor", 128_000),
    ],
)
def test_numbers_that_shape_no_weight_are_free(folder, key, value):
    changes = reconfigured(folder, **{key: value})
    assert type(opened(changes)) is LlamaForCausalLM


def test_listed_classes_are_taken(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    assert config_and_model_class(config)[1] is LlamaForSequenceClassification


def test_a_class_in_no_table_is_taken_where_its_config_is_of_the_type_and_it_runs():
    config = PatchTSTConfig(context_length=32, patch_length=8, d_model=16).to_dict()
    assert config_and_model_class(config | {"architectures": ["PatchTSTForPrediction"]})[1] is PatchTSTForPrediction
    for other in ("PatchTSTPreTrainedModel", "LongT5EncoderModel", "PreTrainedModel"):
        with pytest.raises(Reject, match="is no model class of transformers"):
            config_and_model_class(config | {"architectures": [other]})


@pytest.mark.parametrize("name", [*tiny.NAMES, *tiny.WIDER])
def test_every_class_that_effc_is_tested_with_is_listed(name):
    with torch.device("meta"):
        assert type(tiny.blank(name)).__name__ in set(model_class_names(tiny.config(name).model_type))


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "org/kernel"},
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": "org/kernel:f"},
        {"experts_implementation": "org/kernel"},
        {"transformers_weights": "../../other.safetensors"},
        {"_name_or_path": "org/evil"},
    ],
    ids=str,
)
def test_kernels_and_other_files_are_not_the_configs_choice(folder, changes):
    model = opened(reconfigured(folder, **changes))
    assert model.config._attn_implementation == "sdpa"
    assert "org/" not in json.dumps(model.config.to_dict(), default=str)


def test_no_kernel_is_fetched_for_a_model(folder):
    """transformers would do so from 5.25 on, for every model."""
    assert not opened(folder).use_kernels


def test_keys_of_code_are_taken_out_at_any_depth():
    deep = {"a": [{"auto_map": 1, "b": {"quantization_config": 2, "c": 3}}], "limit": {"__float__": "Infinity"}}
    assert drop_unsafe_config_keys(deep) == {"a": [{"b": {"c": 3}}], "limit": float("inf")}


def test_an_adapter_is_no_model(folder):
    """transformers would open the model that it names."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/evil"}))
    assert "holds an adapter" in refused(lambda: opened(folder)).diagnostics[0].message
    (folder.parent / "a").mkdir()
    shutil.copytree(folder, folder.parent / "a" / "model")
    assert "holds an adapter" in refused(lambda: load(folder.parent / "a" / "model")).diagnostics[0].message


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "pipeline"},
        {"tokenizer_class": "LlamaForCausalLM"},
        {"tokenizer_class": "AutoTokenizer"},
        {"tokenizer_class": ["x"]},
        {"tokenizer_class": "evil.Evil"},
        {"auto_map": {"AutoTokenizer": ["evil.T", None]}},
    ],
    ids=str,
)
def test_a_tokenizer_is_one_of_transformers(folder, changes):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    origin = origin_of_folder(folder, "here", "auto", worlds.context(folder.parent).settings)
    try:
        origin.tokenizer()
    except Reject as reject:
        assert reject.diagnostics[0].slug == "bad-tokenizer"
    else:
        assert "auto_map" in changes  # not looked at: the class is named beside it


@pytest.mark.parametrize("name", [*tiny.NAMES, *tiny.WIDER])
def test_real_configs_have_room(name, tmp_path):
    """Of every architecture that effc is tested with: nothing is refused for its numbers."""
    model = tiny.model(name)
    model.save_pretrained(tmp_path)
    from effc.compiler.models.checkpoints.model_folder import read_model_config
    from effc.compiler.models.checkpoints.weights import read_weight_headers

    refuse_excessive_config_numbers(
        read_model_config(tmp_path / "config.json", "here"), read_weight_headers(tmp_path, "here").slots, "here"
    )
    refuse_excessive_config_numbers(read_model_config(tmp_path / "config.json", "here"), None, "here")


def test_a_config_that_is_no_file_is_refused(folder):
    import os

    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(lambda: opened(folder))
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    refused(lambda: opened(folder))


def test_experts_that_are_rows_of_one_tensor_are_bounded_by_sizes():
    refuse_excessive_config_numbers({"model_type": "doge", "num_experts": 16384}, None, "it")
    for config in ({"model_type": "mixtral", "num_experts": 16384}, {"model_type": "doge", "num_experts": 1 << 25}):
        with pytest.raises(Reject, match="num_experts"):
            refuse_excessive_config_numbers(config, None, "it")


@pytest.mark.parametrize("name", ["LICENSE", "preprocessor_config.json", "tokenizer.json", "config.json"])
def test_a_link_that_leads_out_of_a_model_is_not_followed(folder, name, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(Reject, match="is a link that leads out of"):
        opened(folder)


@pytest.mark.parametrize("place", ["additional_chat_templates/x.jinja", "1_Pooling/config.json"])
def test_nothing_of_somebody_else_gets_into_an_artifact(folder, place, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "modules.json").write_text('[{"type": "x.Pooling", "path": "1_Pooling"}]')
    (folder / place).parent.mkdir()
    (folder / place).symlink_to(tmp_path / "secret")
    origin = origin_of_folder(folder, "here", "auto", worlds.context(folder.parent).settings)
    with pytest.raises(Reject, match="is a link that leads out of"):
        copy_sidecar_files(origin.load(), origin, tmp_path / "out")


def test_links_of_the_hubs_cache_lead_to_its_blobs(folder, tmp_path):
    cached = tmp_path / "models--a--b" / "snapshots" / "0123"
    (blobs := cached.parents[1] / "blobs").mkdir(parents=True)
    cached.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (cached / file.name).symlink_to(blobs / str(number))
    assert type(opened(cached)) is LlamaForCausalLM
