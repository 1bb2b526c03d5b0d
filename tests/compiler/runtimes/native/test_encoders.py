"""Encoders on the engine: every token sees its whole text; states, or the class of a text or of its tokens."""

import effc
import pytest
import torch
import transformers
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.emission import native_artifact_facts
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.plan_files import write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject

from tests.grids import wide

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 70,
}
DISTILLED = {"vocab_size": 128, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
MODERN = {"local_attention": 8, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 128, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
MODELS = {
    "BertModel": SIZES,
    "BertForMaskedLM": SIZES,
    "BertForTokenClassification": SIZES,
    "BertForSequenceClassification": SIZES,
    "RobertaModel": SIZES,
    "RobertaForSequenceClassification": SIZES,
    "XLMRobertaModel": SIZES,
    "CamembertModel": SIZES,
    "ElectraModel": {**SIZES, "embedding_size": 24},
    "DistilBertModel": DISTILLED,
    "DistilBertForSequenceClassification": DISTILLED,
    "ModernBertModel": {**SIZES, **MODERN, "cls_token_id": 1, "sep_token_id": 2},
    "T5EncoderModel": T5,
    "LlamaModel": {**SIZES, "num_key_value_heads": 2},
}
STAND = ("BertModel", "BertForSequenceClassification", "ModernBertModel", "LlamaModel")


def made(name):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**MODELS[name])).eval()


@pytest.fixture(params=wide(MODELS, STAND))
def pair(request, tmp_path):
    model = made(request.param)
    return model, opened(model, tmp_path)


def opened(model, folder, weights="bf16"):
    plan = Reader(capture(model), weights).build_plan()
    write_plan(plan, folder, native_artifact_facts(model, weights, plan.output))
    return open_native(folder, threads=1, max_sequences=2)


def test_texts_of_any_length_give_what_torch_gives_each_alone(pair):
    model, native = pair
    ids = torch.randint(5, 128, (5, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 31:], mask[2, 1:], mask[4, 7:] = 0, 0, 0
    name, found = next(iter(native(ids, mask).items()))
    assert name == ("last_hidden_state" if model.base_model is model else "logits")
    with torch.no_grad():
        for row, seen, own in zip(ids, mask.bool(), found, strict=True):
            wanted = model(input_ids=row[seen][None])[0][0]
            own = own if wanted.dim() == 1 else own[seen]
            assert float((own - wanted).norm()) <= 0.02 * float(wanted.norm())


def test_what_lies_behind_a_text_is_zero_and_two_texts_in_a_row_are_refused(tmp_path):
    native = opened(made("BertModel"), tmp_path)
    ids = torch.randint(5, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    assert not native(ids, mask).last_hidden_state[1, 4:].any()
    with pytest.raises(Reject, match="two texts"):
        native(ids, mask, token_type_ids=mask)
    with pytest.raises(Reject, match="generates none"):
        native.generate(ids)


def test_a_text_has_positions_of_its_own_and_no_others(tmp_path):
    model = made("RobertaModel")
    native = opened(model, tmp_path)
    ids = torch.randint(5, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.raises(Reject, match="other positions"):
        native(ids, mask)
    own = (mask.cumsum(-1) - 1).clamp(min=0) + native.first_position
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=own)[0][1, 3:]
    found = native(ids, mask, position_ids=own).last_hidden_state[1, 3:]
    assert float((found - wanted).norm()) <= 0.02 * float(wanted.norm())
    with pytest.raises(Reject, match="other positions"):
        native(ids, mask, position_ids=own + 1)
    ids[0, 4:] = model.config.pad_token_id
    with pytest.raises(Reject, match="nothing says where"):
        native(ids)


def test_where_distance_counts_a_text_may_begin_anywhere_but_has_no_holes(tmp_path):
    model = made("LlamaModel")
    native = opened(model, tmp_path)
    ids = torch.randint(5, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask)[0][1, 3:]
    found = native(ids, mask).last_hidden_state[1, 3:]
    assert float((found - wanted).norm()) <= 0.02 * float(wanted.norm())
    mask[1, 5] = 0
    with pytest.raises(Reject, match="other positions"):
        native(ids, mask)


@pytest.mark.parametrize("name", wide(["BertForSequenceClassification", "DistilBertModel"], {"DistilBertModel"}))
@pytest.mark.slow
def test_an_encoder_is_compiled_and_computes_the_same_in_a_fresh_process(name, tmp_path):
    made(name).save_pretrained(tmp_path / "model")
    recipe = tmp_path / "r.effspec"
    recipe.write_text(
        f'effspec 1\nmodel base = hf("{tmp_path / "model"}")\npipeline same(base) {{ }}\n'
        'emit same {\n  native("cpu")\n}\n'
    )
    (result,) = effc.compile(str(recipe), out=tmp_path / "out", cache_dir=tmp_path / "cache")
    assert {check.what.partition(": ")[2] for check in result.artifacts[0].manifest.checks} == {
        "logits of a batch",
        "logits of a right-padded batch",
    }


def test_a_text_that_is_too_long_for_the_model_is_refused(tmp_path):
    native = opened(made("BertModel"), tmp_path)
    with pytest.raises(Reject, match="longer than the model's context of 70"):
        native(torch.full((1, 71), 7))


def test_a_number_a_token_is_no_row_of_states():
    kind = transformers.BertForQuestionAnswering
    with pytest.raises(Reject, match="not one row of numbers"):
        Reader(capture(kind(kind.config_class(**SIZES)).eval()), "bf16").build_plan()


def test_what_the_engine_does_not_keep_is_said_in_a_sentence(tmp_path):
    native, ids = opened(made("BertModel"), tmp_path), torch.tensor([[5, 6, 7]])
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(Reject, match=f"`{name}` asks for what the native engine does not keep"):
            native(ids, **{name: True})
    found = native(ids, output_hidden_states=False, output_attentions=None)
    assert not hasattr(found, "pooler_output") and found.last_hidden_state.shape == (1, 3, 48)
    with pytest.raises(AttributeError, match="gives `last_hidden_state`, and no `pooler_output`"):
        print(found.pooler_output)


def test_a_table_of_distances_added_to_scores_that_are_written_out_is_refused_by_name():
    model = transformers.MPNetModel(transformers.MPNetConfig(**SIZES)).eval()
    with pytest.raises(Reject, match="attention that the engine does not have"):
        Reader(capture(model), "bf16").build_plan()


@pytest.mark.parametrize("kind", ["RobertaForTokenClassification", "RobertaForCausalLM"])
@pytest.mark.slow
def test_models_that_count_behind_padding_are_compiled_and_hold_in_a_fresh_process(kind, tmp_path):
    """What a compile does beside: positions of its own process, rows that it draws, accounts and times."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES, is_decoder=kind.endswith("LM"))
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "m")
    recipe = 'effspec 1\nmodel base = hf("./m")\npipeline lean(base) {}\nemit lean { native("cpu") }\n'
    (tmp_path / "r.effspec").write_text(recipe)
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    (artifact,) = result.artifacts
    assert artifact.manifest.checks and all(check.holds for check in artifact.manifest.checks)
