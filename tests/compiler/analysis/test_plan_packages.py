"""Optional packages of passes and targets: a plan says which is missing, before any weight is read."""

import sys

import pytest
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data calib = generated(2, length: 32)
pipeline p(base) {{ step = {step} }}
emit p {{ {target}("out") }}
"""


def plans(folder, step: str, target: str = "hf"):
    path = folder / "r.effspec"
    path.write_text(RECIPE.format(step=step, target=target))
    return api.plan(path, cache_dir=folder / "cache", threads=1)


@pytest.mark.parametrize(
    "step, target, module, extra",
    [
        ("lower.mixed(keep: 30% of bytes, data: calib)", "native", "scipy", "search"),
        ("tune.heal(data: calib)", "hf", "peft", "tune"),
    ],
)
def test_a_pass_whose_package_is_missing_is_refused_at_its_place(tmp_path, monkeypatch, step, target, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Reject) as caught:
        plans(tmp_path, step, target)
    (fault,) = caught.value.diagnostics
    assert fault.slug == "package-missing" and caught.value.exit == 5
    assert fault.message == f"`{step.partition('(')[0]}` needs {module}, not installed here"
    assert f"effc[{extra}]" in fault.help and fault.span.text.startswith(step.partition("(")[0])


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_target_whose_package_is_missing_is_refused_at_its_place_whatever_steps_remove(tmp_path, monkeypatch, target):
    monkeypatch.setitem(sys.modules, target, None)
    with pytest.raises(Reject) as caught:
        plans(tmp_path, "prune.blocks(remove: 1, score: perplexity(calib))", target)
    (fault,) = caught.value.diagnostics
    assert fault.slug == "package-missing" and caught.value.exit == 5
    assert fault.message == f"the target `{target}` needs {target}, not installed here"
    assert f"effc[{target}]" in fault.help and fault.span.text == f'{target}("out")'


def test_a_pass_that_needs_no_package_as_it_is_called_is_planned(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    (plan,) = plans(tmp_path, "tune.heal(data: calib, method: full)")
    assert [stage.name for stage in plan.stages] == ["step"]
