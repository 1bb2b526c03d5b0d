"""Discovery of a model's structure."""

from effc.compiler.core.events import Ticked, listening_with
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import resolve_origin
from effc.compiler.transforms.editing.rehearsed import _discover_skeleton


def test_a_plan_tells_what_of_the_models_structure_it_looks_for(tmp_path):
    seen, origin = [], resolve_origin("zoo:tiny-llama", Settings(tmp_path))
    with listening_with(seen.append):
        _discover_skeleton(origin)
    labels = list(dict.fromkeys(e.label for e in seen if isinstance(e, Ticked) and not e.total))
    assert labels == ["capturing the model's graph", "discovering what can be pruned", "trying which branches can go"]
