"""Encoders with a decoder: one program of two stacks, whose decoder keeps what the encoder gave in a second cache."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import transformers
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.verify import make_probe_inputs
from effc.compiler.artifacts.verify_child import probe_model
from effc.compiler.evaluation import equivalence, timing
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.program import Program
from effc.compiler.models.rows import inputs
from effc.compiler.models.rows.forward import logits, total_nll
from effc.compiler.transforms.editing.dry_run import layer_needed
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.supernet.choices import LAYERS
from effc.compiler.transforms.supernet.elastic_dims import depth_dims
from effc.dsl.syntax.diagnostics import Reject
from torch import nn

from tests.architectures import table
from tests.architectures.passes import context
from tests.architectures.test_unseen import assert_sliced_is_silenced
from tests.compiler.driver.test_rows_of_others import HEARS
from tests.equivalence import max_logit_difference

torch.set_num_threads(1)
NAMES = ("t5", "bart", "marian")
STEPS = 5


@functools.cache
def captured(name: str) -> Program:
    return capture(table.model(name))


def generated(model: nn.Module) -> list[torch.Tensor]:
    """Logits step by step with the caches, with sources filled up at the left; and what three beams say."""
    ids = torch.arange(14).view(2, 7) % 50 + 4
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    asked = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    with torch.no_grad():
        made = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **asked)
        return [torch.stack(made.logits), model.generate(ids, attention_mask=mask, num_beams=3, **asked)]


@pytest.mark.parametrize("name", NAMES)
def test_what_can_not_be_narrowed_has_a_name_though_no_module_encloses_both_stacks(name):
    program = captured(name)
    for path, _ in skeleton_of(program).facts["refused"]:
        assert path and program.model.get_submodule(path), path


@pytest.mark.parametrize("name", NAMES)
def test_the_graphs_say_what_the_model_says_token_by_token(name):
    program, reference = copy.deepcopy(captured(name)), table.model(name)
    assert not program.opaque
    expected, said = generated(reference), equivalence.record_logits_of_sample_calls(reference)
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    assert equivalence.max_difference(said, equivalence.record_logits_of_sample_calls(program.model)) == 0.0
    assert equivalence.max_difference(expected, generated(program.model)) == 0.0


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_without_any_branch_the_caches_stay_right(name):
    """Against the model whose branch adds zeros; the decoder's own cache is asked at its first slot how long it is."""
    removed = 0
    for branch in skeleton_of(captured(name)).branches:
        program = copy.deepcopy(captured(name))
        silenced = copy.deepcopy(program.model)
        try:
            with Rewriter(program) as rewrite:
                rewrite.drop_branch(
                    branch.unit, branch.join, other_operand_of_join(program.units[branch.unit].graph, branch)
                )
        except Reject as refused:  # T5's first layer makes the table of positions for all
            assert refused.diagnostics[0].fault is layer_needed and ".0" in branch.unit and name == "t5"
            continue
        removed += 1
        with torch.no_grad():
            for part in branch.parts:
                for parameter in silenced.get_submodule(part).parameters(recurse=False):
                    parameter.zero_()
        assert max_logit_difference(silenced, program.model) < 1e-5
        assert equivalence.max_difference(generated(silenced), generated(program.model)) < 1e-5
    assert removed >= 7


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_no_whole_layer_goes_where_two_stacks_share_a_config(name):
    program = captured(name)
    for unit in (list(program.units)[1], list(program.units)[-1]):
        with pytest.raises(Reject) as refused:
            Rewriter(program).drop_layer(unit)
        assert refused.value.diagnostics[0].fault is layer_needed and unit in refused.value.diagnostics[0].message
    assert depth_dims(program, None, LAYERS) == []


@pytest.mark.parametrize(
    ("name", "kind"), [("t5", "channels"), ("bart", "channels"), ("bart", "heads"), ("whisper", "heads")]
)
def test_both_stacks_can_be_sliced(name, kind):
    sites = {g.site.split(".")[-4] for g in skeleton_of(captured(name)).groups if g.kind == kind}
    assert sites
    assert_sliced_is_silenced(captured(name), kind)


@pytest.mark.slow
def test_a_model_that_hears_says_the_same_of_sounds_token_by_token():
    program, reference = copy.deepcopy(captured("whisper")), table.model("whisper")
    said = equivalence.record_logits_of_sample_calls(reference)
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    assert len(program.units) == 4 and not program.opaque
    assert equivalence.max_difference(said, equivalence.record_logits_of_sample_calls(program.model)) == 0.0
    probed = probe_model(reference, make_probe_inputs(reference))["logits of a batch, and of decode steps"]
    assert torch.allclose(probed[:, :8], probed[:, 12:20], atol=1e-5), "the first steps, and the whole"


def test_a_model_that_hears_is_run_on_no_rows_of_tokens():
    with pytest.raises(Reject, match="hears sounds"):
        inputs.forward_args_and_kwargs(table.model("whisper"), torch.ones(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("word", ["pt2", "gguf"])
def test_targets_of_one_program_refuse_them_before_any_pass_runs(tmp_path, word):
    model = table.model("bart")
    ctx = context(model, tmp_path, "bart")
    ctx = replace(ctx, origin=replace(ctx.origin, build=lambda: type(model)(model.config)))
    with pytest.raises(Reject) as refused:
        ctx.registry.import_plugin_class("target", word)(path="x").check_requirements(ctx)
    (found,) = refused.value.diagnostics
    assert (
        "an encoder with a decoder" in found.message
        or "no GGUF of `bart`" in found.message
        or "package" in found.message
    )
    assert "pt2" not in found.help, "which refuses them too"


@pytest.mark.parametrize("clock", [timing.make_prefill_step, timing.make_decode_step])
def test_a_source_is_timed_and_tokens_are_said_behind_it(clock):
    step = clock(table.model("t5"), 8)
    with torch.no_grad():
        assert min(step() for _ in range(3)) > 0


def test_the_loss_of_a_row_is_the_models_own_of_its_target():
    """transformers reckons it from `labels`, where -100 does not count."""
    model, fill = table.model("t5"), table.model("t5").config.pad_token_id
    rows = torch.arange(40).view(2, 20) % 60 + 4
    rows[0, 6:10] = rows[1, 17:20] = fill
    source, target = rows[:, :10], rows[:, 10:]
    wanted = target.masked_fill(~inputs.non_padding_mask(target, fill), -100)
    with torch.no_grad():
        mask = inputs.non_padding_mask(source, fill).long()
        expected = model(input_ids=source, attention_mask=mask, labels=wanted).loss.item()
        assert logits(model, rows).shape[:2] == (2, 10)
    nats, count = total_nll(model, rows)
    assert count == 17 and nats / count == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", HEARS)
def test_a_model_that_hears_says_the_same_of_any_sounds_token_by_token(kind):
    config = getattr(transformers, f"{kind}Config")(**HEARS[kind])
    cls = getattr(transformers, f"{kind}ForSpeechToText" if kind == "SpeechT5" else f"{kind}ForConditionalGeneration")
    program, reference = (table.randomized(lambda: cls(config), spread=0.05) for _ in range(2))
    program, said = capture(program), equivalence.record_logits_of_sample_calls(reference)
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    assert len(program.units) >= 4 and not program.opaque
    assert equivalence.max_difference(said, equivalence.record_logits_of_sample_calls(program.model)) == 0.0
    probed = probe_model(reference, make_probe_inputs(reference))["logits of a batch, and of decode steps"]
    assert torch.allclose(probed[:, :8], probed[:, 12:20], atol=1e-5), "the first steps, and the whole"


def test_a_capture_leaves_the_statistics_of_batch_norms_as_they_were():
    config = transformers.CanaryConfig(**HEARS["Canary"])
    model = table.randomized(lambda: transformers.CanaryForConditionalGeneration(config))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    capture(model)
    assert any("running_var" in name for name in before)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
