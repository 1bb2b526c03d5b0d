"""Interventions that requests name: several on one base, whoever else is answered at the time."""

import shutil
import threading

import httpx
import pytest
import torch
from effc.compiler.apps.serving.adapters import AdapterChats, model_copies_with_adapters, parse_adapter_options
from effc.compiler.apps.serving.chat import ChatSession
from effc.compiler.apps.serving.request import Request
from effc.compiler.apps.serving.runner import CachedModel, make_decoder
from effc.compiler.apps.serving.scheduler import SHARED_PROMPT_TOKENS, Scheduler
from effc.compiler.artifacts.load import verify_signature_and_files
from effc.compiler.artifacts.signature import sign_artifact
from effc.compiler.artifacts.signing_keys import write_key_pair
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.models import open_model
from effc.compiler.ir.weights import model_weights_hash
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.serving.conftest import serving
from tests.compiler.apps.serving.test_scheduler import Answer

pytestmark = pytest.mark.slow

RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline {name}(base) {{ e = reft.insert(positions: "f3+l3", rank: 4, start: random, form: noreft) }}
emit {name} {{ reft("{name}") }}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of interventions that make noise, each its own."""
    work, made = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(("left", "right")):
        (work / f"{name}.effspec").write_text(RECIPE.format(name=name))
        api.compile(work / f"{name}.effspec", out=work / "out", cache_dir=work / "cache", seed=seed, force=True)
        made[name] = work / "out" / name
    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return open_model("zoo:tiny-llama", Settings(tmp_path_factory.mktemp("c")))


@pytest.fixture(scope="module")
def models(opened, folders):
    """The plain model and the two others, over the same tensors."""
    found = parse_adapter_options([f"{name}={folder}" for name, folder in folders.items()])
    return {"": opened.model, **model_copies_with_adapters(opened.model, "tiny", found)}


def alone(model, ids, count):
    row = torch.tensor([ids])
    made = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False)
    return made[0, len(ids) :].tolist()


def test_views_share_every_tensor_and_leave_the_base_as_it_was(models, folders):
    plain = models[""]
    own = {id(p) for p in plain.parameters()}
    for name in folders:
        assert sum(id(p) not in own for p in models[name].parameters()) == 3 * len(plain.model.layers)
        assert model_weights_hash(models[name]) == model_weights_hash(plain)
        ids = torch.arange(20)[None]
        wanted = api.load(folders[name])(ids).logits
        torch.testing.assert_close(models[name](ids).logits, wanted)
        assert not torch.allclose(plain(ids).logits, wanted, atol=0.1)


def test_requests_at_once_are_each_answered_by_their_own_adapter_and_long_prompts_too(models, opened):
    runner = CachedModel(models[""], 4, {name: m for name, m in models.items() if name})
    scheduler = Scheduler(runner, opened.tokenizer, (), 64, 4, runner)
    verses, asked = ("And it came to pass", "And the LORD said", "In the beginning God", "Then Moses went"), []
    for n in range(12):
        ids = opened.tokenizer(verses[n % 4])["input_ids"]
        asked.append((["", "left", "right"][n % 3], ids * (3 * SHARED_PROMPT_TOKENS // len(ids) if n % 4 == 3 else 1)))
    apart = [alone(model, asked[0][1], 6) for model in models.values()]
    assert apart[0] != apart[1] != apart[2] != apart[0]  # so that a mix-up would show
    wanted = [alone(models[adapter], ids, 6) for adapter, ids in asked]  # a model is of one thread at a time
    scheduler.start()
    try:
        answers = [Answer() for _ in asked]
        for (adapter, ids), answer in zip(asked, answers, strict=True):
            request = Request(tuple(ids), 6, temperature=0.0, alternatives=0, adapter=adapter)
            scheduler.submit(request, answer.put)
        for (adapter, ids), answer, expected in zip(asked, answers, wanted, strict=True):
            tokens, piece = [], None
            while piece is None or not piece.finish:
                piece = answer.get(timeout=60)
                assert not piece.error, piece.error
                tokens += [token.id for token in piece.tokens]
            assert tokens == expected, (adapter, len(ids))
    finally:
        scheduler.stop()
        scheduler.join(5)


@pytest.mark.heavy
def test_clients_name_an_adapter_as_they_name_a_model(models, folders, opened):
    flags = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    ids = opened.tokenizer("And it came to pass")["input_ids"]
    with serving("zoo:tiny-llama", *flags) as served:
        listed = [m.id for m in served.client.models.list().data]
        assert listed == [served.name, f"{served.name}:left", f"{served.name}:right"]
        said, threads = {}, []

        def ask(name, n):
            full = f"{served.name}:{name}" if name else served.name
            made = served.client.completions.create(
                model=full, prompt="And it came to pass", max_tokens=8, temperature=0
            )
            said[name, n] = (made.model, made.choices[0].text)

        for n in range(3):
            threads += [threading.Thread(target=ask, args=(name, n)) for name in models]
        [t.start() for t in threads], [t.join() for t in threads]
        for name, model in models.items():
            text = opened.tokenizer.decode(alone(model, ids, 8))
            for n in range(3):
                assert said[name, n][0].endswith(f":{name}" if name else served.name)
                assert said[name, n][1].strip() == text.strip()
        wrong = httpx.post(f"{served.url}/v1/completions", json={"model": f"{served.name}:middle", "prompt": "a"})
        assert wrong.status_code == 404 and f"`{served.name}:right`" in wrong.json()["error"]["message"]


def test_lines_of_a_talk_choose_who_answers_and_a_single_adapter_does_from_the_start(models, opened):
    made = {name: ChatSession(model, opened.tokenizer, 4) for name, model in models.items()}
    wanted = {
        name: chat_session.answer("And it came to pass", lambda t: None).text for name, chat_session in made.items()
    }
    talk = AdapterChats(made)
    say = lambda line: talk.answer(line, lambda t: None).text  # noqa: E731
    assert say("And it came to pass") == wanted[""]
    assert say(":right And it came to pass") == wanted["right"] == say("And it came to pass")
    assert say(": And it came to pass") == wanted[""]
    assert say(":right") == "" and say("And it came to pass") == wanted["right"]
    with pytest.raises(Reject, match="no adapter `middle`"):
        say(":middle And it")
    one = AdapterChats({name: made[name] for name in ("", "left")})
    assert one.answer("And it came to pass", lambda t: None).text == wanted["left"]


@pytest.mark.parametrize("text", ["left", "=x", "a:b=x", "a/b=x", "left=/nowhere"])
def test_what_names_no_adapter_is_refused(text):
    with pytest.raises(Reject) as refused:
        parse_adapter_options([text])
    assert refused.value.diagnostics[0].slug == "no-adapter"


def test_another_base_is_refused_by_name(folders, tmp_path, opened):
    found = parse_adapter_options([f"left={folders['left']}"])
    other = open_model("zoo:tiny-llama", Settings(tmp_path)).model
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(Reject) as refused:
        model_copies_with_adapters(other, "other", found)
    assert refused.value.diagnostics[0].slug == "other-base"
    assert not make_decoder(opened.model, "tiny").needs_full_prompt("")


def test_where_a_signature_is_required_adapters_need_one_too(folders, tmp_path):
    key = write_key_pair(tmp_path / "key")
    shutil.copytree(folders["left"], tmp_path / "left")
    (found,) = parse_adapter_options([f"left={tmp_path / 'left'}"]).values()
    with pytest.raises(Reject, match="is not signed"):
        verify_signature_and_files(found, [key])
    sign_artifact(tmp_path / "left", tmp_path / "key")
    assert verify_signature_and_files(found, [key]) == key
    (tmp_path / "left" / "more.txt").write_text("")
    with pytest.raises(Reject, match="is not in the manifest"):
        verify_signature_and_files(found, [key])
