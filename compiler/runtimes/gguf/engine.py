"""Interpreter of a GGUF file as llama.cpp computes it, in float32 by torch; reads nothing but the file."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.checkpoints.generation_config import read_generation_config
from ..decoder import BatchedRun
from ..model import DecoderModel
from .facts import FACTORS, GgufFacts, read_facts, read_weights
from .llama_clock import LlamaClock
from .reading import read_gguf

FILE = "model.gguf"
_SEQUENCES = 64


class Engine(BatchedRun):
    """Keys and values of a sequence are [kv heads, t, d], layer by layer."""

    def __init__(self, facts: GgufFacts, weights: dict[str, Tensor]):
        super().__init__(_SEQUENCES, facts.context, facts.vocabulary)
        self.facts, self.kind, self.weights = facts, facts.kind, weights
        self._snapshots: dict[int, list[tuple[Tensor, Tensor] | None]] = {}
        self._lengths: dict[int, int] = {}
        evens = torch.arange(0, facts.n_rotated, 2, dtype=torch.float32) / facts.n_rotated
        far = 1.0 / facts.base**evens / facts.stretch
        self._frequencies = {True: 1.0 / facts.local**evens, False: far / weights.get(FACTORS, 1.0)}

    def length(self, sequence: int) -> int:
        return self._lengths.get(sequence, 0)

    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        cache_layers = self._snapshots.get(sequence)
        if not num_remaining or cache_layers is None:
            self._snapshots.pop(sequence, None)
            self._lengths.pop(sequence, None)
            return
        self._snapshots[sequence] = [
            pair and (pair[0][:, :num_remaining], pair[1][:, :num_remaining]) for pair in cache_layers
        ]
        self._lengths[sequence] = min(num_remaining, self._lengths[sequence])

    @torch.no_grad()
    def extend(self, sequences: list[int], ids: Tensor) -> Tensor:
        head = "output" if "output.weight" in self.weights else "token_embd"
        states = [self._hidden_states(sequence, row) for sequence, row in zip(sequences, ids, strict=True)]
        logits = self._linear(self._norm_if_present(torch.stack(states), "output_norm"), head)
        scale, cap = self.facts.scales[3], self.facts.caps[1]
        if scale:
            logits = logits / scale if self.facts.architecture == "granite" else logits * scale
        return cap * (logits / cap).tanh() if cap else logits

    def _hidden_states(self, sequence: int, ids: Tensor) -> Tensor:
        """The residual stream [t, hidden] of new tokens after the last layer."""
        x = F.embedding(ids, self.weights["token_embd.weight"])
        x = x * (self.facts.scales[0] or (x.shape[-1] ** 0.5 if self.kind.scaled else 1.0))
        before, share = self.length(sequence), self.facts.scales[1] or 1.0
        cache_layers = self._snapshots.setdefault(sequence, [None] * len(self.facts.heads))
        for i, heads in enumerate(self.facts.heads):
            layer, normed = f"blk.{i}.", x
            if heads:
                normed = self._norm_if_present(x, f"{layer}attn_norm")
                attended = self._norm_if_present(
                    self._attention(i, normed, before, cache_layers), f"{layer}post_attention_norm"
                )
                x = x + share * attended
            is_parallel = self.kind.before and f"{layer}ffn_norm.weight" not in self.weights
            read = normed if is_parallel else self._norm_if_present(x, f"{layer}ffn_norm")
            x = x + share * self._norm_if_present(self._mlp(layer, read), f"{layer}post_ffw_norm")
        self._lengths[sequence] = before + len(ids)
        return x

    def _mlp(self, layer: str, x: Tensor) -> Tensor:
        act = F.silu if self.kind.activation == "silu" else _gelu
        up = self._linear(x, f"{layer}ffn_up")
        if self.kind.gate == "none":
            return self._linear(act(up), f"{layer}ffn_down")
        gate, up = up.chunk(2, -1) if self.kind.gate == "fused" else (self._linear(x, f"{layer}ffn_gate"), up)
        return self._linear(act(gate) * up, f"{layer}ffn_down")

    def _attention(self, layer_index: int, x: Tensor, past_length: int, cache_layers: list) -> Tensor:
        t, window = len(x), self.facts.windows[layer_index]
        q, k, v = self._qkv(layer_index, x)  # [h, t, d]
        if self.kind.rotates(layer_index, window):
            q, k = self._apply_rope(q, past_length, window), self._apply_rope(k, past_length, window)
        if cache_layers[layer_index] is not None:
            k, v = torch.cat([cache_layers[layer_index][0], k], 1), torch.cat([cache_layers[layer_index][1], v], 1)
        cache_layers[layer_index] = (k, v)
        visible = torch.ones(t, past_length + t, dtype=torch.bool).tril(past_length)
        if window:
            visible &= ~torch.ones_like(visible).tril(past_length - self.facts.window)
        repeat = self.facts.heads[layer_index] // self.facts.kv_heads[layer_index]
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        scores = q @ k.transpose(1, 2) * (self.facts.scales[2] or self._scale())  # [h, t, before + t]
        cap = self.facts.caps[0]
        scores = cap * (scores / cap).tanh() if cap else scores
        out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v  # [h, t, d]
        return self._linear(out.transpose(0, 1).reshape(t, -1), f"blk.{layer_index}.attn_output")

    def _scale(self) -> float:
        """Of scores; the largest of a generation of Gemma are told by how many layers they have."""
        if len(self.facts.heads) == {"gemma2": 46, "gemma3": 62}.get(self.facts.architecture):
            return (self.weights["output_norm.weight"].numel() // self.facts.heads[0]) ** -0.5
        return self.facts.head_dim**-0.5

    def _qkv(self, layer_index: int, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [h, t, d] each."""
        stem, d = f"blk.{layer_index}.attn_", self.facts.head_dim
        if self.kind.fused:
            sizes = [
                n * d
                for n in (
                    self.facts.heads[layer_index],
                    self.facts.kv_heads[layer_index],
                    self.facts.kv_heads[layer_index],
                )
            ]
            parts = self._linear(x, f"{stem}qkv").split(sizes, -1)
        else:
            parts = tuple(self._linear(x, stem + name) for name in "qkv")
        if self.kind.norms == "row":
            parts = (
                self._norm_if_present(parts[0], f"{stem}q_norm"),
                self._norm_if_present(parts[1], f"{stem}k_norm"),
                parts[2],
            )
        q, k, v = (part.view(len(x), -1, d).transpose(0, 1) for part in parts)
        if self.kind.norms == "head":
            q, k = self._norm_if_present(q, f"{stem}q_norm"), self._norm_if_present(k, f"{stem}k_norm")
        return q, k, v

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm_if_present(self, x: Tensor, name: str) -> Tensor:
        """Apply the norm of this name, or return the input where the architecture has none."""
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            return x
        if self.kind.centred:
            return F.layer_norm(x, x.shape[-1:], weight, self.weights.get(f"{name}.bias"), self.facts.epsilon)
        return F.rms_norm(x, x.shape[-1:], weight, self.facts.epsilon)

    def _apply_rope(self, x: Tensor, past_length: int, in_window: bool) -> Tensor:
        angle = (
            torch.arange(past_length, past_length + x.shape[1])[:, None] * self._frequencies[in_window]
        )  # [t, turns / 2]
        cos, sin = angle.cos(), angle.sin()
        x, passed = x[..., : self.facts.n_rotated], x[..., self.facts.n_rotated :]
        if self.kind.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        else:
            a, b = x.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return torch.cat([turned, passed], -1)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def open_gguf(folder: Path) -> DecoderModel:
    """The model of a folder that the target `gguf` wrote. Raises Reject (refused-gguf)."""
    stored = read_gguf(folder / FILE)
    facts = read_facts(stored)
    weights = read_weights(stored, facts)
    model_facts = {
        "class": f"GGUF `{facts.architecture}`",
        "model_type": facts.architecture,
        "params": sum(t.numel() for name, t in weights.items() if name != FACTORS),
    }
    plan = {"vocabulary": facts.vocabulary, "context": facts.context}
    model = DecoderModel(Engine(facts, weights), plan, weights, model_facts, _SEQUENCES, read_generation_config(folder))
    model.engine_name = "the engine of GGUF files"
    model.runtime = LlamaClock(folder / FILE, facts.context)
    model.stored_bytes = sum(entry.bytes for entry in stored.entries.values())
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()
