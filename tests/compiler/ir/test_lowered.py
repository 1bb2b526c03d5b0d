"""A linear module that runs a kernel: captured as before, stored and loaded whole, refused where it can't be held."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.cli.verbs.exit_codes import diagnostics_of_exception
from effc.compiler.evaluation.metrics.params import Params
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.ir.graph_json import graph_to_json
from effc.compiler.ir.layers.linear import KernelLinear, check_and_copy_packed_weights, kernel_linears
from effc.compiler.ir.outcome import Model
from effc.compiler.ir.program import Program
from effc.compiler.ir.step_results import StepResults
from effc.compiler.targets.hf import Hf
from effc.compiler.targets.pt2 import Pt2
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.checker.values import Bytes
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.native import KernelError
from effc.kernels.packed import KINDS, Header

from tests import tiny
from tests.architectures.modules import TwoTowers
from tests.drafts import write_artifact
from tests.grids import wide
from tests.kernels.test_packed import sealed
from tests.recipes_in_memory import context_of, origin_of, recipe_of
from tests.weights import load_weights, weights_of
from tests.worlds import refused

IDS = torch.arange(3, 23).view(2, 10)


def lower(program: Program, kernel: str = "sparse_linear", only: str = "") -> None:
    with Rewriter(program) as rewrite:
        for part in skeleton_of(program).parts:
            if part.kind in ("Linear", "Conv1D") and part.path.endswith(only):
                module = program.model.get_submodule(part.path)
                rewrite.swap_module(part.path, KernelLinear.of(module, kernel))


def made(name: str = "llama", kernel: str = "sparse_linear", only: str = "") -> Program:
    program = capture(tiny.model(name))
    lower(program, kernel, only)
    return program


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def written(program: Program, tmp_path: Path, target, checked: bool = True) -> Path:
    ctx = context_of(tmp_path, tiny.model("llama"), recipe_of([]))

    def build(folder: Path) -> Manifest:
        target.emit(program, folder, ctx)
        if checked:
            verify_forms(folder, program.model, target.forms())
        return Manifest(type(target).__name__.lower())

    write_artifact(tmp_path / "out", build=build)
    return tmp_path / "out"


def hf(**form) -> Hf:
    return Hf(**{"path": "hf", "form": "auto", "shard": Bytes(5 * 10**9), **form})


@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
def test_a_lowered_model_says_nearly_the_same_and_is_captured_alike(name):
    program = made(name)
    before = capture(tiny.model(name))
    assert len(dict(kernel_linears(program.model))) == sum(
        p.kind in ("Linear", "Conv1D") for p in skeleton_of(before).parts
    )
    ours, theirs = logits(program.model), logits(before.model)
    assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()  # weights and inputs in bfloat16
    assert {u: graph_to_json(unit.graph) for u, unit in program.units.items()} == {
        u: graph_to_json(unit.graph) for u, unit in before.units.items()
    }
    roles = [(b.site, b.role, b.parts) for b in skeleton_of(program).branches]
    assert roles == [(b.site, b.role, b.parts) for b in skeleton_of(before).branches]


@pytest.mark.parametrize("kernel", sorted(KINDS))
def test_every_kernel_computes_what_its_packed_weight_stands_for(kernel):
    torch.manual_seed(0)
    linear = torch.nn.Linear(70, 33)
    module, x = KernelLinear.of(linear, kernel), torch.randn(5, 70)
    kept = torch.ops.effc.unpack_linear(module.packed, 33, 70)
    bound = 0.02 * x.abs().amax() * kept.abs().sum(1).max() / 8  # x in bfloat16 or int8
    assert (module(x) - torch.nn.functional.linear(x, kept, linear.bias)).abs().max() <= bound
    steps = 6 if kernel.endswith("int4") else 127  # a scale of 4-bit weights may clip the largest for all others' sake
    assert (kept - linear.weight).abs().max() <= linear.weight.abs().max() * 1.01 / steps  # scales are bfloat16


def test_its_channels_can_no_longer_be_cut_and_discovery_says_why():
    program = made(only="down_proj")
    assert not [g for g in skeleton_of(program).groups if g.kind == "channels"]
    assert ["model.layers.0.mlp.down_proj", "its weight is packed for a kernel"] in skeleton_of(program).facts[
        "refused"
    ]
    assert [g for g in skeleton_of(program).groups if g.kind == "kv_heads"]  # attention is as it was


def test_a_packed_weight_counts_as_the_numbers_that_it_stands_for():
    before = sum(p.numel() for p in tiny.model("llama").parameters())
    assert Params().measure(made(only="_proj").model, None) == before


def test_a_copy_computes_the_same_and_shares_nothing():
    model = made().model
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    one, two = model.model.layers[0].mlp.up_proj.packed, other.model.layers[0].mlp.up_proj.packed
    assert one.data_ptr() != two.data_ptr()


def test_edits_replay_on_a_blank_model_and_weights_fill_it():
    program = made("gpt2")
    edits = Edits.from_json(json.loads(json.dumps(program.edits.to_json())))
    with torch.device("meta"):
        blank = tiny.blank("gpt2")
    replay_edits(blank, edits)
    assert {p: m.spec() for p, m in kernel_linears(blank)} == {p: m.spec() for p, m in kernel_linears(program.model)}
    fresh = tiny.model("gpt2", seed=5)
    replay_edits(fresh, edits)
    load_weights(fresh, weights_of(program.model))
    assert torch.equal(logits(fresh), logits(program.model))


@pytest.mark.parametrize("change", [{"kernel": "rm"}, {"bytes": -1}, {"bytes": "9"}, {"out_features": 2.5}])
def test_a_stored_module_of_another_form_is_refused(change):
    program = made(only="up_proj")
    data = program.edits.to_json()
    data["swapped"]["model.layers.0.mlp.up_proj"]["spec"].update(change)
    assert (
        refused(lambda: replay_edits(tiny.model("llama"), Edits.from_json(data))).diagnostics[0].slug == "refused-edits"
    )


def test_a_kept_step_comes_back_with_its_packed_weights(tmp_path):
    from effc.compiler.core.cache import Cache

    program, cache, origin = made(), Cache(tmp_path), origin_of(tiny.model("llama"))
    StepResults(cache, origin).save_outcome("k" * 64, Model(program), {}, {"program": [], "summary": ""})
    again = StepResults(cache, origin).load_outcome("k" * 64).program
    assert torch.equal(logits(again.model), logits(program.model))


@pytest.mark.slow
def test_hf_writes_a_compact_folder_that_generates_and_saves_itself_again(tmp_path):
    program = made()
    out = written(program, tmp_path, hf())
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["compact"]
    notes = json.loads((out / "manifest.json").read_text())["notes"]
    assert any("no stock checkpoint" in n and "KernelLinear" in n for n in notes)
    assert any("no compat checkpoint" in n for n in notes)
    model = load(out)
    assert torch.equal(logits(model), logits(program.model))
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 14)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(program.model))


@pytest.mark.parametrize("form", ["stock", "compat"])
def test_a_form_that_stock_transformers_reads_is_refused(tmp_path, form):
    with pytest.raises(Reject, match="KernelLinear") as caught:
        written(made(only="up_proj"), tmp_path, hf(form=form))
    assert caught.value.diagnostics[0].slug == "cannot-write-form"


@pytest.mark.slow
def test_pt2_writes_a_program_that_calls_the_kernels(tmp_path):
    torch.manual_seed(0)
    program = capture(TwoTowers().eval())
    lower(program, "dense_linear_int8", "0")
    out = written(program, tmp_path, Pt2(path="pt2"))  # reopened: its check holds
    assert json.loads((out / "program/kernels.json").read_text()) == ["effc.dense_linear_int8.default"]
    assert Params().measure(load(out), None) == Params().measure(TwoTowers(), None)
    assert "effc.kernels.ops" in json.loads((out / "manifest.json").read_text())["notes"][0]
    line = (
        "import sys, torch, effc; m = effc.load(sys.argv[1]); "
        "print(m(left=torch.ones(3, 12), right=torch.ones(3, 10)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", line, str(out)], capture_output=True, text=True)
    expected = program.model(left=torch.ones(3, 12), right=torch.ones(3, 10))
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6), done.stderr


@pytest.mark.parametrize(
    ("at", "said"), [(0, "does not begin"), (12, "another version"), (8, "other byte order"), (-70, "checksum")]
)
def test_a_flipped_bit_of_a_packed_weight_is_refused_with_the_modules_name(tmp_path, at, said):
    from effc.compiler.models.checkpoints.safetensors_header import read_safetensors_header

    out = written(made(only="up_proj"), tmp_path, hf(), checked=False)
    file = out / "compact/model.safetensors"
    header, raw = read_safetensors_header(file), bytearray(file.read_bytes())
    slot = header.slots["model.layers.1.mlp.up_proj.packed"]
    raw[header.begin + (slot.start if at >= 0 else slot.end) + at] ^= 1
    file.write_bytes(raw)
    found = refused(lambda: load(out, check="size")).diagnostics[0]
    assert found.slug == "packed-damaged" and "model.layers.1.mlp.up_proj" in found.message and said in found.message


def one(kernel: str = "sparse_linear") -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(KernelLinear.of(torch.nn.Linear(96, 48), kernel))


@pytest.mark.parametrize("kernel", sorted(KINDS))
@pytest.mark.parametrize("cut", [1, 64, 2000])
def test_a_packed_weight_that_was_cut_is_refused_when_it_is_settled(kernel, cut):
    model = one(kernel)
    model[0].packed = model[0].packed[:-cut].clone()
    found = refused(lambda: check_and_copy_packed_weights(model)).diagnostics[0]
    assert (found.slug, found.exit) == ("packed-damaged", 5) and "longer or shorter" in found.message


@pytest.mark.parametrize("kernel", ["sparse_linear", "sparse_linear_int8"])
def test_masks_that_disagree_with_the_values_are_refused_even_behind_a_right_checksum(kernel):
    model = one(kernel)
    packed = model[0].packed.clone()
    at = Header.from_buffer_copy(bytes(packed[:128].numpy())).stream_at
    packed[at : at + 4] ^= 255
    model[0].packed = sealed(packed)
    found = refused(lambda: check_and_copy_packed_weights(model)).diagnostics[0]
    assert found.slug == "packed-damaged" and "masks do not agree" in found.message and found.message.startswith("0:")


def test_a_packed_weight_of_another_kernel_or_size_is_refused():
    model = one()
    model[0].packed = one("dense_linear")[0].packed
    assert "packed for another kernel" in refused(lambda: check_and_copy_packed_weights(model)).diagnostics[0].message
    model = one()
    model[0].in_features = 95
    assert "it has 96 inputs" in refused(lambda: check_and_copy_packed_weights(model)).diagnostics[0].message
    model = one()
    model[0].out_features = 47
    assert (
        "sizes are not those of this layer"
        in refused(lambda: check_and_copy_packed_weights(model)).diagnostics[0].message
    )


def test_a_weight_changed_in_place_is_checked_again_before_it_runs():
    model, x = one(), torch.randn(2, 96)
    model(x)
    model[0].packed[200] ^= 1
    with pytest.raises(KernelError, match="checksum"):
        model(x)


def test_what_a_kernel_refuses_is_a_sentence_of_the_command_line():
    found = diagnostics_of_exception(KernelError("the packed weight can't be used: it is not a row of bytes"))[0]
    assert (found.slug, found.exit) == ("kernel-refused", 5) and "row of bytes" in found.message


def test_a_device_without_kernels_is_refused(tmp_path):
    out = written(made(only="up_proj"), tmp_path, hf(), checked=False)
    assert refused(lambda: load(out, device="cuda")).diagnostics[0].slug == "cpu-only"
