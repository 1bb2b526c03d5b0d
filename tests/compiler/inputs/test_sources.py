"""Model sources: what they give, and what they refuse before any weight is read."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.compiler.inputs.sources.config import Config
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.inputs.sources.module import Module
from effc.compiler.inputs.sources.zoo import Zoo, zoo_folders_by_name
from safetensors.torch import load_file, save_file

from tests import worlds

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    worlds.llama(tmp_path / "model")
    worlds.tokenizer(tmp_path / "model")
    return tmp_path / "model"


def origin(folder: Path, **more):
    return Hf(name=str(folder), **more).resolve(worlds.context(folder.parent))


def rewrite(folder: Path, change) -> None:
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- folders -------------------------------------------------------------------------------------------------


def test_a_folder_loads_bit_for_bit(folder):
    found = origin(folder)
    module, stored = found.load(), load_file(folder / "model.safetensors")
    assert all(torch.equal(module.get_parameter(name), stored[name]) for name in stored)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not module.training and found.dtype == "float32"
    assert found.weight_bytes == sum(p.nbytes for p in module.parameters())


def test_weights_are_mapped_from_disk_not_copied(folder):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    module = origin(folder).load()
    assert str(folder / "model.safetensors") in maps.read_text()
    del module


def test_building_on_meta_reads_nothing_and_has_the_same_names(folder):
    found = origin(folder)
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        module = found.build()
    assert all(p.is_meta for p in module.parameters())
    assert module.config._attn_implementation == "sdpa"
    assert "model.layers.1.mlp.down_proj.weight" in dict(module.named_parameters())


def test_a_config_of_seventy_billion_builds_on_meta_in_seconds(tmp_path):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = Config(path="config.json").resolve(worlds.context(tmp_path))
    with torch.device("meta"):
        module = found.build()
    assert 70e9 < sum(p.numel() for p in module.parameters()) < 71e9
    assert module.dtype == torch.bfloat16


def test_resolving_imports_no_torch(folder):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); from tests import worlds\n"
        "from effc.compiler.inputs.sources.hf import Hf\n"
        "Hf(name=sys.argv[1]).resolve(worlds.context(Path(sys.argv[1]).parent))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, folder, Path(__file__).parents[3]], check=True)


def test_the_fingerprint_is_the_structure_and_the_identity_the_weights(folder, tmp_path):
    one = origin(folder)
    other = origin(worlds.llama(tmp_path / "other", seed=1))
    wider = origin(worlds.llama(tmp_path / "wider", intermediate_size=64))
    assert one.fingerprint == other.fingerprint != wider.fingerprint
    assert len({one.identity, other.identity, wider.identity}) == 3
    assert origin(folder).identity == one.identity != origin(folder, dtype="bfloat16").identity


def test_a_moved_folder_keeps_its_identity(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert origin(moved).identity == origin(folder).identity
    assert origin(moved).tokenizer_identity == origin(folder).tokenizer_identity != ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_auto_keeps_what_the_files_hold(tmp_path, dtype):
    found = origin(worlds.llama(tmp_path / "m", dtype=dtype))
    assert found.dtype == dtype and found.load().dtype == getattr(torch, dtype)
    assert bool(found.notes) == (dtype == "float16")
    assert origin(tmp_path / "m", dtype="bfloat16").load().dtype == torch.bfloat16


def test_a_model_without_tokenizer_has_none(tmp_path):
    assert origin(worlds.llama(tmp_path / "m")).tokenizer() is None


def test_the_tokenizer_is_read_once(folder):
    found = origin(folder)
    assert found.tokenizer() is found.tokenizer()
    assert found.tokenizer()("a")["input_ids"][0] == 0


def test_shards_load_like_one_file(folder, tmp_path):
    whole = origin(folder).load()
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    parts = origin(tmp_path / "sharded").load()
    assert all(torch.equal(p, parts.get_parameter(n)) for n, p in whole.named_parameters())


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    assert worlds.slug(lambda: origin(tmp_path / "nowhere")) == "no-model"


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert worlds.slug(lambda: origin(folder)) == "no-model"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": 3}', "[" * 10**5, "\xff"])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    assert worlds.slug(lambda: origin(folder)) == "bad-config"


def test_an_unknown_architecture_names_the_nearest(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "lama"}
    (folder / "config.json").write_text(json.dumps(config))
    (found,) = worlds.refused(lambda: origin(folder).build()).diagnostics
    assert found.slug == "unknown-architecture" and "`llama`" in found.help


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    assert worlds.slug(lambda: origin(folder)) == "no-model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_a_pickle_is_named_and_never_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    (found,) = worlds.refused(lambda: origin(folder)).diagnostics
    assert found.slug == "pickle-weights" and name in found.message and "save_pretrained" in found.help


def test_a_gguf_file_in_the_folder_is_pointed_at(folder):
    (folder / "model.safetensors").rename(folder / "m.gguf")
    assert "gguf(" in worlds.refused(lambda: origin(folder)).diagnostics[0].help


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -1000])
def test_a_cut_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    reject = worlds.refused(lambda: origin(folder))
    assert reject.diagnostics[0].slug == "damaged-weights" and reject.exit == 5


def test_bytes_after_the_end(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0")
    assert worlds.slug(lambda: origin(folder)) == "damaged-weights"


def test_a_git_lfs_pointer_says_so(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in worlds.refused(lambda: origin(folder)).diagnostics[0].help


def test_a_tensor_that_two_shards_have_is_named_with_both(folder, tmp_path):
    origin(folder).load().save_pretrained(tmp_path / "s", max_shard_size="20KB")
    first, second, *_ = sorted((tmp_path / "s").glob("*.safetensors"))
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    tensors = {**load_file(second), **load_file(first)}
    save_file(tensors, second, {"format": "pt"})
    assert set(index["weight_map"].values()) >= {first.name, second.name}
    (found,) = worlds.refused(lambda: origin(tmp_path / "s")).diagnostics
    assert found.slug == "damaged-weights" and first.name in found.message and second.name in found.message


def test_a_missing_shard_is_named(folder, tmp_path):
    origin(folder).load().save_pretrained(tmp_path / "s", max_shard_size="20KB")
    gone = sorted((tmp_path / "s").glob("*.safetensors"))[1]
    gone.unlink()
    (found,) = worlds.refused(lambda: origin(tmp_path / "s")).diagnostics
    assert found.slug == "missing-shard" and gone.name in found.message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{}", "its `weight_map`, which says which file a tensor is in, is no object"),
        ("[]", "its `weight_map`, which says which file a tensor is in, is no object"),
        ('{"weight_map": null}', "its `weight_map`, which says which file a tensor is in, is no object"),
        ("x", "is no index of shards"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names files outside its folder"),
        ('{"weight_map": {"a": "b", "c": 3}}', "names no file for `c`"),
        ('{"weight_map": ["a"]}', "its `weight_map`, which says which file a tensor is in, is no object"),
    ],
)
def test_an_index_that_is_none(folder, body, said):
    (folder / "model.safetensors").rename(folder / "b")
    (folder / "model.safetensors.index.json").write_text(body)
    (found,) = worlds.refused(lambda: origin(folder)).diagnostics
    assert found.slug == "damaged-weights" and said in found.message and "object" not in (found.note or "")


def test_shards_without_an_index_are_told_of(folder, tmp_path):
    origin(folder).load().save_pretrained(tmp_path / "s", max_shard_size="20KB")
    (tmp_path / "s" / "model.safetensors.index.json").unlink()
    (found,) = worlds.refused(lambda: origin(tmp_path / "s")).diagnostics
    assert found.slug == "no-model" and "shards and no model.safetensors.index.json" in found.message


def test_a_weight_of_integers_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].int()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (found,) = worlds.refused(lambda: origin(folder)).diagnostics
    assert found.exit == 5 and "`model.layers.1.mlp.up_proj.weight` is I32" in found.message


def test_names_and_shapes_that_the_config_does_not_ask_for(folder):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
        tensors["model.layers.0.extra.weight"] = torch.zeros(2)
        del tensors["model.layers.1.mlp.up_proj.weight"]

    rewrite(folder, change)
    found = worlds.refused(origin(folder).load).diagnostics
    assert [d.slug for d in found] == ["other-weights"] * 3
    text = "\n".join(d.message for d in found)
    assert "47 x 32" in text and "`model.layers.1.mlp.up_proj.weight`" in text and "extra" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    rewrite(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(value) and None)
    (found,) = worlds.refused(origin(folder).load).diagnostics
    assert found.slug == "not-finite"
    assert "model.layers.1.mlp.up_proj.weight" in found.message and "1 value" in found.message


def test_quantized_and_integer_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert worlds.slug(lambda: origin(folder)) == "weights-dtype"
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda t: {k: v.to(torch.int8) for k, v in t.items()})
    assert worlds.slug(lambda: origin(folder)) == "weights-dtype"


def test_a_tokenizer_that_is_damaged(folder):
    (folder / "tokenizer.json").write_text("{")
    assert worlds.slug(origin(folder).tokenizer) == "bad-tokenizer"


def test_code_of_a_model_runs_only_where_granted(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'mine'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    source = Hf(name=str(folder))
    assert worlds.slug(lambda: source.resolve(worlds.context(tmp_path))) == "remote-code"
    assert not (tmp_path / "ran").exists()
    module = source.resolve(worlds.context(tmp_path, trust_remote_code=True)).load()
    assert type(module).__name__ == "M" and (tmp_path / "ran").exists()


def test_code_beside_a_known_architecture_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "mine.M"}}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    origin(folder).load()
    assert not (tmp_path / "ran").exists()


def test_the_hub_out_of_reach_is_a_network_matter(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    source = Hf(name="nobody/no-such-model-of-effc-tests")
    reject = worlds.refused(lambda: source.resolve(worlds.context(tmp_path, offline=True)))
    assert reject.diagnostics[0].slug == "hub-unreachable" and reject.exit == 8
    assert worlds.slug(lambda: Hf(name="a b/c/d").resolve(worlds.context(tmp_path))) == "hub-refused"


# -- zoo, config, module -------------------------------------------------------------------------------------


def test_the_zoo_names_the_nearest(tmp_path):
    (found,) = worlds.refused(lambda: Zoo(name="tiny-lama").resolve(worlds.context(tmp_path))).diagnostics
    assert found.slug == "unknown-model" and "tiny-llama" in found.help


def test_every_zoo_model_resolves(tmp_path):
    for name in zoo_folders_by_name():
        found = Zoo(name=name).resolve(worlds.context(tmp_path))
        assert found.tokenizer() is not None and found.weight_bytes > 0


def test_random_weights_follow_the_seed(folder):
    ctx = worlds.context(folder)
    a, again, b = (Config(path="config.json", seed=s).resolve(ctx) for s in (0, 0, 1))
    before = torch.random.get_rng_state()
    weights = [o.load().state_dict() for o in (a, again, b)]
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])
    assert a.identity == again.identity != b.identity and a.fingerprint == b.fingerprint
    assert a.tokenizer() is not None


def test_a_user_module_needs_the_grant_and_repeats(tmp_path):
    (tmp_path / "net.py").write_text("import torch\ndef make(config):\n    return torch.nn.Linear(config['n'], 2)\n")
    (tmp_path / "net.json").write_text('{"n": 3}')
    source = Module(place="./net.py:make", config="net.json")
    assert worlds.slug(lambda: source.resolve(worlds.context(tmp_path))) == "remote-code"
    ctx = worlds.context(tmp_path, trust_remote_code=True)
    found = source.resolve(ctx)
    assert torch.equal(found.load().weight, found.load().weight)
    assert Module(place="./net.py:make", config="net.json", seed=1).resolve(ctx).identity != found.identity
    with torch.device("meta"):
        assert found.build().weight.is_meta


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("net.py", ""),
        ("net.py:not a name", ""),
        ("gone.py:make", ""),
        ("net.py:make", "x ="),
        ("net.py:make", "1 / 0"),
        ("net.py:make", ""),
        ("net.py:make", "def make(): return 3"),
    ],
)
def test_user_modules_that_make_none(tmp_path, place, text):
    (tmp_path / "net.py").write_text(text)
    ctx = worlds.context(tmp_path, trust_remote_code=True)
    assert worlds.slug(lambda: Module(place=place).resolve(ctx).load()) == "user-module"
