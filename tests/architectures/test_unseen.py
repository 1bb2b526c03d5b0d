"""What architectures taught that came after the twenty-five: each was wrong, or refused without need, before."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.selection import reject_if_model_has_none
from effc.compiler.artifacts.compat import plan_padding_to_stock
from effc.compiler.artifacts.verify import make_probe_inputs
from effc.compiler.artifacts.verify_child import probe_model
from effc.compiler.core.settings import Settings
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.ir.program import Program
from effc.compiler.models.checkpoints.mamba_rescale import NOTE
from effc.compiler.models.checkpoints.meta_init import without_storage
from effc.compiler.models.checkpoints.model_folder import origin_of_folder
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.models.rows.forward import logits_of_output
from effc.compiler.models.rows.inputs import forward_args_and_kwargs
from effc.compiler.plugin.context import Context
from effc.compiler.plugin.registry import Registry
from effc.compiler.targets.hf import Hf
from effc.compiler.transforms.editing.dry_run import layer_needed
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.widths import slice_groups
from effc.dsl.checker.recipe import Recipe
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.source import Source
from torch import nn
from transformers import XLNetLMHeadModel

from tests import tiny
from tests.architectures import table
from tests.architectures.test_closure import SHARE, chosen, timeouts
from tests.equivalence import max_logit_difference

torch.set_num_threads(1)


@functools.cache
def captured(name: str) -> Program:
    return capture(table.model(name))


def kinds(program: Program) -> set[str]:
    return {g.kind for g in skeleton_of(program).groups}


def assert_sliced_is_silenced(program: Program, kind: str) -> None:
    groups = [g for g in skeleton_of(program).groups if g.kind == kind]
    assert groups, skeleton_of(program).facts["refused"]
    cuts = chosen(groups, 1)
    silenced, trial = copy.deepcopy(program.model), copy.deepcopy(program)
    for group, items in cuts:
        timeouts(silenced, group, items)
    with Rewriter(trial) as rewrite:
        slice_groups(trial, rewrite, cuts)
    expected, found = (
        equivalence.record_logits_of_sample_calls(silenced),
        equivalence.record_logits_of_sample_calls(trial.model),
    )
    assert equivalence.max_difference(expected, found) <= SHARE * max(1.0, *(float(x.abs().max()) for x in expected))


def written(model: nn.Module, origin: Origin, folder: Path) -> None:
    recipe = Recipe(Source("x.effspec", "effspec 1\n"), "", {}, {}, {}, {}, {})
    ctx = Context(Settings(folder / "cache", threads=1), recipe, folder, Registry(), origin, folder)
    (folder / "out").mkdir()
    Hf(path="x").emit(capture(model), folder / "out", ctx)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    there = dict(other.named_parameters())
    return all(torch.equal(p, there[name]) for name, p in one.named_parameters())


# -- models of transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mpnet", "nystromformer"])
def test_a_layer_that_adds_its_mask_itself_runs_without_one_also_after_a_cut(name):
    """Encoders hand on no mask where no row is padded; the graph was captured with one."""
    program, reference = copy.deepcopy(captured(name)), table.model(name)
    for _ in range(2):
        for unit in program.units.values():
            unit.install_graph_forward(program.model)
        assert max_logit_difference(reference, program.model) == 0.0
        for unit in program.units.values():
            unit.restore_class_forward(program.model)
        group = next(g for g in skeleton_of(program).groups if g.kind == "channels")
        with Rewriter(program) as rewrite:
            slice_groups(program, rewrite, [(group, {0})])
        reference = copy.deepcopy(program.model)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("falcon", "heads"),
        ("falcon", "channels"),
        ("apertus", "channels"),
        ("doge", "channels"),
        ("nystromformer", "heads"),
        ("deepseek_v3", "heads"),
        ("recurrent_gemma", "channels"),
    ],
)
def test_what_they_are_made_of_can_be_sliced(name, kind):
    assert_sliced_is_silenced(captured(name), kind)


@pytest.mark.parametrize("name", ["doge", "minimax"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_stream_that_is_weighed_before_it_is_added_to_is_one(name, number):
    program = copy.deepcopy(captured(name))
    branch = skeleton_of(program).branches[number]
    silenced = copy.deepcopy(program.model)
    unit = program.units[branch.unit]
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(branch.unit, branch.join, other_operand_of_join(unit.graph, branch))
    with torch.no_grad():
        for part in branch.parts:
            for parameter in silenced.get_submodule(part).parameters(recurse=False):
                parameter.zero_()
    assert max_logit_difference(silenced, program.model) < 1e-5


@pytest.mark.parametrize("name", ["gpt_oss", "lfm2_moe", "deepseek_v3"])
def test_experts_go_with_all_that_has_an_entry_for_each(name):
    """Biases of a choice among them, buffers of the router; as many of every group that they are compared in."""
    program = copy.deepcopy(captured(name))
    groups = [g for g in skeleton_of(program).groups if g.kind == "experts"]
    count = groups[0].count
    assert groups[0].per_block == (4 if name == "deepseek_v3" else 0)
    block = groups[0].per_block or count
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(g, {i for i in range(count) if i % block < block // 2}) for g in groups])
    left = [
        t
        for n, t in program.model.state_dict().items()
        if ".experts." in n or "gate." in n or "router." in n or "expert_bias" in n
    ]
    assert left and all(count not in t.shape[:1] for t in left)
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    bound = equivalence.record_logits_of_sample_calls(program.model)
    assert all(t.isfinite().all() for t in bound)


def test_a_branch_that_reads_the_sum_before_it_does_not_hide_the_branch_of_that_sum():
    """RWKV's feed-forward is handed the state of the attention, which it did not take from the sum alone."""
    joins = [b.join for b in skeleton_of(capture(tiny.model("rwkv"))).branches]
    assert joins == ["add"] * 3


def test_a_branch_that_the_model_asks_for_by_name_is_refused_before_anything_changes():
    program = copy.deepcopy(captured("recurrent_gemma"))
    before, branch = equivalence.record_logits_of_sample_calls(program.model), skeleton_of(program).branches[0]
    with pytest.raises(Reject) as refused:
        Rewriter(program).drop_branch(
            branch.unit, branch.join, other_operand_of_join(program.units[branch.unit].graph, branch)
        )
    assert refused.value.diagnostics[0].fault is layer_needed
    assert equivalence.max_difference(before, equivalence.record_logits_of_sample_calls(program.model)) == 0.0


def test_branches_of_a_layer_have_sites_of_their_own():
    sites = [b.site for b in skeleton_of(captured("fnet")).branches]
    assert len(set(sites)) == len(sites) and "fnet.encoder.layer.0.fourier.self" in sites


def test_a_branch_without_weights_can_not_come_back_as_zeros():
    program = copy.deepcopy(captured("fnet"))
    branch = next(b for b in skeleton_of(program).branches if not b.parts)
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(branch.unit, branch.join, other_operand_of_join(program.units[branch.unit].graph, branch))
    assert "fourier" in " ".join(plan_padding_to_stock(program).reasons)


@pytest.mark.slow
def test_query_heads_whose_keys_another_layer_makes_come_back_beside_the_right_ones():
    program = copy.deepcopy(captured("gemma3n"))
    group = next(g for g in skeleton_of(program).groups if g.kind == "heads" and g.site.startswith("model.layers.2."))
    silenced = copy.deepcopy(program.model)
    timeouts(silenced, group, {0, 2})
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(group, {0, 2})])
    filled = plan_padding_to_stock(program)
    assert not filled.reasons
    stock = copy.deepcopy(silenced)
    stock.load_state_dict({piece.name: piece.make() for piece in filled.padded_tensor_pieces(program)}, strict=False)
    assert max_logit_difference(silenced, stock) < 1e-4


@pytest.mark.slow
def test_heads_come_back_in_their_own_width_or_not_at_all():
    """A config without a word for it makes the same width of fewer, wider heads."""
    program = copy.deepcopy(captured("deberta_v2"))
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(g, {0, 1}) for g in skeleton_of(program).groups if g.kind == "heads"])
    filled, stock = plan_padding_to_stock(program), table.model("deberta_v2")
    assert not filled.reasons and filled.config.num_attention_heads == 4
    stock.load_state_dict({piece.name: piece.make() for piece in filled.padded_tensor_pieces(program)}, strict=False)
    assert max_logit_difference(program.model, stock) < 1e-4


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("olmo2", "heads", "a norm or a mixing function runs over several heads"),
        ("bloom", "heads", "from outside of the layer, has an entry for each of them"),
        ("mpt", "heads", "from outside of the layer, has an entry for each of them"),
        ("fnet", "heads", ""),
    ],
)
def test_what_can_not_go_is_refused_with_the_reason_that_is_about_it(name, kind, said):
    program = captured(name)
    with pytest.raises(Reject) as refused:
        reject_if_model_has_none(skeleton_of(program), kind, ())
    assert said in refused.value.diagnostics[0].message.split(";", 1)[-1]


def test_a_score_of_logits_is_refused_where_there_are_none():
    with pytest.raises(Reject, match="returns pooled, and no logits"):
        logits_of_output({"pooled": torch.zeros(2, 3)})


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len"])
def test_a_models_longest_row_is_known_by_each_of_its_names(name):
    assert Origin("x", {name: 128}, None, "x", None, None, None).positions == 128


def test_image_models_with_a_vocabulary_are_given_images():
    """BEiT counts the codes of picture patches under that name."""
    model = captured("beit").model
    assert model.config.vocab_size == 128 and set(make_probe_inputs(model)) == {"pixels"}
    assert Origin("x", model.config.to_dict(), None, "x", None, None, None).token_id_count is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_that_draw_random_numbers_are_refused(device):
    with pytest.raises(Reject) as refused:
        capture(table.model("vit_mae").to(device))
    said = refused.value.diagnostics[0].message
    assert "vit.embeddings draws random numbers when it runs" in said and "torch.rand(" in said


@pytest.mark.slow
def test_a_size_that_a_layer_is_handed_is_known_after_its_graph_was_stored():
    """Swin's layers take height and width as a tuple, which JSON has as a list."""
    program, again = copy.deepcopy(captured("swin")), table.model("swin")
    branch = skeleton_of(program).branches[0]
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(branch.unit, branch.join, other_operand_of_join(program.units[branch.unit].graph, branch))
    replay_edits(again, Edits.from_json(json.loads(json.dumps(program.edits.to_json()))))
    again.load_state_dict(program.model.state_dict())
    expected, found = (
        probe_model(model, make_probe_inputs(model))["outputs of a batch"] for model in (program.model, again)
    )
    assert torch.equal(expected, found)


class Skipped(nn.Linear):
    """A number is drawn before the layer asks whether it trains."""

    def forward(self, x):
        drawn = torch.rand([])
        return x if self.training and drawn < 0.5 else x + super().forward(x)


def test_layers_that_are_left_out_while_training_alone_draw_a_number():
    program = capture(Stack(lambda: Skipped(8, 8)).eval())
    assert len(skeleton_of(program).branches) == 2


def test_models_that_generate_from_a_second_stream_are_refused_with_and_without_weights():
    with without_storage():
        bare = XLNetLMHeadModel(table.model("xlnet").config)  # it asks for parameters of the CPU
    for model in (table.model("xlnet"), bare):
        with pytest.raises(Reject) as refused:
            capture(model)
        (found,) = refused.value.diagnostics
        assert "transformer.layer.0 can't be captured: it is given output_g" in found.message
        assert "one graph must hold for all calls" in found.help


@pytest.mark.parametrize("name", ["mamba2", "mamba", "falcon_mamba"])
def test_weights_of_mamba_are_taken_and_left_as_they_are_stored(tmp_path, name):
    """transformers makes them smaller at every load where the config says how they once began."""
    model = table.model(name)
    model.config.rescale_prenorm_residual = True
    model.save_pretrained(tmp_path / "base")
    origin = origin_of_folder(tmp_path / "base", "x", "auto", Settings(tmp_path / "cache"))
    loaded = origin.load()
    assert origin.notes == (NOTE,) and same_weights(model, loaded)
    written(loaded, origin, tmp_path)
    found = type(model).from_pretrained(tmp_path / "out" / "model")
    assert not found.config.rescale_prenorm_residual and same_weights(model, found)
    assert "`rescale_prenorm_residual`" in (tmp_path / "out" / "notes.json").read_text()


def test_nemotrons_flag_stays_for_its_class_looks_before_it_rescales(tmp_path):
    model = table.model("nemotron_h")
    model.save_pretrained(tmp_path / "base")
    origin = origin_of_folder(tmp_path / "base", "x", "auto", Settings(tmp_path / "cache"))
    written(origin.load(), origin, tmp_path)
    found = type(model).from_pretrained(tmp_path / "out" / "model")
    assert not origin.notes and found.config.rescale_prenorm_residual and same_weights(model, found)


# -- plain modules -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A matrix turned by a property, and a sum of weighed parts."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(16, 8)), nn.Linear(16, 8)

    def forward(self, x):
        return 0.5 * x + 2.0 * self.down(torch.maximum(x @ self.up.T, torch.tensor(0.1)))


class Repeated(nn.Module):
    """Keys and values written into a new tensor, and repeated for the query heads that they serve."""

    def __init__(self):
        super().__init__()
        self.heads, self.served = 4, 2
        self.q, self.kv, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, -1, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, t, -1, 8).transpose(1, 2).chunk(2, -1)
        made = k.new_empty(k.shape)
        made[..., :2].copy_(k[..., :2])
        made[..., 2:] = k[..., 2:]
        k, v = (y.repeat_interleave(self.heads // self.served, dim=1) for y in (made, v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Strided(nn.Module):
    """Gate and value interleaved, the larger of two kept, a slope for each channel."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x):
        y = self.up(x)
        return x + self.down(torch.max(y[..., ::2], y[..., 1::2]))


class Stack(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])
        self.dummy_inputs = {"x": torch.randn(2, 3, 8)}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("layer", "kind", "count"), [(Tied, "channels", 16), (Repeated, "kv_heads", 2), (Strided, "channels", 12)]
)
def test_plain_layers_can_be_sliced(layer, kind, count):
    program = capture(Stack(layer).eval())
    assert {g.count for g in skeleton_of(program).groups if g.kind == kind} == {count}
    assert len(skeleton_of(program).branches) == 2
    assert_sliced_is_silenced(program, kind)


@pytest.mark.parametrize("name", ["convnext", "resnet"])
def test_models_of_halves_are_shown_images_of_halves(name):
    model = copy.deepcopy(table.model(name)).bfloat16()
    looked = probe_model(model, make_probe_inputs(model))["outputs of a batch"]
    args, given = forward_args_and_kwargs(model, make_probe_inputs(model)["pixels"])
    with torch.no_grad():
        assert torch.equal(model(*args, **given).logits.float(), looked)
    assert skeleton_of(capture(model)).groups
