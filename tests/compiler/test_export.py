"""An edited model is one that torch can compile and export."""

import torch
from effc.compiler.rewrite import Rewriter
from effc.compiler.tracing.capture import capture

from tests import tiny

ROUNDING = 1e-4     # sums in another order, logits of size about 5, float32


def test_a_model_with_an_edited_layer_compiles_and_exports():
    model = tiny.model("llama")
    program = capture(model)
    branch = next(b for b in program.skeleton.branches if b.unit == "model.layers.1")
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(branch.unit, branch.join)
    given = {"input_ids": torch.arange(3, 17).view(2, 7)}
    expected = model(**given).logits
    exported = torch.export.export(model, (), {**given, "use_cache": False}, strict=False).module()
    assert torch.allclose(exported(**given, use_cache=False).logits, expected, atol=ROUNDING)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(**given, use_cache=False).logits, expected, atol=ROUNDING)
