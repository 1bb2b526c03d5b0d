"""A cache that can only be read serves what it has, and says so where a step would have to run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.compiler.core.cache import Cache, canonical_json_sha256, tensor_hash

from tests import worlds
from tests.hostile.closed import UNTRIED

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="the system has no owners")
RECIPE = """effspec 1
model base = hf("./m")
data  rows = synthetic(2, length: 12, seed: 1)
pipeline lean(base) { thin = prune.channels(keep: 66% of channels, align: 8) }
expect lean { perplexity(rows) <= 100000 }
emit lean { hf("lean") }
"""
READING = """
import sys
from pathlib import Path
from effc.compiler.core.cache import Cache
from effc.dsl.syntax.diagnostics import Reject
cache = Cache(Path(sys.argv[1]))
key = cache.finished_steps()[0].key
assert cache.load_verified_tensor(cache.read_complete_step(key)["tensors"]["w"]).sum() == 8
assert cache.read_value({"of": "base"}) == 34.0
cache.store_value({"of": "another"}, 3.0)
assert cache.read_value({"of": "another"}) is None and not (cache.folder / "steps" / "x").exists()
try:
    cache.make_checked_scratch("0" * 64)
except Reject as reject:
    print(reject.diagnostics[0].slug)
"""


def closed(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """A command run where nobody can write to the folder."""
    words = [sys.executable, str(Path(__file__).with_name("closed.py")), str(folder), *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env)
    if done.returncode == UNTRIED:
        pytest.skip("root can't mount a folder here, and modes don't bind it")
    return done


@pytest.mark.slow
def test_a_cache_that_can_only_be_read_gives_what_it_has_and_keeps_nothing(tmp_path):
    cache, parts = Cache(tmp_path / "cache"), {"step": {"word": "prune.blocks"}, "seed": 0}
    cache.store_value({"of": "base"}, 34.0)
    tensors = {"w": cache.store_tensor(torch.ones(8))}
    cache.write_step_record(
        canonical_json_sha256(parts), parts, {"tensors": tensors, "borrowed": {}, "edits": {}, "notes": {}}
    )
    done = closed(cache.folder, sys.executable, "-c", READING, str(cache.folder))
    assert done.stdout == "cache-closed\n", done.stderr
    assert cache.read_value({"of": "another"}) is None and cache.tensor_path(tensor_hash(torch.ones(8))).is_file()


@pytest.mark.heavy
def test_a_compile_works_from_a_warm_cache_that_can_only_be_read_and_says_that_it_lacks_a_step(tmp_path):
    worlds.llama(tmp_path / "m")
    worlds.tokenizer(tmp_path / "m")
    effc = shutil.which("effc", path=Path(sys.executable).parent)
    recipe, cache = tmp_path / "r.effspec", tmp_path / "cache"

    def compiled(*words: str) -> list[str]:
        return [effc, "compile", str(recipe), "--cache-dir", str(cache), "--offline", "--no-progress", *words]

    recipe.write_text(RECIPE)
    subprocess.run(compiled("-o", str(tmp_path / "one")), check=True, capture_output=True)
    kept = sorted(path for path in cache.rglob("*"))
    warm = closed(cache, *compiled("-o", str(tmp_path / "two")))
    assert warm.returncode == 0, warm.stderr
    one, two = (tmp_path / out / "lean" / "model" / "model.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    recipe.write_text(RECIPE.replace("66%", "34%"))
    cold = closed(cache, *compiled("-o", str(tmp_path / "three")))
    assert cold.returncode == 5 and "error[cache-closed]" in cold.stderr and "--cache-dir" in cold.stderr
    assert not (tmp_path / "three" / "lean").exists() and sorted(path for path in cache.rglob("*")) == kept
