"""Print what one allocation of formats and zeros loses beside single techniques that are no faster, as a table.

    python -m bench.mixed_speed FOLDER [--model MODEL_FOLDER] [--once] [--race] [--json FILE]

Single techniques: every format of the target `native` for the whole model, four bits by GPTQ, and int8 with zeros by
SparseGPT. Mixed points: the knapsack of `lower.mixed` under budgets of milliseconds, which are those of single techniques
by a race of kernels and two shares between; with all options, with numbers alone ("bits") and with zeros alone.
The first call writes all points into FOLDER and scores them, and goes on where it was stopped; `--race`, for a machine
at rest, has them decode in turn and prints the table. "lower" is by how much the divergence of a mixed point is below
that of the best single technique that decodes no slower, within 2 %.

The model is the embedded one, or a folder's in bfloat16, compared with itself in float32. Texts: `text.heldout`, and
the repository's licence, which is like nothing that was calibrated on. With `--once` losses are measured around the model
alone, as the first of the two rounds of `lower.mixed` has them, and shared by all points.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from effc.compiler.core.cache import Cache
from effc.compiler.core.journal import Journal
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.evaluation import reference
from effc.compiler.ir.program import Program
from effc.compiler.runtimes.native import plan_files
from effc.compiler.runtimes.native.emission import native_artifact_facts
from effc.compiler.runtimes.native.linears import NumberFormats
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.transforms.lowering.mixed import Allocation, Allocator, Option, Packer, choose_option_indices
from effc.compiler.transforms.lowering.racing import try_set_real_time_priority
from effc.compiler.transforms.search.layerwise import stages
from effc.compiler.transforms.search.prefix import Prefix
from effc.dsl.checker.values import DataRef, Ratio
from effc.passes.lower.mixed import Mixed

from bench.mixed import GPTQ, ROOT
from bench.smol import finished
from bench.tables import markdown
from bench.tables import mixed_speed_rows as table

RECIPE = """effspec 1
model base = {model}
data unlike = text("{unlike}", samples: 8, length: 128, seed: 7)
data calib = text("{calib}", samples: 16, length: 128, seed: 7)
data losses = text("{calib}", samples: 4, length: 64, seed: 7)
data heldout = text("{heldout}", samples: 8, length: 128, seed: 7)
pipeline point(base) {{ {steps} }}
emit point {{ native("point") }}
"""
TEXTS = ("heldout", "unlike")
ZEROS = (50,)  # percent
SPARSE = (
    "thin = sparsify.sparsegpt(sparsity: {0}% of weights, data: calib)"
    "  cpu = lower.sparse_cpu(format: sparse_int8, data: calib, divergence: 10)"  # whatever it loses
)
FORMATS = ["dense_int8_int16", "dense_int8", "dense_int4", "sparse_int8"]
SINGLES = {
    "int8": ("", NumberFormats("int8")),
    "int8/int16": ("", NumberFormats("int8_int16")),
    **{f"int4, group {g}, gptq": (GPTQ.format(g).replace("text.", ""), NumberFormats("int4", g)) for g in (32, 64)},
    **{f"sparse int8, {z} % zeros": (SPARSE.format(z), NumberFormats("int8")) for z in ZEROS},
}
KINDS: dict[str, Callable[[Option], bool]] = {
    "all": lambda option: True,
    "bits": lambda option: not option.zeros,
    "zeros": lambda option: option.zeros > 0 or option.kernel == "dense_linear_int8",
}
SHARES = (0.0, 0.2, 0.5, 1.0)  # of the way from all modules on int4 in groups of 64 to all on int8
STEPS, PAUSE = 16, 0.03  # tokens of a turn, and seconds before it: threads of the one before spin for some milliseconds
SHORT, LONG = 64, 128  # tokens: a decoding context runs from the first to the second


class Bench:
    """Folder of points, and what all of them are built from."""

    def __init__(self, folder: Path, model_folder: Path | None):
        self.folder = folder
        self.model, self.original = 'zoo("tiny-llama")', 'zoo("tiny-llama")'
        if model_folder is not None:
            self.model, self.original = (
                f'hf("{model_folder.resolve()}", dtype: {dtype})' for dtype in ("bfloat16", "float32")
            )

    def build(self, steps: str = "", model: str = "") -> Build:
        zoo = ROOT / "recipes/zoo/tiny-llama"
        file = self.folder / "point.effspec"
        texts = {"calib": zoo / "calib.txt", "heldout": zoo / "heldout.txt", "unlike": ROOT / "LICENSE"}
        file.write_text(RECIPE.format(model=model or self.model, steps=steps, **texts))
        session = api.open_session(file, cache_dir=self.folder / "cache", threads=torch.get_num_threads())
        (plan,) = api.plan_all_pipelines(session)
        return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))

    def write(self, name: str, program: Program, formats: NumberFormats) -> None:
        """Write and score a point."""
        point = self.folder / "points" / re.sub(r"\W+", "-", name).strip("-")
        point.mkdir(parents=True, exist_ok=True)
        plan_files.write_plan(
            Reader(program, formats).build_plan(), point, native_artifact_facts(program.model, formats.weights)
        )
        size = (point / plan_files.WEIGHTS).stat().st_size
        self.record(name, {"folder": point.name, "bytes": size, **self.divergences(point)})

    def record(self, name: str, row: dict) -> None:
        points = self.points() | {name: row}
        (self.folder / "points.json").write_text(json.dumps(points, indent=1) + "\n")
        print(f"{name}: {row}", flush=True)

    def points(self) -> dict[str, dict]:
        file = self.folder / "points.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def divergences(self, point: Path) -> dict[str, float]:
        """Of an artifact from the original in float32, in nats a token, by text."""
        ctx, model, values = self.build(model=self.original).ctx, open_native(point), {}
        for text in TEXTS:
            rows = ctx.rows(DataRef(text))
            file, head = (self.folder / f"{name}.safetensors" for name in (text, "head"))
            if not file.is_file():
                reference.write_original_outputs(ctx, ctx.origin.load(), rows, file, head, text)
            outputs = reference.open_reference(file, head)
            values[text] = reference.mean_kl_divergence(model, rows, outputs, "divergence")
        return values


def write_singles(bench: Bench) -> None:
    for name, (steps, formats) in SINGLES.items():
        if name not in bench.points():
            bench.write(name, finished(bench.build(steps)), formats)


def write_mixed(bench: Bench, once: bool) -> None:
    build = bench.build()
    program, ctx = build.load_outcome(build.plan.identity).program, build.ctx
    zeros = [Ratio(z / 100) for z in ZEROS]
    step = Mixed(keep=Ratio(0.5, "latency"), data=DataRef("calib"), formats=FORMATS, zeros=zeros)
    sites = step.kernel_sites_by_path_or_reject(program)
    options = {path: step.options_of_site(site) for path, site in sites.items()}
    packer = Packer({path: program.model.get_submodule(path) for path in sites})
    parts = [part for part in step._parts(build.plan.skeleton) if part.path in sites]
    packer.observe_inputs_and_quantize(program, stages(program, parts), ctx.rows(step.data), options)
    costs_file = bench.folder / "milliseconds.json"
    if not costs_file.is_file():
        costs, _ = step.measure_costs_and_budget(packer, options, ctx)
        costs_file.write_text(json.dumps({path: [1e3 * s for s in seconds] for path, seconds in costs.items()}))
    costs = json.loads(costs_file.read_text())
    rows = ctx.rows(DataRef("losses"))
    files = bench.folder / "before.safetensors", bench.folder / "before-head.safetensors"
    reference.write_original_outputs(ctx, program.model, rows, *files, "before")
    before = reference.open_reference(*files)

    def loss() -> float:
        return reference.mean_kl_divergence(program.model, rows, before, "divergence")

    def allocator(options: Mapping[str, list[Option]], costs: Mapping[str, list[float]], budget: float, remember):
        return Allocator(
            program.model, options, costs, budget, packer.pack, loss, remember, lambda: Prefix(program, 2 << 30)
        )

    journal = Journal(bench.folder / "losses.jsonl")
    losses = allocator(options, costs, 1.0, journal.get_or_compute).measure_option_losses(0)
    names: dict[str, str] = {}  # allocation -> name of its point
    for kind, is_allowed in KINDS.items():
        allowed = {path: [i for i, o in enumerate(listed) if is_allowed(o)] for path, listed in options.items()}

        def restricted(values: Mapping[str, list], allowed=allowed) -> dict[str, list]:
            return {path: [values[path][i] for i in indices] for path, indices in allowed.items()}

        def remember(key: str, compute, kind=kind, losses=restricted(losses)) -> list[float]:
            around, path = key.split(" ")
            return losses[path] if around == "0" else journal.get_or_compute(f"{kind} {key}", compute)

        for share in SHARES:
            name = f"mixed ({kind}), {share:.0%} of the way"
            if name in bench.points():
                continue
            limits = [
                milliseconds_of_all_modules(o, options, costs) for o in ("dense_linear_int4", "dense_linear_int8")
            ]
            budget = limits[0] + share * (limits[1] - limits[0])
            subset, prices = restricted(options), restricted(costs)
            if sum(map(min, prices.values())) > budget:
                print(f"{name}: nothing is as fast", flush=True)
                continue
            if once:
                chosen = {
                    path: subset[path][i]
                    for path, i in choose_option_indices(restricted(losses), prices, budget).items()
                }
            else:
                chosen, _ = allocator(subset, prices, budget, remember).allocate_and_list_round_losses()
            if (same := names.setdefault(repr(chosen), name)) in bench.points():
                bench.record(name, bench.points()[same])
            else:
                write_allocation(bench, name, program, packer, chosen)


def milliseconds_of_all_modules(
    kernel: str, options: Mapping[str, list[Option]], costs: Mapping[str, list[float]]
) -> float:
    """Milliseconds of all modules on a kernel; of four bits in the larger groups."""
    return sum(
        min(cost for option, cost in zip(options[path], costs[path], strict=True) if option.kernel == kernel)
        for path in options
    )


def write_allocation(bench: Bench, name: str, program: Program, packer: Packer, chosen: Allocation) -> None:
    originals = {path: program.model.get_submodule(path) for path in chosen}
    for path, option in chosen.items():
        program.model.set_submodule(path, packer.pack(path, option))
    program.changed()
    try:
        bench.write(name, program, NumberFormats("int4"))
    finally:
        for path, module in originals.items():
            program.model.set_submodule(path, module)
        program.changed()
    counts: dict[Option, int] = {}
    for option in chosen.values():
        counts[option] = counts.get(option, 0) + 1
    print(f"  {counts}", flush=True)


def tokens_per_second_by_point(bench: Bench, rounds: int, threads: int) -> dict[str, list[float]]:
    """Tokens a second of each point's folder, turn by turn."""
    torch.set_num_threads(threads)
    folders = sorted({row["folder"] for row in bench.points().values()})
    engines = {name: open_native(bench.folder / "points" / name, threads=threads).engine for name in folders}
    ids = list(range(100, 100 + SHORT))
    for engine in engines.values():
        engine.run(ids, [0] * SHORT, [SHORT - 1])
    first = next(iter(engines.values()))
    tokens = max(STEPS, min(512, round(0.05 / seconds_of_a_token(first, STEPS))))
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name in sorted(engines, reverse=number % 2 == 1):
            time.sleep(PAUSE)
            raised = try_set_real_time_priority(True)
            rate = 1 / seconds_of_a_token(engines[name], tokens)
            if raised:
                try_set_real_time_priority(False)
            rates[name] += [rate] if number else []
    return rates


def seconds_of_a_token(engine, tokens: int) -> float:
    token = 1
    started = 0.0
    for number in range(tokens + 1):
        if engine.length(0) >= LONG:
            engine.forget(0, SHORT)
        token = int(engine.run([token], [0], [0]).argmax())
        started = started if number else time.perf_counter()  # the first one wakes threads
    return (time.perf_counter() - started) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="folder of a model; the embedded one without")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--race", action="store_true")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.folder.resolve(), args.model)
    if not args.race:
        write_singles(bench)
        write_mixed(bench, args.once)
        return
    rates = tokens_per_second_by_point(bench, args.rounds, args.threads)
    points = {
        name: row | {"tokens_s": statistics.median(speeds), "range": [min(speeds), max(speeds)]}
        for name, row in bench.points().items()
        if (speeds := rates[row["folder"]])
    }
    if args.json:
        args.json.write_text(json.dumps(points, indent=1) + "\n")
    print("\n" + markdown(table(points)))


if __name__ == "__main__":
    main()
