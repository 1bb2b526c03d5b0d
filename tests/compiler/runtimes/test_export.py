"""An edited model is one that torch can compile and export."""

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.exported import load_exported_model
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.evaluation.metrics.bytes import Bytes
from effc.compiler.evaluation.metrics.params import Params
from effc.compiler.ir.capture.capture import capture
from effc.compiler.targets.pt2 import Pt2
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.syntax.diagnostics import Reject

from tests import mixers, tiny
from tests.recipes_in_memory import context_of, recipe_of

pytestmark = pytest.mark.slow

ROUNDING = 1e-4  # sums in another order, logits of size about 5, float32


def test_a_model_with_an_edited_layer_compiles_and_exports():
    model = tiny.model("llama")
    program = capture(model)
    branch = next(b for b in skeleton_of(program).branches if b.unit == "model.layers.1")
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(branch.unit, branch.join)
    given = {"input_ids": torch.arange(3, 17).view(2, 7)}
    expected = model(**given).logits
    exported = torch.export.export(model, (), {**given, "use_cache": False}, strict=False).module()
    assert torch.allclose(exported(**given, use_cache=False).logits, expected, atol=ROUNDING)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(**given, use_cache=False).logits, expected, atol=ROUNDING)


def emitted(tmp_path, model):
    target, folder = Pt2(path="exported"), tmp_path / "exported"
    folder.mkdir()
    target.emit(capture(model), folder, context_of(tmp_path, model, recipe_of([])))
    return folder, target


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return emitted(tmp_path_factory.mktemp("exported"), tiny.model("llama"))


def test_a_program_of_a_language_model_holds_for_other_lengths_masks_and_positions(llama):
    folder, target = llama
    model = tiny.model("llama")
    checks = verify_forms(folder, model, target.forms())
    assert [c.what.partition(": ")[2] for c in checks] == ["logits of a batch", "logits of a left-padded batch"]
    ids = torch.arange(3, 33)[None]
    assert torch.allclose(load_exported_model(folder / "program")(ids), model(ids).logits, atol=ROUNDING)


def test_a_tied_head_of_a_program_counts_once(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=True)
    folder, _ = emitted(tmp_path, model)
    opened = load_exported_model(folder / "program")
    for metric in (Params(), Bytes()):
        assert metric.measure(opened, None) == metric.measure(model, None)


def test_another_model_than_the_one_in_memory_is_found(llama):
    folder, target = llama
    with pytest.raises(Reject, match="logits of a left-padded batch differ by"):
        verify_forms(folder, tiny.model("llama", seed=1), target.forms())


def test_a_model_whose_program_would_hold_for_few_tokens_only_is_refused(tmp_path):
    with pytest.raises(Reject, match="for short prompts only"):
        emitted(tmp_path, mixers.model("mamba2"))
