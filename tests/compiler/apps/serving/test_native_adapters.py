"""Adapters on the native engine: requests of several and of none are one batch, each as torch computes it."""

import json
import shutil

import httpx
import pytest
import torch
from effc.compiler.apps.serving.adapters import engine_adapters, model_copies_with_adapters, parse_adapter_options
from effc.compiler.apps.serving.request import Request
from effc.compiler.apps.serving.runner import make_decoder
from effc.compiler.apps.serving.scheduler import Scheduler
from effc.compiler.artifacts.adapter import CONFIG, WEIGHTS
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.models import open_model
from effc.compiler.runtimes.native.adapters import AdaptedEngine, EngineAdapter
from effc.compiler.runtimes.native.emission import BASE_HASH
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import load_file, save_file

from tests.compiler.apps.serving.conftest import serving
from tests.compiler.apps.serving.test_lora import write_lora
from tests.compiler.apps.serving.test_scheduler import Answer

pytestmark = pytest.mark.slow

pytest.importorskip("peft")
RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline {name}(base) {{ e = reft.insert(positions: "{at}", rank: 4, start: random, form: {form}, tied: {tied}) }}
emit {name} {{ reft("{name}") }}
"""
INTERVENTIONS = {
    "edges": ("f3+l3", "noreft", "false"),
    "tied": ("f2+l2", "loreft", "true"),
    "ends": ("l4", "direft", "false"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder by the name of each adapter."""
    work = tmp_path_factory.mktemp("adapters")
    plain = open_model("zoo:tiny-llama", Settings(work / "c")).model
    folders = {}
    for seed, (name, (at, form, tied)) in enumerate(INTERVENTIONS.items()):
        (work / f"{name}.effspec").write_text(RECIPE.format(name=name, at=at, form=form, tied=tied))
        api.compile(work / f"{name}.effspec", out=work / "out", cache_dir=work / "cache", seed=seed, force=True)
        folders[name] = work / "out" / name
    for seed, (name, fields) in enumerate((("law", {}), ("stable", {"use_rslora": True}))):
        folder = folders[name] = write_lora(work / name, plain, seed, **fields)
        tensors = load_file(folder / WEIGHTS)
        save_file(
            {key: 0.1 * tensor if "lora_A" in key else tensor for key, tensor in tensors.items()}, folder / WEIGHTS
        )
    return folders


@pytest.fixture(scope="module")
def options(folders):
    return parse_adapter_options([f"{name}={folder}" for name, folder in folders.items()])


@pytest.fixture(scope="module")
def torch_models(options, tmp_path_factory):
    model = open_model("zoo:tiny-llama", Settings(tmp_path_factory.mktemp("c"))).model.requires_grad_(False)
    return {"": model, **model_copies_with_adapters(model, "tiny", options)}


def opened(artifact, **more):
    return open_model(str(artifact), Settings(artifact.parent / "cache"), batch_invariant=True, **more)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().square().mean().sqrt() / wanted.detach().square().mean().sqrt())


def test_a_model_on_the_engine_computes_each_adapter_as_torch_does(artifact, options, torch_models):
    engine = opened(artifact).model
    adapted = model_copies_with_adapters(engine, "served", options)
    for length in (1, 2, 3, 5, 40):
        ids = (torch.arange(length) * 7 % 90)[None]
        bare = off(engine(ids).logits, torch_models[""](ids).logits)
        for name, model in adapted.items():
            wanted = torch_models[name](ids).logits
            effect, error = off(torch_models[""](ids).logits, wanted), off(model(ids).logits, wanted)
            assert error < max(0.01, 4 * bare), (name, length)
            if length > 1 or name in INTERVENTIONS:  # one token attends to itself, whatever its query
                assert error < effect / 5, (name, length)  # a mix-up would show
    assert torch.equal(engine(ids).logits, opened(artifact).model(ids).logits)


def test_tokens_behind_a_prompt_are_generated_with_its_adapter(artifact, options, torch_models):
    adapted = model_copies_with_adapters(opened(artifact).model, "served", options)
    ids = (torch.arange(12) * 5 % 90)[None]
    for name, model in adapted.items():
        for _ in range(2):  # the second time on sequences that others had
            made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
            wanted = torch_models[name](made[None]).logits[0] if name in ("law", "stable") else None
            if wanted is not None:  # within rounding each token is the likeliest
                chosen = wanted[11:-1].gather(1, made[12:, None])[:, 0]
                assert bool((wanted[11:-1].amax(1) - chosen < 0.1 * wanted.std()).all()), name


def test_requests_of_all_adapters_at_once_are_each_answered_as_alone(artifact, options):
    one = opened(artifact)
    runner = make_decoder(one.model, "served", options)
    assert isinstance(runner, AdaptedEngine)
    scheduler = Scheduler(runner, one.tokenizer, (), 64, 8, runner, prefix_cache_tokens=4096)
    names = ["", *options]
    verses = ("And it came to pass", "And the LORD said", "In the beginning God", "Then Moses went")
    asked = []
    for n in range(24):
        ids = one.tokenizer(verses[n % 4])["input_ids"] * (30 if n % 5 == 4 else 3)
        asked.append((names[n % len(names)], tuple(ids)))
    alone = {}
    for adapter, ids in set(asked):
        fresh = opened(artifact)
        model = model_copies_with_adapters(fresh.model, "served", options)[adapter] if adapter else fresh.model
        row = torch.tensor([ids])
        alone[adapter, ids] = model.generate(row, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(ids) :]
    scheduler.start()
    try:
        for _ in range(2):  # the second time some prompts go on from what a sequence holds
            answers = [Answer() for _ in asked]
            for (adapter, ids), answer in zip(asked, answers, strict=True):
                scheduler.submit(Request(ids, 6, temperature=0.0, alternatives=0, adapter=adapter), answer.put)
            for question, answer in zip(asked, answers, strict=True):
                tokens, piece = [], None
                while piece is None or not piece.finish:
                    piece = answer.get(timeout=60)
                    assert not piece.error, piece.error
                    tokens += [token.id for token in piece.tokens]
                assert tokens == alone[question].tolist(), (question[0], len(question[1]))
    finally:
        scheduler.stop()
        scheduler.join(5)


def test_edges_of_prompts_have_their_adapters_and_all_tokens_a_lora():
    edges = EngineAdapter(first=1, last=2, n_first=2, n_last=3)
    assert edges.adapter_of_each_token(0, 7) == [1, 1, -1, -1, 2, 2, 2]
    assert edges.adapter_of_each_token(0, 5) == [1, 1, 2, 2, 2]
    assert edges.adapter_of_each_token(0, 3) == [1, 2, 2]
    assert edges.adapter_of_each_token(0, 1) == [2]
    assert edges.adapter_of_each_token(7, 2) == [-1, -1]
    assert EngineAdapter(first=4, last=-1, n_first=3).adapter_of_each_token(0, 5) == [4, 4, 4, -1, -1]
    assert (
        EngineAdapter(default=5).adapter_of_each_token(0, 2)
        == EngineAdapter(default=5).adapter_of_each_token(9, 2)
        == [5, 5]
    )


@pytest.mark.heavy
def test_clients_name_adapters_of_an_artifact_and_the_base_stays_what_it_was(artifact, folders):
    flags = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    texts = {}
    with serving(artifact, *flags) as served, serving(artifact) as bare:
        for name in ("", *folders):
            model = f"{served.name}:{name}" if name else served.name
            body = {"model": model, "prompt": "And it came to pass", "max_tokens": 8, "temperature": 0}
            texts[name] = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
            scored = {**body, "echo": True, "logprobs": 0, "max_tokens": 0}
            answer = httpx.post(f"{served.url}/v1/completions", json=scored, timeout=60)
            assert answer.status_code == (400 if name in INTERVENTIONS else 200), name
            assert name in INTERVENTIONS or len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) > 3
        body = {**body, "model": bare.name}
        assert texts[""] == httpx.post(f"{bare.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert len(set(texts.values())) > 3


def test_adapters_that_do_not_fit_the_engine_are_refused_by_name(artifact, folders, tmp_path, torch_models):
    engine = opened(artifact).model

    def refusal(folder) -> str:
        with pytest.raises(Reject) as refused:
            engine_adapters(engine, "served", parse_adapter_options([f"one={folder}"]))
        (diagnostic,) = refused.value.diagnostics
        return f"{diagnostic.message} {diagnostic.help}"

    law = folders["law"]
    tensors = load_file(law / WEIGHTS)

    def changed(name: str, tensors: dict, **fields):
        folder = tmp_path / name
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(json.loads((law / CONFIG).read_text()) | fields))
        save_file(tensors, folder / WEIGHTS)
        return folder

    renamed = {key.replace("q_proj", "embed_tokens"): tensor for key, tensor in tensors.items()}
    assert "is no linear step of its own" in refusal(changed("embed", renamed, target_modules=["embed_tokens"]))
    wide = {key: t.repeat(1, 2) if "lora_A" in key else t for key, t in tensors.items()}
    assert "`down` of an adapter is" in refusal(changed("wide", wide))
    nan = {key: t * float("nan") for key, t in tensors.items()}
    assert "holds NaN or infinity" in refusal(changed("nan", nan))
    large = {key: t.repeat(*((300, 1) if "lora_A" in key else (1, 300))) for key, t in tensors.items()}
    assert "rank 1200" in refusal(changed("large", large, r=1200))
    flat = tmp_path / "flat" / "reft"
    shutil.copytree(folders["tied"] / "reft", flat)
    (weights,) = flat.glob("*.safetensors")
    for value, words in ((0.0, "rows that depend on each other"), (float("nan"), "NaN or infinity")):
        stored = load_file(weights)
        save_file({key: t * value if key.endswith("project") else t for key, t in stored.items()}, weights)
        assert words in refusal(flat)
    engine.facts = {**engine.facts, BASE_HASH: "0" * 64}
    assert "other tensors" in refusal(folders["edges"])
    engine.facts = {key: value for key, value in engine.facts.items() if key != BASE_HASH}
    assert "compile it with this effc" in refusal(folders["edges"])


def test_copies_of_a_model_share_its_lock_and_beams_stay_with_models_that_can_go_back(artifact, options):
    engine = opened(artifact).model
    adapted = model_copies_with_adapters(engine, "served", options)["edges"]
    assert adapted.exclusive() is engine.exclusive()
    ids = (torch.arange(12) * 5 % 90)[None]
    assert adapted.generate(ids, num_beams=2, max_new_tokens=3).shape[1] > 12
    adapted.engine.engine.backward = False
    with pytest.raises(Reject, match="interventions edit"):
        adapted.generate(ids, num_beams=2, max_new_tokens=3)
