"""A process beside the editor that plans what it has open: it imports torch, so that the editor never waits for that.

Lines of JSON in, lines of JSON out. It plans only what needs no model to be looked at anew; nothing is fetched or run.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Reject
from ...core.cache import default_cache_folder
from ...core.quantity import signed_count
from ...core.settings import Settings
from ...driver.api import Session, plan_all_pipelines


def main() -> int:
    if hasattr(os, "nice"):
        os.nice(15)
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(
            json.dumps({"id": request["id"], "steps": step_forecasts_json(Path(request["path"]), request["texts"])})
            + "\n"
        )
        sys.stdout.flush()
    return 0


def step_forecasts_json(path: Path, texts: dict[str, str]) -> list[dict[str, Any]]:
    """Forecast of each step of a recipe's file, by the offset where it ends; none where there is no forecast."""
    session = Session(
        path,
        Settings(cache_dir=default_cache_folder(), offline=True, threads=1),
        texts={Path(name): text for name, text in texts.items()},
    )
    try:
        recipes = session.check().recipes
        if not recipes or any(session.stored_skeleton(m) is None for r in recipes[:1] for m in r.models.values()):
            return []
        plan_list = plan_all_pipelines(session)
    except Reject:
        return []
    by_end = {}
    for plan in (p for p in plan_list if p.recipe.variant == plan_list[0].recipe.variant):
        for stage in plan.stages:
            if stage.span and stage.span.source.name == str(path):
                by_end[stage.span.end] = {"end": stage.span.end, "said": effect_text(stage)}
    return list(by_end.values())


def effect_text(stage) -> str:
    """`-> 16 modules, -3.10 M params`."""
    parts = [f"{len(stage.matched)} module{'' if len(stage.matched) == 1 else 's'}"] if stage.matched else []
    difference = stage.after.params - stage.before.params
    parts += [f"{signed_count(difference)} params"] if difference else []
    return f"-> {', '.join(parts)}" if parts else ""


if __name__ == "__main__":
    raise SystemExit(main())
