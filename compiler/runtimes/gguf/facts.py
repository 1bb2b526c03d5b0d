"""Metadata of a GGUF file, and the weights that it requires."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....dsl.syntax.diagnostics import Reject
from .architectures import KINDS, Architecture, default_window_pattern
from .reading import GgufFile
from .refusal import rejected_gguf

FACTORS = "rope_freqs.weight"  # of frequencies; no parameters


@dataclass(frozen=True)
class GgufFacts:
    """Numbers of the file's head; per layer where it says so.

    n_rotated  numbers of a head that rotate
    window     tokens that a layer with a window sees, itself one of them
    windows    which layers have one
    local      base of the frequencies there
    stretch    what positions are divided by where there is no window
    caps       of scores and of logits; 0: none
    scales     what embeddings, the sums of branches, scores and logits are multiplied by; 0: as the architecture does
    """

    architecture: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]
    head_dim: int
    n_rotated: int
    base: float
    epsilon: float
    context: int
    vocabulary: int
    window: int
    windows: tuple[bool, ...]
    local: float
    stretch: float
    caps: tuple[float, float]
    scales: tuple[float, float, float, float]

    @property
    def kind(self) -> Architecture:
        return KINDS[self.architecture]


def read_facts(file: GgufFile) -> GgufFacts:
    """Raises Reject (refused-gguf) where a key is missing, or of another kind."""
    known: Mapping[str, Any] = file.facts
    name = known.get("general.architecture")
    if not isinstance(name, str) or name not in KINDS:
        raise gguf_rejection(file, f"has the architecture `{str(name)[:40]}`, of which effc knows {', '.join(KINDS)}")
    kind = KINDS[name]

    def number(key: str, kind: type[int | float] = int, default: Any = None) -> Any:
        value = known.get(f"{name}.{key}", default)
        if type(value) is not kind or not 0 < value < 1 << 31:
            raise gguf_rejection(file, f"does not state `{key}`")
        return value

    def perhaps(key: str) -> float:
        return number(key, float) if f"{name}.{key}" in known else 0.0

    count = number("block_count")

    def each(key: str) -> tuple[int, ...]:
        value = known.get(f"{name}.{key}")
        values = value if isinstance(value, list) else [value] * min(count, 4096)
        if len(values) != count or not all(type(v) is int and 0 <= v < 1 << 24 for v in values):
            raise gguf_rejection(file, f"does not state `{key}` of its {count} layers")
        return tuple(values)

    dim, base = number("attention.key_length"), number("rope.freq_base", float)
    rope_dims, stretched = number("rope.dimension_count", default=dim), known.get(f"{name}.rope.scaling.type", "none")
    if rope_dims > dim or rope_dims % 2 or stretched not in ("none", "linear"):
        raise gguf_rejection(
            file, f"rotates {rope_dims} of the {dim} numbers of a head, or stretches positions as effc does not"
        )
    window, windows = _read_window_layers(file, name, kind, len(each("attention.head_count")))
    return GgufFacts(
        name,
        each("attention.head_count"),
        each("attention.head_count_kv"),
        each("feed_forward_length"),
        dim,
        rope_dims,
        base,
        number(f"attention.layer_norm_{'' if kind.centred else 'rms_'}epsilon", float),
        number("context_length"),
        number("vocab_size"),
        window,
        windows,
        number("rope.freq_base_swa", float, 10000.0 if name == "gemma3" else base),
        number("rope.scaling.factor", float) if stretched == "linear" else 1.0,
        (perhaps("attn_logit_softcapping"), perhaps("final_logit_softcapping")),
        (perhaps("embedding_scale"), perhaps("residual_scale"), perhaps("attention.scale"), perhaps("logit_scale")),
    )


def _read_window_layers(
    file: GgufFile, key_prefix: str, architecture: Architecture, n_layers: int
) -> tuple[int, tuple[bool, ...]]:
    """Number of tokens of a window, and the layers that have one."""
    window = file.facts.get(f"{key_prefix}.attention.sliding_window", 0)
    pattern_stored = file.facts.get(f"{key_prefix}.attention.sliding_window_pattern")
    if (
        type(window) is not int
        or not 0 <= window < 1 << 31
        or (pattern_stored is not None and not isinstance(pattern_stored, list))
    ):
        raise gguf_rejection(file, "has windows that are no numbers")
    if not architecture.period or not window:
        return 0, (False,) * n_layers
    windows = default_window_pattern(architecture, n_layers) if pattern_stored is None else tuple(pattern_stored)
    if len(windows) != n_layers or not all(type(flag) is bool for flag in windows):
        raise gguf_rejection(file, f"does not state the windows of its {n_layers} layers")
    return window, windows


def read_weights(file: GgufFile, facts: GgufFacts) -> dict[str, Tensor]:
    """Read every tensor by name and check that it has the shape that the header says. Raises Reject (refused-gguf)."""
    tensors = {name: file.read_tensor(name) for name in file.entries}
    hidden = tensors["token_embd.weight"].shape[-1] if "token_embd.weight" in tensors else 0
    if file.facts.get(f"{facts.architecture}.embedding_length", hidden) != hidden:
        raise gguf_rejection(file, f"states another `embedding_length` than the {hidden} of its embeddings")
    needed, allowed = _required_and_optional_shapes(facts, hidden)
    for i, (heads, kv, width) in enumerate(zip(facts.heads, facts.kv_heads, facts.widths, strict=True)):
        if heads and (not kv or heads % kv):
            raise gguf_rejection(file, f"has {heads} heads over {kv} in layer {i}")
        is_parallel = facts.kind.parallel == "always" or (
            facts.kind.parallel == "some" and f"blk.{i}.ffn_norm.weight" not in tensors
        )
        for name_part, shape in _layer_shapes(
            facts, hidden, heads * facts.head_dim, kv * facts.head_dim, width, is_parallel
        ).items():
            needed[f"blk.{i}.{name_part}.weight"] = shape
            if name_part in facts.kind.biases:
                allowed[f"blk.{i}.{name_part}.bias"] = shape[:1]
    for name, shape in needed.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise gguf_rejection(file, f"has no `{name}` of the shape {' x '.join(map(str, shape))}")
    for name in tensors.keys() - needed.keys():
        if name not in allowed or tuple(tensors[name].shape) != allowed[name]:
            raise gguf_rejection(file, f"has `{name[:80]}`, which `{facts.architecture}` has not, or not of that shape")
    return tensors


def _required_and_optional_shapes(
    facts: GgufFacts, hidden: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes outside the layers: of what must be there, and of what may."""
    table, row = (facts.vocabulary, hidden), (hidden,)
    needed: dict[str, tuple[int, ...]] = {"token_embd.weight": table, "output_norm.weight": row}
    allowed: dict[str, tuple[int, ...]] = {"output_norm.bias": row} if facts.kind.centred else {}
    if not facts.kind.tied:
        allowed["output.weight"] = table
    if facts.kind.headed:
        allowed["output.bias"] = (facts.vocabulary,)
    if facts.kind.factors:
        allowed[FACTORS] = (facts.n_rotated // 2,)
    return needed, allowed


def _layer_shapes(
    facts: GgufFacts, hidden: int, q_width: int, kv_width: int, width: int, is_parallel: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights. `is_parallel`: both branches read what one norm gives."""
    kind, row = facts.kind, (hidden,)
    shapes: dict[str, tuple[int, ...]] = {}
    if q_width:
        shapes["attn_output"] = (hidden, q_width)
        shapes |= {"attn_qkv": (q_width + 2 * kv_width, hidden)} if kind.fused else {}
        shapes |= (
            {}
            if kind.fused
            else {"attn_q": (q_width, hidden), "attn_k": (kv_width, hidden), "attn_v": (kv_width, hidden)}
        )
        shapes |= {"attn_norm": row} if kind.before else {}
        each = (facts.head_dim,)
        shapes |= {"attn_q_norm": each, "attn_k_norm": each} if kind.norms == "head" else {}
        shapes |= {"attn_q_norm": (q_width,), "attn_k_norm": (kv_width,)} if kind.norms == "row" else {}
    shapes |= {"ffn_norm": row} if kind.before and not is_parallel else {}
    shapes |= {"post_attention_norm": row, "post_ffw_norm": row} if kind.after else {}
    shapes |= {"ffn_up": (width * (2 if kind.gate == "fused" else 1), hidden), "ffn_down": (hidden, width)}
    return shapes | ({"ffn_gate": (width, hidden)} if kind.gate == "beside" else {})


def gguf_rejection(file: GgufFile, problem: str) -> Reject:
    return Reject(rejected_gguf(f"{file.path} {problem}", help="compile it again with this effc"))
