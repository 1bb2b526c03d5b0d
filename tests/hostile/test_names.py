"""Names that no file system has are a recipe's mistake, wherever a word reads a file of that name."""

from contextlib import suppress

import pytest
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

LONG = "a" * 300  # bytes of a name: systems have 255
STEP = "x = prune.channels(keep: 50% of channels, score: perplexity(d))"
RECIPE = """effspec 1
{use}
model base = {model}
{data}
pipeline p(base) {{
  {step}
}}
emit p {{ {emit} }}
"""
PLAIN = {"use": "", "model": 'zoo("tiny-llama")', "data": "", "step": "", "emit": 'hf("o")'}
MODELS = ['hf("{}")', 'hf("./{}")', 'gguf("{}.gguf")', 'config("{}.json")', 'module("{}.py:make")']
ROWS = ["text", "chat", "choices", "pairs", "labels", "texts", "images", "tensors", "hub"]
OTHERS = [
    {"use": 'use "./{}"'},
    {"step": 'x = prune.apply("{}")'},
    {"emit": 'rttc("o", knowledge: "{}")'},
    {"emit": 'hf("{}/b")'},
]
CASES = [
    *({"model": model} for model in MODELS),
    *({"data": f'data d = {word}("{{}}", length: 8)', "step": STEP} for word in ROWS),
    *OTHERS,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: next(iter(case.values()))[:24])
@pytest.mark.parametrize("name", [LONG, f"{LONG}/b", "b/" * 2500])
def test_a_name_that_no_system_has_is_refused_by_check_and_plan(tmp_path, case, name):
    parts = {part: text.replace("{}", name) for part, text in (PLAIN | case).items()}
    (tmp_path / "r.effspec").write_text(RECIPE.format(**parts))
    for verb in (api.check, api.plan):
        with suppress(Reject):  # all else, an OSError too, is no answer
            verb(tmp_path / "r.effspec", offline=True, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", [LONG, f"{LONG}/a.effspec", "a\0b"])
def test_a_recipe_and_params_of_such_a_name_are_refused(tmp_path, name):
    (tmp_path / "r.effspec").write_text(RECIPE.format(**PLAIN))
    for path, params in ((name, None), (tmp_path / "r.effspec", name)):
        with pytest.raises(Reject):
            api.check(path, params=params)
