"""Description of the pruned parts, in MultiPruner's published format."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..analysis.discovery.discover import skeleton_of
from ..artifacts.pruning_config import to_published_config
from ..ir.capture.capture import capture
from ..ir.program import Program
from ..plugin.context import Context
from ..plugin.target import Target


class PruningConfig(Target):
    """Description of the pruned parts, in MultiPruner's published format.

    A folder with `pruning_config.json`: layers whose attention or MLP is gone, in order of removal, and how many
    query and MLP channels the others keep. `prune.apply` cuts another copy of the model so; weights that were
    repaired or healed are not in it, and of channels it says how many, not which: those of largest weight
    magnitude, where the search ordered them by `reorder: l1`. A dropped layer is one without attention and MLP.
    What the form has no field for, as query heads that went without their KV head, is refused.

    Source: MultiPruner (Munoz et al. 2025, arXiv 2501.09949), run_multipruner.py of its repository.
    Example: pruning_config("lean-config")
    """

    def cannot_hold(self) -> Mapping[str, str]:
        return {"interventions": "it says what was cut, and interventions were put in"}

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        with torch.device("meta"):
            model = ctx.origin.build()
        before = skeleton_of(capture(model))
        removed = [note["cut"] for note in program.notes if "cut" in note]
        config = to_published_config(before, skeleton_of(program), removed, program.edits.layers)
        (destination / "pruning_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
