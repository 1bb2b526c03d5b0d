"""Architectures as tiny models with random weights, plain modules that no hub knows, and more.

Built from config classes without network. Weights are larger than at a usual start, and norms, biases and running
statistics are random too, so that every part matters.
"""

from collections.abc import Callable

import torch
import transformers
from torch import nn

from tests import tiny

from .generated import GENERATED, config
from .modules import PLAIN
from .more import MORE

_ENCODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_ZAMBA2 = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "mamba_d_state": 16,
    "mamba_headdim": 16,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "pad_token_id": 0,
    "hybrid_layer_ids": [2, 5],
    "num_mem_blocks": 1,
    "adapter_rank": 8,
    "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
}
_NEMOTRON_H = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "chunk_size": 8,
    "pad_token_id": 0,
    "layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp"],
}
_SPECIAL = {  # name -> (class, config)
    "zamba2": ("Zamba2ForCausalLM", _ZAMBA2),
    "nemotron_h": ("NemotronHForCausalLM", _NEMOTRON_H),
    "bert": ("BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaForMaskedLM", _ENCODER),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 5,
        },
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "bottleneck", "num_labels": 5},
    ),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.35, "image_size": 32, "num_labels": 5},
    ),
}
_TINY = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
    "mamba",
    "falcon_mamba",
    "mamba2",
    "bamba",
    "zamba2",
    "jamba",
    "granitemoehybrid",
)
NAMES = (*dict.fromkeys((*_TINY, *_SPECIAL)), *PLAIN, *MORE)
ROWS = (*NAMES, *GENERATED)  # of the whole matrix; what is generated stands there once it was run
# Of models whose rounding grows from layer to layer, or whose routers are nearly undecided, where weights are as wide as
# others' here: those of trained models are not.
CALM = dict.fromkeys(("gemma4_text", "qwen3_next", "phimoe", "minimax", "distilbert", "mt5", "t5, gated"), 0.05)
PLAIN_CONFIGS = {"fused qkv": {"vocab_size": 64}}  # what a recipe's `config:` would say of them


def model(name: str) -> nn.Module:
    """The model of a row; the same weights every time."""
    if name in PLAIN:
        return randomized(PLAIN[name])
    if name in MORE:
        return randomized(lambda: _from_config(*MORE[name]), spread=CALM.get(name, 0.1))
    if name in GENERATED:
        auto, kind, values = GENERATED[name]
        made = getattr(transformers, auto)
        return randomized(
            lambda: made.from_config(config(kind, values), dtype=torch.float32), spread=CALM.get(name, 0.1)
        )
    if name not in _SPECIAL:
        return tiny.model(name)
    kind, values = _SPECIAL[name]
    made = getattr(transformers, kind)
    return randomized(lambda: made(made.config_class(**values)))


def _from_config(auto: str, kind: str, values: dict) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, **values)
    return getattr(transformers, auto).from_config(config, dtype=torch.float32)


def randomized(make: Callable[[], nn.Module], seed: int = 0, spread: float = 0.1) -> nn.Module:
    """A model whose numbers are drawn: those of matrices by a normal law as wide as `spread`, others by twice that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                noise = torch.randn(parameter.shape) * (spread if parameter.dim() in (2, 3) else 2 * spread)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
            for module in made.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
    return made
