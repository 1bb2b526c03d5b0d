"""Divergence of SmolLM2-135M when its cached keys and values have fewer bits, with and without a Hadamard rotation.

    python -m bench.kv_bits FOLDER [--rows 16]

FOLDER is that of bench.frontier (its model in `base`, its texts in rows.json). Simulated in float32: every key and value is
rounded to codes of a group with a bfloat16 scale, those of the newest token, too. A rotation H turns queries, keys and
values of a head; products of queries and keys stay, and outputs are turned back. Scales: the largest magnitude of a group,
or, of twelve candidates, the one of least squared error.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.linalg
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.text_quality import half_width

TEXTS = ("kjv", "code")
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest magnitude: candidates for a scale
SCALE_BITS = 16
HEAD = 64


@dataclass(frozen=True)
class Rounding:
    """Codes of cached keys and values: bits each, numbers that share a scale."""

    key_bits: int
    value_bits: int
    group: int
    rotated: bool = False
    searched: bool = False

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one key and one value of a head."""
        return HEAD * (self.key_bits + self.value_bits + 2 * SCALE_BITS / self.group) / 8

    def __str__(self) -> str:
        parts = [f"keys {self.key_bits}, values {self.value_bits} bits, groups of {self.group}"]
        return ", ".join(parts + ["rotated"] * self.rotated + ["searched scales"] * self.searched)


ROUNDINGS = (
    Rounding(8, 8, 32),
    Rounding(4, 4, 32),
    Rounding(4, 4, 32, rotated=True),
    Rounding(4, 4, 32, rotated=True, searched=True),
    Rounding(4, 4, 64, rotated=True, searched=True),
    Rounding(8, 4, 64, rotated=True, searched=True),
    Rounding(4, 8, 64, rotated=True, searched=True),
    Rounding(5, 5, 32, rotated=True, searched=True),
    Rounding(6, 6, 32, rotated=True, searched=True),
)


def round_to_codes(x: torch.Tensor, bits: int, group: int, searched: bool) -> torch.Tensor:
    """`x` [..., head], as its codes say it."""
    groups, most = x.unflatten(-1, (-1, group)), 2 ** (bits - 1)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = [largest.abs() / (most - 1)]
    if searched:  # `most` codes on the side of the largest number, one fewer on the other
        scales = [s * shrink for shrink in SHRINKS for s in (largest.abs() / (most - 1), -largest / most)]
    candidates = torch.stack([_dequantized(groups, s.bfloat16().float(), most) for s in scales])
    best = (candidates - groups).square().sum(-1).argmin(0)
    return candidates.gather(0, best[None, ..., None].expand_as(candidates[:1]))[0].flatten(-2)


def _dequantized(groups: torch.Tensor, scales: torch.Tensor, most: int) -> torch.Tensor:
    codes = (groups / torch.where(scales == 0, 1, scales)).round().clamp(-most, most - 1)
    return codes * scales


class RoundedAttention:
    """Causal attention of transformers, over keys and values [b, h, t, head] that are rounded first."""

    def __init__(self) -> None:
        self.rounding: Rounding | None = None
        self.rotation = torch.tensor(scipy.linalg.hadamard(HEAD), dtype=torch.float32) / HEAD**0.5

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        rounding = self.rounding
        if rounding and rounding.rotated:
            query, key, value = (x @ self.rotation for x in (query, key, value))
        if rounding:
            key = round_to_codes(key, rounding.key_bits, rounding.group, rounding.searched)
            value = round_to_codes(value, rounding.value_bits, rounding.group, rounding.searched)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        if rounding and rounding.rotated:
            output = output @ self.rotation.T
        return output.transpose(1, 2), None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    attention = RoundedAttention()
    ALL_ATTENTION_FUNCTIONS["rounded"] = attention
    model = AutoModelForCausalLM.from_pretrained(
        options.folder / "base", dtype=torch.float32, attn_implementation="rounded"
    ).eval()
    texts = json.loads((options.folder / "rows.json").read_text())
    rows = {name: torch.tensor(texts[name][: options.rows]) for name in TEXTS}

    @torch.inference_mode()
    def log_probabilities(ids: torch.Tensor) -> torch.Tensor:
        return model(ids[None], use_cache=False).logits[0].log_softmax(-1)

    originals = {name: [log_probabilities(ids) for ids in rows[name]] for name in TEXTS}
    print(f"{options.rows} rows of {rows[TEXTS[0]].shape[1]} tokens of each text; nats, half of the 95 % interval")
    for rounding in ROUNDINGS:
        attention.rounding = rounding
        cells = []
        for name in TEXTS:
            divergences = [
                (p.exp() * (p - log_probabilities(ids))).sum(-1).mean().item()
                for p, ids in zip(originals[name], rows[name], strict=True)
            ]
            cells.append(f"{name} {sum(divergences) / len(divergences):.4f} ± {half_width(divergences):.4f}")
        print(f"{rounding}: {rounding.bytes_per_token:.0f} bytes, {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
