"""What the target `onnx` writes: ONNX Runtime computes it, the pruned shapes are in the file, and odd files are refused."""

import json
import random
import re
import shutil

import pytest
import torch
import transformers
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.artifacts.verify_child import first_output
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.evaluation.metrics.params import Params
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.target import LoadRequest
from effc.compiler.runtimes.onnx.model import open_onnx
from effc.compiler.targets.onnx import Onnx
from effc.compiler.targets.pt2 import Pt2
from effc.dsl.syntax.diagnostics import Reject

from tests import mixers, tiny, worlds
from tests.architectures import modules
from tests.compiler.runtimes.modes import assert_generates_alike
from tests.recipes_in_memory import context_of, recipe_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
torch.set_num_threads(1)

# The middle layer loses its attention, each MLP has a width of its own.
CUT = {
    "pruned_attn_idx": [1],
    "pruned_mlp_idx": [],
    "pruned_attn_width": {"0": 64, "1": 64, "2": 32},
    "pruned_mlp_width": {"0": 96, "1": 64, "2": 80},
}
RECIPE = """effspec 1
model base = hf("./llama")
pipeline slim(base) {
  cut = prune.apply("pruning_config.json")
}
emit slim {
  onnx("slim")
}
"""


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    """An artifact of a Llama whose layers differ, compiled from a recipe: it was verified on the way."""
    folder = tmp_path_factory.mktemp("onnx")
    tiny.model("llama", vocab_size=worlds.VOCABULARY, max_position_embeddings=1024).save_pretrained(folder / "llama")
    worlds.tokenizer(folder / "llama")
    (folder / "pruning_config.json").write_text(json.dumps(CUT))
    (folder / "slim.effspec").write_text(RECIPE)
    (result,) = api.build(
        api.open_session(folder / "slim.effspec", settings=Settings(folder / "cache", threads=1)), folder
    )
    (artifact,) = result.artifacts
    return artifact


def emitted(tmp_path, model, **options):
    target, folder = Onnx(path="o", **options), tmp_path / "o"
    folder.mkdir(parents=True)
    target.emit(capture(model), folder, context_of(tmp_path, model, recipe_of([])))
    return folder, target


@pytest.mark.slow
def test_a_fresh_process_ran_32_greedy_tokens_in_onnx_runtime(slim):
    said = {check.what.partition(": ")[2]: check for check in slim.manifest.checks}
    assert len(said) == 6 and all(check.holds for check in said.values())
    assert said["greedy tokens, left-padded"].worst == 0.0
    assert "logits of prefill and 31 decode steps, left-padded" in said


def test_pruned_shapes_are_in_the_file_and_nothing_wider(slim):
    graph = onnx.load(slim.path / "onnx" / "model.onnx", load_external_data=False).graph
    shapes = sorted(tuple(t.dims) for t in graph.initializer if len(t.dims) == 2 and min(t.dims) > 1)
    widths = {shape for shape in shapes if 64 in shape} - {(64, 64), (64, 32), (32, 64)}
    assert {w for shape in widths for w in shape} >= {96, 64, 80}
    held = sum(torch.Size(t.dims).numel() for t in graph.initializer if len(t.dims) == 2)
    assert held <= json.loads(graph_facts(slim))["params"]
    past = [i.name for i in graph.input if i.name.startswith("past_key_values.")]
    assert past == [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]


def axes(value) -> list:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_axes_of_any_length_have_the_names_that_hosts_know(slim):
    graph = onnx.load(slim.path / "onnx" / "model.onnx", load_external_data=False).graph
    found = {value.name: axes(value) for value in (*graph.input, *graph.output)}
    assert found["input_ids"] == ["batch_size", "sequence_length"] == found["logits"][:2]
    assert found["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert found["past_key_values.0.key"][::2] == ["batch_size", "past_sequence_length"]
    assert found["present.0.key"][2].split(" + ") in (
        ["past_sequence_length", "sequence_length"],
        ["sequence_length", "past_sequence_length"],
    )
    unnamed = [dim.dim_param for v in graph.value_info for dim in v.type.tensor_type.shape.dim if dim.dim_param]
    assert unnamed and not any(re.search(r"\bs\d", name) for name in unnamed)


@pytest.mark.parametrize(("head", "said"), [("ForSequenceClassification", "logits"), ("Model", "last_hidden_state")])
@pytest.mark.slow
def test_what_an_encoder_says_has_the_name_that_it_has_in_transformers(tmp_path, head, said):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{head}")(transformers.BertConfig(vocab_size=64, **sizes)).eval()
    folder, _ = emitted(tmp_path, model)
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output] == [said]
    assert axes(graph.input[0]) == ["batch_size", "sequence_length"]


def graph_facts(artifact) -> str:
    model = onnx.load(artifact.path / "onnx" / "model.onnx", load_external_data=False)
    return {p.key: p.value for p in model.metadata_props}["effc"]


def test_it_runs_inspects_and_verifies_from_the_command_line(slim, capsys):
    from effc.compiler.cli.main import main

    assert main(["run", str(slim.path), "--prompt", "In the beginning", "-n", "4"]) == 0
    assert main(["inspect", str(slim.path)]) == 0
    assert "takes input_ids, attention_mask, position_ids and 4 keys and values" in capsys.readouterr().out
    assert main(["verify", str(slim.path)]) == 0


def test_rows_of_unequal_length_go_through_the_graph_together(slim):
    model = load(slim.path)
    torch.manual_seed(0)
    long, short = torch.randint(3, 200, (9,)), torch.randint(3, 200, (4,))
    ids = torch.stack([long, torch.cat([torch.zeros(5, dtype=torch.int64), short])])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    both = model.generate(ids, attention_mask=mask, max_new_tokens=6)[:, 9:]
    alone = [model.generate(row[None], max_new_tokens=6)[0, len(row) :] for row in (long, short)]
    assert torch.equal(both, torch.stack(alone))


@pytest.mark.slow
def test_every_mode_gives_what_transformers_generates(tmp_path):
    model = tiny.model("llama")
    folder, _ = emitted(tmp_path, model)
    assert_generates_alike(model, open_onnx(folder / "onnx"))


def test_what_the_graph_does_not_give_is_said_in_a_sentence(slim):
    model, ids = load(slim.path), torch.tensor([[5, 6, 7]])
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(Reject, match=f"`{name}` asks for what ONNX Runtime does not keep"):
            model(ids, **{name: True})
    plain = model(ids).logits
    assert torch.equal(model(ids, output_hidden_states=False, output_attentions=None).logits, plain)


def test_equal_weights_of_another_file_are_not_read(slim, tmp_path):
    """External weights that lie elsewhere, ops of other domains and changed bytes: refused, never opened."""
    from effc.compiler.runtimes.onnx.checking import read_checked_onnx

    def changed(change):
        shutil.rmtree(tmp_path / "onnx", ignore_errors=True)
        shutil.copytree(slim.path / "onnx", tmp_path / "onnx")
        file = tmp_path / "onnx" / "model.onnx"
        model = onnx.load(file, load_external_data=False)
        change(model)
        file.write_bytes(model.SerializeToString())
        return tmp_path / "onnx"

    def elsewhere(model):
        tensor = next(t for t in model.graph.initializer if t.data_location == t.EXTERNAL)
        next(e for e in tensor.external_data if e.key == "location").value = "/etc/passwd"

    def beyond(model):
        tensor = next(t for t in model.graph.initializer if t.data_location == t.EXTERNAL)
        next(e for e in tensor.external_data if e.key == "length").value = str(1 << 60)

    def foreign(model):
        model.graph.node[0].domain = "evil"

    for change, words in ((elsewhere, "another file"), (beyond, "outside of"), (foreign, "calls ops of evil")):
        with pytest.raises(Reject, match=words):
            read_checked_onnx(changed(change))
    file = changed(lambda model: None) / "model.onnx"
    name = onnx.load(file, load_external_data=False).graph.node[0].op_type.encode()
    file.write_bytes(file.read_bytes().replace(name, b"\xff" + name[1:]))
    with pytest.raises(Reject, match="not UTF-8"):
        read_checked_onnx(file.parent)
    honest = (slim.path / "onnx" / "model.onnx").read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        data = bytearray(honest)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "onnx" / "model.onnx").write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            read_checked_onnx(tmp_path / "onnx")
        except Reject as refused:
            assert refused.diagnostics[0].slug in ("refused-onnx", "odd-file")


def test_a_state_space_mixer_is_refused_by_name_before_passes_run(tmp_path):
    model = mixers.model("mamba2")
    with pytest.raises(Reject, match=r"backbone.layers.0.mixer. \(Mamba2Mixer\) keeps a state"):
        Onnx(path="o").foresee(context_of(tmp_path, model, recipe_of([])))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma2", "gemma3_text", "phi3", "opt", "bloom", "mixtral"])
def test_decoders_of_many_kinds_compute_the_same_in_onnx_runtime(tmp_path, name):
    model = tiny.model(name)
    folder, target = emitted(tmp_path, model)
    assert len(verify_forms(folder, model, target.forms())) == 6


def outlying(model):
    """Inputs of MLPs have one channel that is far larger than the others, which int8 by the token loses."""
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[0] *= 3000
        layer.mlp.gate_proj.weight.data[:, 0] /= 3000
        layer.mlp.up_proj.weight.data[:, 0] /= 3000
    return model


@pytest.mark.slow
def test_what_int8_loses_is_reported_and_no_fault_of_reloading(tmp_path):
    model = outlying(tiny.model("llama"))
    folder, target = emitted(tmp_path, model, dynamic="int8")
    heard = []
    text = torch.arange(3, 67).reshape(2, 32)
    checks = verify_forms(folder, model, target.forms(), text_ids=text, on_text_logits=lambda _, x: heard.append(x))
    assert all(check.worst <= check.tolerance < 1e-3 for check in checks if "logits" in check.what)
    assert "int8 itself is off by " in checks[0].reason
    logits = model(text).logits
    assert (heard[0] - logits).square().mean() > (0.4 * logits).square().mean()  # more than what was refused before
    size = sum(p.nbytes for p in model.parameters())
    assert (folder / "onnx" / "model.onnx.data").stat().st_size < 0.4 * size


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_refused_before_it_is_rounded_to_int8(tmp_path):
    model = tiny.model("llama")
    program = capture(model)
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, out: out if torch.compiler.is_exporting() else 2 * out
    )
    (tmp_path / "o").mkdir()
    with pytest.raises(Reject, match="reload-differs"):
        Onnx(path="o", dynamic="int8").emit(program, tmp_path / "o", context_of(tmp_path, model, recipe_of([])))


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("Roberta", marks=pytest.mark.heavy), "Luke"])
def test_positions_behind_the_one_of_padding_are_counted_by_the_graph(tmp_path, name):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    more = {"entity_vocab_size": 8, "entity_emb_size": 8} if name == "Luke" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, max_position_embeddings=40, pad_token_id=1, **sizes, **more
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for target in (Onnx(path="o"), Pt2(path="p")):
        folder = tmp_path / target.path
        folder.mkdir()
        target.emit(capture(model), folder, context_of(tmp_path, model, recipe_of([])))
        opened, _ = type(target).open(folder / next(iter(target.forms())).folder, LoadRequest())
        ids = torch.tensor([[5, 9, 7, 3, 11], [8, 6, 1, 1, 1]])  # 1 is padding
        mask = (ids != 1).long()
        theirs = model(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = first_output(opened(input_ids=ids, attention_mask=mask))
        assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5), target.path
        ours = first_output(opened(input_ids=ids[:, :4]))
        assert torch.allclose(ours, model(input_ids=ids[:, :4]).last_hidden_state, atol=1e-5), target.path


@pytest.mark.heavy
def test_encoders_vision_models_and_plain_modules_are_written_as_they_are(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    for number, model in enumerate(
        (
            BertForMaskedLM(BertConfig(vocab_size=64, **sizes)),
            ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)),
            modules.TwoTowers(),
        )
    ):
        folder, target = emitted(tmp_path / str(number), model.eval())
        assert verify_forms(folder, model, target.forms())
        opened, _ = type(target).open(folder / "onnx", LoadRequest())
        assert Params().measure(opened, None) == sum(p.numel() for p in model.parameters())


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_weights_beyond_two_gigabytes_are_written_and_run(tmp_path):
    sizes = {"hidden_size": 4096, "intermediate_size": 18944, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    model = tiny.blank("llama", **sizes, **heads)
    folder, target = emitted(tmp_path, model)
    assert (folder / "onnx" / "model.onnx.data").stat().st_size > 1 << 31
    checks = verify_forms(folder, model, target.forms())
    assert len(checks) == 6 and all(check.holds for check in checks)
