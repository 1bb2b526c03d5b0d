"""Small configs of model types of transformers: sizes by names that configs share."""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_HEAD = r"head_dim|.*_head_dim|d_kv|attention_head_size"
_HIDDEN = r"(.*_)?hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|embedding_size|projection_dim|dim|d_embed"
_HIDDEN += r"|adapter_(in_dim|out_dim|input_size)"
_EXPERTS_OF_TOKEN = r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts"
SIZES: tuple[tuple[str, Any], ...] = (  # names of configs -> what stands there in a small one; the first that matches
    (r"(.*_)?vocab_size.*|.*_vocab|n_words", 128),
    (r"(pad|bos|eos|decoder_start|sep|cls|mask)_token_id", None),  # those of the small vocabulary follow
    (r".*token_(id|index)", 5),
    (r"max_(position_embeddings|target_positions|seq_len)|n_positions", 256),
    (r"max_source_positions", 64),
    (r".*(num|n)_.*layers?|(encoder|decoder|text|vision|qformer)_layers|n_layers?|num_layers|depth", 2),
    (r"num_hidden_layers", 2),
    (r"indexer_kv_heads", 1),
    (r".*(key_value|kv)_heads", 4),
    (r".*(attention_heads|num_heads|n_heads?)", 4),
    (r"stem_out_channels", 32),
    (r"num_filters", 4),  # doubled at each of several halvings
    (r"qk_head_dim", 32),  # of both its parts
    (_HEAD, 16),
    (_HIDDEN, 64),
    (r".*(intermediate_size|ffn_dim|ffn_size|d_ff|dim_ff|n_inner|dff)", 96),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"n_group|topk_group|num_expert_group|(.*_)?n_?groups", 1),
    (r"o_groups", 2),  # of heads, whose outputs have a low rank each
    (r"q_lora_rank", 24),
    (r".*_lora_rank", 16),
    (r"image_size|input_size|img_size|crop_size", 64),
    (r"frames_per_clip|num_frames", 4),
    (r"patch_size", 16),
    (r"coordinate_size", 10),  # four of these and two of those are a hidden size
    (r"shape_size", 12),
    (r"mm_tokens_per_image", 4),  # a square of as many patches at most
)
UNSTATED = {
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "hunyuan_v1_moe": {"head_dim": 16},
    "step3p7": {"text_config": {"sliding_window": 8}},
    **{kind: {"vocab_size": 32} for kind in ("wav2vec2-bert", "wav2vec2-conformer")},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 96}},
    "qwen4_exp": {
        "text_config": {
            **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
            **{"indexer_budget": 8, "indexer_compress_ratio": 2},
        }
    },
}  # what classes read and configs don't state
_WIDTH = ("hidden_size", "d_model", "embed_dim")  # of which other sizes of a config are multiples
_DEPTHS = ("depths", "num_block_repeats")
_SCALES = {"width_coefficient": 0.2, "depth_coefficient": 1.0}  # of EfficientNet's lists
_PLACEHOLDERS = re.compile(r"(image|video|audio)_token_(id|index)")
_OF_LAYERS = re.compile(r".*(layer|index|indices|idx).*")  # lists of numbers of layers


def small(kind: str, cls: str) -> Iterator[PretrainedConfig]:
    """Configs of a type for a class, from the smallest to those with fewer names changed."""
    shapes = ("image", "patch")
    variants = (
        ((), 1.0),
        ((), 1.5),
        (shapes, 1.0),
        (("head", "kv", *shapes), 1.0),
        (("head", "kv", "hidden", "dim", "patch"), 1.0),
    )
    for skipped, wider in variants:
        try:
            config = AutoConfig.for_model(kind, **UNSTATED.get(kind, {}))
            _shrink(config, skipped, wider)
            config = CONFIG_MAPPING[kind].from_dict(config.to_dict())
            text = config.get_text_config()
            yield (
                text if isinstance(text, _config_class(cls)) and not isinstance(config, _config_class(cls)) else config
            )
        except Exception:  # anybody's checks of anybody's names
            continue


def _config_class(cls: str) -> type[PretrainedConfig]:
    """The config that a class takes: of its type, or of the part of it that reads texts."""
    return getattr(transformers, cls).config_class or PretrainedConfig


def _shrink(config: PretrainedConfig, skipped: tuple[str, ...], wider: float) -> None:
    """Write `SIZES` over the numbers of a config and of those inside of it, widths `wider` times as large: six divides
    96, which a sum of six tables of positions asks for."""
    layers, kinds = getattr(config, "num_hidden_layers", None), _kinds_of_layers(config)
    splits = _splits_heads(config)
    width = next((size for name in _WIDTH if isinstance(size := getattr(config, name, None), int)), 0)
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, skipped, wider)
        elif isinstance(value, list) and isinstance(layers, int) and len(value) == layers > 2 and name != "depths":
            entries = [entry for place, entry in enumerate(value) if entry not in value[:place]][:kinds]
            setattr(config, name, entries + [value[0]] * (kinds - len(entries)))
        elif name == "_out_indices" and (layers is None or "depths" in vars(config)):
            continue  # of stages, none of which goes
        elif isinstance(value, list) and _OF_LAYERS.fullmatch(name) and all(type(entry) is int for entry in value):
            setattr(config, name, [min(max(entry, -2), 1) for entry in value])  # of two layers
        elif type(value) is int and value >= 0 and not _is_skipped(name, skipped):
            setattr(config, name, kinds if name == "num_hidden_layers" else _small_number(name, value, width, wider))
        elif value is None and _PLACEHOLDERS.fullmatch(name):
            setattr(config, name, 5)  # which a checkpoint states
        elif name == "rope_parameters" and isinstance(value, dict) and _reads_sections(config):
            value |= {"rope_type": "default", "rope_theta": 10_000.0} if not value else {}
            rotated = int((getattr(config, "head_dim", None) or 16) * (value.get("partial_rotary_factor") or 1)) // 2
            value["mrope_section"] = [rotated // 4, rotated // 4, rotated - 2 * (rotated // 4)]
        elif name in (*_DEPTHS, "hidden_sizes", "embed_dims", "embed_dim") and isinstance(value, (list, tuple)):
            setattr(config, name, [1] * len(value) if name in _DEPTHS else _widths_of_stages(config, len(value)))
        elif name in _SCALES and isinstance(value, float):
            setattr(config, name, _SCALES[name])
    if "width_coefficient" in vars(config):
        config.hidden_dim = int(1280 * _SCALES["width_coefficient"])  # the published width of EfficientNet's last one
    if splits:
        config.head_dim = config.qk_rope_head_dim + _small_number("qk_nope_head_dim", 0, 0, wider)
    if "per_layer_config" in config.to_dict():
        config.per_layer_config = {}  # sizes of some layers, which are as small as those of the others


def _is_skipped(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a number stays as it is; not the number of layers, which lists of layers agree with."""
    return name != "num_hidden_layers" and any(part in name for part in parts)


def _small_number(name: str, value: int, width: int, wider: float) -> int:
    """What stands in a small config in place of a number: by its name, else as many times the width as before, once among them."""
    if name == "num_feat_extract_layers":  # as many as its convolutions, which are a list
        return value
    if re.fullmatch(_EXPERTS_OF_TOKEN, name):
        return min(value, 2)
    multiple = int(value * 64 * wider) // width if width and value >= width and value % width == 0 else value
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), multiple)
    size = int(size * wider) if size and re.fullmatch(f"{_HEAD}|{_HIDDEN}", name) else size
    return size if size is not None else min(value, 3)


def _widths_of_stages(config: PretrainedConfig, stages: int) -> list[int]:
    """Widths of stages that grow from 32 on, as the heads of stages do where a config lists them."""
    lists = (
        value for name, value in vars(config).items() if name.endswith("heads") and isinstance(value, (list, tuple))
    )
    heads = next((value for value in lists if len(value) == stages), range(1, stages + 1))
    each = 4 * max(1, 8 // heads[0])  # of a head
    return [each * count for count in heads]


def _splits_heads(config: PretrainedConfig) -> bool:
    """Whether a head is a part that is rotated and one that isn't: elsewhere its size is that of the rotated part."""
    plain = config.to_dict()
    return (plain.get("head_dim") or 0) > (plain.get("qk_rope_head_dim") or math.inf)


def _reads_sections(config: PretrainedConfig) -> bool:
    """Whether positions of a model are those of time, height and width, each in a section of the rotated numbers."""
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return True
    file = Path(sys.modules[type(config).__module__].__file__ or "")
    source = file.with_name(file.name.replace("configuration_", "modeling_"))
    is_text = not config.base_config_key or "text" in config.base_config_key
    return is_text and source.is_file() and "mrope_section" in source.read_text(encoding="utf-8")


def _kinds_of_layers(config: PretrainedConfig) -> int:
    """As many layers as there are kinds of them in a list with one for each; two at least."""
    layers = getattr(config, "num_hidden_layers", 0)
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) == layers > 2]
    return max([2, *(len(set(value)) for value in lists if all(isinstance(entry, str) for entry in value))])
