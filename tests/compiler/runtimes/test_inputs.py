"""Calls of a model over an engine: what does not go together is refused, labels give transformers' loss."""

import pytest
import torch
import transformers
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.model import DecoderModel
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.padded import PaddedModel, PaddedRows
from effc.dsl.syntax.diagnostics import Reject
from transformers import GenerationConfig

from tests import tiny
from tests.compiler.runtimes.native import test_encoders, test_translators
from tests.compiler.runtimes.native.naive import Naive
from tests.compiler.runtimes.native.test_plans import halved

torch.set_num_threads(1)
UNFIT = [
    ("num_beams", 0),
    ("num_beams", "2"),
    ("num_return_sequences", 0),
    ("max_new_tokens", 1.5),
    ("max_length", "x"),
    ("min_new_tokens", -1),
    ("top_p", 7.0),
    ("top_p", -0.1),
    ("top_p", float("nan")),
    ("seed", "x"),
    ("seed", 2**70),
    ("seed", 1.5),
    ("seed", True),
]


class Graph:
    """A stateless graph, by torch: keys and values of all layers go in and come out."""

    def __init__(self, model):
        self.model, heads = model, model.config.num_key_value_heads
        self.past = [f"past.{number}" for number in range(2 * model.config.num_hidden_layers)]
        self.shapes = dict.fromkeys(self.past, (None, heads, None, model.config.head_dim))

    @torch.no_grad()
    def step(self, ids, mask, past=None):
        cache = transformers.DynamicCache()
        for layer, (k, v) in enumerate(zip(past[::2], past[1::2], strict=True) if past else ()):
            cache.update(torch.from_numpy(k), torch.from_numpy(v), layer)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = self.model(ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True).logits
        return [logits.numpy(), *(part.numpy() for layer in cache.layers for part in (layer.keys, layer.values))]


@pytest.fixture(scope="module")
def original():
    return halved(tiny.model("llama", max_position_embeddings=24))


@pytest.fixture(scope="module", params=["engine", "graph"])
def decoder(request, original):
    if request.param == "graph":
        sizes = {"vocabulary": original.config.vocab_size, "context": 24}
        return PaddedModel(PaddedRows(Graph(original), sizes), sizes, {}, {}, max_sequences=6).eval()
    plan = Reader(capture(original), "bf16").build_plan()
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    return DecoderModel(Naive(plan.to_json(), weights), plan.to_json(), weights, {}, max_sequences=6).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))


def refused(call, slug):
    with pytest.raises(Reject) as rejection:
        call()
    (diagnostic,) = rejection.value.diagnostics
    assert (diagnostic.slug, diagnostic.exit) == (slug, 2) and diagnostic.help
    return diagnostic.message


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (1, 9), (9,), (2, 1, 9, 9)])
def test_a_mask_of_another_shape_than_the_tokens_is_refused_with_both_shapes(decoder, ids, shape):
    mask = torch.ones(shape, dtype=torch.long)
    for call in (decoder, decoder.generate):
        message = refused(lambda call=call: call(ids, attention_mask=mask), "unfit-inputs")
        assert str(list(shape)) in message and "[2, 9]" in message
    assert decoder.num_free_sequences == 6


def test_behind_a_cache_a_mask_is_of_the_new_tokens_or_of_all(decoder, ids):
    for mask in (torch.ones(2, 4), torch.ones(2, 9)):
        cache = decoder(ids[:, :5], use_cache=True).cache
        decoder(ids[:, 5:], attention_mask=mask, cache=cache)
    message = refused(lambda: decoder(ids[:, 5:], attention_mask=torch.ones(2, 5), cache=cache), "unfit-inputs")
    assert "[2, 4] behind 9 of the cache" in message


@pytest.mark.parametrize("tokens", [[[5, 9]], torch.tensor([5, 9]), torch.tensor([[1.0, 2.0]]), "text"])
def test_tokens_that_are_no_whole_numbers_by_rows_are_refused(decoder, tokens):
    for call in (decoder, decoder.generate):
        assert "`input_ids` is " in refused(lambda call=call: call(tokens), "unfit-inputs")


@pytest.mark.parametrize(("name", "value"), UNFIT)
def test_settings_that_are_no_such_numbers_are_refused_by_name(decoder, ids, name, value):
    assert f"`{name}={value}`" in refused(lambda: decoder.generate(ids, **{name: value}), "bad-sampling")


def test_settings_of_a_config_are_checked_as_well(decoder, ids):
    config = GenerationConfig(max_new_tokens=2)
    config.num_beams = 0
    assert "`num_beams=0`" in refused(lambda: decoder.generate(ids, generation_config=config), "bad-sampling")


def test_a_token_that_the_model_does_not_have_is_refused_by_every_engine(decoder):
    for call in (decoder, decoder.generate):
        refused(lambda call=call: call(torch.tensor([[5, 9999]])), "unknown-token")


def test_what_an_engine_does_not_keep_is_refused_by_the_engine_s_name(decoder, ids):
    for call in (decoder, decoder.generate):
        arguments = {} if call is decoder else {"return_dict_in_generate": True, "max_new_tokens": 2}
        message = refused(lambda call=call, a=arguments: call(ids, output_attentions=True, **a), "no-states")
        assert f"what {decoder.engine_name} does not keep" in message
    assert PaddedModel.engine_name != DecoderModel.engine_name


def test_a_model_over_an_engine_refuses_to_save_itself_and_says_what_to_copy(decoder):
    decoder.name_or_path = "out/small/onnx"
    with pytest.raises(Reject, match="not-saved") as refusal:
        decoder.save_pretrained("elsewhere")
    assert "copy out/small" in refusal.value.diagnostics[0].help


def test_labels_give_the_loss_that_the_original_gives(decoder, original, ids):
    labels = ids.clone()
    labels[0, :3] = -100
    with torch.no_grad():
        expected = original(ids, labels=labels).loss
    output = decoder(ids, labels=labels)
    assert torch.allclose(output.loss, expected, rtol=1e-4)
    assert output.logits.shape == (2, 9, 128)


def test_labels_of_padding_do_not_count(decoder, original, ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        losses = [original(row, labels=row).loss * (row.shape[1] - 1) for row in (ids[:1], ids[1:, 4:])]
    assert torch.allclose(decoder(ids, attention_mask=mask, labels=ids).loss, sum(losses) / 12, rtol=1e-4)


def test_labels_that_do_not_fit_are_refused(decoder, ids):
    assert "[2, 9]" in refused(lambda: decoder(ids, labels=ids[:, 1:]), "unfit-inputs")
    assert "none of the 128" in refused(lambda: decoder(ids, labels=ids + 128), "unfit-inputs")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_of_a_translator_give_its_loss(tmp_path, name):
    model = test_translators.made(name)
    native = test_translators.opened(model, tmp_path)
    sources = torch.randint(4, 128, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(4, 128, (2, 5), generator=torch.Generator().manual_seed(2))
    labels[1, 3:] = -100
    with torch.no_grad():
        expected = model(input_ids=sources, labels=labels).loss
    assert torch.allclose(native(sources, labels=labels).loss, expected, rtol=0.02)  # bf16 weights
    assert native.num_free_sequences == 3


def test_labels_of_an_encoder_give_its_loss(tmp_path):
    ids = torch.randint(5, 128, (3, 8), generator=torch.Generator().manual_seed(1))
    for name, labels in (("BertForMaskedLM", ids), ("BertForSequenceClassification", torch.tensor([0, 1, 1]))):
        model = test_encoders.made(name)
        with torch.no_grad():
            expected = model(ids, labels=labels).loss
        (folder := tmp_path / name).mkdir()
        native = test_encoders.opened(model, folder)
        assert torch.allclose(native(ids, labels=labels).loss, expected, rtol=0.02)  # bf16 weights
    states = test_encoders.opened(test_encoders.made("BertModel"), tmp_path)
    assert "no head" in refused(lambda: states(ids, labels=ids), "unfit-inputs")
