"""Encoders with a decoder as ONNX: three graphs as hosts name them, batches that are filled up, odd folders."""

import shutil

import pytest
import torch
import transformers
from effc.compiler.artifacts.load import load
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.runtimes.onnx.model import open_onnx
from effc.compiler.runtimes.onnx.seq2seq_export import refuse_unsupported_encoder_decoder
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.runtimes.native.test_translators import BART, GREEDY, assert_near, made, sources

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
NEW = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # 2.9 is known to take a batch for a constant
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NEW, reason="torch's exporter before 2.13 may refuse decoders beside an encoder"),
]
GRAPHS = ("encoder_model", "decoder_model", "decoder_with_past_model")
RECIPE = """effspec 1
model base = hf("./base")
data rows = synthetic(2, length: 16)
pipeline thin(base) {
  cut = prune.multi(remove: 10% of params, score: perplexity(rows))
}
emit thin {
  hf("thin")
  onnx("runtime")
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A pruned T5 as ONNX and for transformers; a fresh process compared it on the way."""
    folder = tmp_path_factory.mktemp("onnx")
    made("t5", num_layers=1).save_pretrained(folder / "base")
    (folder / "r.effspec").write_text(RECIPE)
    (result,) = api.build(
        api.open_session(folder / "r.effspec", settings=Settings(folder / "cache", threads=1)), folder
    )
    return {artifact.path.name: artifact for artifact in result.artifacts}


def test_a_fresh_process_said_32_greedy_tokens_in_onnx_runtime(compiled):
    checks = {c.what.partition(": ")[2]: c for c in compiled["runtime"].manifest.checks}
    assert checks.keys() >= {"greedy tokens", "logits of a right-padded batch", "greedy tokens, right-padded"}
    assert all(check.holds for check in checks.values())
    folder = compiled["runtime"].path / "onnx"
    assert {f"{name}.onnx" for name in GRAPHS} == {file.name for file in folder.glob("*.onnx")}


def test_hosts_that_know_the_names_decode_batches_that_are_filled_up_as_transformers_does(compiled):
    """By the names of optimum's ORTModelForSeq2SeqLM: its inputs, its outputs, and what it keeps of them."""
    folder, model = compiled["runtime"].path / "onnx", load(compiled["thin"].path)
    encoder, first, further = (runtime.InferenceSession(folder / f"{name}.onnx") for name in GRAPHS)
    assert [i.name for i in encoder.get_inputs()] == ["input_ids", "attention_mask"]
    assert [o.name for o in encoder.get_outputs()] == ["last_hidden_state"]
    names = [f"{n}.{side}.{part}" for n in range(1) for side in ("decoder", "encoder") for part in ("key", "value")]
    assert [o.name for o in first.get_outputs()] == ["logits", *(f"present.{name}" for name in names)]
    ids, mask = sources(9)
    (states,) = encoder.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    said = torch.zeros(3, 1, dtype=torch.int64)
    given = {"input_ids": said.numpy(), "encoder_attention_mask": mask.numpy(), "encoder_hidden_states": states}
    logits, *kept = first.run(None, given)
    past = dict(zip((f"past_key_values.{name}" for name in names), kept, strict=True))
    found = [torch.from_numpy(logits)]
    for _ in range(6):
        token = found[-1][:, -1:].argmax(-1)
        given = {"input_ids": token.numpy(), "encoder_attention_mask": mask.numpy(), **past}
        out = dict(zip([o.name for o in further.get_outputs()], further.run(None, given), strict=True))
        found.append(torch.from_numpy(out.pop("logits")))
        past |= {name.replace("present.", "past_key_values."): x for name, x in out.items()}
    with torch.no_grad():
        wanted = model.generate(ids, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, **GREEDY)
    assert_near(torch.cat(found, 1), torch.stack(wanted.logits, 1), 1e-4)


def test_what_is_loaded_says_what_transformers_says(compiled):
    model, own = load(compiled["thin"].path), load(compiled["runtime"].path)
    ids, mask = sources(9)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    assert_near(own(ids, mask, decoder_input_ids=ids).logits, wanted, 1e-4)
    asked = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": 1}
    assert torch.equal(
        own.generate(ids, attention_mask=mask, **asked), model.generate(ids, attention_mask=mask, **asked)
    )


def test_each_side_of_a_translator_may_have_words_of_its_own(tmp_path):
    """More than a source has that a target can't say; random rows, samples and probes have only what both know."""
    made("marian, two vocabularies", encoder_layers=1).save_pretrained(tmp_path / "base")
    (tmp_path / "r.effspec").write_text(RECIPE)
    (result,) = api.build(
        api.open_session(tmp_path / "r.effspec", settings=Settings(tmp_path / "cache", threads=1)), tmp_path
    )
    thin, own = (load(artifact.path) for artifact in result.artifacts)
    assert (thin.config.vocab_size, thin.config.decoder_vocab_size) == (128, 90)
    ids, mask = (x[:2] for x in sources(9))  # transformers numbers what a third is filled up with before its text
    target = ids % 90
    with torch.no_grad():
        wanted = thin(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    assert wanted.shape[2] == 90
    assert_near(own(ids, mask, decoder_input_ids=target).logits, wanted, 1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "decoder_model.onnx").unlink(), "decoder_model.onnx can't be read"),
        (lambda folder: (folder / "decoder_model.onnx.data").unlink(), "outside of decoder_model.onnx.data"),
        (
            lambda folder: shutil.copy(folder / "encoder_model.onnx", folder / "decoder_with_past_model.onnx"),
            "in another file than decoder_with_past_model.onnx.data",
        ),
    ],
)
def test_graphs_that_do_not_belong_together_are_refused(compiled, change, said, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(compiled["runtime"].path / "onnx", folder)
    change(folder)
    with pytest.raises(Reject, match=said):
        open_onnx(folder)


def test_a_decoder_without_a_head_and_one_that_hears_otherwise_are_refused_by_name():
    with pytest.raises(Reject, match="has no head of logits"):
        refuse_unsupported_encoder_decoder(transformers.BartModel(transformers.BartConfig(**BART)))
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    sizes |= {"input_feat_per_channel": 8, "pad_token_id": 0}  # frames that a mask shows some of
    with pytest.raises(Reject, match="takes `input_features`"):
        refuse_unsupported_encoder_decoder(
            transformers.Speech2TextForConditionalGeneration(transformers.Speech2TextConfig(**sizes))
        )
