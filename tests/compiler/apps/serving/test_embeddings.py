"""`effc serve` of an encoder: unit vectors of texts, asked by the `openai` package."""

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from effc.compiler.apps.serving import embeddings
from effc.compiler.apps.serving.application import make_openai_application
from effc.compiler.apps.serving.embeddings import EmbeddingService
from effc.compiler.apps.serving.error_response import ErrorResponse
from effc.compiler.apps.serving.served_models import ServedModels
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.cli.verbs.model_services import is_headless_encoder
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import resolve_origin
from effc.compiler.ir.capture.capture import capture
from effc.compiler.targets.native import Native
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    RobertaConfig,
    RobertaModel,
)

from tests.compiler.apps.serving.conftest import serving
from tests.drafts import write_artifact
from tests.worlds import context, tokenizer

pytestmark = pytest.mark.slow

TEXTS = ["And it came to pass", "a", "In the beginning God created the heaven and the earth"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "encoder"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=261,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
    )
    BertModel(config).save_pretrained(path)
    tokenizer(path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder) as served:
        yield served


def expected(folder, text: str) -> torch.Tensor:
    """Mean of the hidden states of one text by itself, scaled to length 1."""
    model, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = model(**words(text, return_tensors="pt")).last_hidden_state
    return torch.nn.functional.normalize(states.mean(1)[0], dim=-1)


def test_vectors_are_the_means_of_hidden_states_whatever_texts_stand_beside(server, folder):
    answer = server.client.embeddings.create(model=server.name, input=TEXTS)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    for text, entry in zip(TEXTS, answer.data, strict=True):
        assert torch.allclose(torch.tensor(entry.embedding), expected(folder, text), atol=1e-5)
    words = AutoTokenizer.from_pretrained(folder)
    assert answer.usage.prompt_tokens == sum(len(words(text)["input_ids"]) for text in TEXTS)


def test_numbers_and_base64_say_the_same(server):
    plain = server.post("/v1/embeddings", input="a", encoding_format="float").json()["data"][0]["embedding"]
    packed = server.client.embeddings.create(model=server.name, input="a").data[0].embedding
    assert torch.allclose(torch.tensor(plain), torch.tensor(packed), atol=1e-7) and len(plain) == 32


def test_tokens_are_taken_in_place_of_texts(server, folder):
    ids = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    by_ids = server.client.embeddings.create(model=server.name, input=ids).data[0].embedding
    by_text = server.client.embeddings.create(model=server.name, input="a").data[0].embedding
    assert by_ids == by_text


def compiled(folder, work):
    """A native artifact of an encoder."""
    origin = resolve_origin(str(folder), Settings(cache_dir=work / "cache"))
    program, ctx = capture(origin.load().eval()), context(work, origin)

    def build(into) -> Manifest:
        Native(path="encoder").emit(program, into, ctx)
        return Manifest("native")

    write_artifact(work / "artifact", build=build)
    return work / "artifact"


def test_the_native_engine_gives_the_same_vectors(folder, tmp_path):
    with serving(compiled(folder, tmp_path)) as served:
        for text, entry in zip(
            TEXTS, served.client.embeddings.create(model=served.name, input=TEXTS).data, strict=True
        ):
            assert torch.tensor(entry.embedding) @ expected(folder, text) > 0.999  # bfloat16 weights


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "required"),
        ({"input": []}, "neither a text"),
        ({"input": [["a"]]}, "neither a text"),
        ({"input": [1, "a"]}, "neither a text"),
        ({"input": [[]]}, "neither a text"),
        ({"input": [True]}, "neither a text"),
        ({"input": [300]}, "outside of the model's 261"),
        ({"input": [-1]}, "outside of the model's 261"),
        ({"input": "ab " * 200}, "the model reads 80 tokens"),
        ({"input": "a" * 100_000}, "100000 characters are more"),
        ({"input": ["a"] * 2049}, "at most 2048"),
        ({"input": "a", "dimensions": 8}, "have 32 dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "'base64'"),
        ({"input": "a", "colour": 1}, "`colour` is not known here"),
    ],
)
def test_inputs_that_can_not_be_embedded_are_refused_by_a_sentence(server, body, words):
    answer = server.post("/v1/embeddings", **body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_an_encoder_has_the_routes_of_its_kind_alone(server):
    assert server.client.models.list().data[0].id == server.name
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert server.metric("effc_prompt_tokens_total") >= 0
    with pytest.raises(openai.NotFoundError, match="is an encoder: send texts to /v1/embeddings"):
        server.client.chat.completions.create(model=server.name, messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        server.client.embeddings.create(model="other", input="a")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """One whose first state is the vector, as its sentence-transformers files say, and whose `</s>` is padding."""
    path = tmp_path_factory.mktemp("embeddings") / "roberta"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=261, max_position_embeddings=80, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(path)
    tokenizer(path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return path


def test_an_artifact_pools_as_the_folder_that_it_was_made_of_and_refuses_padding_inside_of_a_text(roberta, tmp_path):
    model, words = AutoModel.from_pretrained(roberta).eval(), AutoTokenizer.from_pretrained(roberta)
    with torch.no_grad():
        states = model(**words("And it came", return_tensors="pt")).last_hidden_state[0]
    first, mean = (torch.nn.functional.normalize(x, dim=-1) for x in (states[0], states.mean(0)))
    assert first @ mean < 0.99
    with serving(compiled(roberta, tmp_path)) as served:
        answer = served.client.embeddings.create(model=served.name, input="And it came")
        assert torch.tensor(answer.data[0].embedding) @ first > 0.999
        refused = served.post("/v1/embeddings", input=[[0, 5, 6], [0, 1, 2]])
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == "input" and "other positions" in error["message"]


class Waiting(torch.nn.Module):
    """An encoder that waits with long rows until it may go on."""

    def __init__(self):
        super().__init__()
        self.began, self.goes_on = threading.Event(), threading.Event()

    def forward(self, input_ids, attention_mask):
        if input_ids.shape[1] > 9:
            self.began.set()
            assert self.goes_on.wait(30)
        return {"last_hidden_state": torch.nn.functional.one_hot(input_ids, 300).float()}


def client_of(service: EmbeddingService) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_openai_application(ServedModels(service)))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)


def test_a_large_request_is_parsed_while_another_is_computed():
    encoder = Waiting()
    service = EmbeddingService("e", encoder, SimpleNamespace(pad_token_id=0), "mean", 80, 300)
    service.try_out()

    async def run():
        async with client_of(service) as client:
            rows = [[7] * 70] * 500  # above 64 KiB
            first = asyncio.create_task(client.post("/v1/embeddings", json={"model": "e", "input": rows}))
            await asyncio.to_thread(encoder.began.wait, 30)
            other = await client.post("/v1/embeddings", json={"model": "e", "input": [*rows, [300]]})
            assert other.status_code == 400 and not first.done()
            encoder.goes_on.set()
            assert len((await first).json()["data"]) == 500

    asyncio.run(asyncio.wait_for(run(), 60))


def test_texts_that_wait_are_bounded_and_none_is_computed_for_a_client_that_left(monkeypatch):
    monkeypatch.setattr(embeddings, "_CLIENT_TOKENS", 100)
    encoder = Waiting()
    service = EmbeddingService("e", encoder, SimpleNamespace(pad_token_id=0), "mean", 80, 300)
    service.try_out()

    async def run():
        async with client_of(service) as client:
            first = asyncio.create_task(client.post("/v1/embeddings", json={"model": "e", "input": [[7] * 70] * 2}))
            await asyncio.to_thread(encoder.began.wait, 30)
            refused = await client.post("/v1/embeddings", json={"model": "e", "input": [7]})
            assert refused.status_code == 429 and "140 tokens of this client wait" in refused.text
            encoder.goes_on.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/embeddings", json={"model": "e", "input": [7]})).status_code == 200

    async def leave():
        async def is_disconnected():
            return True

        call = SimpleNamespace(is_disconnected=is_disconnected, scope={"client": ("1.2.3.4", 5), "headers": []})
        with pytest.raises(ErrorResponse, match="left"):
            await service.embed_rows([[7]], call)

    asyncio.run(asyncio.wait_for(run(), 60))
    asyncio.run(leave())


def test_states_that_are_no_numbers_are_an_error_of_the_server_and_others_are_embedded():
    class Odd(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            states = input_ids[..., None].float().expand(-1, -1, 4)
            return {"last_hidden_state": states.masked_fill(input_ids[..., None] == 9, torch.nan)}

    service = EmbeddingService("e", Odd(), SimpleNamespace(pad_token_id=0), "mean", 80, 300)

    async def run():
        async with client_of(service) as client:
            odd = await client.post("/v1/embeddings", json={"model": "e", "input": [[7], [9]]})
            assert odd.status_code == 500 and odd.json()["error"]["code"] == "states_not_finite"
            assert (await client.post("/v1/embeddings", json={"model": "e", "input": [7]})).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_decoder_whose_kind_has_no_base_model_is_no_encoder():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(vocab_size=32, **sizes, **heads))
    assert model.base_model is model and not is_headless_encoder(model)
