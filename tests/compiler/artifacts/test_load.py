"""A loaded artifact is an ordinary transformers model: it generates, trains, saves itself and loads again."""

import json
import os
import shutil

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.manifest import Manifest, file_sha256
from effc.compiler.artifacts.verify_child import inputs_for_config, probe_model
from effc.compiler.core.events import Warned
from effc.compiler.ir.capture.capture import capture
from effc.compiler.targets.hf import Hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from tests import tiny
from tests.compiler.artifacts.test_hf_target import changed, drop
from tests.drafts import write_artifact
from tests.recipes_in_memory import origin_of
from tests.worlds import context, refused, slug

torch.set_num_threads(1)


def artifact(folder, name="llama", change="uneven", lock=None, **config):
    """The program, and the artifact that it was written to."""
    program = changed(name, change, **config)
    ctx = context(folder, origin_of(program.model))

    def build(draft):
        Hf(path="a").emit(program, draft, ctx)
        return Manifest("hf", lock=lock or {})

    write_artifact(folder / "a", build=build)
    return program, folder / "a"


def same(one, other) -> bool:
    inputs = inputs_for_config(one.config)
    left, right = probe_model(one.eval(), inputs), probe_model(other.eval(), inputs)
    return all(torch.equal(left[name], right[name]) for name in left)


# -- what is loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["nothing", "layers", "uneven"])
def test_a_loaded_artifact_is_the_model_it_was_written_from(tmp_path, change):
    program, path = artifact(tmp_path, change=change)
    made = load(path)
    assert isinstance(made, PreTrainedModel) and type(made) is LlamaForCausalLM and not made.training
    assert same(made, program.model)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in program.model.named_parameters()}


@pytest.mark.slow
def test_infinity_in_a_config_is_read_as_transformers_writes_it(tmp_path):
    """Mamba-2 limits its time step by infinity, which is no number of JSON."""
    from effc.compiler.models.checkpoints.model_folder import origin_of_folder, read_model_config

    torch.manual_seed(0)
    source = tiny.model("mamba2")
    source.save_pretrained(tmp_path / "source")
    assert "Infinity" in (tmp_path / "source" / "config.json").read_text()
    ctx = context(tmp_path)
    ctx.origin = origin_of_folder(tmp_path / "source", "here", "auto", ctx.settings)
    program = capture(ctx.origin.load())
    drop(program, "ssm", 1)

    def build(draft):
        Hf(path="a").emit(program, draft, ctx)
        return Manifest("hf")

    write_artifact(tmp_path / "a", build=build)
    for form in ("compact", "compat"):
        made = load(tmp_path / "a" / form, kernels=False)  # sums in the same order
        assert list(made.config.time_step_limit) == [0.0, float("inf")] and same(made, program.model)
    assert config_of(read_model_config(tmp_path / "source" / "config.json", "here")).time_step_limit[1] == float("inf")


def config_of(config):
    from effc.compiler.models.checkpoints.checkpoint import config_and_model_class

    return config_and_model_class(config)[0]


def test_a_config_value_of_another_type_is_refused():
    reject = refused(lambda: config_of({"model_type": "llama", "hidden_size": "wide"}))
    assert reject.diagnostics[0].slug == "bad-config" and "hidden_size" in reject.diagnostics[0].note


@pytest.mark.slow
def test_one_form_can_be_named(tmp_path):
    program, path = artifact(tmp_path)
    assert load(path / "compat").num_parameters() == tiny.model("llama").num_parameters()
    assert load(path / "compact").num_parameters() == program.model.num_parameters()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
@pytest.mark.slow
def test_tied_weights_stay_one_tensor(tmp_path, name):
    _, path = artifact(tmp_path, name)
    made = load(path)
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight


@pytest.mark.slow
def test_another_dtype_can_be_asked_for(tmp_path):
    _, path = artifact(tmp_path)
    made = load(path, dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16 and made.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.slow
def test_weights_are_mapped_not_read(tmp_path):
    _, path = artifact(tmp_path, hidden_size=256, intermediate_size=4096, vocab_size=8192)
    size = (path / "compact" / "model.safetensors").stat().st_size
    load(path)  # what imports hold is held by now
    before = anonymous()
    made = load(path)
    assert anonymous() - before < size // 4 < sum(p.nbytes for p in made.parameters())


def anonymous() -> int:
    from effc.compiler.core.memory import anonymous_memory_bytes

    return anonymous_memory_bytes()


# -- used as any model ---------------------------------------------------------------------------------------


def trained(model, steps=3):
    """The losses of a few optimizer steps on fixed tokens."""
    ids = inputs_for_config(model.config)["ids"]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
@pytest.mark.slow
def test_a_loaded_model_trains_saves_and_loads_again(tmp_path, name):
    _, path = artifact(tmp_path, name)
    weights = path / "compact" / "model.safetensors"
    before = file_sha256(weights)
    made = load(path)
    losses = trained(made)
    assert losses[-1] < losses[0]
    made.save_pretrained(tmp_path / "healed")
    again = load(tmp_path / "healed")
    assert same(made, again) and not same(again, load(path))
    again.save_pretrained(tmp_path / "twice", max_shard_size="50KB")
    assert (tmp_path / "twice" / "model.safetensors.index.json").is_file()
    assert same(load(tmp_path / "twice"), again)
    assert file_sha256(weights) == before  # mapped privately: the artifact is as it was


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(tmp_path):
    _, path = artifact(tmp_path)
    plain, checkpointed = load(path), load(path)
    checkpointed.gradient_checkpointing_enable()
    assert trained(plain) == pytest.approx(trained(checkpointed), rel=1e-5)  # float32: recomputed sums


@pytest.mark.slow
def test_a_compat_model_that_trains_keeps_its_zeros(tmp_path):
    _, path = artifact(tmp_path)
    made = load(path / "compat")
    dead = {n: p == 0 for n, p in made.named_parameters() if n.startswith("model.layers.0.self_attn.")}
    trained(made)
    assert dead and all(mask.all() and (made.get_parameter(n) == 0).all() for n, mask in dead.items())


# -- plain transformers must not load it at random -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("saved_again", [False, True])
def test_plain_transformers_refuses_the_compact_form(tmp_path, saved_again):
    _, path = artifact(tmp_path)
    folder = path / "compact"
    if saved_again:
        load(path).save_pretrained(folder := tmp_path / "again")
    with pytest.raises(ValueError, match="effc"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(OSError, match="load-this-folder-with-effc"):
        LlamaForCausalLM.from_pretrained(folder)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_byte_edited_by_hand_is_found(tmp_path):
    _, path = artifact(tmp_path)
    weights = path / "compact" / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x01")
    assert slug(lambda: load(path)) == "artifact-edited"
    assert slug(lambda: load(path / "compact")) == "artifact-edited"
    assert load(path, check="size").num_parameters() > 0
    assert load(path / "compat").num_parameters() > 0  # the other form is as it was


@pytest.mark.slow
def test_a_cut_file_is_found_even_without_a_manifest(tmp_path):
    _, path = artifact(tmp_path)
    weights = path / "compact" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 8)
    assert slug(lambda: load(path, check="size")) == "artifact-edited"
    os.rename(path / "compact", tmp_path / "alone")
    assert slug(lambda: load(tmp_path / "alone")) == "damaged-weights"


@pytest.mark.slow
def test_a_half_written_folder_does_not_load(compact, tmp_path):
    _, path = artifact(tmp_path)
    os.rename(path / "compact", tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()  # config.json is written last
    assert slug(lambda: load(tmp_path / "half")) == "no-artifact"
    assert slug(lambda: load(tmp_path / "nowhere")) == "no-artifact"


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """A compact folder that no test changes."""
    _, path = artifact(tmp_path_factory.mktemp("compact"))
    return path / "compact"


def alone(compact, tmp_path, spoil):
    """A compact folder without its manifest whose config.json was changed by hand."""
    shutil.copytree(compact, tmp_path / "alone")
    file = tmp_path / "alone" / "config.json"
    body = json.loads(file.read_text())
    spoil(body)
    file.write_text(json.dumps(body))
    return tmp_path / "alone"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda b: b.pop("effc"), "no-effc-config"),
        (lambda b: b["effc"].update(format=99), "no-effc-config"),
        (lambda b: b["effc"].update(base=None), "no-effc-config"),
        (lambda b: b["effc"].update(dtype="list"), "no-effc-config"),
        (lambda b: b["effc"]["base"].pop("model_type"), "no-effc-config"),
        (lambda b: b["effc"]["base"].update(model_type="lama", architectures=[]), "unknown-architecture"),
        (lambda b: b["effc"]["base"].update(architectures=["Trainer"]), "unknown-architecture"),
        (lambda b: b["effc"].update(edits={"format": 1}), "refused-edits"),
        (
            lambda b: b["effc"]["edits"]["shapes"].update({"model.layers.1.mlp.up_proj.weight": [93, 64]}),
            "tensors-differ",
        ),
        (
            lambda b: b["effc"]["edits"]["shapes"].update({"model.layers.7.mlp.up_proj.weight": [93, 64]}),
            "refused-edits",
        ),
        (
            lambda b: b["effc"]["edits"]["swapped"].update({"model.norm": {"class": "os:system", "spec": {}}}),
            "refused-edits",
        ),
    ],
)
def test_a_config_edited_by_hand_is_refused(compact, tmp_path, spoil, expected):
    folder = alone(compact, tmp_path, spoil)
    assert slug(lambda: load(folder)) == expected


def test_weights_of_another_save_are_refused_with_their_shapes(compact, tmp_path):
    folder = alone(compact, tmp_path, lambda body: None)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(91, 64)
    del weights["model.norm.weight"]
    weights["model.extra"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    (found,) = refused(lambda: load(folder)).diagnostics
    assert found.slug == "tensors-differ"
    for part in ("`model.norm.weight` is missing", "`model.extra` has no place", "(91, 64) in the file and (92, 64)"):
        assert part in found.message


def test_another_target_s_artifact_is_no_model(tmp_path):
    def build(folder):
        (folder / "model.engine").write_bytes(b"x")
        return Manifest("engine")

    write_artifact(tmp_path / "a", build=build)
    assert slug(lambda: load(tmp_path / "a")) == "other-kind"


def test_older_libraries_than_those_that_wrote_it_are_told(tmp_path):
    _, path = artifact(tmp_path, change="nothing", lock={"versions": {"transformers": "5.99.0", "torch": "2.0.0"}})
    told = []
    load(path, on_event=told.append)
    (event,) = told
    assert isinstance(event, Warned) and "written with transformers 5.99.0" in event.message


# -- options -------------------------------------------------------------------------------------------------

UNFIT = [
    ("device", "tpu"),
    ("dtype", "float7"),
    ("dtype", torch.int8),
    ("check", "x"),
    ("threads", -1),
    ("threads", 0),
    ("max_sequences", -1),
    ("max_sequences", 2.5),
    ("batch_invariant", "yes"),
    ("kernels", "bogus"),
    ("mapped", "x"),
    ("signed_by", "release.key.pub"),
    ("signed_by", []),
    ("signed_by", [""]),
    ("signed_by", [3]),
    ("on_event", 3),
]


@pytest.mark.parametrize(("name", "value"), UNFIT)
def test_an_option_of_load_that_means_nothing_is_refused_before_a_file_is_read(tmp_path, name, value):
    (diagnostic,) = refused(lambda: load(tmp_path / "nowhere", **{name: value})).diagnostics
    assert (diagnostic.slug, diagnostic.exit) == ("bad-option", 2)
    assert f"`{name}=" in diagnostic.message and diagnostic.help


@pytest.mark.slow
def test_a_device_that_is_not_here_is_refused_as_such(tmp_path):
    _, path = artifact(tmp_path)
    assert slug(lambda: load(path, device="hpu")) == "device-missing"


@pytest.mark.slow
def test_a_dtype_may_be_named_by_a_text(tmp_path):
    _, path = artifact(tmp_path)
    assert load(path, dtype="auto").dtype == load(path).dtype
    assert load(path, dtype="bfloat16").dtype == torch.bfloat16
