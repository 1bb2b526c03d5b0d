"""Print how the cost of prune.multi's searches grows with layers and with calibration tokens.

    python -m bench.search_growth [--widths smollm2] [--layers 8 16 30] [--tokens 256 1024] [--share 0.1]
                                      [--searches exact racing]

Random Llamas of SmolLM2's widths (hidden 576, 9 heads, 3 KV heads, MLP 1536) or of Llama-3.2-1B's (2048, 32, 8, 8192)
with a small vocabulary: what is searched for has no meaning, what it costs has. Layer forwards count one layer over
all calibration tokens; `whole` is what scoring every candidate by the whole model would take for the same cuts. A
cut of channels is a sixth of an MLP. Seconds hold all of it: the rows that the model writes itself, ranking, fits
and scores; peak is the process's. The last table extrapolates to 1B, 8B and 70B Llamas by the formulas below it.
"""

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import Recorded
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver.api import open_session, plan_all_pipelines
from effc.compiler.driver.pipeline import Build

WHOLE = "layer forwards, were every candidate scored by the whole model"
RECIPE = """effspec 1
model base = config("config.json", seed: 0)
data  rows = synthetic({rows}, length: 128, seed: 0)
pipeline lean(base) {{ slim = prune.multi(remove: {share}% of params, search: {search}{more}, group: {group},
                                          score: perplexity(rows)) }}
emit lean {{ hf("lean") }}
"""
SPLIT = ", split: {blocks: 44, channels: 52, heads: 4}"
WIDTHS = {
    "smollm2": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536},
    "1b": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192},
}
LAYERS = {"1B": 16, "8B": 32, "70B": 80}  # of Llamas


def search_forwards(widths: str, layers: int, tokens: int, search: str, removed_share: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from transformers import LlamaConfig

        LlamaConfig(
            num_hidden_layers=layers,
            vocab_size=1024,
            tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
            **WIDTHS[widths],
        ).save_pretrained(folder)
        (folder / "lean.effspec").write_text(
            RECIPE.format(
                rows=tokens // 128,
                group=WIDTHS[widths]["intermediate_size"] // 6 // 64 * 64,
                share=f"{100 * removed_share:g}",
                search=search,
                more=SPLIT if search == "exact" else "",
            )
        )
        opened, said = open_session(folder / "lean.effspec", cache_dir=folder / "cache", threads=1), {}
        opened.settings = replace(
            opened.settings, on_event=lambda e: isinstance(e, Recorded) and said.update({e.name: e.value})
        )
        (plan,) = plan_all_pipelines(opened)
        build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(folder / "cache"))
        started = time.perf_counter()
        build.run_step_unless_cached(plan.stages[0])
        return {
            "cuts": sum(name.startswith("cut ") for name in said),
            "run": said["layer forwards"],
            "whole": said[WHOLE],
            "kept": said["layer outputs kept"],
            "seconds": time.perf_counter() - started,
        }


def print_extrapolation(
    removed_share: float = 0.2, cut_share: float = 0.004, tokens: int = 2048, own_tokens: int = 8192
) -> None:
    """Layer forwards by formula."""
    cuts = round(removed_share / cut_share)
    print(
        f"\nextrapolated: {removed_share:.0%} of parameters in {cuts} cuts of {cut_share:.1%}, {tokens} tokens scored:"
    )
    print("  whole   cuts x 3L candidates x L layers")
    print("  exact   cuts x 3L candidates x (L + 1) / 2 layers")
    print(f"  racing  2 x {own_tokens} / {tokens} x L to write and to read its own rows,")
    print("          first round 4L candidates x (L + 1) / 2, then cuts x 2.5 scores x (L + 1) / 2")
    for name, layers in LAYERS.items():
        half = (layers + 1) / 2
        exact, whole = cuts * 3 * layers * half, cuts * 3 * layers * layers
        racing = 2 * own_tokens / tokens * layers + 4 * layers * half + cuts * 2.5 * half
        print(
            f"  {name:>4}  L {layers:>3}  whole {whole:>9,}  exact {exact:>11,.0f} ({exact / whole:.0%})  "
            f"racing {racing:>9,.0f} ({racing / whole:.0%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", choices=WIDTHS, default="smollm2")
    parser.add_argument("--searches", nargs="+", choices=("exact", "racing"), default=["exact", "racing"])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 30])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{', '.join(f'{k} {v}' for k, v in machine_facts().items())}, seed 0, widths {options.widths}")
    print(
        f"{'':8} {'layers':>6} {'tokens':>6} {'cuts':>5} {'layer forwards':>14} {'of whole':>8} {'per cut':>8} "
        f"{'kept MiB':>8} {'seconds':>8} {'peak GiB':>8}"
    )
    for search in options.searches:
        for layers in options.layers:
            for tokens in options.tokens:
                r = search_forwards(options.widths, layers, tokens, search, options.share)
                print(
                    f"{search:8} {layers:>6} {tokens:>6} {r['cuts']:>5} {r['run']:>14,.0f} "
                    f"{r['run'] / r['whole']:>8.1%} {r['run'] / r['cuts']:>8,.1f} {r['kept'] / 2**20:>8.1f} "
                    f"{r['seconds']:>8.1f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:>8.2f}",
                    flush=True,
                )
    print_extrapolation()


if __name__ == "__main__":
    main()
