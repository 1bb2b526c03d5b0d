"""Write the skeleton of every zoo model beside its weights, so that `effc check` knows it without torch.

    python recipes/zoo/ship_skeletons.py

Run it when capture or discovery finds more than before; a test holds the files equal to what is found now.
"""

import json
import tempfile
from pathlib import Path

from effc.compiler.analysis.discovery.structure import discover_skeleton_without_weights
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import resolve_origin
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name


def found(name: str) -> str:
    """The skeleton of a zoo model as JSON."""
    with tempfile.TemporaryDirectory() as cache:
        origin = resolve_origin(f"zoo:{name}", Settings(Path(cache)))
        return json.dumps(discover_skeleton_without_weights(origin).to_json(), separators=(",", ":")) + "\n"


if __name__ == "__main__":
    for name, folder in zoo_folders_by_name().items():
        (folder / "skeleton.json").write_text(found(name))
