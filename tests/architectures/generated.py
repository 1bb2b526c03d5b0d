"""More families, and variants of families by one option or two: their configs are generated.

A config's own names are looked up among those that most configs share (`COMMON`), so that a family is a word here;
what it needs beside them stands behind it. name -> (auto class, model type, what else its config says).
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tests.compiler.runtimes.native.particular import CONFIGS
from tests.compiler.runtimes.native.survey import COMMON

_LM, _MASKED, _IMAGE = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification"
_SPOKEN = "AutoModelForSeq2SeqLM"
_DECODERS = [
    "afmoe",
    "arcee",
    "biogpt",
    "codegen",
    "cohere2",
    "cwm",
    "dbrx",
    "deepseek_v2",
    "diffllama",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "exaone4",
    "flex_olmo",
    "gemma",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox_japanese",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "jetmoe",
    "lfm2",
    "llama4_text",
    "minicpm3",
    "ministral",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai-gpt",
    "persimmon",
    "phi",
    "phimoe",
    "qwen3_next",
    "qwen3_5_text",
    "rwkv",
    "seed_oss",
    "smollm3",
    "stablelm",
    "vaultgemma",
    "xglm",
]
_ENCODERS = [
    "albert",
    "camembert",
    "convbert",
    "data2vec-text",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "eurobert",
    "megatron-bert",
    "mobilebert",
    "modernbert",
    "nomic_bert",
    "rembert",
    "roberta-prelayernorm",
    "roformer",
    "squeezebert",
    "xlm-roberta",
]
_NARROW = {
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "squeezebert": {"embedding_size": 64},
}
_STACKS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "is_decoder": False,
}
_T5 = {"d_kv": 16, "d_ff": 96, "num_decoder_layers": 3, "decoder_start_token_id": 0, "is_decoder": False}
_TWO_SIDED = ("marian", "mbart", "pegasus", "m2m_100", "blenderbot", "blenderbot-small", "plbart", "mvp")
_STAGES = {"image_size": 32, "num_labels": 5, "depths": [2, 2]}
_PATCHES = {"image_size": 32, "patch_size": 8, "num_labels": 5}
_IMAGES: dict[str, dict[str, Any]] = {
    "bit": {**_STAGES, "embedding_size": 16, "hidden_sizes": [32, 64], "num_groups": 8},
    "convnextv2": {**_STAGES, "hidden_sizes": [16, 32], "num_stages": 2},
    "data2vec-vision": _PATCHES,
    "dinov2_with_registers": _PATCHES,
    "efficientnet": {
        "image_size": 32,
        "num_labels": 5,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.25,
        "hidden_dim": 320,
        "dropout_rate": 0.0,
    },
    "focalnet": {
        **_STAGES,
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "patch_size": 4,
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "hiera": {
        **_STAGES,
        "image_size": [32, 32],
        "num_query_pool": 1,
        "embed_dim": 16,
        "num_heads": [1, 2],
        "query_stride": [2, 2],
        "masked_unit_size": [4, 4],
    },
    "ijepa": _PATCHES,
    "mobilevitv2": {"image_size": 64, "num_labels": 5, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
    "poolformer": {
        **_STAGES,
        "hidden_sizes": [16, 32],
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
    "pvt_v2": {
        **_STAGES,
        "hidden_sizes": [16, 32],
        "num_encoder_blocks": 2,
        "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
    },
    "regnet": {**_STAGES, "embedding_size": 16, "hidden_sizes": [32, 64], "groups_width": 16},
    "swinv2": {**_STAGES, "embed_dim": 16, "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
    "vit_msn": _PATCHES,
}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
_NTK = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, biases": (_LM, "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": (_LM, "llama", {"tie_word_embeddings": True}),
    "llama, one KV head": (_LM, "llama", {"num_key_value_heads": 1}),
    "llama, all KV heads": (_LM, "llama", {"num_key_value_heads": 4}),
    "llama, wide heads": (_LM, "llama", {"head_dim": 32}),
    "llama, linear rope": (_LM, "llama", {"rope_parameters": _LINEAR}),
    "llama, yarn": (_LM, "llama", {"rope_parameters": _YARN}),
    "llama, dynamic rope": (_LM, "llama", {"rope_parameters": _NTK}),
    "llama, llama3 rope": (_LM, "llama", {"rope_parameters": _LLAMA3}),
    "qwen2, some windows": (
        _LM,
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "use_sliding_window": True},
    ),
    "cohere, query norms": (_LM, "cohere", {"use_qk_norm": True}),
    "phi, query norms": (_LM, "phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
    "stablelm, parallel": (_LM, "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt_neox, serial": (_LM, "gpt_neox", {"use_parallel_residual": False}),
    "gpt2, scaled": (_LM, "gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "opt, norms behind": (_LM, "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "falcon, alibi": (_LM, "falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "bloom, norms behind": (_LM, "bloom", {"apply_residual_connection_post_layernorm": True}),
    "deepseek_v3, no query latent": (
        _LM,
        "deepseek_v3",
        {"q_lora_rank": None, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "starcoder2, tied": (_LM, "starcoder2", {"tie_word_embeddings": True, "use_bias": False}),
    "gpt_bigcode, all heads": (_LM, "gpt_bigcode", {"multi_query": False}),
    "granite, multipliers": (
        _LM,
        "granite",
        {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0, "attention_multiplier": 0.1},
    ),
    "olmo, clipped": (_LM, "olmo", {"clip_qkv": 0.5}),
    "mixtral, one expert a token": (_LM, "mixtral", {"num_experts_per_tok": 1}),
    "bert, classes": ("AutoModelForSequenceClassification", "bert", {"num_labels": 3, "is_decoder": False}),
    "bert, labels of tokens": ("AutoModelForTokenClassification", "bert", {"num_labels": 3, "is_decoder": False}),
    "bert, spans": ("AutoModelForQuestionAnswering", "bert", {"is_decoder": False}),
    "llama, classes": ("AutoModelForSequenceClassification", "llama", {"num_labels": 3}),
    "t5, gated": (_SPOKEN, "t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
GENERATED: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (_LM, name, CONFIGS.get(name, {})) for name in _DECODERS},
    **{name: (_MASKED, name, {"is_decoder": False, **_NARROW.get(name, {})}) for name in _ENCODERS},
    "deit": ("AutoModel", "deit", _PATCHES),
    **{name: (_SPOKEN, name, _STACKS) for name in _TWO_SIDED},
    "mt5": (_SPOKEN, "mt5", _T5),
    **{name: (_IMAGE, name, values) for name, values in _IMAGES.items()},
    **VARIANTS,
}


def config(kind: str, values: dict[str, Any]) -> PretrainedConfig:
    """A config of a model type: the names that it shares with most have small values, and `values` go before."""
    known = AutoConfig.for_model(kind).to_dict()
    common = {name: value for name, value in COMMON.items() if name in known}
    if "qk_rope_head_dim" in common:  # every head has keys of its own there
        common |= {"num_key_value_heads": 4, "head_dim": common["qk_rope_head_dim"]}
    return AutoConfig.for_model(kind, **{**common, **values})
