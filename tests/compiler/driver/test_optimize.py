"""`effc.optimize`: what comes out, what it leaves alone, and what it refuses."""

import copy
from pathlib import Path

import effc
import pytest
import torch
from effc.compiler.artifacts.manifest import artifact_hash
from effc.compiler.core.cache import Cache
from effc.compiler.core.deadline import Deadline
from effc.compiler.core.events import Recorded, StageEnded
from effc.compiler.driver import api
from effc.dsl.syntax.render import render
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.compiler.cli.verbs.conftest import process  # noqa: F401

ZOO = Path(__file__).resolve().parents[3] / "recipes" / "zoo" / "tiny-llama"
HALF = effc.sparsify.magnitude(sparsity="50% of weights")
IDS = torch.randint(3, 128, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def options(tmp_path):
    return {"cache_dir": tmp_path / "cache", "threads": 1}


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = [torch.equal(t, other[n]) and t.dtype == other[n].dtype for n, t in one.items()]
    return one.keys() == other.keys() and all(same)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.slow
def test_a_smaller_model_comes_out_and_the_one_in_memory_stays_bit_for_bit(options):
    model = tiny.model("llama").to(torch.bfloat16).train()
    model.model.layers[0].eval()
    before, config, modes = bits(model), copy.deepcopy(model.config.to_dict()), [m.training for m in model.modules()]
    slim = effc.optimize(model, effc.prune.blocks(remove=1), data=IDS, expect="perplexity <= 9 * base", **options)
    assert equal(before, bits(model)) and model.config.to_dict() == config
    assert [m.training for m in model.modules()] == modes
    assert slim.model.num_parameters() < model.num_parameters()
    assert slim.model.dtype == torch.bfloat16 and slim.model.device == model.device and not slim.model.training
    assert slim.model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3).shape == (1, 19)
    measure = slim.measures["perplexity(heldout)"]
    assert measure.original > 1 and measure.compiled > 1 and not slim.missed
    assert "blocks = prune.blocks(remove: 1, score: perplexity(calib))" in slim.recipe
    assert repr(slim) == repr(slim.measures) and len(repr(slim.artifact)) < 2000


@pytest.mark.slow
def test_what_it_saves_compiles_to_the_same_bytes_in_a_process_of_its_own(options, tmp_path, process):  # noqa: F811
    slim = effc.optimize(tiny.model("llama"), HALF, effc.prune.blocks(remove=1), data=IDS, **options)
    recipe = slim.save(tmp_path / "saved")
    assert recipe.read_text() == slim.recipe and not any(f.is_symlink() for f in recipe.parent.rglob("*"))
    where = ("-o", "out", "--cache-dir", "cache", "--threads", 1)
    done = process("compile", "recipe.effspec", *where, cwd=recipe.parent)
    assert done.code == 0, done.err
    assert artifact_hash(recipe.parent / "out" / "optimized") == artifact_hash(slim.artifact.path)
    with pytest.raises(effc.Reject, match="output-exists"):
        slim.save(tmp_path / "saved")


@pytest.mark.slow
def test_without_steps_a_model_comes_back_with_the_same_numbers_and_nothing_is_printed(options, capfd):
    model = tiny.model("gpt2").to(torch.bfloat16)
    same = effc.optimize(model, **options)
    assert type(same.model) is type(model) and same.model.dtype == torch.bfloat16
    assert torch.equal(logits(same.model), logits(model))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_adapters_of_peft_are_merged_in_a_copy(options):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny.model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    before = bits(wrapped)
    merged = effc.optimize(wrapped, **options)
    assert equal(before, bits(wrapped)) and isinstance(wrapped, peft.PeftModel)
    assert "q_proj.lora_A.default.weight" in str(before.keys())
    assert torch.allclose(logits(merged.model), logits(wrapped), atol=1e-4)  # float32 sums in another order
    assert not torch.allclose(logits(merged.model), logits(tiny.model("llama")), atol=1e-2)


@pytest.mark.slow
def test_a_second_target_and_a_second_call_run_no_step_again(options, tmp_path):
    events = []
    model = tiny.model("llama")
    slim = effc.optimize(model, HALF, on_event=events.append, **options)
    page, program = slim.report(tmp_path / "page.html"), slim.emit(effc.targets.hf("again", form="compact"), tmp_path)
    again = effc.optimize(tiny.model("llama"), HALF, on_event=events.append, **options)
    assert [e.cached for e in events if isinstance(e, StageEnded) and e.stage == "magnitude"] == [False, True, True]
    assert equal(bits(effc.load(program.path)), bits(slim.model)) and "<html" in page.read_text()
    assert artifact_hash(again.artifact.path) == artifact_hash(slim.artifact.path)


@pytest.mark.slow
def test_a_search_that_max_time_ended_is_named_and_gives_no_second_target_of_another_model(
    options, tmp_path, monkeypatch
):
    step = effc.prune.multi(remove="20% of params", order=["channels", "heads"], group=16)
    cuts = []

    def note_cut(event):
        cuts.extend([event] if isinstance(event, Recorded) and event.name.startswith("cut ") else [])

    with monkeypatch.context() as patch:  # a clock that moves with the cuts
        patch.setattr(Deadline, "elapsed", property(lambda self: float(len(cuts))))
        early = effc.optimize(tiny.model("llama"), step, data=IDS, max_time=1.5, on_event=note_cut, **options)
    assert [d.slug for d in early.stopped] == ["out-of-time"]
    with pytest.raises(effc.Reject, match="out-of-time"):
        early.emit(effc.targets.native("cpu"), tmp_path)


@pytest.mark.slow
def test_texts_become_rows_of_which_every_tenth_is_held_out(options):
    model, tokenizer = (kind.from_pretrained(ZOO) for kind in (AutoModelForCausalLM, AutoTokenizer))
    texts = (ZOO / "calib.txt").read_text()[:40_000].split("\n\n")
    step = effc.quantize.gptq(bits=8, on="layers.0.mlp.*")
    slim = effc.optimize(model, step, tokenizer=tokenizer, data=iter(texts), length=64, samples=50, **options)
    rows = slim.source.rows
    assert [tuple(t.shape) for t in rows.values()] == [(45, 64), (5, 64)]
    calib, heldout = ({tuple(row.tolist()) for row in rows[n]} for n in ("calib", "heldout"))
    assert not calib & heldout
    assert tokenizer.decode(rows["calib"][0][1:20], skip_special_tokens=True).strip()[:20] in "\n\n".join(texts)
    assert "perplexity(heldout) <= 2 * base" in slim.recipe and "data: calib" in slim.recipe
    assert (
        AutoTokenizer.from_pretrained(slim.artifact.path / "model")("and it")["input_ids"]
        == tokenizer("and it")["input_ids"]
    )


@pytest.mark.slow
def test_rows_with_names_are_used_by_their_names(options):
    data = {"mine": IDS[:8], "tests": IDS[8:]}
    slim = effc.optimize(
        tiny.model("llama"), effc.prune.blocks(remove=1), data=data, expect="perplexity <= 99", **options
    )
    assert "score: perplexity(mine)" in slim.recipe and "perplexity(tests) <= 99" in slim.recipe


@pytest.mark.slow
def test_steps_of_one_pass_get_names_of_their_own(options):
    slim = effc.optimize(tiny.model("llama"), HALF, effc.sparsify.magnitude(sparsity="60% of weights"), **options)
    assert [s["name"] for s in slim.artifact.manifest.steps] == ["magnitude", "magnitude_2"]


@pytest.mark.slow
def test_a_bound_that_is_missed_is_said_and_the_model_is_there(options):
    slim = effc.optimize(tiny.model("llama"), HALF, expect=["params <= 0.5 * base"], **options)
    assert [d.slug for d in slim.missed] == ["expectation-missed"] and slim.model is slim.model


def spoiled(number: float):
    model = tiny.model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = number
    return model


def adapted():
    model = tiny.model("llama")
    model._hf_peft_config_loaded = True  # as `add_adapter` leaves it, which asks for a newer peft than effc does
    return model


def prompted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        tiny.model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


def on_meta():
    with torch.device("meta"):
        return tiny.blank("llama")


BLOCKS = effc.prune.blocks(remove=1)
MISTAKES = {
    "unknown parameter": (tiny.model, [effc.prune.blocks(remov=1)], {"data": IDS}, "unknown-parameter"),
    "an argument without its name": (tiny.model, [effc.prune.blocks(1, 2)], {"data": IDS}, "too-many-arguments"),
    "number where a ratio is needed": (tiny.model, [effc.prune.multi(remove=0.15)], {"data": IDS}, "wrong-unit"),
    "text that is no ratio": (tiny.model, [effc.prune.multi(remove="15 %")], {"data": IDS}, "wrong-type"),
    "no data": (tiny.model, [BLOCKS], {}, "bad-option"),
    "target among the steps": (tiny.model, [effc.targets.native("x")], {}, "unknown-word"),
    "text as a step": (tiny.model, ["prune.blocks(remove: 1)"], {}, "bad-option"),
    "word that is not called": (tiny.model, [effc.prune.blocks], {}, "bad-option"),
    "bound that is none": (tiny.model, [HALF], {"expect": "params < < 3"}, "syntax"),
    "rows that a step learned from": (
        tiny.model,
        [effc.quantize.gptq()],
        {"data": {"calib": IDS}, "expect": "perplexity <= 2 * base"},
        "same-data",
    ),
    "more than there is": (tiny.model, [effc.prune.blocks(remove=6)], {"data": IDS}, "leaves-none"),
    "texts without a tokenizer": (tiny.model, [BLOCKS], {"data": ["a text"]}, "no-tokenizer"),
    "a number as data": (tiny.model, [BLOCKS], {"data": 3}, "bad-option"),
    "an empty tensor": (tiny.model, [BLOCKS], {"data": IDS[:0]}, "bad-option"),
    "a tensor of numbers": (tiny.model, [BLOCKS], {"data": IDS.float()}, "bad-option"),
    "ids beyond the vocabulary": (tiny.model, [BLOCKS], {"data": IDS + 1000}, "bad-rows"),
    "a length that is none": (tiny.model, [BLOCKS], {"data": IDS, "length": 0}, "bad-option"),
    "params of a recipe": (tiny.model, [HALF], {"set": {"keep": "80%"}}, "bad-option"),
    "module": (lambda _: torch.nn.Linear(2, 2), [HALF], {}, "bad-option"),
    "path": (lambda _: "org/name", [HALF], {}, "bad-option"),
    "meta": (lambda _: on_meta(), [HALF], {}, "bad-option"),
    "NaN": (lambda _: spoiled(float("nan")), [HALF], {}, "not-finite"),
    "adapters of add_adapter": (lambda _: adapted(), [HALF], {}, "bad-option"),
    "adapters that can't be merged": (lambda _: prompted(), [HALF], {}, "bad-option"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_reject_that_shows_its_place(options, mistake):
    make, steps, arguments, slug = MISTAKES[mistake]
    with pytest.raises(effc.Reject) as raised:
        effc.optimize(make("llama"), *steps, **options | arguments)
    assert slug in [d.slug for d in raised.value.diagnostics]
    spans = [d for d in raised.value.diagnostics if d.span]
    assert not spans or render(raised.value.diagnostics) in raised.value.__notes__[0]


@pytest.mark.parametrize(("data", "slug"), [([], "too-short"), ([{"text": "a"}], "bad-option"), ("And", "too-short")])
def test_texts_that_make_no_rows_are_refused(options, data, slug):
    model, tokenizer = tiny.model("llama"), AutoTokenizer.from_pretrained(ZOO)
    with pytest.raises(effc.Reject, match=slug):
        effc.optimize(model, BLOCKS, tokenizer=tokenizer, data=data, **options)


def test_a_mistake_is_said_before_a_weight_is_saved(options):
    with pytest.raises(effc.Reject, match="unknown-parameter"):
        effc.optimize(tiny.model("llama"), effc.prune.blocks(remov=1), data=IDS, **options)
    assert not options["cache_dir"].exists()


def test_verbs_that_read_recipes_say_who_takes_a_model():
    for verb in (api.check, api.plan, api.compile):
        with pytest.raises(effc.Reject) as raised:
            verb(tiny.model("llama"))
        assert "effc.optimize" in render(raised.value.diagnostics) and len(str(raised.value)) < 100


@pytest.mark.slow
def test_a_saved_model_goes_with_the_cache(options):
    effc.optimize(tiny.model("llama"), **options)
    assert any((options["cache_dir"] / "models").iterdir())
    assert Cache(options["cache_dir"]).evict_unused_and_count_bytes(keep_seconds=0) > 0
    assert not any((options["cache_dir"] / "models").iterdir())
