"""A recipe with one pass on an architecture, as far as `check` and `plan` decide: what they refuse, nobody can compile."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effc.compiler.driver import api
from effc.dsl.checker.value_text import value_text
from effc.dsl.syntax.diagnostics import Reject
from torch import nn
from transformers import PreTrainedModel

RECIPE = """effspec 1
model base = config("./config.json")
data rows = synthetic(count: 2, length: 12, seed: 0)
pipeline lean(base) {{ slim = {call} }}
emit lean {{ hf("lean") }}
"""


def call_of(word: str, arguments: Mapping[str, Any]) -> str:
    """A pass as a recipe has it."""
    return (
        f"{word}({', '.join(f'{name}: {value_text(value)}' for name, value in arguments.items() if value is not None)})"
    )


def refused(model: nn.Module, word: str, arguments: Mapping[str, Any], cache: Path) -> Reject | None:
    """What `check` and `plan` have against a recipe with one pass; None of plain modules, which have no config."""
    if not isinstance(model, PreTrainedModel):
        return None
    with tempfile.TemporaryDirectory() as folder:
        body = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
        Path(folder, "config.json").write_text(json.dumps(body), encoding="utf-8")
        recipe = Path(folder, "r.effspec")
        recipe.write_text(RECIPE.format(call=call_of(word, arguments)), encoding="utf-8")
        try:
            api.plan(recipe, cache_dir=cache, threads=1)
        except Reject as reject:
            return reject
    return None
