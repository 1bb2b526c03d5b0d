"""Print what `effc tune` chooses beside the best of all its candidates, for six wishes, as a table.

    python -m bench.tune [--model zoo:tiny-llama] [--bits 16] [--within 4min] [--folder FOLDER]
        [--skip PATTERN...] [--json FILE]

Two sizes, two times per token and two losses of quality. Every wish is searched with a cache of its own; then every
candidate is built and measured by itself, once, on all rows that choices are made by (the matrix). "behind" is by how
much the choice is behind the matrix's best at the objective, both by the matrix's measurements; "time" the share of
the matrix's time that the search took; "held out" whether all bounds hold on rows that nothing was decided by.
--skip leaves candidates out of the matrix by their names (`"15 % pruned*"`), not out of the searches; what a search
chooses is measured as well. --folder keeps every measurement, and a run that was broken off goes on there.
Run it on a machine at rest: times decide.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from effc.compiler.core.cache import Cache
from effc.compiler.driver.api import open_session
from effc.compiler.driver.tuning.alternatives import Candidate, allowed_candidates
from effc.compiler.driver.tuning.journal import Journal
from effc.compiler.driver.tuning.search import Search
from effc.compiler.driver.tuning.trials import Trial, Trials
from effc.compiler.driver.tuning.tune import tune
from effc.compiler.driver.tuning.wish import Wish, read_wish

from bench.tables import markdown
from bench.tables import tune_rows as table

PERPLEXITY = "perplexity(text.heldout)"
LIMITS = {  # by the bits of the original's weights: shares of the bytes and of the time, with their names
    32: ((0.5, "half"), (0.2, "a fifth"), (0.33, "a third"), (0.14, "0.14")),
    16: ((0.55, "0.55"), (0.34, "0.34"), (0.33, "a third"), (0.2, "a fifth")),
}


def wishes(bits: int) -> dict[str, tuple[str, str]]:
    """Metric and bound of each wish, by its title."""
    sizes, times = LIMITS[bits][:2], LIMITS[bits][2:]
    result: dict[str, tuple[str, str]] = {}
    for share, name in sizes:
        of = " " if name == "half" else " of "
        result[f"best perplexity, {name}{of}the bytes"] = PERPLEXITY, f"bytes <= {share} * base"
    for share, name in times:
        result[f"best perplexity, {name} of the time"] = PERPLEXITY, f"decode.p50 <= {share} * base"
    for percent in (1, 10):
        bound = f"{PERPLEXITY} <= {1 + percent / 100:.2f} * base"
        result[f"fastest, perplexity at most {percent} % worse"] = "decode.p50", bound
    return result


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


@dataclass(frozen=True)
class Matrix:
    """Candidates measured by themselves, one at a time, and the seconds that each took with its plan.

    folder  keeps them, so that a run that was broken off goes on
    """

    folder: Path
    trials: Trials
    measured: dict[Candidate, Trial] = field(default_factory=dict)
    seconds: dict[Candidate, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, model: str) -> "Matrix":
        wish = wish_of(folder, folder / "matrix", model, "decode.p50", ALL, "1h")
        return cls(folder, Trials(wish, Cache(folder / "matrix"), folder))

    def measure(self, candidate: Candidate) -> None:
        """Measure a candidate; one that its plan refuses is left out."""
        file = self.folder / f"trial{candidate.suffix}.json"
        if file.is_file():
            record = json.loads(file.read_text())
        else:
            started = time.monotonic()
            plan = self.trials.plan_or_none(candidate)
            trial = self.trials.measure({candidate: plan}, 0)[candidate] if plan else Trial(refused="by its plan")
            record = {"trial": asdict(trial), "seconds": time.monotonic() - started}
            file.write_text(json.dumps(record))
            self.trials.keep_artifacts(())
        if not (trial := Trial(**record["trial"])).refused:
            self.measured[candidate] = trial
        self.seconds[candidate] = record["seconds"]

    def measure_all(self, skip: Sequence[str]) -> None:
        """Measure all candidates but those whose names match a pattern of `skip`."""
        candidates = [c for c in allowed_candidates(self.trials.wish) if not any(fnmatch(c.name, p) for p in skip)]
        for number, candidate in enumerate(candidates, 1):
            self.measure(candidate)
            spent = sum(self.seconds.values())
            print(f"\rmatrix {number} of {len(candidates)}, {spent:.0f} s", end="", flush=True)
        print()


def row_of(matrix: Matrix, number: int, wish_by_title: tuple[str, tuple[str, str]], args: Any) -> dict[str, Any]:
    """Row of the table for a wish, kept in the matrix's folder."""
    title, (optimize, bound) = wish_by_title
    folder = matrix.folder
    file = folder / f"wish{number}.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    cache, started, matrix_seconds = folder / f"cache{number}", time.monotonic(), sum(matrix.seconds.values())
    wish = wish_of(folder, cache, args.model, optimize, bound, args.within)
    tuned = tune(wish, folder / f"{number}.effspec", folder / f"out{number}")
    seconds = time.monotonic() - started
    search = Search(wish, Trials(wish, Cache(cache), folder), Journal.read_or_make(wish, Cache(cache)))
    compiled, row = next(iter(tuned.chosen), None), dict[str, Any](wish=title)
    if compiled is not None:
        (chosen,) = (c for c in allowed_candidates(matrix.trials.wish) if c.name == compiled.name)
        if chosen not in matrix.measured:  # its time is none of the matrix's
            matrix.measure(chosen)
            del matrix.seconds[chosen]
        row |= {"chosen": chosen.name, "held_out": not tuned.unmet}
    best = best_of(matrix.measured, wish, search)
    row |= {"best": best.name, "seconds": seconds, "share": seconds / matrix_seconds}
    if compiled is not None:
        costs = [search.objective_costs(_for_wish(matrix.measured[c], search))[0] for c in (chosen, best)]
        row["behind"] = costs[0] / costs[1] - 1
    file.write_text(json.dumps(row))
    return row


def best_of(matrix: dict[Candidate, Trial], wish: Wish, search: Search) -> Candidate:
    """The best candidate of the matrix for a wish."""
    renamed = {c: _for_wish(t, search) for c, t in matrix.items() if not t.refused}
    return search.rank_measured_feasible_first(renamed)[0]


def _for_wish(trial: Trial, search: Search) -> Trial:
    """A trial of the matrix under the names of a wish's metrics."""
    by_word = {name.partition("(")[0]: value for name, value in trial.values.items()}
    return Trial({name: by_word[name.partition("(")[0]] for name in search.trials.metrics}, 0, trial.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default='zoo("tiny-llama")', help="as a recipe writes it")
    parser.add_argument("--bits", type=int, choices=LIMITS, default=32, help="of the weights of the original")
    parser.add_argument("--within", default="4min")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--skip", nargs="*", default=[], help="names of candidates that are not measured by themselves")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        matrix = Matrix.of(folder, args.model)
        matrix.measure_all(args.skip)
        seconds, count = sum(matrix.seconds.values()), len(matrix.measured)
        rows = []
        for number, wish in enumerate(wishes(args.bits).items()):
            rows.append(row_of(matrix, number, wish, args))
            print(json.dumps(rows[-1]), flush=True)
    measured = {"rows": rows, "matrix": {c.name: asdict(t) for c, t in matrix.measured.items()}, "seconds": seconds}
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"\n{args.model}, {count} candidates in {seconds / 60:.1f} min\n\n{markdown(table(measured))}")


if __name__ == "__main__":
    main()
