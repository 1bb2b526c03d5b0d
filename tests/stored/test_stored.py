"""What an earlier effc stored is read by this one: artifacts, and a cache's steps.

`8d012cb.tar.xz` was written by effc at that commit, in a checkout of it, with one thread: `old.effspec` in it was
compiled to `out/` with the cache `cache/`; `logits.safetensors` holds what each artifact computed there, and the
tokens `ids` that it computed it of.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.core.cache import Cache
from effc.compiler.core.sealed_json import sealed_json_bytes
from effc.compiler.ir.layers.linear import kernel_linears
from effc.compiler.ir.step_results import StepResults
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.recipe import Invocation
from safetensors.torch import load_file

from tests.worlds import context

torch.set_num_threads(1)
ROUNDING = 5e-3  # bfloat16 products of one machine's kernels against another's, logits of size 0.4


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(Path(__file__).with_name("8d012cb.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "8d012cb"


def origin_in(folder: Path) -> Origin:
    """The model that was compiled, by the recipe's own words."""
    source = Registry().make("model", Invocation("config", {"path": "tiny.json", "seed": 0, "dtype": "auto"}))
    return source.resolve(context(folder))


@pytest.mark.parametrize(("artifact", "form"), [("hf", "hf"), ("cpu", "native"), ("program", "pt2")])
def test_an_artifact_of_8d012cb_loads_and_computes_what_it_did(stored, artifact, form):
    said = load_file(stored / "logits.safetensors")
    with torch.no_grad():
        found = load(stored / "out" / artifact)(input_ids=said["ids"])
    logits = found if isinstance(found, torch.Tensor) else found.logits
    assert (logits.float() - said[form]).abs().max() < ROUNDING < said[form].abs().max() / 50


def test_a_step_that_8d012cb_kept_is_restored_with_its_packed_weights(stored):
    said, cache = load_file(stored / "logits.safetensors"), Cache(stored / "cache")
    assert not cache.finished_steps()  # it has no seals, so it would be computed again
    for path in (stored / "cache" / "steps").iterdir():
        path.write_bytes(sealed_json_bytes(json.loads(path.read_bytes())))
    kept = {entry.parts["step"]["word"]: entry for entry in cache.finished_steps()}
    assert set(kept) == {"prune.blocks", "prune.channels", "lower.sparse_cpu"}
    old = json.dumps(kept["lower.sparse_cpu"].body["edits"])
    assert '"compiler.lowering.lowered:KernelLinear"' in old
    program = StepResults(cache, origin_in(stored)).load_outcome(kept["lower.sparse_cpu"].key).program
    assert [path for path, _ in kernel_linears(program.model)] == list(program.edits.swapped)
    with torch.no_grad():
        logits = program.model(input_ids=said["ids"]).logits
    assert (logits - said["hf"]).abs().max() < ROUNDING
    assert '"class": "KernelLinear"' in json.dumps(program.edits.to_json())  # stored again, under its name
