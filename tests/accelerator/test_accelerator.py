"""Compiles whose model lies on another device: the emulated one, as no GPU can be assumed (see `emulated`)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

PAGE_FOLDER = Path(__file__).parents[2]
STEPS = {
    "multi": "prune.multi(remove: 10% of params, group: 16, score: perplexity(rows), data: rows)",
    "foreseen": "prune.multi(remove: 10% of params, group: 16, score: perplexity(rows), data: rows, estimate: taylor)",
    "channels": "prune.channels(keep: 50% of channels, data: rows)",
    "wanda": "sparsify.wanda(sparsity: 50% of weights, data: rows)",
    "sparsegpt": "sparsify.sparsegpt(sparsity: 50% of weights, data: rows)",
    "gptq": "quantize.gptq(bits: 4, group: 32, data: rows)",
    "scale": "quantize.scale(bits: 4, group: 32, data: rows)",
    "heal": "tune.heal(data: rows, steps: 3, batch: 4)",
}
HEAD = 'effspec 1\nmodel base = config("tiny.json", seed: 3)\ndata rows = synthetic(16, length: 24, seed: 1)\n'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="the emulated device needs a C++ compiler"),
    pytest.mark.timeout(900),
]


def text(*names):
    made = [f'pipeline {n}(base) {{\n  s = {STEPS[n]}\n}}\nemit {n} {{ hf("{n}") }}\n' for n in names]
    return HEAD + "".join(made)


def effc(folder, *args, memory=1 << 40):
    """The command line, with the emulated device: what it gave, and the most bytes that the device held."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.accelerator.effc", *args, "--threads", "1", "--cache-dir", str(folder / "cache")],
        cwd=PAGE_FOLDER,
        env=os.environ | {"EMULATED_BYTES": str(memory), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    *said, peak = done.stderr.rstrip().splitlines()
    return done.returncode, done.stdout + "\n".join(said), int(peak)


def compile(folder, device, *names, memory=1 << 40):
    """Artifacts of some steps in `folder / device`: exit code, text, peak."""
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "r.effspec").write_text(text(*names))
    out = folder / f"{device}-{memory}"
    found = effc(folder, "compile", str(folder / "r.effspec"), "-o", str(out), "--device", device, memory=memory)
    return out, *found


def tensors(out, name):
    return load_file(min((out / name).rglob("model.safetensors")))


def apart(ours, theirs):
    """The share of numbers that differ by more than rounding, of tensors that have to be of the same shapes."""
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    off = sum(int(torch.isclose(ours[n], theirs[n], rtol=1e-3, atol=1e-4).logical_not().sum()) for n in ours)
    return off / sum(t.numel() for t in ours.values())


def test_steps_decide_on_a_device_what_they_decide_on_the_cpu(tmp_path):
    names = list(STEPS)
    here, code, said, peak = compile(tmp_path, "cpu", *names)
    assert (code, peak) == (0, 0), said
    there, code, said, peak = compile(tmp_path, "emulated", *names)
    assert code == 0 and peak > 100_000, said
    for name in names:
        assert apart(tensors(there, name), tensors(here, name)) < 0.01, name


def test_a_device_without_room_for_all_rows_is_given_fewer_at_once(tmp_path):
    _, code, said, peak = compile(tmp_path, "emulated", "wanda", "heal")
    assert code == 0 and "has no room" not in said, said
    whole = {name: tensors(tmp_path / f"emulated-{1 << 40}", name) for name in ("wanda", "heal")}
    shutil.rmtree(tmp_path / "cache")
    tight, code, said, _ = compile(tmp_path, "emulated", "wanda", "heal", memory=int(0.7 * peak))
    assert code == 0, said
    assert "emulated has no room for 16 rows at once: begun again, 8 at once" in said
    for name, wanted in whole.items():  # three steps of AdamW: the sign of a tiny gradient is rounding's
        assert apart(tensors(tight, name), wanted) < (0.05 if name == "heal" else 0.01), name


def test_a_device_without_room_for_the_model_is_refused_with_a_remedy(tmp_path):
    _, code, said, _ = compile(tmp_path, "emulated", "wanda", memory=100_000)
    assert code == 6
    assert "error[device-full]" in said and "r.effspec:2" in said and "--device cpu" in said, said


def test_auto_is_the_accelerator_where_there_is_one(tmp_path):
    _, code, said, peak = compile(tmp_path, "auto", "channels")
    assert code == 0 and peak > 0, said


TARGETS = """effspec 1
model base = zoo("tiny-llama")
data rows = text("{zoo}/calib.txt", samples: 16, length: 32, seed: 7)
pipeline thin(base) {{
  s = prune.channels(keep: 75% of channels)
}}
emit thin {{
  hf("hf")
  native("native")
  gguf("gguf")
  onnx("onnx")
  pt2("pt2")
  pruning_config("pruning")
  flower("flower", data: rows, clients: 2, rounds: 1, strategy: hetlora, ranks: [2, 4], steps: 1)
  rttc("rttc", knowledge: "{zoo}/calib.txt", policy: ttt)
  report("report.html")
}}
"""


def test_every_target_is_written_and_judged_of_what_a_device_computed(tmp_path):
    """Those of engines that run on the CPU alone, too."""
    recipe = tmp_path / "r.effspec"
    recipe.write_text(TARGETS.format(zoo=PAGE_FOLDER / "recipes" / "zoo" / "tiny-llama"))
    code, said, peak = effc(tmp_path, "compile", str(recipe), "-o", str(tmp_path / "out"), "--device", "emulated")
    assert code == 0 and peak > 0, said
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {"hf", "native", "gguf", "onnx", "pt2", "pruning", "flower", "rttc", "report.html"}
