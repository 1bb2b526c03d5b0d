"""Print what `effc plan` estimated of steps and targets beside what they took, and the median of the errors.

    python -m bench.estimates [RECIPE...]

Recipes of the library, by their names; each is compiled once with a cache of its own, one thread. The error of a line is
the larger of both seconds by the smaller, minus 1: 100 % is twice as long, or half. Lines below a second are left out of
the median: nobody waits for them. Run it on a machine at rest.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RECIPES = ("quickstart", "llm/int4-gptq", "llm/sparse-30-cpu")
SHORTEST = 1.0  # seconds


def estimates_of(recipe: str, folder: Path) -> Iterator[tuple[str, float, float]]:
    """(step or target, planned seconds, seconds) of a recipe, and the whole compile last."""
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build

    session = api.open_session(ROOT / "recipes" / f"{recipe}.effspec", cache_dir=folder / "cache", threads=1)
    for number, plan in enumerate(api.plan_all_pipelines(session)):
        build = Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))
        result = build.run(folder / f"out{number}", force=False)
        for name, cost in build.costs.items():
            if "seconds" in cost:
                yield name, cost["planned"], cost["seconds"]
        yield plan.pipeline.name, plan.seconds, result.seconds


def relative_error(planned_s: float, measured_s: float) -> float:
    return max(planned_s, measured_s) / max(min(planned_s, measured_s), 1e-3) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    errors = []
    print(f"{'recipe':<20}{'step':<24}{'planned':>9}{'took':>9}{'error':>9}")
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            for name, planned, seconds in estimates_of(recipe, Path(folder)):
                errors += [relative_error(planned, seconds)] if seconds >= SHORTEST else []
                print(
                    f"{recipe:<20}{name:<24}{planned:8.1f}s{seconds:8.1f}s{relative_error(planned, seconds):9.0%}",
                    flush=True,
                )
    print(f"median error of {len(errors)} lines: {statistics.median(errors):.0%}")


if __name__ == "__main__":
    main()
