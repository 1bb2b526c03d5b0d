"""Tiny models with state-space mixers, and what removing their parts means, written without effc.

The oracles change weights of a stock model so that it computes what the smaller one should: C = 0 and D = 1 make a
scan the identity, C's rows of zeros make it forget a state, columns of zeros make nobody read a channel.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny

_HYBRID = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
_OTHERS = {
    "zamba2": {
        **_HYBRID,
        "num_key_value_heads": 4,
        "mamba_d_state": 16,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "mamba_expand": 2,
        "chunk_size": 8,
        "adapter_rank": 8,
    },
    "nemotron_h": {
        **_HYBRID,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "layers_block_type": ["mamba", "attention", "mamba"],
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "falcon_h1": {
        **_HYBRID,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
}
MAMBA1 = ("mamba", "falcon_mamba", "jamba")
MAMBA2 = ("mamba2", "bamba", "granitemoehybrid", "zamba2", "nemotron_h", "falcon_h1")


def blank(name: str, **changes) -> torch.nn.Module:
    if name not in _OTHERS:
        return tiny.blank(name, **changes)
    config = AutoConfig.for_model(name, **{**_OTHERS[name], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def model(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """In evaluation mode, with weights that follow from the seed and large enough that every part matters."""
    if name not in _OTHERS:
        return tiny.model(name, seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    made = blank(name, **changes)
    with torch.no_grad():
        for p in made.parameters():
            noise = torch.randn(p.shape, generator=generator) * (0.1 if p.dim() > 1 else 0.2)
            p.copy_(noise if p.dim() > 1 else p + noise)
    return made


def mixers(made: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules with a decay, by path."""
    return {path: m for path, m in made.named_modules() if "A_log" in m._parameters}


def _rows_of_c(mixer: torch.nn.Module) -> slice:
    """Where C lies among the convolved channels of Mamba-2, or in what `x_proj` makes for Mamba-1."""
    if hasattr(mixer, "x_proj"):
        return slice(mixer.x_proj.out_features - mixer.ssm_state_size, None)
    width = mixer.n_groups * mixer.ssm_state_size
    return slice(mixer.intermediate_size + width, mixer.intermediate_size + 2 * width)


@torch.no_grad()
def forget(mixer: torch.nn.Module, states=slice(None)) -> None:
    """C reads some states no more, and norms over B and C make up for them; numbered group by group."""
    rows = _rows_of_c(mixer)
    if hasattr(mixer, "x_proj"):
        mixer.x_proj.weight[rows][states] = 0
        for norm in (getattr(mixer, f"{name}_layernorm", None) for name in ("b", "c")):
            if norm is not None and states != slice(None):
                _mean_over_fewer(norm, 1 - len(states) / mixer.ssm_state_size)
        if hasattr(mixer, "b_layernorm") and states != slice(None):
            mixer.x_proj.weight[rows.start - mixer.ssm_state_size : rows.start][states] = 0
        return
    for weight in (mixer.conv1d.weight, mixer.conv1d.bias):
        weight[rows][states] = 0  # silu(0) = 0


def _mean_over_fewer(norm: torch.nn.Module, left: float) -> None:
    """What a norm says of the others when some of what it takes its mean over is zero, and should be gone."""
    if norm._parameters:
        norm.weight.mul_(left**0.5)
    else:  # FalconMamba's has a weight for show
        norm.register_forward_hook(lambda _, args, out: out * left**0.5)
    for name in {"eps", "variance_epsilon"} & vars(norm).keys():
        setattr(norm, name, getattr(norm, name) * left)


@torch.no_grad()
def identity(mixer: torch.nn.Module) -> None:
    """y = x: C reads nothing, D is 1."""
    forget(mixer)
    mixer.D.fill_(1)


@torch.no_grad()
def behead(mixer: torch.nn.Module, heads: list[int]) -> None:
    """Heads whose gate is zero add nothing to the norm's mean; its weight and epsilon make up for the larger count."""
    width = mixer.intermediate_size // mixer.num_heads
    rows = [head * width + i for head in heads for i in range(width)]
    mixer.in_proj.weight[rows] = 0
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias[rows] = 0
    if not isinstance(getattr(mixer, "norm", torch.nn.Identity()), torch.nn.Identity):
        _mean_over_fewer(mixer.norm, 1 - len(heads) / mixer.num_heads)


@torch.no_grad()
def ignore(mixer: torch.nn.Module, channels: list[int]) -> None:
    """Nobody reads some channels of a Mamba-1 mixer."""
    mixer.x_proj.weight[:, channels] = 0
    mixer.out_proj.weight[:, channels] = 0


def rows() -> torch.Tensor:
    return torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))


def cuts(program) -> list[str]:
    """What a search cut, in order."""
    return [note["cut"] for note in program.notes if "cut" in note]


def loss(made: torch.nn.Module) -> float:
    """Nats per token over `rows()`."""
    ids = rows()
    with torch.no_grad():
        values = made(input_ids=ids, use_cache=False).logits[:, :-1].reshape(-1, 128)
    return torch.nn.functional.cross_entropy(values, ids[:, 1:].reshape(-1)).item()


def counted_positions(cache) -> list[int]:
    """Layer by layer; transformers counts them in layers with a state from 5.25 on."""
    return [int(getattr(layer, "cumulative_length_linear", 0)) for layer in cache.layers]
