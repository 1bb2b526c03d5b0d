"""What a GGUF file says, computed as llama.cpp does, in float32 by torch: nothing is read but the file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...dsl.diagnostics import Reject
from ..checkpoints.generation import read_generation
from ..native.model import NativeModel
from ..native.rows import Rows
from .reading import Stored, read
from .refusal import refused_gguf

FILE = "model.gguf"
_INTERLEAVED = ("llama", "deci")
ARCHITECTURES = (*_INTERLEAVED, "qwen2", "qwen3")
_FACTORS = "rope_freqs.weight"  # of frequencies; no parameters
_SEQUENCES = 64


@dataclass(frozen=True)
class Facts:
    """Numbers of the file's head; per layer where it says so."""

    architecture: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]
    head_dim: int
    base: float
    epsilon: float
    context: int
    vocabulary: int


def facts_of(stored: Stored) -> Facts:
    """Raises Reject (refused-gguf) where a key is missing, or of another kind."""
    known = stored.facts
    name = known.get("general.architecture")
    if name not in ARCHITECTURES:
        raise _odd(stored, f"has the architecture `{str(name)[:40]}`, of which effc knows {', '.join(ARCHITECTURES)}")

    def number(key: str, kind: type = int) -> Any:
        value = known.get(f"{name}.{key}")
        if type(value) is not kind or not 0 < value < 1 << 31:
            raise _odd(stored, f"does not state `{key}`")
        return value

    count = number("block_count")

    def each(key: str) -> tuple[int, ...]:
        value = known.get(f"{name}.{key}")
        values = value if isinstance(value, list) else [value] * min(count, 4096)
        if len(values) != count or not all(type(v) is int and 0 <= v < 1 << 24 for v in values):
            raise _odd(stored, f"does not state `{key}` of its {count} layers")
        return tuple(values)

    return Facts(
        name,
        each("attention.head_count"),
        each("attention.head_count_kv"),
        each("feed_forward_length"),
        number("attention.key_length"),
        number("rope.freq_base", float),
        number("attention.layer_norm_rms_epsilon", float),
        number("context_length"),
        number("vocab_size"),
    )


def weights_of(stored: Stored, facts: Facts) -> dict[str, Tensor]:
    """Every tensor by name, of the shape that the head says. Raises Reject (refused-gguf)."""
    found = {name: stored.tensor(name) for name in stored.entries}
    hidden = found["token_embd.weight"].shape[-1] if "token_embd.weight" in found else 0
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (facts.vocabulary, hidden),
        "output_norm.weight": (hidden,),
    }
    for i, (heads, kv, width) in enumerate(zip(facts.heads, facts.kv_heads, facts.widths, strict=True)):
        q, k = heads * facts.head_dim, kv * facts.head_dim
        if heads and (not kv or heads % kv):
            raise _odd(stored, f"has {heads} heads over {kv} in layer {i}")
        if heads:
            wanted |= {f"blk.{i}.attn_norm.weight": (hidden,), f"blk.{i}.attn_output.weight": (hidden, q)}
            wanted |= {f"blk.{i}.attn_{n}.weight": (rows, hidden) for n, rows in (("q", q), ("k", k), ("v", k))}
        wanted |= {f"blk.{i}.ffn_norm.weight": (hidden,), f"blk.{i}.ffn_down.weight": (hidden, width)}
        wanted |= {f"blk.{i}.ffn_{part}.weight": (width, hidden) for part in ("gate", "up")}
    for name, shape in wanted.items():
        if name not in found or tuple(found[name].shape) != shape:
            raise _odd(stored, f"has no `{name}` of the shape {' x '.join(map(str, shape))}")
    return found


def _odd(stored: Stored, what: str) -> Reject:
    return Reject(refused_gguf(f"{stored.path} {what}", help="compile it again with this effc"))


class Engine(Rows):
    """Keys and values of a sequence are [kv heads, t, d], layer by layer."""

    def __init__(self, facts: Facts, weights: dict[str, Tensor]):
        super().__init__(_SEQUENCES, facts.context, facts.vocabulary)
        self.facts, self.weights = facts, weights
        self._kept: dict[int, list[tuple[Tensor, Tensor] | None]] = {}
        self._lengths: dict[int, int] = {}
        d = facts.head_dim
        self._frequencies = 1.0 / facts.base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
        if _FACTORS in weights:
            self._frequencies = self._frequencies / weights[_FACTORS]

    def length(self, number: int) -> int:
        return self._lengths.get(number, 0)

    def forget(self, number: int, length: int = 0) -> None:
        kept = self._kept.get(number)
        if not length or kept is None:
            self._kept.pop(number, None)
            self._lengths.pop(number, None)
            return
        self._kept[number] = [pair and (pair[0][:, :length], pair[1][:, :length]) for pair in kept]
        self._lengths[number] = min(length, self._lengths[number])

    @torch.no_grad()
    def extend(self, numbers: list[int], ids: Tensor) -> Tensor:
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        states = [self._states(number, row) for number, row in zip(numbers, ids, strict=True)]
        return F.linear(self._norm(torch.stack(states), "output_norm"), head)

    def _states(self, number: int, ids: Tensor) -> Tensor:
        """The residual stream [t, hidden] of new tokens after the last layer."""
        x, w = F.embedding(ids, self.weights["token_embd.weight"]), self.weights
        before = self.length(number)
        kept = self._kept.setdefault(number, [None] * len(self.facts.heads))
        for i, heads in enumerate(self.facts.heads):
            if heads:
                x = x + self._attend(i, self._norm(x, f"blk.{i}.attn_norm"), before, kept)
            y = self._norm(x, f"blk.{i}.ffn_norm")
            gate, up = F.linear(y, w[f"blk.{i}.ffn_gate.weight"]), F.linear(y, w[f"blk.{i}.ffn_up.weight"])
            x = x + F.linear(F.silu(gate) * up, w[f"blk.{i}.ffn_down.weight"])
        self._lengths[number] = before + len(ids)
        return x

    def _attend(self, i: int, x: Tensor, before: int, kept: list) -> Tensor:
        t = len(x)
        q, k, v = (self._part(i, name, x) for name in ("q", "k", "v"))  # [h, t, d]
        q, k = self._rotated(q, before), self._rotated(k, before)
        if kept[i] is not None:
            k, v = torch.cat([kept[i][0], k], 1), torch.cat([kept[i][1], v], 1)
        kept[i] = (k, v)
        seen = torch.ones(t, before + t, dtype=torch.bool).tril(before)
        repeat = self.facts.heads[i] // self.facts.kv_heads[i]
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        out = F.scaled_dot_product_attention(q, k, v, seen)  # [h, t, d]
        return F.linear(out.transpose(0, 1).reshape(t, -1), self.weights[f"blk.{i}.attn_output.weight"])

    def _part(self, i: int, name: str, x: Tensor) -> Tensor:
        stem = f"blk.{i}.attn_{name}"
        y = F.linear(x, self.weights[f"{stem}.weight"], self.weights.get(f"{stem}.bias"))
        y = y.view(len(x), -1, self.facts.head_dim).transpose(0, 1)  # [h, t, d]
        return self._norm(y, f"{stem}_norm") if f"{stem}_norm.weight" in self.weights else y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.facts.epsilon)

    def _rotated(self, x: Tensor, before: int) -> Tensor:
        angle = torch.arange(before, before + x.shape[1])[:, None] * self._frequencies  # [t, d / 2]
        cos, sin = angle.cos(), angle.sin()
        if self.facts.architecture in _INTERLEAVED:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def open_gguf(folder: Path) -> NativeModel:
    """The model of a folder that the target `gguf` wrote. Raises Reject (refused-gguf)."""
    stored = read(folder / FILE)
    facts = facts_of(stored)
    weights = weights_of(stored, facts)
    said = {
        "class": f"GGUF `{facts.architecture}`",
        "model_type": facts.architecture,
        "params": sum(t.numel() for name, t in weights.items() if name != _FACTORS),
    }
    plan = {"vocabulary": facts.vocabulary, "context": facts.context}
    model = NativeModel(Engine(facts, weights), plan, weights, said, _SEQUENCES, read_generation(folder))
    model.stored = sum(entry.bytes for entry in stored.entries.values())
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()
