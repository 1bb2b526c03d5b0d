"""How much of a pruned model's loss comes back, by tokens of training: adapters and all weights, short and long text.

    python -m bench.recovery FOLDER --text kjv.txt [--tokens 0.1 0.5 2] [--arms ARM...] [--seed 0] [--json FILE]

FOLDER   keeps what is done: caches, and measured rows in rows.json
--text   the King James Bible as recipes/zoo/train_tiny_llama.py reads it; its held-out books are left out here, too

The embedded tiny-llama loses a fifth of its parameters by `prune.multi`, and is trained by `tune.heal`, each number of
tokens (millions) a run of its own: 8 rows of 128 tokens a step, rate by the pass's schedule. "book" learns from the
whole text, "139 KB" from calib.txt alone. Perplexities: "like" is heldout.txt, books that no training had; "unlike" are
topics of Python's documentation. "regained" is the share of the nats a token that pruning lost on like text. Arms
that end "dev" judge by 20 rows of calib.txt that healing does not train on, keep the best weights and may stop early;
"tokens" are then those that were trained, and a run that never got better than the pruned model is "refused".
"""

import argparse
import math
import runpy
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from effc.compiler.core.cache import Cache
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.ir.program import Program
from effc.compiler.models.rows.forward import total_nll
from effc.dsl.checker.values import DataRef
from effc.dsl.syntax.diagnostics import Reject

from bench import smol
from bench.json_table import add_json_option, write_table
from bench.row_store import RowStore
from bench.tables import markdown

ZOO = Path(__file__).parents[1] / "recipes/zoo"
BATCH, LENGTH = 8, 128
TEXTS = ("like", "unlike")
RECIPE = """effspec 1
model base = zoo("tiny-llama")
data book   = text("book.txt", length: 128)
data calib  = text("train.txt", length: 128)
data dev    = text("dev.txt", samples: 20, length: 128)
data score  = text("train.txt", samples: 8, length: 128, seed: 7)
data like   = text("{zoo}/tiny-llama/heldout.txt", samples: 64, length: 256, seed: 1)
data unlike = text("docs.txt", samples: 20, length: 256, seed: 1)
pipeline lean(base) {{
{steps}}}
emit lean {{ hf("hf") }}
"""
CUT = "  cut = prune.multi(remove: 20% of params, group: 32, score: perplexity(score))\n"


class Arm(NamedTuple):
    """Training data and parameters of `tune.heal`."""

    data: str
    settings: str


FULL, LORA = "method: full, lr: 1e-3", "method: lora, lr: 3e-3"
ARMS = {
    "full, distill 50%, book": Arm("book", f"{FULL}, distill: 50%"),
    "lora, distill 50%, book": Arm("book", f"{LORA}, distill: 50%"),
    "full, book": Arm("book", FULL),
    "full, distill 50%, 139 KB": Arm("calib", f"{FULL}, distill: 50%"),
    "full, 139 KB": Arm("calib", FULL),
    "full, 139 KB, dev": Arm("calib", f"{FULL}, held_out: dev"),
    "full, distill 50%, 139 KB, dev": Arm("calib", f"{FULL}, distill: 50%, held_out: dev"),
}


def write_texts(folder: Path, text: Path) -> None:
    """The book without its held-out books; calib.txt as rows to train on and rows to judge by."""
    smol.write_texts(folder)
    script = runpy.run_path(str(ZOO / "train_tiny_llama.py"))
    chapters = [c for c in script["read_chapters"](text.read_text("utf-8")) if c.book not in script["HELD_OUT"]]
    (folder / "book.txt").write_text(script["prose"](chapters), "utf-8")
    paragraphs = (ZOO / "tiny-llama/calib.txt").read_text("utf-8").split("\n\n")
    (folder / "dev.txt").write_text("\n\n".join(paragraphs[9::10]), "utf-8")
    (folder / "train.txt").write_text("\n\n".join(p for i, p in enumerate(paragraphs) if i % 10 != 9), "utf-8")


def program_after(folder: Path, step_lines: str, seed: int) -> tuple[Program, Any, float]:
    """The model behind its steps, the context that has its data, and the seconds of processor time that they took."""
    recipe = folder / "recovery.effspec"
    recipe.write_text(RECIPE.format(zoo=ZOO, steps=step_lines), "utf-8")
    session = api.open_session(recipe, cache_dir=folder / "cache", threads=1, seed=seed)
    (plan,) = api.plan_all_pipelines(session)
    build = Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))
    began = time.process_time()
    program = smol.finished(build)
    return program, build.ctx, time.process_time() - began


def perplexities(program: Program, ctx: Any) -> dict[str, float]:
    sums = {name: total_nll(program.model, ctx.rows(DataRef(name))) for name in TEXTS}
    return {name: math.exp(nats / tokens) for name, (nats, tokens) in sums.items()}


def measured_row(folder: Path, arm: Arm, million_tokens: float, seed: int) -> dict[str, Any]:
    steps = round(million_tokens * 1e6 / BATCH / LENGTH)
    heal = f"  fit = tune.heal(data: {arm.data}, steps: {steps}, batch: {BATCH}, {arm.settings})\n"
    try:
        program, ctx, seconds = program_after(folder, CUT + heal, seed)
    except Reject as refusal:
        if all(diagnostic.slug != "not-healed" for diagnostic in refusal.diagnostics):
            raise
        return {"refused": str(refusal)}
    taken = program.notes[-1]["steps"]
    return perplexities(program, ctx) | {"trained": taken * BATCH * LENGTH, "seconds": seconds}


def table_lines(original: dict[str, Any], pruned: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each run behind the heads."""
    lines = [("", "tokens, M", "like", "regained", "unlike", "seconds")]
    lines += [
        (name, "", f"{r['like']:.2f}", "", f"{r['unlike']:.1f}", "")
        for name, r in (("original", original), ("pruned by 20 %", pruned))
    ]
    lost = math.log(pruned["like"] / original["like"])
    for row in rows:
        if "refused" in row:
            lines.append((row["arm"], f"{row['millions']:g}", "refused", "", "", ""))
            continue
        regained = math.log(pruned["like"] / row["like"]) / lost
        values = f"{row['like']:.2f}", f"{regained:.0%}", f"{row['unlike']:.1f}", f"{row['seconds']:.0f}"
        lines.append((row["arm"], f"{row['trained'] / 1e6:.2f}", *values))
    return lines


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=float, nargs="+", default=[0.1, 0.5, 2], help="millions")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    folder = options.folder.resolve()
    write_texts(folder, options.text)
    store = RowStore(folder / "rows.json", {"seed": options.seed})
    original, pruned = (perplexities(*program_after(folder, steps, options.seed)[:2]) for steps in ("", CUT))
    for arm, millions in ((a, m) for a in options.arms for m in options.tokens):
        if all((row["arm"], row["millions"]) != (arm, millions) for row in store.rows):
            row = measured_row(folder, ARMS[arm], millions, options.seed)
            store.add({"arm": arm, "millions": millions} | row)
            print(*table_lines(original, pruned, store.rows[-1:])[-1], flush=True)
    rows = sorted(store.rows, key=lambda row: (list(ARMS).index(row["arm"]), row["millions"]))
    columns, *lines = table_lines(original, pruned, rows)
    print(markdown([columns, *lines]))
    write_table(options.json, columns, lines)


if __name__ == "__main__":
    main()
