"""The random mixture of `mixtures.py` as a GGUF file, which llama.cpp reads: without a vocabulary, ids in, logits out."""

from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

ARCHITECTURE = "qwen3moe"
TYPES = {"bf16": Type.BF16, "q8_0": Type.Q8_0}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


def gguf_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By GGUF's names; experts of a layer are one tensor [experts, out, in] for each of their three layers."""
    found = {}
    for name, tensor in model.state_dict().items():
        whole, _, _ = name.rpartition(".")
        layer, prefix = "", ""
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            prefix, whole = f"blk.{layer}.", rest.removesuffix(".weight")
        if whole == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                found[f"{prefix}ffn_{part}_exps.weight"] = half
        elif whole == "mlp.experts.down_proj":
            found[f"{prefix}ffn_down_exps.weight"] = tensor
        else:
            found[f"{prefix}{_NAMES[whole]}.weight"] = tensor
    return found


def write_gguf(model: PreTrainedModel, file: Path, kind: str) -> int:
    """Write the file; the bytes of weights that a token needs: of experts those it asks, of the embedding one row."""
    config, held = model.config, gguf_tensors(model)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    needed = 0.0
    for name, tensor in held.items():
        small = tensor.dim() == 1 or "ffn_gate_inp" in name
        type = Type.F32 if small else TYPES[kind]
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), type)
        writer.add_tensor(name, data, raw_dtype=type)
        share = config.num_experts_per_tok / config.num_experts if "_exps" in name else 1.0
        needed += 0 if name.startswith("token_embd") else data.nbytes * share
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return int(needed)
