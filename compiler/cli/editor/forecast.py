"""A process beside the editor that plans what it has open: it imports torch, so that the editor never waits for that.

Lines of JSON in, lines of JSON out. It plans only what needs no model to be looked at anew; nothing is fetched or run.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Reject
from ...core.cache import default_cache
from ...core.quantity import signed
from ...core.settings import Settings
from ...driver.api import Session, plans


def main() -> int:
    if hasattr(os, "nice"):
        os.nice(15)
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.write(json.dumps({"id": asked["id"], "steps": steps(Path(asked["path"]), asked["texts"])}) + "\n")
        sys.stdout.flush()
    return 0


def steps(path: Path, texts: dict[str, str]) -> list[dict[str, Any]]:
    """What each step of a recipe's own file does, by the offset where it ends; none where nothing can be told."""
    session = Session(
        path,
        Settings(cache_dir=default_cache(), offline=True, threads=1),
        texts={Path(name): text for name, text in texts.items()},
    )
    try:
        recipes = session.check().recipes
        if not recipes or any(session.known_skeleton(m) is None for r in recipes[:1] for m in r.models.values()):
            return []
        made = plans(session)
    except Reject:
        return []
    found = {}
    for plan in (p for p in made if p.recipe.variant == made[0].recipe.variant):
        for stage in plan.stages:
            if stage.span and stage.span.source.name == str(path):
                found[stage.span.end] = {"end": stage.span.end, "said": effect_text(stage)}
    return list(found.values())


def effect_text(stage) -> str:
    """`-> 16 modules, -3.10 M params`."""
    parts = [f"{len(stage.matched)} module{'' if len(stage.matched) == 1 else 's'}"] if stage.matched else []
    lost = stage.after.params - stage.before.params
    parts += [f"{signed(lost)} params"] if lost else []
    return f"-> {', '.join(parts)}" if parts else ""


if __name__ == "__main__":
    raise SystemExit(main())
