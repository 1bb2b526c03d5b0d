"""Configs of decoders that common names do not make tiny, for the survey."""

from typing import Any

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE = {
    **_TEXT,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_DELTA = {
    "layer_types": _MIXED,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_KIMI = {
    **_MOE,
    **_LATENT,
    "q_lora_rank": None,
    "layer_types": _MIXED,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "num_experts_per_token": 2,
    "model_max_length": 64,
}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_SHORT = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_GEMMA = {
    **_TEXT,
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "layer_types": _SHORT,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_KIMI, "num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "bamba": {**_TEXT, **_SSM, "attn_layer_indices": [1]},
    "dbrx": {
        "vocab_size": 128,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
            "moe_normalize_expert_weights": 1.0,
        },
    },
    "falcon_h1": {**_TEXT, **_SSM, "mamba_d_ssm": 128},
    "gemma3n_text": {**_GEMMA, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.9, 0.0]},
    "gemma4_text": {**_GEMMA, "global_head_dim": 16},
    "gpt_neo": {
        **_TEXT,
        "attention_types": [[["global", "local", "global"], 1]],
        "num_layers": 3,
        "num_heads": 4,
        "window_size": 5,
    },
    "granitemoehybrid": {
        **_MOE,
        **_SSM,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 64,
    },
    "jamba": {**_MOE, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": _KIMI,
    "lfm2_moe": {**_MOE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {
        **_MOE,
        **_LATENT,
        "num_layers": 2,
        "n_routed_experts": 4,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {**_TEXT, "num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "minimax": {**_MOE, "block_size": 8, "layer_types": _MIXED},
    "olmo_hybrid": {**_TEXT, **_DELTA},
    "qwen3_5_moe_text": {**_MOE, **_DELTA},
    "qwen3_5_text": {**_TEXT, **_DELTA},
    "qwen3_next": {**_MOE, **_DELTA},
    "recurrent_gemma": {
        **_TEXT,
        "lru_width": 64,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
    },
    "xlm": {"n_words": 128, "emb_dim": 64, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64, "causal": True},
    "xmod": {**_TEXT, "is_decoder": True, "languages": ["de", "en", "fr"], "default_language": "en"},
    "zamba": {
        **_TEXT,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
    },
    "zaya": {**_MOE, "num_experts_per_tok": 1, "router_hidden_size": 16},
}
