"""Architectures beyond the twenty-five: tried as they come, to see that the next one works or is refused clearly.

name -> (auto class, model type, config). What one of them taught is a test of its own in test_unseen.py.
"""

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = {**_GROUPED, "head_dim": 16}
_MOE = {
    **_WIDE,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_LATENT = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 96}
_STAGES = {"image_size": 32, "depths": [2, 2], "num_labels": 5}
_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
_T5 = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_STACKS = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_HEADLESS = {**_TEXT, "num_hidden_layers": 2}
_SPOKEN = "AutoModelForSeq2SeqLM"
_LM, _MASKED, _IMAGE = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification"

MORE = {
    "olmo2": (_LM, "olmo2", _WIDE),
    "cohere": (_LM, "cohere", _WIDE),
    "starcoder2": (_LM, "starcoder2", _GROUPED),
    "falcon": (_LM, "falcon", {**_TEXT, "ffn_hidden_size": 96}),
    "falcon 40b": (
        _LM,
        "falcon",
        {**_TEXT, "ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bloom": (_LM, "bloom", {**_TEXT, "n_layer": 3, "n_head": 4}),
    "mpt": (_LM, "mpt", {"vocab_size": 128, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    "gptj": (_LM, "gptj", {**_GPT, "rotary_dim": 8}),
    "apertus": (_LM, "apertus", _WIDE),
    "doge": (_LM, "doge", _WIDE),
    "gemma3n": (
        _LM,
        "gemma3n_text",
        {
            **_WIDE,
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 3,
        },
    ),
    "qwen2_moe": (_LM, "qwen2_moe", _MOE),
    "deepseek_v3": (_LM, "deepseek_v3", _LATENT),
    "gpt_oss": (
        _LM,
        "gpt_oss",
        {**_MOE, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "minimax": (
        _LM,
        "minimax",
        {**_MOE, "block_size": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "lfm2_moe": (_LM, "lfm2_moe", {**_MOE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}),
    "falcon_h1": (
        _LM,
        "falcon_h1",
        {
            **_WIDE,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
        },
    ),
    "recurrent_gemma": (
        _LM,
        "recurrent_gemma",
        {**_WIDE, "lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    ),
    "mpnet": (_MASKED, "mpnet", _TEXT),
    "deberta_v2": (_MASKED, "deberta-v2", {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "nystromformer": (_MASKED, "nystromformer", _TEXT),
    "fnet": (_MASKED, "fnet", _TEXT),
    "convnext": (_IMAGE, "convnext", {**_STAGES, "hidden_sizes": [16, 32], "num_stages": 2}),
    "swin": (_IMAGE, "swin", {**_STAGES, "embed_dim": 16, "num_heads": [2, 4], "window_size": 4, "patch_size": 2}),
    "mobilenet_v1": (_IMAGE, "mobilenet_v1", {"depth_multiplier": 0.25, "image_size": 32, "num_labels": 5}),
    "segformer": (
        _IMAGE,
        "segformer",
        {
            **_STAGES,
            "hidden_sizes": [16, 32],
            "num_encoder_blocks": 2,
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
    ),
    "beit": (_IMAGE, "beit", {**_VISION, "vocab_size": 128}),
    "vit_mae": (
        "AutoModelForPreTraining",
        "vit_mae",
        {
            **_VISION,
            "decoder_hidden_size": 32,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 64,
            "decoder_num_hidden_layers": 1,
        },
    ),
    "xlnet": (_LM, "xlnet", {"vocab_size": 128, "d_model": 64, "n_layer": 3, "n_head": 4, "d_inner": 96}),
    "t5": ("AutoModelForSeq2SeqLM", "t5", _T5),
    "bart": (_SPOKEN, "bart", {**_STACKS, "decoder_start_token_id": 3}),
    "whisper": ("AutoModelForSpeechSeq2Seq", "whisper", {**_STACKS, "num_mel_bins": 16, "decoder_start_token_id": 3}),
    "bert encoder": ("AutoModel", "bert", _HEADLESS),
    "mpnet encoder": ("AutoModel", "mpnet", _HEADLESS),
    "t5 encoder": ("AutoModelForTextEncoding", "t5", {**_T5, "num_layers": 3}),
    "clip text": ("AutoModelForTextEncoding", "clip_text_model", _HEADLESS),
    "clip vision": ("AutoModel", "clip_vision_model", _VISION),
    "siglip vision": ("AutoModel", "siglip_vision_model", _VISION),
    "dinov2": ("AutoModel", "dinov2", _VISION),
    "vit encoder": ("AutoModel", "vit", _VISION),
}
