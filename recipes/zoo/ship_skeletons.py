"""Write the skeleton of every zoo model beside its weights, so that `effc check` knows it without torch.

    python recipes/zoo/ship_skeletons.py

Run it when capture or discovery finds more than before; a test holds the files equal to what is found now.
"""

import json
import tempfile
from pathlib import Path

from effc.compiler.analysis.discovery.structure import find_skeleton
from effc.compiler.core.settings import Settings
from effc.compiler.inputs.sources.zoo import zoo
from effc.compiler.plugin.context import Context
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.recipe import Invocation


def found(name: str) -> str:
    """The skeleton of a zoo model as JSON."""
    with tempfile.TemporaryDirectory() as cache:
        ctx = Context(Settings(Path(cache)), None, Path(), Registry(), None, Path(cache))
        origin = ctx.shelf.make("model", Invocation("zoo", {"name": name})).resolve(ctx)
        return json.dumps(find_skeleton(origin).to_json(), separators=(",", ":")) + "\n"


if __name__ == "__main__":
    for name, folder in zoo().items():
        (folder / "skeleton.json").write_text(found(name))
