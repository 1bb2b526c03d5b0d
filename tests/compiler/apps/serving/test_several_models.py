"""`effc serve` with several models in one process."""

import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from effc.compiler.apps.serving.error_response import ErrorResponse
from effc.compiler.apps.serving.fair_lock import FairLock
from effc.compiler.apps.serving.stream import require_model_name
from effc.compiler.cli.verbs.model_sources import ModelSource, parse_model_arguments
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.serving.conftest import EFFC, serving
from tests.compiler.apps.serving.test_embeddings import folder  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(artifact, folder):  # noqa: F811
    with serving(artifact, "plain=zoo:tiny-llama", f"words={folder}") as served:
        yield served


def complete(server, model: str, prompt: str = "And it came to pass") -> str:
    answer = server.client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def test_each_model_is_listed_and_answers_as_it_does_alone(server, artifact):
    assert server.name == "served, plain, words"
    assert [model.id for model in server.client.models.list()] == ["served", "plain", "words"]
    with serving(artifact) as alone:
        text = alone.complete().choices[0].text
    assert complete(server, "served") == complete(server, "plain") == text
    assert server.client.models.retrieve("plain").id == "plain"


def test_an_unknown_model_is_404_with_the_names_of_those_that_exist(server):
    with pytest.raises(openai.NotFoundError) as refusal:
        complete(server, "other")
    assert refusal.value.code == "model_not_found"
    assert "`other` does not exist, `served` and `plain` and `words` do" in refusal.value.message
    with pytest.raises(ErrorResponse) as many:
        require_model_name("other", *map(str, range(10)))
    assert str(many.value).endswith("`7` and 2 more do")


def test_an_encoder_beside_decoders_embeds_and_each_has_its_endpoint(server):
    client = server.client
    vector = client.embeddings.create(model="words", input="a text").data[0].embedding
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)  # float32
    with pytest.raises(openai.NotFoundError, match="`words` is an encoder: send texts to /v1/embeddings"):
        complete(server, "words")
    with pytest.raises(openai.NotFoundError, match="`plain` continues texts"):
        client.embeddings.create(model="plain", input="a text")


def test_answers_of_models_at_once_are_those_of_each_alone(server):
    prompts = [f"And the {word} of the" for word in ("king", "house", "city", "people")]
    pairs = [(model, prompt) for prompt in prompts for model in ("served", "plain")]
    alone = [complete(server, *pair) for pair in pairs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: complete(server, *pair), pairs)) == alone


def test_metrics_are_of_each_model(server):
    before = {model: server.metric("effc_generated_tokens_total", model=model) for model in ("served", "plain")}
    complete(server, "plain")
    after = {model: server.metric("effc_generated_tokens_total", model=model) for model in ("served", "plain")}
    assert after == {"served": before["served"], "plain": before["plain"] + 12}
    assert server.metric("effc_requests_running", model="plain") == 0


def test_a_full_queue_of_one_model_refuses_nothing_of_another():
    flags = ("--parallel", "1", "--queue", "0")
    with serving("a=zoo:tiny-llama", "b=zoo:tiny-llama", *flags) as server:
        stream = server.client.completions.create(model="a", prompt="And", max_tokens=400, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            complete(server, "a")
        assert complete(server, "b")
        stream.close()


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (["zoo:tiny-llama", "zoo:tiny-llama"], {}, "two models are called `tiny-llama`"),
        (["zoo:tiny-llama", "zoo:tiny-mamba2"], {"name": "one"}, "is one name for 2 models"),
        (["zoo:tiny-llama", "b=nowhere"], {}, "there is no `nowhere`"),
        (["=zoo:tiny-llama"], {}, "there is no `=zoo:tiny-llama`"),
        (["zoo:tiny-llama", "b="], {}, "there is no `b=`"),
        (["a=zoo:tiny-llama", "b=zoo:tiny-llama"], {"adapters": ["c=out"]}, "names none of the 2 models"),
        (
            ["a=zoo:tiny-llama", "a:law=zoo:tiny-llama"],
            {"adapters": ["a:law=out"]},
            "a model and an adapter are called `a:law`",
        ),
    ],
)
def test_models_that_no_request_could_tell_apart_are_refused(arguments, options, reason):
    with pytest.raises(Reject, match=reason):
        parse_model_arguments(arguments, **options)


def test_an_adapter_goes_to_the_model_that_it_names():
    sources = parse_model_arguments(
        ["a=zoo:tiny-llama", "zoo:tiny-mamba2"], adapters=["a:law=x", "tiny-mamba2:law=y", "a:b=z"]
    )
    assert sources == [
        ModelSource("a", "zoo:tiny-llama", ["law=x", "b=z"]),
        ModelSource("tiny-mamba2", "zoo:tiny-mamba2", ["law=y"]),
    ]
    assert parse_model_arguments(["zoo:tiny-llama"], "n", ["law=x"])[0].adapters == ["law=x"]
    nested = parse_model_arguments(["a=zoo:tiny-llama", "a:b=zoo:tiny-llama"], adapters=["a:b:x=out", "a:y=out"])
    assert [source.adapters for source in nested] == [["y=out"], ["x=out"]]


def test_a_folder_whose_name_has_an_equals_sign_is_a_place(tmp_path):
    path = tmp_path / "a=b"
    path.mkdir()
    assert parse_model_arguments([str(path)]) == [ModelSource("a=b", str(path), [])]


def test_two_models_of_one_name_end_the_command_with_a_sentence():
    command = [*EFFC, "serve", "zoo:tiny-llama", "zoo:tiny-llama", "--port", "0", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and json.loads(done.stdout)["diagnostics"][0]["slug"] == "model-names"


def test_threads_get_the_lock_in_the_order_of_their_requests():
    lock, order, started = FairLock(), [], threading.Event()

    def compute(name: str) -> None:
        with lock:
            order.append(name)
            started.set()
            time.sleep(0.02)

    threads = []
    for name in "abcab":
        threads.append(threading.Thread(target=compute, args=(name,)))
        threads[-1].start()
        started.wait(10)
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert order == list("abcab")


def test_health_says_that_all_models_answer(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
