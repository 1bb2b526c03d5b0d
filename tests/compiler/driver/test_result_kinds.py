"""Kinds of results: each is read from a cache as it was written, and a new one is a class."""

import json
import tarfile
from pathlib import Path

import effc
import pytest
import torch
from effc.compiler.artifacts.load import checkpoint_folder_by_point
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import StageEnded
from effc.compiler.driver import api
from effc.compiler.driver.pick import copy_point
from effc.compiler.ir.outcome import outcome_class_of_entry
from effc.compiler.ir.step_results import StepResults
from effc.compiler.models.checkpoints.model_folder import origin_of_folder
from effc.compiler.plugin.registry import Plugins, Registry
from effc.compiler.transforms.supernet.family import Family
from effc.compiler.transforms.training.unmerged import UnmergedAdapters
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.driver.test_outcomes import HEAD, write
from tests.worlds import context

torch.set_num_threads(1)
STORED = Path(__file__).parents[2] / "stored" / "outcomes.tar.xz"
KINDS = {"search.": "front", "supernet.": "family", "tune.": UnmergedAdapters.kind, "prune.": "model"}

SCALED = '''
"""Multiply every weight by some factors."""

from dataclasses import dataclass, replace

import torch
from effc.compiler.ir.outcome import Outcome
from effc.compiler.plugin.interfaces import Lossy, Pass, param


@dataclass
class Scaled(Outcome):
    kind = "scaled"
    entry_key = "scaled"
    several = True
    program: object
    factors: tuple
    base: str = ""

    @property
    def summary(self):
        return f"{len(self.factors)} factors"

    @property
    def measures(self):
        return {f"by_{factor}": {"factor": (factor, "", "lower")} for factor in self.factors}

    def members(self):
        for factor in self.factors:
            with torch.no_grad():
                for weight in self.program.model.parameters():
                    weight.mul_(factor)
            yield f"by_{factor}", self.program
            with torch.no_grad():
                for weight in self.program.model.parameters():
                    weight.div_(factor)

    def store(self, cache, origin):
        return {"scaled": {"factors": self.factors, "base": self.base}, "needs": [self.base] if self.base else []}

    @classmethod
    def restore(cls, body, results):
        scaled = body["scaled"]
        return cls(results.base_program(scaled["base"]), tuple(scaled["factors"]), scaled["base"])

    def with_base(self, key):
        return replace(self, base=key)


class Scale(Pass):
    """Multiply every weight by some factors.

    Example: all = scale(by: [2, 4])
    """

    keeps = Lossy()
    results = ("scaled",)
    by: list[int] = param("Factors.", least=1)

    def result_of(self, outcome, ctx):
        outcome.program.note(scaled=len(self.by))
        return Scaled(outcome.program, tuple(self.by))
'''
TARGET = '''
"""A folder for each model."""

from effc.compiler.plugin.target import Form, Target
from effc.compiler.targets import hf


class Folders(Target):
    """A folder for each model.

    Example: folders("all")
    """

    result_kinds = ("scaled",)

    def write(self, outcome, into, ctx):
        for name, program in outcome.members():
            (into / "points" / name).mkdir(parents=True)
            hf.write_stock_or_compact(program, into / "points" / name, ctx, 5_000_000_000)

    def forms_of(self, outcome):
        return tuple(Form(f"points/by_{factor}/model", "plain", member=f"by_{factor}") for factor in outcome.factors)
'''
RECIPE = """
pipeline scaled(base) {
  thin = prune.channels(keep: 75% of channels, align: 16)
  all  = scale(by: [2, 4])
}
expect scaled { params <= 0.99 * base }
emit scaled { folders("all") }
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED) as archive:
        archive.extractall(folder, filter="data")
    return folder / "outcomes"


def test_an_entry_of_each_kind_is_restored_and_stored_again_as_it_was(stored):
    cache = Cache(stored / "cache")
    origin = origin_of_folder(stored / "m", "m", "auto", context(stored).settings)
    entries = cache.finished_steps()
    assert {body.parts["step"]["word"].split(".")[0] for body in entries} == {k.rstrip(".") for k in KINDS}
    for entry in entries:
        outcome = StepResults(cache, origin).load_outcome(entry.key)
        word = entry.parts["step"]["word"]
        assert outcome.kind == next(kind for prefix, kind in KINDS.items() if word.startswith(prefix))
        again = json.loads(json.dumps(outcome.store(cache, origin)))
        assert all(has_all_of(again[name], entry.body[name]) for name in again)
        assert all(not entry.body[name] for name in {"tensors", "borrowed", "edits"} - again.keys())


@pytest.mark.parametrize("keys", [{"points", "family"}, {"novel"}])
def test_an_entry_of_no_kind_or_of_two_is_refused(stored, keys):
    cache = Cache(stored / "cache")
    origin = origin_of_folder(stored / "m", "m", "auto", context(stored).settings)
    body = {"tensors": {}, "borrowed": {}, "edits": {}, "notes": {}}
    cache.write_step_record("k" * 64, {}, {**body, **{key: {} for key in keys}})
    with pytest.raises(Reject, match="cache-damaged"):
        StepResults(cache, origin).load_outcome("k" * 64)
    assert outcome_class_of_entry({**body, "family": {}}) is Family


def has_all_of(new, old) -> bool:
    """Whether JSON says all that an earlier effc said; a later one may say more of a result."""
    if isinstance(old, dict):
        return all(key in new and has_all_of(new[key], value) for key, value in old.items())
    return new == old


def plugged(folder: Path, monkeypatch) -> Registry:
    """A registry with the pass `scale` and the target `folders`."""
    for kind, name, text in (("pass", "scale", SCALED), ("target", "folders", TARGET)):
        (folder / f"toy_{kind}").mkdir()
        (folder / f"toy_{kind}" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    registry = Registry()
    for kind in ("pass", "target"):
        shelf, added = registry.vocabulary.words(kind), Plugins(kind, {f"toy_{kind}": folder / f"toy_{kind}"})
        shelf.paths |= added.paths
        shelf.modules |= added.modules
    return registry


def built(recipe: Path, registry: Registry, events: list) -> "api.Result":
    opened = api.open_session(recipe, cache_dir=recipe.parent / "cache", threads=1, on_event=events.append)
    opened.registry = registry
    (result,) = api.build(opened, recipe.parent / "out", force=True)
    return result


@pytest.mark.slow
def test_a_new_kind_of_result_is_one_class_and_a_target(tmp_path, monkeypatch):
    registry, first, second = plugged(tmp_path, monkeypatch), [], []
    recipe = write(tmp_path, HEAD + RECIPE)
    artifact = built(recipe, registry, first).artifacts[0]
    names = ("by_2", "by_4")
    assert tuple(m["name"] for m in artifact.manifest.members) == names and not artifact.missed
    assert all(any(f"points/{name}/model" in c.what for c in artifact.manifest.checks) for name in names)
    assert [m.metric for m in artifact.manifest.measures if m.metric.startswith("params")] == [
        f"params of {name}" for name in names
    ]
    loaded = [
        effc.load(folder).state_dict() for _, folder in checkpoint_folder_by_point(artifact.path, artifact.manifest)
    ]
    assert all(torch.equal(2 * loaded[0][name], weight) for name, weight in loaded[1].items())
    again = built(recipe, registry, second).artifacts[0]
    assert [e.stage for e in second if isinstance(e, StageEnded) and e.cached] == ["thin", "all"]
    assert again.manifest.files == artifact.manifest.files
    copy_point(artifact.path, tmp_path / "picked", point_name="by_4")
    assert torch.equal(effc.load(tmp_path / "picked").state_dict()["lm_head.weight"], loaded[1]["lm_head.weight"])


def test_who_needs_a_model_is_told_of_a_new_kind_by_its_name(tmp_path, monkeypatch):
    registry = plugged(tmp_path, monkeypatch)
    recipe = write(tmp_path, HEAD + RECIPE.replace("folders(", "hf("))
    with pytest.raises(Reject, match="other-kind-of-result") as rejection:
        built(recipe, registry, [])
    assert any("gives a result of kind `scaled`" in d.message for d in rejection.value.diagnostics)


def test_who_emits_adapters_as_a_model_reads_which_target_holds_them(tmp_path):
    recipe = write(
        tmp_path,
        'effspec 1\nuse std.text\nmodel base = zoo("tiny-llama")\n'
        "pipeline l(base) { h = tune.heal(data: text.train, merge: false) }\n"
        'emit l { hf("lora") }\n',
    )
    (diagnostic,) = api.check(recipe).diagnostics
    assert diagnostic.help == "emit it with `peft`, write `from: base`, or leave `merge: false` out of `h`"
