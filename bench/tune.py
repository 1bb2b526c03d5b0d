"""Print what `effc tune` chooses beside the best of all its candidates, for six wishes, as a table.

    python -m bench.tune [--model zoo:tiny-llama] [--within 4min] [--json FILE]

Two sizes, two times per token and two losses of quality. Every wish is searched with a cache of its own; then every
candidate is built and measured by itself, once, on all rows that choices are made by (the matrix). "behind" is by how
much the choice is behind the matrix's best at the objective, both by the matrix's measurements; "time" the share of
the matrix's time that the search took; "held out" whether all bounds hold on rows that nothing was decided by.
Run it on a machine at rest: times decide.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from effc.compiler.core.cache import Cache
from effc.compiler.driver.api import open_session
from effc.compiler.driver.tuning.alternatives import Candidate, candidates_of
from effc.compiler.driver.tuning.journal import Journal
from effc.compiler.driver.tuning.search import Search
from effc.compiler.driver.tuning.trials import Trial, Trials
from effc.compiler.driver.tuning.tune import tune
from effc.compiler.driver.tuning.wish import Wish, read_wish

from bench.tables import markdown
from bench.tables import tune_rows as table

PERPLEXITY = "perplexity(text.heldout)"
WISHES = {
    "best perplexity, half the bytes": (PERPLEXITY, "bytes <= 0.5 * base"),
    "best perplexity, a fifth of the bytes": (PERPLEXITY, "bytes <= 0.2 * base"),
    "best perplexity, a third of the time": (PERPLEXITY, "decode.p50 <= 0.33 * base"),
    "best perplexity, 0.14 of the time": (PERPLEXITY, "decode.p50 <= 0.14 * base"),
    "fastest, perplexity at most 1 % worse": ("decode.p50", f"{PERPLEXITY} <= 1.01 * base"),
    "fastest, perplexity at most 10 % worse": ("decode.p50", f"{PERPLEXITY} <= 1.10 * base"),
}
RECIPE = """effspec 1
use std.text
model base = {model}
pipeline fast(base) {{
  best = search.steps(optimize: {optimize}, data: text.calib, choose: text.choose, within: {within})
}}
expect fast {{ {bound} }}
emit fast {{ native("fast") }}
"""
ALL = f"{PERPLEXITY} <= 100 * base  bytes <= 100 * base"


def wish_of(folder: Path, cache: Path, model: str, optimize: str, bound: str, within: str) -> Wish:
    file = folder / "wish.effspec"
    optimize = optimize.replace("text.heldout", "text.choose")
    file.write_text(RECIPE.format(model=model, optimize=optimize, bound=bound, within=within))
    return read_wish(open_session(file, cache_dir=cache))


def matrix_of(folder: Path, model: str) -> tuple[dict[Candidate, Trial], float]:
    """All candidates measured by themselves, and the seconds that it took."""
    wish = wish_of(folder, folder / "matrix", model, "decode.p50", ALL, "1h")
    trials, result, started = Trials(wish, Cache(folder / "matrix"), folder), {}, time.monotonic()
    candidates = candidates_of(wish)
    for number, candidate in enumerate(candidates, 1):
        plan = trials.plan_or_none(candidate)
        if plan is not None:
            result |= trials.measure({candidate: plan}, 0)
        print(f"\rmatrix {number} of {len(candidates)}, {time.monotonic() - started:.0f} s", end="", flush=True)
    print()
    return result, time.monotonic() - started


def best_of(matrix: dict[Candidate, Trial], wish: Wish, search: Search) -> Candidate:
    """The best candidate of the matrix for a wish."""
    renamed = {c: _for_wish(t, search) for c, t in matrix.items() if not t.refused}
    return search.ranked(renamed)[0]


def _for_wish(trial: Trial, search: Search) -> Trial:
    """A trial of the matrix under the names of a wish's metrics."""
    by_word = {name.partition("(")[0]: value for name, value in trial.values.items()}
    return Trial({name: by_word[name.partition("(")[0]] for name in search.trials.metrics}, 0, trial.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default='zoo("tiny-llama")', help="as a recipe writes it")
    parser.add_argument("--within", default="4min")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        matrix, matrix_seconds = matrix_of(folder, args.model)
        for number, (title, (optimize, bound)) in enumerate(WISHES.items()):
            cache, started = folder / f"cache{number}", time.monotonic()
            wish = wish_of(folder, cache, args.model, optimize, bound, args.within)
            tuned = tune(wish, folder / f"{number}.effspec", folder / f"out{number}")
            seconds = time.monotonic() - started
            search = Search(wish, Trials(wish, Cache(cache), folder), Journal.of(wish, Cache(cache)))
            best = best_of(matrix, wish, search)
            row = {"wish": title, "best": best.name, "seconds": seconds, "share": seconds / matrix_seconds}
            compiled = next(iter(tuned.chosen), None)
            if compiled is not None:
                chosen = next(c for c in matrix if c.name == compiled.name)
                costs = [search.costs(_for_wish(matrix[c], search))[0] for c in (chosen, best)]
                row |= {"chosen": chosen.name, "behind": costs[0] / costs[1] - 1, "held_out": not tuned.unmet}
            rows.append(row)
            print(json.dumps(row))
    measured = {"rows": rows, "matrix": {c.name: asdict(t) for c, t in matrix.items()}, "seconds": matrix_seconds}
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"\n{args.model}, {len(matrix)} candidates in {matrix_seconds / 60:.1f} min\n\n{markdown(table(measured))}")


if __name__ == "__main__":
    main()
