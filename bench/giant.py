"""Make Llamas of random weights as large as asked, and print what every stage takes of the machine for them.

    python -m bench.giant make 1b FOLDER
    python -m bench.giant run FOLDER [--only NAME ...] [--threads 1] [--work FOLDER] [--rows N] [--length N]

`make` streams shards to disk, a tensor in memory at a time: 135m, 0.4b, 1b (hidden 2048, 16 layers, 32 heads on 8, MLP
8192, vocabulary 49,152), llama-3.2-1b (128,256 instead) or 8b (Llama 3.1's shapes), in bfloat16. Random weights show
mechanics, memory and speed; what is decided by them means nothing.

`run` compiles one recipe after another, each in a process and a cache of its own: seconds, seconds of processors and the
most anonymous memory of each stage beside what `plan` foresaw, and VmHWM of the process, which counts mapped weights.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

SHAPES = {  # hidden, layers, heads, heads of keys, MLP, vocabulary, tied
    "135m": (576, 30, 9, 3, 1536, 49152, True),
    "0.4b": (1024, 24, 16, 8, 4096, 32768, True),
    "1b": (2048, 16, 32, 8, 8192, 49152, True),
    "llama-3.2-1b": (2048, 16, 32, 8, 8192, 128256, True),
    "8b": (4096, 32, 32, 8, 14336, 128256, False),
}
RECIPES = {  # name: steps, emit
    "magnitude": ("s = sparsify.magnitude(sparsity: 50% of weights)", "hf"),
    "wanda": ("s = sparsify.wanda(sparsity: 50% of weights, data: rows)", "hf"),
    "channels": ("s = prune.channels(keep: 90% of channels)", "hf"),
    "multi": ("s = prune.multi(remove: 0.3% of params, group: 512, score: perplexity(rows), data: rows)", "hf"),
    "sparse_cpu": (
        "s = sparsify.magnitude(sparsity: 50% of weights)\n  c = lower.sparse_cpu(data: rows, divergence: 0.2)",
        "native",
    ),
    "bf16": ("s = sparsify.magnitude(sparsity: 50% of weights)", "native"),
    "int8": ("s = sparsify.magnitude(sparsity: 50% of weights)", "native int8"),
}
TARGETS = {"hf": 'hf("out")', "native": 'native("out")', "native int8": 'native("out", weights: int8)'}


def write_random_checkpoint(size: str, folder: Path, shard_bytes: int = 2 << 30, seed: int = 0) -> None:
    """A checkpoint folder of these shapes, weights drawn as Llamas begin: normal, 0.02; norms are one."""
    from effc.compiler.models.checkpoints.tensor_files import LazyTensor, write_safetensors_files

    hidden, layers, heads, kv, mlp, vocabulary, tied = SHAPES[size]
    generator, width = torch.Generator().manual_seed(seed), hidden // heads

    def random_tensor(name: str, *shape: int) -> LazyTensor:
        def drawn() -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

        return LazyTensor(name, torch.bfloat16, shape, drawn)

    pieces = [
        random_tensor("model.embed_tokens.weight", vocabulary, hidden),
        random_tensor("model.norm.weight", hidden),
    ]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        pieces += [
            random_tensor(f"{at}.self_attn.q_proj.weight", heads * width, hidden),
            random_tensor(f"{at}.self_attn.k_proj.weight", kv * width, hidden),
            random_tensor(f"{at}.self_attn.v_proj.weight", kv * width, hidden),
            random_tensor(f"{at}.self_attn.o_proj.weight", hidden, heads * width),
            random_tensor(f"{at}.mlp.gate_proj.weight", mlp, hidden),
            random_tensor(f"{at}.mlp.up_proj.weight", mlp, hidden),
            random_tensor(f"{at}.mlp.down_proj.weight", hidden, mlp),
            random_tensor(f"{at}.input_layernorm.weight", hidden),
            random_tensor(f"{at}.post_attention_layernorm.weight", hidden),
        ]
    if not tied:
        pieces.append(random_tensor("lm_head.weight", vocabulary, hidden))
    folder.mkdir(parents=True)
    write_safetensors_files(folder, pieces, shard_bytes)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def recipe(model_folder: Path, name: str, rows: int, length: int) -> str:
    steps, target = RECIPES[name]
    return (
        f'effspec 1\nmodel base = hf("{model_folder}")\ndata rows = synthetic({rows}, length: {length}, seed: 0)\n'
        f"pipeline lean(base) {{\n  {steps}\n}}\nemit lean {{ {TARGETS[target]} }}\n"
    )


def compile_recipe(
    model_folder: Path, name: str, work_folder: Path, threads: int, speeds_json: str, rows: int, length: int
) -> None:
    """Compile one recipe in this process, whose plan estimates from speeds in JSON; then print its stages as JSON."""
    from effc.compiler.core.events import StageEnded
    from effc.compiler.core.speed_cache import store_speeds
    from effc.compiler.core.speeds import Speeds
    from effc.compiler.driver import api

    torch.set_num_threads(threads)
    path = work_folder / f"{name}.effspec"
    path.write_text(recipe(model_folder, name, rows, length), encoding="utf-8")
    stages: list[dict] = []
    before = 0.0

    def ended(stage: str, seconds: float, peak: int) -> None:
        nonlocal before
        now = processor_seconds()
        stages.append({"stage": stage, "seconds": seconds, "cpu": now - before, "peak": peak})
        before = now

    def tell(event: object) -> None:
        if isinstance(event, StageEnded):
            ended(event.stage, event.seconds, event.peak_bytes)

    (work_folder / "cache").mkdir()
    store_speeds(work_folder / "cache", Speeds(**json.loads(speeds_json)))
    options = {"cache_dir": work_folder / "cache", "threads": threads, "seed": 0, "tell": tell}
    started = time.perf_counter()
    (plan,) = api.plan_all_pipelines(api.open_session(path, **options))
    ended("plan", time.perf_counter() - started, 0)
    foreseen = {s.name: (s.seconds, s.peak_bytes) for s in plan.stages}
    foreseen |= {f"emit {e.call.word}": (e.seconds, e.peak_bytes) for e in plan.emissions}
    api.compile(path, work_folder / "out", **options)
    for row in stages:
        row["planned"], row["planned_peak"] = foreseen.get(row["stage"], (None, None))
    print(json.dumps({"name": name, "rows": stages, "hwm": peak_resident_bytes()}))


def processor_seconds() -> float:
    """Of this process and of those that it waited for: what a busy machine changes little."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak_resident_bytes() -> int:
    """VmHWM of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        row = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(row.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run(model: Path, names: list[str], threads: int, work_folder: Path | None, data: list[str]) -> None:
    from effc.compiler.core.fingerprint import machine_facts
    from effc.compiler.core.speeds import measure_machine_speeds

    torch.set_num_threads(threads)
    speeds_json = json.dumps(asdict(measure_machine_speeds(model.parent / "disk", seconds_each=0.5)))
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    print(
        f"{', '.join(f'{k} {v}' for k, v in machine_facts().items())}, seed 0, weights {weights / 2**30:.2f} GiB",
        flush=True,
    )
    print(
        f"{'recipe':<11} {'stage':<14} {'seconds':>8} {'of CPU':>8} {'planned':>8} {'peak GiB':>9} {'planned':>8} {'VmHWM GiB':>10}",
        flush=True,
    )
    for name in names:
        folder = Path(tempfile.mkdtemp(dir=work_folder))
        try:
            command = [sys.executable, "-m", "bench.giant", "one", str(model), name, str(folder), str(threads)]
            done = subprocess.run([*command, speeds_json, *data], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{name:<11} ended with {done.returncode}", flush=True)
                continue
            print_result(json.loads(done.stdout.splitlines()[-1]))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def print_result(result: dict) -> None:
    for row in result["rows"]:
        seconds = "" if row["planned"] is None else f"{row['planned']:.1f}"
        peak = "" if row["planned_peak"] is None else f"{row['planned_peak'] / 2**30:.2f}"
        print(
            f"{result['name']:<11} {row['stage']:<14} {row['seconds']:>8.1f} {row['cpu']:>8.1f} {seconds:>8} "
            f"{row['peak'] / 2**30:>9.2f} {peak:>8} {result['hwm'] / 2**30:>10.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make")
    making.add_argument("size", choices=SHAPES)
    making.add_argument("folder", type=Path)
    running = verbs.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--work", type=Path, help="where caches and artifacts lie meanwhile")
    running.add_argument("--rows", default="4", help="of random tokens, for steps that look at data")
    running.add_argument("--length", default="256", help="of a row, in tokens")
    one = verbs.add_parser("one")
    one.add_argument("folder", type=Path)
    one.add_argument("name")
    one.add_argument("work", type=Path)
    one.add_argument("threads", type=int)
    one.add_argument("measured")
    one.add_argument("rows", type=int, nargs="?", default=4)
    one.add_argument("length", type=int, nargs="?", default=256)
    options = parser.parse_args()
    if options.verb == "make":
        write_random_checkpoint(options.size, options.folder)
    elif options.verb == "run":
        run(options.folder.resolve(), options.only, options.threads, options.work, [options.rows, options.length])
    else:
        compile_recipe(
            options.folder, options.name, options.work, options.threads, options.measured, options.rows, options.length
        )


if __name__ == "__main__":
    main()
