"""Print how the cost of prune.multi's searches grows with layers and with calibration tokens.

    python tests/bench/search_cost.py [--layers 8 16 30] [--tokens 256 1024] [--share 0.1]

Random Llamas of SmolLM2's widths (hidden 576, 9 heads, 3 KV heads, MLP 1536) with a small vocabulary: what is
searched for has no meaning, what it costs has. Layer forwards count one layer over all calibration tokens; `whole` is
what scoring every candidate by the whole model would take for the same cuts. The last table extrapolates to 1B, 8B
and 70B Llamas by the formulas below it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import effc
import torch
from effc.compiler.api import plans, session
from effc.compiler.cache import Cache
from effc.compiler.fingerprint import machine
from effc.compiler.pipeline import Build
from effc.compiler.progress import Recorded

WHOLE = "layer forwards, were every candidate scored by the whole model"
RECIPE = """effspec 1
model base = config("config.json", seed: 0)
data  rows = synthetic({rows}, length: 128, seed: 0)
pipeline lean(base) {{ slim = prune.multi(remove: {share}% of params, search: {search}{more}, group: 256,
                                          score: perplexity(rows)) }}
emit lean {{ hf("lean") }}
"""
SPLIT = ", split: {blocks: 44, channels: 52, heads: 4}"
LLAMAS = {"1B": (16, 8192, 32), "8B": (32, 14336, 32), "70B": (80, 28672, 64)}      # layers, MLP width, heads


def searched(layers: int, tokens: int, search: str, share: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from transformers import LlamaConfig

        LlamaConfig(hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
                    intermediate_size=1536, vocab_size=1024, tie_word_embeddings=True,
                    architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        (folder / "lean.effspec").write_text(RECIPE.format(
            rows=tokens // 128, share=f"{100 * share:g}", search=search, more=SPLIT if search == "exact" else ""))
        opened, said = session(folder / "lean.effspec", cache_dir=folder / "cache", threads=1), {}
        opened.settings.tell = lambda e: isinstance(e, Recorded) and said.update({e.name: e.value})
        (plan,) = plans(opened)
        build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(folder / "cache"))
        started = time.perf_counter()
        build.step(plan.stages[0])
        return {"cuts": sum(name.startswith("cut ") for name in said), "run": said["layer forwards"],
                "whole": said[WHOLE], "kept": said["layer outputs kept"], "seconds": time.perf_counter() - started}


def extrapolated() -> None:
    """Layer forwards by formula, for cuts of 1% of the parameters each."""
    print("\nextrapolated, 20% of parameters in cuts of 0.4% (50 cuts):")
    print("  exact   50 cuts x (3L candidates) x (L + 1) / 2 layers")
    print("  racing  first round 4L candidates x (L + 1) / 2, then 50 cuts x 2.5 scores x (L + 1) / 2")
    for name, (layers, _, _) in LLAMAS.items():
        half = (layers + 1) / 2
        exact, racing = 50 * 3 * layers * half, 4 * layers * half + 50 * 2.5 * half
        whole = 50 * 3 * layers * layers
        print(f"  {name:>4}  L {layers:>3}  whole {whole:>9,}  exact {exact:>11,.0f} ({exact / whole:.0%})  "
              f"racing {racing:>9,.0f} ({racing / whole:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 30])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{', '.join(f'{k} {v}' for k, v in machine().items())}, effc {effc.__version__}, 1 thread, seed 0")
    print(f"{'':8} {'layers':>6} {'tokens':>6} {'cuts':>5} {'layer forwards':>14} {'of whole':>8} {'per cut':>8} "
          f"{'kept MiB':>8} {'seconds':>8}")
    for search in ("exact", "racing"):
        for layers in options.layers:
            for tokens in options.tokens:
                r = searched(layers, tokens, search, options.share)
                print(f"{search:8} {layers:>6} {tokens:>6} {r['cuts']:>5} {r['run']:>14,.0f} "
                      f"{r['run'] / r['whole']:>8.1%} {r['run'] / r['cuts']:>8,.1f} {r['kept'] / 2**20:>8.1f} "
                      f"{r['seconds']:>8.1f}", flush=True)
    extrapolated()


if __name__ == "__main__":
    main()
