"""Words of recipes from Python: what they say, how they are typed, and that they cost no torch."""

import inspect
import subprocess
import sys

import effc
import pytest
from effc.compiler.plugin import word_functions, word_stubs
from effc.compiler.plugin.registry import SHELVES, Registry
from effc.dsl.syntax.builder import call, literal, name, percent, select
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source

SPOKEN = [
    (effc.prune.multi(remove="15% of params"), "prune.multi(remove: 15% of params)"),
    (effc.prune.multi(remove=percent(15).of("params")), "prune.multi(remove: 15% of params)"),
    (effc.prune.blocks(remove=2, on="layers.*"), 'prune.blocks(remove: 2, on: "layers.*")'),
    (effc.prune.blocks(remove="25% of blocks", search="exact"), "prune.blocks(remove: 25% of blocks, search: exact)"),
    (effc.prune.multi(score="perplexity(calib)"), "prune.multi(score: perplexity(calib))"),
    (effc.prune.multi(score=effc.metrics.perplexity("calib")), "prune.multi(score: perplexity(calib))"),
    (effc.prune.multi(order=["blocks", "heads"], on=None), "prune.multi(order: [blocks, heads])"),
    (effc.prune.multi(split={"blocks": 3, "heads": 1}), "prune.multi(split: {blocks: 3, heads: 1})"),
    (effc.sparsify.magnitude(pattern="2:4"), 'sparsify.magnitude(pattern: "2:4")'),
    (effc.tune.heal(steps=50, lr=1e-3, merge=False), "tune.heal(steps: 50, lr: 0.001, merge: false)"),
    (effc.targets.native("15% of params"), 'native("15% of params")'),
    (effc.targets.hf("x", shard="2GB"), 'hf("x", shard: 2GB)'),
    (effc.data.text("a.txt", length=64), 'text("a.txt", length: 64)'),
    (effc.metrics.decode.p50(prompt=8), "decode.p50(prompt: 8)"),
    (effc.models.hf("org/name"), 'hf("org/name")'),
    (effc.prune.channels(on=select("*.mlp") - "layers.0.*"), 'prune.channels(on: "*.mlp" - "layers.0.*")'),
]


@pytest.mark.parametrize(("value", "text"), SPOKEN, ids=[text for _, text in SPOKEN])
def test_a_loose_text_is_the_literal_that_its_parameter_takes(value, text):
    assert str(value) == text


@pytest.mark.parametrize("text", ["", "15 % of", "a b", "1) data y = g(2", "x, y", "a: 1", "effspec 1", '"', "# x"])
def test_a_text_that_is_no_literal_stays_a_text_that_the_checker_sees(text):
    assert literal(text) is None
    assert str(effc.prune.multi(remove=text)).startswith('prune.multi(remove: "')


def test_a_word_that_is_not_there_is_an_attribute_error_that_completes():
    with pytest.raises(AttributeError, match=r"prune\.mulit") as raised:
        effc.prune.mulit  # noqa: B018
    assert "multi" in dir(raised.value.obj)
    with pytest.raises(AttributeError):
        effc.nonsense  # noqa: B018


def test_the_package_lists_every_namespace_and_every_namespace_its_words():
    assert {*word_functions.namespace_names()} <= {*effc.__all__} <= {*dir(effc)}
    spaces = {"pass": [getattr(effc, n) for n in dir(word_functions.Namespace("pass"))]}
    spaces |= {kind: [getattr(effc, n)] for n, kind in word_functions.KINDS.items()}

    def count(space) -> int:
        inner = (getattr(space, n) for n in dir(space))
        return sum(count(x) if isinstance(x, word_functions.Namespace) else 1 for x in inner)

    assert {kind: sum(map(count, spaces[kind])) for kind in SHELVES} == {
        kind: len(Registry().vocabulary.words(kind)) for kind in SHELVES
    }


def test_the_name_of_every_pass_can_be_the_name_of_a_step():
    for word in Registry().vocabulary.words("pass"):
        stem = word.rpartition(".")[2]
        parsed = parse(Source("r", f"effspec 1 pipeline p(m) {{ {stem} = {word}() }}"))
        assert not parsed.diagnostics and parsed.file.statements[0].steps[0].name.path == stem


def test_a_function_has_its_words_parameters_and_sentences():
    parameters = inspect.signature(effc.prune.multi).parameters
    word = Registry().vocabulary.word("pass", "prune.multi")
    assert {*parameters} == {p.name for p in word.params}
    assert parameters["remove"].default is inspect.Parameter.empty
    assert parameters["score"].default is not inspect.Parameter.empty  # `effc.optimize` fills it in
    assert word.summary in inspect.getdoc(effc.prune.multi)
    assert str(inspect.signature(effc.targets.hf)).startswith("(path: str | Value, *, form: Literal['auto', ")


def test_the_stub_of_the_words_is_current():
    """`python -m effc.compiler.plugin.word_stubs` writes it."""
    assert word_stubs.FILE.read_text(encoding="utf-8") == word_stubs.stub_text()


def test_a_builder_takes_a_call_as_a_step():
    recipe = effc.recipe()
    pipeline = recipe.pipeline("p", recipe.model("base", call("zoo", "tiny-llama")))
    assert pipeline.step("slim", effc.prune.blocks(remove=1, score="params")) == name("slim")
    assert "slim = prune.blocks(remove: 1, score: params)" in str(recipe)


def test_words_and_a_reject_cost_no_torch():
    code = "import sys, effc; effc.prune.multi(remove='1% of params'); effc.Reject; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
