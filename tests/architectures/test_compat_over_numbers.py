"""Even checkpoints of models that ask, while they run, what numbers a tensor holds: tokens of an expert, languages."""

import copy

import pytest
import torch
import transformers
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.selection import reject_if_model_has_none
from effc.compiler.artifacts.compat import plan_padding_to_stock
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.widths import slice_groups
from effc.dsl.syntax.diagnostics import Reject
from torch import nn

from tests.architectures import table
from tests.equivalence import max_logit_difference

torch.set_num_threads(1)
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}


def made(name: str) -> nn.Module:
    if name == "jetmoe":
        return table.model(name)
    config, cls = {
        "longformer": (transformers.LongformerConfig(**_SIZES, attention_window=[4, 4]), "LongformerForMaskedLM"),
        "xmod": (
            transformers.XmodConfig(**_SIZES, languages=["en_XX", "de_DE"], default_language="de_DE"),
            "XmodForMaskedLM",
        ),
    }[name]
    return table.randomized(lambda: getattr(transformers, cls)(config))


def test_heads_that_stay_are_refused_with_the_function_that_has_no_rule():
    """Lengths that `torch.div` divides and a mask that is cast to the type of queries hide no `reshape`."""
    with pytest.raises(Reject) as refused:
        reject_if_model_has_none(skeleton_of(capture(made("longformer"))), "heads", ())
    assert "`as_strided` does something unknown" in refused.value.diagnostics[0].message


@pytest.mark.parametrize("name", ["longformer", "xmod", "jetmoe"])
def test_uneven_cuts_of_a_model_that_asks_for_numbers_are_filled_up_with_zeros(name):
    program = capture(made(name))
    skeleton = skeleton_of(program)
    group = next((g for g in skeleton.groups if g.kind == "channels"), None)
    with Rewriter(program) as rewrite:
        if group is not None:
            slice_groups(program, rewrite, [(group, {1, 2, 3})])
        else:
            branch = skeleton.branches[1]
            rewrite.drop_branch(
                branch.unit, branch.join, other_operand_of_join(program.units[branch.unit].graph, branch)
            )
    padding = plan_padding_to_stock(program)
    assert not padding.reasons
    stock = copy.deepcopy(made(name))
    stock.load_state_dict({piece.name: piece.make() for piece in padding.padded_tensor_pieces(program)}, strict=False)
    assert max_logit_difference(program.model, stock) < 1e-4
