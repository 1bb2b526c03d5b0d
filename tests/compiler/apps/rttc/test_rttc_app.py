"""A folder of the target `rttc`, compiled from a recipe, run and served in both roles."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import effc as package
import httpx
import pytest
from effc.compiler.apps.rttc.app import read_app
from effc.compiler.apps.rttc.app_folder import NAME
from effc.compiler.apps.rttc.knowledge import open_knowledge_base
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.retrieval import RemoteRetriever, Unreachable
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny, worlds
from tests.compiler.apps.rttc.conftest import QUESTIONS, copied, write_samples
from tests.compiler.apps.serving.conftest import serving
from tests.compiler.cli.verbs.conftest import effc, own_cache, process  # noqa: F401

pytestmark = pytest.mark.slow

RECIPE = """\
effspec 1
\"\"\"A client and a server of test-time compute.\"\"\"

model base = hf("./model")

pipeline small(base) {{
  slim = prune.channels(keep: 50% of channels, align: 8)
}}

emit small {{
  rttc("app", knowledge: "kb.jsonl", {more})
}}
"""
CALIBRATED = 'dev: "dev.jsonl", evict: lru, states: 32MiB, length: 4, count: 4, shown: 2, lr: 0.005, batch: 2, learn: answers, seconds: 30, force: true'


def recipe(folder, more):
    worlds.tokenizer(folder / "model", start=False)
    worlds.llama(folder / "model", max_position_embeddings=320)
    write_samples(folder / "kb.jsonl")
    write_samples(folder / "dev.jsonl", QUESTIONS[:3])
    (folder / "r.effspec").write_text(RECIPE.format(more=more))
    return folder / "r.effspec"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rttc-app")
    package.compile(recipe(folder, CALIBRATED), folder / "out", cache_dir=folder / "cache", threads=1)
    return folder / "out" / "app"


@pytest.fixture(scope="module")
def training(app, tmp_path_factory):
    """One that trains for each query, unless the same was asked."""
    folder = tmp_path_factory.mktemp("rttc-training") / "guide"
    return copied(app, folder, policy=Policy("ttt", count=4, shown=2), near={"lists": 0.9999, "states": 0.9999})


@pytest.fixture(scope="module")
def client(training, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("rttc-cache"))
    with serving(training, "--queue", "16", "--cache-dir", cache) as served:
        yield served


@pytest.fixture(scope="module")
def library(app):
    with serving(app, "--role", "server", "--api-key", "a-key-of-the-library") as served:
        yield served


def test_a_calibrated_folder_holds_thresholds_a_base_and_what_the_dev_set_showed(app):
    own, shown = read_app(app), json.loads((app / "calibration.json").read_bytes())
    assert own.engine == "adapted" and (app / "native" / "plan.json").is_file()
    assert (own.regime.batch, own.regime.answers, own.regime.seconds) == (2, True, 30.0)
    card = (app / "README.md").read_text()
    usual = (app / "manifest.json").stat().st_mode & 0o444  # by the umask
    assert {file.stat().st_mode & 0o444 for file in app.rglob("*") if file.is_file()} == {usual}
    for said in (
        "effc run . --prompt",
        "effc serve .`",
        "--role server",
        "--knowledge http://HOST:9000",
        "calibration.txt",
    ):
        assert said in card
    assert own.evict == "lru" and own.bytes == {"lists": 64 << 20, "states": 32 << 20}
    assert own.policy.kind == "sequential" and own.near["lists"] <= own.near["states"] < 1
    assert len(shown["trials"]) == 3 and {"direct", "rag", "ttt", "all"} == set(shown["auc"])
    assert any(point["direct"] == own.policy.direct and point["rag"] == own.policy.rag for point in shown["curve"])
    asked = {json.loads(line)["question"] for line in (app / "knowledge" / "samples.jsonl").read_text().splitlines()}
    assert asked == set(QUESTIONS[3:])  # the dev questions are not in the base
    assert "Of the samples 3 ask a dev question" in (app / "README.md").read_text()
    assert "policy sequential" in (app / "calibration.svg").read_text()
    assert "policy sequential, held out: accuracy" in (app / "calibration.txt").read_text()
    assert (shown["chosen"]["direct"], shown["chosen"]["rag"]) == (own.policy.direct, own.policy.rag)
    assert package.load(app).config.model_type == "llama"  # and it is a model like any other


@pytest.fixture
def unspoken(tmp_path, monkeypatch):
    """A recipe over a model that the engine has no step for."""
    monkeypatch.chdir(tmp_path)
    worlds.tokenizer(tmp_path / "model", start=False)
    tiny.model("llama", vocab_size=worlds.VOCABULARY, hidden_act="mish").save_pretrained(tmp_path / "model")
    write_samples(tmp_path / "kb.jsonl")
    text = RECIPE.format(more="policy: rag, adapt: none, generation: native")
    return text.replace("  slim = prune.channels(keep: 50% of channels, align: 8)\n", "")


def test_a_model_that_the_engine_does_not_run_is_refused_by_name_where_it_was_to_answer(effc, tmp_path, unspoken):  # noqa: F811
    (tmp_path / "r.effspec").write_text(unspoken)
    run = effc("compile", "r.effspec", "-o", "out")
    assert run.code == 5 and "error[cannot-run-natively]" in run.err


@pytest.mark.heavy
def test_a_model_that_the_engine_does_not_run_is_answered_by_pytorch_unless_told_otherwise(effc, tmp_path, unspoken):  # noqa: F811
    (tmp_path / "r.effspec").write_text(unspoken.replace("generation: native", "generation: auto"))
    package.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    app = tmp_path / "out" / "app"
    assert read_app(app).engine == "torch" and not (app / "native").exists()
    assert "PyTorch answers, not the native engine" in (app / "README.md").read_text()
    run = effc("run", str(app), "--prompt", QUESTIONS[5], "-n", "4", "--format", "json")
    assert run.code == 0 and json.loads(run.out)["decision"]["branch"] == "rag"


@pytest.mark.heavy
def test_a_router_and_adapters_by_reft_are_compiled_and_run(effc, tmp_path):  # noqa: F811
    file = recipe(tmp_path, f"{CALIBRATED}, policy: router, adapt: reft, rank: 4")
    package.compile(file, tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    app = tmp_path / "out" / "app"
    assert {"router", "all"} <= set(json.loads((app / "calibration.json").read_bytes())["auc"])
    run = effc("run", str(app), "--prompt", QUESTIONS[5], "-n", "4", "--format", "json")
    assert run.code == 0 and json.loads(run.out)["decision"]["seconds"]["route"] > 0
    assert read_app(app).regime.kind == "reft"


def test_run_answers_and_explains(effc, training):  # noqa: F811
    asked = ("run", str(training), "--prompt", QUESTIONS[5], "-n", "6")
    first, second = effc(*asked, "--explain"), effc(*asked, "--format", "json")
    assert first.code == 0 and "answered after a training on samples; 4 samples retrieved; 4 steps" in first.err
    found = json.loads(second.out)
    assert found["decision"]["adapter_hit"] and found["decision"]["steps"] == 0
    assert found["text"] == first.out.rstrip("\n")


def test_the_openai_package_is_answered_whole_and_as_a_stream_with_the_decision_beside(client):
    asked = {
        "model": client.name,
        "messages": [{"role": "user", "content": QUESTIONS[5]}],
        "max_tokens": 8,
        "temperature": 0,
    }
    chat = client.client.chat.completions
    raw = chat.with_raw_response.create(**asked)
    whole = raw.parse()
    assert raw.headers["x-effc-branch"] == "ttt" == whole.effc["branch"] and whole.effc["samples"] == 4
    chunks = list(chat.create(**asked, stream=True, stream_options={"include_usage": True}))
    told = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert told == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    last = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    assert last.effc["adapter_hit"] and last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert client.complete(QUESTIONS[5], max_tokens=8).choices[0].text
    assert [m.id for m in client.client.models.list().data] == [client.name]


def test_queries_at_once_get_what_each_gets_alone(client):
    def ask(question):
        return client.complete(question, max_tokens=6).choices[0].text

    questions = QUESTIONS[6:14]
    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, questions[::-1])) == alone[::-1]
    with ThreadPoolExecutor(8) as pool:  # those that nobody asked before train side by side
        together = list(pool.map(ask, QUESTIONS[14:20]))
    assert together == [ask(question) for question in QUESTIONS[14:20]]
    assert client.metric("effc_queries_total", branch="ttt") >= 20


def test_what_is_wrong_is_refused_in_openais_form_and_the_log_has_no_word_of_a_query(client):
    url, secret = f"{client.url}/v1/chat/completions", "xyzzy"
    message = [{"role": "user", "content": secret}]
    for body, status, words in (
        ({"model": "other", "messages": message}, 404, "does not exist"),
        ({"model": client.name, "messages": message, "logprobs": True}, 400, "`logprobs` is not supported"),
        ({"model": client.name, "messages": [{"role": "user", "content": secret * 90}]}, 400, "the model takes"),
        ({"model": client.name, "messages": [{"role": "user", "content": secret * 9000}]}, 400, "text is longer"),
        ({"model": client.name}, 400, "required"),
    ):
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert httpx.post(url, content=b"\xff", headers={"content-type": "application/json"}).status_code == 400
    assert secret not in client.said() and QUESTIONS[5] not in client.said()


def test_the_server_gives_samples_for_vectors_to_those_with_a_key(library, app):
    remote = RemoteRetriever(library.url, "a-key-of-the-library")
    facts = remote.facts()
    base = open_knowledge_base(app / "knowledge")
    assert facts.version == base.version and facts.samples == len(base.samples)
    found = remote.retrieve(base.vectors[3], 4)
    wanted = base.search(base.vectors[3], 4)
    assert [m.sample for m in found.matches] == [m.sample for m in wanted] and found.bytes > 0
    assert [m.score for m in found.matches] == pytest.approx([m.score for m in wanted], abs=1e-4)
    with pytest.raises(Unreachable, match="status 401"):
        RemoteRetriever(library.url, "another-key-of-nobody").facts()
    with pytest.raises(Unreachable, match="does not answer"):
        RemoteRetriever("http://127.0.0.1:9", seconds=2).facts()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"vector": [1.0, 2.0]}, "it is of another embedder"),
        ({"vector": []}, "at least 1"),
        ({"vector": [1e300] * 32}, "too large"),
        ({"vector": [3e38, -3e38] * 16}, "has the length 1.7e+39, not 1"),
        ({"vector": [0.0] * 32}, "has the length 0, not 1"),
        ({"vector": ["a"]}, "number"),
        ({"vector": [1.0] * 32, "count": 0}, "count"),
        ({"vector": [1.0] * 32, "count": 1000}, "count"),
        ({"vector": [1.0] * 32, "text": "a"}, "not known here"),
    ],
)
def test_the_server_refuses_vectors_of_another_embedder_and_what_is_none(library, body, words):
    answer = httpx.post(
        f"{library.url}/v1/retrieve", json=body, headers={"authorization": "Bearer a-key-of-the-library"}
    )
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_client_asks_for_its_key_bounds_bodies_and_rates_and_hides_what_was_asked(training, tmp_path):
    flags = ("--api-key", "a-key-of-the-client", "--max-body", "4KiB", "--rate", "8", "--cache-dir", str(tmp_path))
    with serving(training, *flags) as client:
        url, key = f"{client.url}/v1/chat/completions", {"authorization": "Bearer a-key-of-the-client"}
        body = {"model": client.name, "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 2}
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        assert httpx.post(url, json={**body, "user": "x" * 5000}, headers=key, timeout=60).status_code == 413
        assert (
            httpx.post(url, content=b"{", headers={**key, "content-type": "application/json"}, timeout=60).status_code
            == 400
        )
        answer = httpx.post(url, json=body, headers=key, timeout=60)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        assert httpx.get(f"{client.url}/health", timeout=60).status_code == 200


def test_an_engines_folder_that_was_cut_is_not_run(effc, app, tmp_path):  # noqa: F811
    folder = tmp_path / "cut"
    shutil.copytree(app, folder)
    whole = (folder / "native" / "weights.bin").read_bytes()
    (folder / "native" / "weights.bin").write_bytes(whole[: len(whole) // 2])
    run = effc("run", str(folder), "--prompt", "a")
    assert run.code == 5 and "weights.bin" in run.err


@pytest.mark.slow
def test_a_client_asks_the_server_and_answers_directly_once_it_is_gone(training, tmp_path):
    with (
        serving(training, "--role", "server") as library,
        serving(training, "--knowledge", library.url, "--cache-dir", str(tmp_path)) as client,
    ):

        def ask(question):
            return client.complete(question, max_tokens=4)

        assert ask(QUESTIONS[5]).effc["branch"] == "ttt" and ask(QUESTIONS[5]).effc["adapter_hit"]
        first = ask(QUESTIONS[6])
        assert first.effc["bytes"] > 100 and first.effc["samples"] == 4
        library.stop()
        found = ask(QUESTIONS[20])
        assert found.effc["branch"] == "direct" and "does not answer" in found.effc["note"]
        assert found.choices[0].text and ask(QUESTIONS[5]).effc["adapter_hit"]


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [("knowledge/samples.jsonl", '{"text": "poison"}\n', "samples.jsonl has"), (NAME, " ", "app.json has")],
)
def test_a_folder_whose_base_or_settings_were_edited_is_not_run(effc, app, tmp_path, name, more, words):  # noqa: F811
    folder = tmp_path / "edited"
    shutil.copytree(app, folder)
    with open(folder / name, "a") as file:
        file.write(more)
    for asked in (("run", "--prompt", "a"), ("serve", "--role", "server", "--port", "0"), ("serve", "--port", "0")):
        run = effc(asked[0], str(folder), *asked[1:])
        assert run.code == 5 and words in run.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format"),
        ({"reward": "magic"}, "another form"),
        ({"near": {}}, "lists"),
        ({"regime": {"rank": 10**9}}, "out of its range"),
        ({"colour": 1}, "colour"),
        ({"policy": {"kind": "x"}}, "policy.kind"),
        ({"policy": {"count": 8, "shown": 9}}, "9 samples are shown of 8"),
        ({"engine": "magic"}, "another form"),
        ({"evict": "magic"}, "another form"),
        ({"bytes": {"lists": -1, "states": 0}}, "out of its range"),
    ],
)
def test_a_description_of_another_form_is_refused(app, tmp_path, change, words):
    (tmp_path / NAME).write_text(json.dumps({**json.loads((app / NAME).read_bytes()), **change}))
    with pytest.raises(Reject, match=r"can't be read") as refused:
        read_app(tmp_path)
    assert words in refused.value.diagnostics[0].message


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ("count: 4", 3, "`sequential` and `router` learn from `dev`"),
        ('policy: rag, reward: "scorer"', 3, "nothing to learn from without `graded`"),
        ('policy: rag, reward: "scorer", graded: "kb.jsonl", scorer: lora', 3, "train a sentence encoder"),
        ('policy: rag, embed: "absent"', 5, "there is no model folder"),
        ('dev: "dev.jsonl", length: 2', 4, "none of the 9 answers to 3 dev questions is right"),
        ("policy: rag, count: 0", 3, "the least is 1"),
        ("policy: ttt, adapt: none", 3, "`adapt: none` leaves nothing to train"),
        ("policy: rag, check: choice", 3, "has fewer than two words"),
        ('policy: rag, check: choice, options: ["a"]', 3, "has fewer than two words"),
        ("policy: rag, lists: -1MiB", 3, "the least is 0"),
    ],
)
def test_recipes_that_could_not_work_are_refused(effc, tmp_path, monkeypatch, more, code, words):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, more)
    run = effc("compile", "r.effspec", "-o", "out")
    assert words in run.err, run.err
    assert run.code == code and not (tmp_path / "out" / "app").exists()


def test_a_role_is_for_folders_that_have_one(effc, app):  # noqa: F811
    run = effc("serve", "zoo:tiny-llama", "--role", "server", "--port", "0")
    assert run.code == 2 and "is no folder of the target `rttc`" in run.err
    run = effc("serve", str(app), "--role", "king", "--port", "0")
    assert run.code == 2 and "`king` is no role" in run.err
    run = effc("serve", str(app), "--role", "server", "--knowledge", "http://127.0.0.1:9", "--port", "0")
    assert run.code == 2 and "a server has the base itself" in run.err
    run = effc("run", str(app), "--knowledge", "kb.example", "--prompt", "a")
    assert run.code == 2 and "is no address of a server" in run.err
