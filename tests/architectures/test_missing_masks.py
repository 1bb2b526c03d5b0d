"""Models that drop a mask where it hides nothing, and layers whose config no part of the model saves."""

import pytest
import transformers
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir import graph_json
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rehearsed import unremovable_branch_reasons
from effc.compiler.transforms.editing.rewrite import Rewriter

from tests.architectures import table


@pytest.fixture(scope="module")
def canine():
    """Its mask is pooled over 16 characters: a short row keeps none. Its first layers have a copy of the config."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CanineConfig(**sizes, num_hash_buckets=64, num_hash_functions=4, local_transformer_stride=16)
    config.vocab_size = 128  # of code points: it hashes any number
    return table.randomized(lambda: transformers.CanineForSequenceClassification(config))


def test_a_mask_that_a_short_row_does_not_need_may_be_missing_in_the_first_call(canine):
    program = capture(canine)
    deep = program.units["canine.encoder.layer.0"]
    assert "attention_mask" in deep.placeholders


def test_a_branch_of_a_layer_with_a_config_of_its_own_goes(canine):
    program = capture(canine)
    branch = next(b for b in skeleton_of(program).branches if b.unit.startswith("canine.initial_char_encoder"))
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(branch.unit, branch.join)
    assert branch.site not in {b.site for b in skeleton_of(program).branches} and not unremovable_branch_reasons(
        program
    )


@pytest.mark.parametrize("name", ["convnextv2", "fnet"])
def test_graphs_name_norms_and_fourier_transforms_of_torch(name):
    program = capture(table.model(name))
    for unit in program.units.values():
        again = graph_json.graph_from_json(graph_json.graph_to_json(unit.graph))
        assert [n.target for n in again.nodes if n.op == "call_function"] == [
            n.target for n in unit.graph.nodes if n.op == "call_function"
        ]
