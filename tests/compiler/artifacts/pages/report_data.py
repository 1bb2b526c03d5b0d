"""Manifests to draw: one with a search, trainings and timings in it, and hostile ones."""

from dataclasses import replace
from typing import Any

from effc.compiler.artifacts.form_losses import Account
from effc.compiler.artifacts.manifest import Check, Expectation, Manifest, Measure
from effc.compiler.artifacts.pages.report_data import ReportData

RECIPE = '''effspec 1
"""Make it smaller."""
model base = zoo("tiny-llama")
pipeline small(base) {
  slim = prune.multi(remove: 15% of params)
}
expect small {
  params <= 0.9 * base
  decode.p50 <= 0.95 * base
}
emit small { hf("small") }
'''


def cut(name: str, kind: str, score: float, share: float, **scores: float) -> dict[str, Any]:
    scores = {name: score, **scores}
    return {"cut": name, "kind": kind, "by": "perplexity", "score": score, "share": share, "scores": scores}


def manifest(**other: Any) -> Manifest:
    was = {"role": "mlp", "channels": 384}
    heads = {"role": "attention", "heads": 8, "kv_heads": 4}
    layers = {f"model.layers.{i}": {"mlp": was, "self_attn": heads} for i in range(11)}
    after = layers | {
        "model.layers.1": {"mlp": {"role": "mlp", "channels": 96}, "self_attn": {**heads, "heads": 2, "kv_heads": 1}},
        "model.layers.2": {"mlp": was},
    }
    decisions = [
        cut("model.layers.1.self_attn 4 -> 3", "kv_heads", 11.5, 0.01, other=12.25),
        cut("model.layers.1.mlp 384 -> 96", "channels", 11.75, 0.09, other=12.5),
        {"loss": [[1, 3.5], [50, 3.0]], "held_out": [[0, 3.75], [50, 3.25]], "best": 50},
        {"sparsity": 0.5, "zeros": {"model.layers.0.mlp.up_proj": 0.5, "model.layers.0.mlp.down_proj": 0.25}},
    ]
    made = Manifest(
        kind="hf",
        name="small",
        effc="0.1.0",
        recipe={"name": "small.effspec", "text": RECIPE, "params": {"keep": 0.85}, "variant": ""},
        lock={"inputs": {'zoo("tiny-llama")': "4" * 64}, "versions": {"torch": "2.13.0"}, "seed": 7, "threads": 1},
        steps=({"name": "slim", "word": "prune.multi", "summary": "-288 channels", "decisions": decisions},),
        profile={"before": layers, "after": after},
        files={"compact/model.safetensors": (6226176, "a" * 64)},
        measures=(
            Measure("params", "params", 1837184.0, 1554560.0, 0.846),
            Measure("decode.p50", "ms", 20.0, 18.0, 0.9, spread=(0.85, 1.05)),
        ),
        expectations=(
            Expectation("params <= 0.9 * base", 1554560.0, "1.65 M", "holds", 8),
            Expectation("decode.p50 <= 0.95 * base", 18.0, "19 ms", "undecided", 9, "after 8 rounds it lies somewhere"),
        ),
        checks=(Check("compact, fresh process: logits of a batch", 5e-05, 1e-4, "equal shapes"),),
        accounts=(
            Account("original", 0.0, None, 1.0, 32.125, 7348736, 256, "text.heldout"),
            Account("in memory", 0.1015, None, 0.758, 33.75, 6218240, 256, "text.heldout"),
            Account("compact", 0.1078, 0.0067, 0.766, 33.875, 6356992, 256, "text.heldout"),
        ),
        machine={"cpu": "Some Processor", "isa": "avx512", "memory_bytes": 1 << 34},
        run={
            "created": "2026-01-02T03:04:05+00:00",
            "seconds": {"measure": 12.5},
            "steps": [{"name": "slim", "planned": 20.0, "seconds": 30.0, "peak_bytes": 1 << 28}],
            "timings": {
                "decode.p50": {
                    "unit": "ms",
                    "original": [20.0, 21.0, 19.0, 20.0, 20.0, 22.0],
                    "compiled": [18.0, 18.9, 17.1, 18.0, 18.0, 19.8],
                }
            },
        },
    )
    return replace(made, **other)


def report(**other: Any) -> ReportData:
    return ReportData("small", manifest(**other), "b" * 64)
