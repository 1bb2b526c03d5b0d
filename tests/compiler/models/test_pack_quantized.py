"""The format `pack-quantized`: what compressed-tensors itself packs and unpacks, and folders that come from anybody."""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from effc.compiler.artifacts.load import load
from effc.compiler.models.checkpoints import pack_quantized
from effc.compiler.models.checkpoints.pack_quantized import Scheme, pack, pack_words, schemes_of_config, unpack_words
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import worlds


def codes(n, k, bits, seed=0):
    return torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def theirs(scheme):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.to_json()))


def packed(scheme, n=6, k=64, dtype=torch.float32, seed=0):
    """Tensors of a weight, and that weight."""
    groups = k // (scheme.group or k)
    code, zero = codes(n, k, scheme.bits, seed), codes(n, groups, scheme.bits, seed + 1).float()
    if scheme.symmetric:
        zero = torch.full_like(zero, 2 ** (scheme.bits - 1))
    scale = (torch.rand(n, groups, generator=torch.Generator().manual_seed(seed)) + 0.1).bfloat16().float()
    steps = code.view(n, groups, -1).float() - zero[:, :, None]
    return pack(code, scale, zero, scheme, dtype), (steps * scale[:, :, None]).view(n, k).to(dtype)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([4, 8]), n=st.integers(1, 9), k=st.integers(1, 70), seed=st.integers(0, 99))
def test_words_are_those_of_compressed_tensors(bits, n, k, seed):
    code = codes(n, k, bits, seed)
    signed = (code.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = pack_words(code, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((n, k))), signed)
    assert torch.equal(unpack_words(words, bits, k), code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_unpacks_the_weights_bit_for_bit(bits, group, symmetric, dtype):
    scheme = Scheme(bits, group, symmetric)
    tensors, weight = packed(scheme, dtype=dtype)
    assert torch.equal(Compressor.decompress(tensors, theirs(scheme))["weight"], weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "words", "zero_words"), [(4, 9, 2), (8, 17, 3)])
def test_names_shapes_and_types_are_those_that_the_format_states(bits, words, zero_words, symmetric):
    """ "Packing multiple sub-8-bit INT values into int32s"; ceil(E * B / 32) int32s hold E values of B bits; the original
    shape is `weight_shape`; the zero-point is packed where it is asymmetric; scales are in the weight's type."""
    scheme = Scheme(bits, 34, symmetric)
    tensors, _ = packed(scheme, n=9, k=68, dtype=torch.bfloat16)
    assert set(tensors) == set(Compressor.compression_param_names(theirs(scheme)))
    facts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert facts["weight_packed"] == (torch.int32, (9, words))
    assert facts["weight_scale"] == (torch.bfloat16, (9, 2))
    assert facts["weight_shape"] == (torch.int64, (2,)) and tensors["weight_shape"].tolist() == [9, 68]
    assert facts.get("weight_zero_point") == (None if symmetric else (torch.int32, (zero_words, 2)))
    sizes = sum(tensor.nbytes for tensor in tensors.values())
    assert scheme.stored_bytes(9, 68, itemsize=2) == sizes


# -- folders ------------------------------------------------------------------------------------------------


PATH = "model.layers.0.mlp.up_proj"


def quantization(*schemes, **changes):
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": s.to_json()} for i, s in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **changes}


def folder_with(tmp_path, scheme, tensors, **changes):
    """A Llama of which one module is packed."""
    folder = worlds.llama(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    stored.pop(f"{PATH}.weight")
    stored |= {f"{PATH}.{name}": tensor for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization(scheme, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("scheme", [Scheme(4, 8, True), Scheme(8, 0, True), Scheme(4, 16, False)])
def test_a_packed_folder_opens_with_the_weights_that_its_codes_stand_for(tmp_path, scheme):
    tensors, weight = packed(scheme, n=48, k=32)
    model = load(folder_with(tmp_path, scheme, tensors))
    assert torch.equal(model.get_submodule(PATH).weight, weight)
    assert not hasattr(model.config, "quantization_config")


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGES = {
    "a part is missing": lambda t: without(t, "weight_scale"),
    "no shape": lambda t: without(t, "weight_shape"),
    "zeros that no scheme has": lambda t: t | {"weight_zero_point": torch.zeros(6, 4, dtype=torch.int32)},
    "a shape that words don't hold": lambda t: t | {"weight_shape": torch.tensor([48, 1 << 40])},
    "a negative shape": lambda t: t | {"weight_shape": torch.tensor([-48, 32])},
    "a shape of floats": lambda t: t | {"weight_shape": torch.tensor([48.0, float("nan")])},
    "words of bytes": lambda t: t | {"weight_packed": t["weight_packed"].view(torch.uint8)},
    "scales of another group": lambda t: t | {"weight_scale": t["weight_scale"][:, :2].contiguous()},
    "codes as scales": lambda t: t | {"weight_scale": t["weight_scale"].int()},
    "scales of eight bytes": lambda t: t | {"weight_scale": t["weight_scale"].double()},
    "scales of one byte": lambda t: t | {"weight_scale": t["weight_scale"].to(torch.float8_e4m3fn)},
    "a dense weight beside": lambda t: t | {"weight": torch.zeros(48, 32)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_are_not_of_the_format_are_refused(tmp_path, damage):
    scheme = Scheme(4, 8, True)
    tensors, _ = packed(scheme, n=48, k=32)
    folder = folder_with(tmp_path, scheme, DAMAGES[damage](tensors))
    assert worlds.slug(lambda: load(folder)) == "damaged-weights"


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": {}},
        {"config_groups": []},
        {"config_groups": {"group_0": {"weights": None}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 3, "strategy": "group", "group_size": 8}}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "group", "group_size": -8}}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "tensor"}}}},
        {"config_groups": {"group_0": {"weights": Scheme(4, 8, True).to_json() | {"type": "float"}}}},
        {"config_groups": {"group_0": {"weights": Scheme(4, 8, True).to_json(), "input_activations": {"num_bits": 8}}}},
        {"kv_cache_scheme": {"num_bits": 8}},
    ],
)
def test_schemes_that_effc_would_compute_otherwise_are_refused(changes):
    config = {"quantization_config": quantization(Scheme(4, 8, True)) | changes}
    assert worlds.slug(lambda: schemes_of_config(config, "m")) == "bad-config"


def test_other_methods_are_not_read_as_this_one():
    for other in ({"quant_method": "gptq"}, {"quant_method": "compressed-tensors", "format": "int-quantized"}, 3, None):
        assert schemes_of_config({"quantization_config": other}, "m") == ()


def test_words_that_hold_more_than_the_model_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    scheme = Scheme(4, 8, True)
    folder = folder_with(tmp_path, scheme, packed(scheme, n=48, k=32)[0])
    file = folder / "model.safetensors"
    excess, _ = packed(scheme, n=4096, k=256)
    save_file(load_file(file) | {f"excess.{name}": tensor for name, tensor in excess.items()}, file, {"format": "pt"})
    monkeypatch.setattr(pack_quantized, "_unpack", lambda *args: pytest.fail("unpacked"))
    with pytest.raises(Reject, match="more numbers than the model"):
        load(folder)


def test_a_config_that_asks_for_more_than_its_words_hold_is_refused(tmp_path):
    scheme = Scheme(4, 8, True)
    folder = folder_with(tmp_path, scheme, packed(scheme, n=48, k=32)[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5000}))
    with pytest.raises(Reject):
        load(folder)
