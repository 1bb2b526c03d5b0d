"""lower.cpu_scan and effc.load: kernels for scans, the same outputs, for all mixers and after what passes did to them."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.driver import api
from effc.compiler.driver.models import resolve_origin
from effc.compiler.evaluation.equivalence import max_difference, record_logits_of_sample_calls
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.ir.layers import decode_steps, fast_mixers, scan_chunks
from effc.compiler.ir.layers.fast_mixers import (
    MARK,
    remove_mixer_kernels,
    runs_on_kernels,
    scan_paths,
    use_mixer_kernels,
    without_mixer_kernels,
)
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.editing.scan_removal import drop_scan
from effc.compiler.transforms.search.widths import slice_group
from effc.dsl.syntax.render import render
from effc.kernels import levels
from transformers import AutoModelForCausalLM

from tests import mixers, tiny
from tests.grids import wide
from tests.recipes_in_memory import context_of, recipe_of
from tests.weights import load_weights, weights_of
from tests.worlds import context, refused, slug

ALL = (*mixers.MAMBA1, *mixers.MAMBA2)
STEPS = {
    **dict.fromkeys(mixers.MAMBA1, decode_steps.selective_step),
    **dict.fromkeys(mixers.MAMBA2, decode_steps.ssd_step),
    "falcon_h1": None,
}  # gates without a norm, and weighs what it projects
IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [0] * 9 + [1] * 3, [0, *[1] * 11]])
TOLERANCE = 1e-4


def lowered(tmp_path, model):
    """The program of a copy of the model after the pass."""
    recipe = recipe_of([("fast", "lower.cpu_scan", {})])
    ctx = context_of(tmp_path, model, recipe)
    program = capture(copy.deepcopy(model))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def generated(model, **options):
    return model.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )


def assert_generates_alike(one, other):
    """Logits of a prefill and of decode steps, of a left-padded batch; greedy tokens where no tie decides."""
    first, second = generated(one), generated(other)
    for a, b in zip(first.logits, second.logits, strict=True):
        assert float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))
    assert torch.equal(first.sequences, second.sequences)


# -- the same outputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_kept_on_all_shapes_padded_and_while_decoding(tmp_path, name):
    model = mixers.model(name)
    program = lowered(tmp_path, model)
    expected, actual = (record_logits_of_sample_calls(m) for m in (model, program.model))
    assert max_difference(expected, actual) <= TOLERANCE
    assert_generates_alike(model, program.model)
    assert (paths := scan_paths(program.model)) and all(runs_on_kernels(program.model.get_submodule(p)) for p in paths)
    assert not any(runs_on_kernels(module) for module in model.modules())


@pytest.mark.parametrize("name", ALL)
def test_a_mixer_of_a_known_family_decodes_in_one_step(name):
    model = mixers.model(name)
    use_mixer_kernels(model)
    generated(model)
    assert {decode_steps._proven[model.get_submodule(path)] for path in scan_paths(model)} == {STEPS[name]}


PIECES = {
    name: step
    and {decode_steps.selective_step: scan_chunks.selective_chunk, decode_steps.ssd_step: scan_chunks.ssd_chunk}[step]
    for name, step in STEPS.items()
}


@pytest.mark.parametrize("name", ALL)
def test_a_long_padded_prefill_goes_by_pieces_and_is_decoded_from(name, monkeypatch):
    model = mixers.model(name)
    quick = copy.deepcopy(model)
    use_mixer_kernels(quick)
    sizes = []
    monkeypatch.setattr(scan_chunks, "ROWS", 120)
    monkeypatch.setattr(scan_chunks, "scan_in_chunks", recorded(scan_chunks.scan_in_chunks, sizes))
    ids = torch.randint(3, 128, (3, 101), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :70] = mask[2, :3] = 0
    with torch.no_grad():
        for rows in (ids, ids[:1]):
            a, b = (each(rows, attention_mask=mask[: len(rows)], use_cache=True) for each in (model, quick))
            assert close(a.logits[mask[: len(rows)] > 0], b.logits[mask[: len(rows)] > 0])
            longer = torch.cat([mask[: len(rows)], mask[: len(rows), :1] * 0 + 1], 1)
            a, b = (
                each(rows[:, :1], attention_mask=longer, cache=out.cache, use_cache=True)
                for each, out in ((model, a), (quick, b))
            )
            assert close(a.logits, b.logits) and mixers.counted_positions(a.cache) == mixers.counted_positions(b.cache)
    assert {scan_chunks._proven[quick.get_submodule(path)] for path in scan_paths(quick)} == {PIECES[name]}
    assert PIECES[name] is None or {34, 101} <= set(sizes)  # three rows of 34 positions; one row at once


def recorded(over, sizes: list[int]):
    def told(family, mixer, hidden, mask, size):
        sizes.append(size)
        return over(family, mixer, hidden, mask, size)

    return told


def close(a, b) -> bool:
    return float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_short_and_a_second_stretch_and_a_listener_get_the_whole_at_once(name):
    model = mixers.model(name)
    quick = copy.deepcopy(model)
    use_mixer_kernels(quick)
    ids = torch.randint(3, 128, (1, 80), generator=torch.Generator().manual_seed(2))
    lengths = []
    (path, *_) = scan_paths(quick)
    with torch.no_grad():
        caches = [each(ids[:, :40], use_cache=True).cache for each in (model, quick)]
        assert close(
            *(each(ids[:, 40:], cache=c, use_cache=True).logits for each, c in zip((model, quick), caches, strict=True))
        )
        quick.get_submodule(path).in_proj.register_forward_hook(lambda _, given, out: lengths.append(given[0].shape[1]))
        wanted = model(ids, use_cache=False).logits
        assert close(wanted, quick(ids, use_cache=False).logits)
    assert lengths == [80]


@pytest.mark.parametrize("name", ["falcon_h1", "zamba"])
def test_a_mixer_that_computes_otherwise_is_not_stepped_and_still_right(name):
    # multipliers on the projection, heads with projections of their own: a step of the published family is wrong
    if name == "zamba":
        from transformers import ZambaConfig, ZambaForCausalLM

        torch.manual_seed(0)
        config = ZambaConfig(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            pad_token_id=0,
            n_mamba_heads=2,
            intermediate_size=96,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
            num_key_value_heads=4,
        )
        model = ZambaForCausalLM(config).eval()
    else:
        model = mixers.model(name, mamba_expand=2, ssm_in_multiplier=0.7, ssm_multipliers=[0.9, 1.2, 0.8, 1.1, 0.7])
    quick = copy.deepcopy(model)
    assert use_mixer_kernels(quick) and scan_paths(quick)
    assert max_difference(record_logits_of_sample_calls(model), record_logits_of_sample_calls(quick)) <= TOLERANCE
    assert_generates_alike(model, quick)
    assert {decode_steps._proven[quick.get_submodule(path)] for path in scan_paths(quick)} == {None}


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_bfloat16_keeps_outputs_within_its_rounding(name):
    model = mixers.model(name).bfloat16()
    quick = copy.deepcopy(model)
    use_mixer_kernels(quick)
    wide = record_logits_of_sample_calls(copy.deepcopy(model).float())
    # to the same model in float32 it is no further off than the library's own bfloat16
    assert max_difference(wide, record_logits_of_sample_calls(quick)) <= 1.5 * max_difference(
        wide, record_logits_of_sample_calls(model)
    )
    ids = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wide, plain, fast = (
            each(ids, use_cache=False).logits.float() for each in (copy.deepcopy(model).float(), model, quick)
        )
    assert float((fast - wide).norm()) <= 1.5 * float((plain - wide).norm())
    assert None not in {scan_chunks._proven[quick.get_submodule(path)] for path in scan_paths(quick)}


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gradients_are_those_of_the_library(name):
    model = mixers.model(name).train()
    quick = copy.deepcopy(model)
    use_mixer_kernels(quick)
    for each in (model, quick):
        each(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for (path, a), (_, b) in zip(model.named_parameters(), quick.named_parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-4 * float(a.grad.abs().max()) + 1e-6, path


def test_a_chunked_prefill_and_beams_go_on_from_a_state():
    for name in ("mamba2", "bamba"):
        model = mixers.model(name)
        quick = copy.deepcopy(model)
        use_mixer_kernels(quick)
        with torch.no_grad():
            for each, found in ((model, first := []), (quick, second := [])):
                cache = each(IDS[:, :5], use_cache=True).cache
                found += [each(IDS[:, 5:], use_cache=True, cache=cache).logits]
                found += [each.generate(IDS, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)]
        assert float((first[0] - second[0]).abs().max()) <= TOLERANCE and torch.equal(first[1], second[1])


def first_of_each(group) -> set[int]:
    """The first item of a group, or of each of its blocks."""
    size = group.per_block or group.count
    return set(range(0, group.count, size))


# -- after other passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "zamba2"])
def test_a_model_that_lost_a_scan_and_states_runs_on_kernels_and_reloads_so(tmp_path, name):
    program = capture(mixers.model(name))
    with Rewriter(program) as rewrite:
        drop_scan(program, rewrite, skeleton_of(program).scans[0])
    for kind in ("ssm_heads", "ssm_channels", "ssm_state"):
        if group := next((g for g in skeleton_of(program).groups if g.kind == kind and g.count > 2), None):
            with Rewriter(program) as rewrite:
                slice_group(program, rewrite, group, first_of_each(group))
    before = record_logits_of_sample_calls(program.model)
    recipe = recipe_of([("fast", "lower.cpu_scan", {})])
    ctx = context_of(tmp_path, program.model, recipe)
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    assert max_difference(before, record_logits_of_sample_calls(program.model)) <= TOLERANCE

    fresh = mixers.blank(name)
    replay_edits(fresh, Edits.from_json(json.loads(json.dumps(program.edits.to_json()))))
    load_weights(fresh, weights_of(program.model))
    with without_mixer_kernels(program.model) as differs, without_mixer_kernels(fresh) as differs_too:
        assert differs and differs_too
        assert max_difference(before, record_logits_of_sample_calls(program.model)) == 0
    assert (
        max_difference(record_logits_of_sample_calls(fresh), record_logits_of_sample_calls(program.model)) <= 1e-5
    )  # its first step was the library's
    assert scan_paths(fresh) == scan_paths(program.model) == [s.site for s in skeleton_of(program).scans]
    assert_generates_alike(fresh, program.model)


def test_a_lowered_model_is_captured_again_as_the_library_writes_it(tmp_path):
    for name in ("mamba", "bamba"):
        model = mixers.model(name)
        before = capture(copy.deepcopy(model))
        after = capture(lowered(tmp_path, model).model)
        assert {path: unit.key for path, unit in before.units.items()} == {
            path: unit.key for path, unit in after.units.items()
        }
        assert skeleton_of(before) == skeleton_of(after)


# -- recipes and artifacts -----------------------------------------------------------------------------------

RECIPE = """effspec 1
data rows = text("rows.txt", samples: 2, length: 32)
model base = zoo("{name}")
pipeline lean(base) {{
{steps}  fast = lower.cpu_scan()
}}
emit lean {{ hf("out") }}
"""
STEP = "  thin = shed.ssm(remove: 1, score: perplexity(rows))\n"


def compiled(tmp_path, name: str, steps: str = ""):
    (tmp_path / "rows.txt").write_text("The river ran past the old mill, and the miller slept. " * 8)
    (tmp_path / "r.effspec").write_text(RECIPE.format(name=name, steps=steps))
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path, cache_dir=tmp_path / "cache", threads=1)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, steps, form",
    wide([("tiny-mamba2", "", "model"), ("tiny-hybrid", STEP, "compact")], {("tiny-hybrid", STEP, "compact")}),
)
def test_an_artifact_is_stock_where_shapes_allow_and_loads_with_kernels(tmp_path, name, steps, form):
    compiled(tmp_path, name, steps)
    assert (tmp_path / "out" / form).is_dir()
    loaded = api.load(tmp_path / "out")
    assert (paths := scan_paths(loaded)) and all(runs_on_kernels(loaded.get_submodule(p)) for p in paths)
    plain = api.load(tmp_path / "out", kernels=False)
    assert all(runs_on_kernels(plain.get_submodule(path)) for path in scan_paths(plain)) == (form == "compact")
    remove_mixer_kernels(plain)
    assert not any(runs_on_kernels(module) for module in plain.modules())
    assert max_difference(record_logits_of_sample_calls(plain), record_logits_of_sample_calls(loaded)) <= TOLERANCE
    assert_generates_alike(plain, loaded)
    # what a loaded model saves is loaded again, and transformers itself knows nothing of kernels
    loaded.save_pretrained(tmp_path / "again")
    again = (
        api.load(tmp_path / "again")
        if form == "compact"
        else AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    )
    assert max_difference(record_logits_of_sample_calls(again), record_logits_of_sample_calls(loaded)) <= TOLERANCE
    if form == "model":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
        assert not any(runs_on_kernels(module) or MARK in vars(module) for module in stock.modules())
        assert MARK not in (tmp_path / "out" / "model" / "config.json").read_text()

    if steps:  # a second compile goes on from what is kept, kernels and all
        (tmp_path / "r.effspec").write_text((tmp_path / "r.effspec").read_text().replace('hf("out")', 'hf("two")'))
        (plan,) = api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache", threads=1)
        assert all(stage.cached for stage in plan.stages)
        (result,) = api.compile(tmp_path / "r.effspec", tmp_path, cache_dir=tmp_path / "cache", threads=1)
        assert result.artifacts and (tmp_path / "two" / "compact").is_dir()


def test_the_zoo_keeps_its_outputs(tmp_path):
    for name in ("tiny-mamba2", "tiny-hybrid"):
        model = resolve_origin(f"zoo:{name}", context(tmp_path).settings).load().eval()
        quick = copy.deepcopy(model)
        assert use_mixer_kernels(quick)
        assert max_difference(record_logits_of_sample_calls(model), record_logits_of_sample_calls(quick)) <= TOLERANCE
        assert_generates_alike(model, quick)


# -- what is refused, and what stays the library's -----------------------------------------------------------


def test_a_model_without_a_scan_is_refused_with_a_sentence(tmp_path):
    found = refused(lambda: lowered(tmp_path, tiny.model("llama"))).diagnostics
    assert found[0].slug == "no-scan" and "llama has no scan" in render(found)
    assert slug(lambda: compiled(tmp_path, "tiny-llama")) == "no-scan"


def test_a_second_lowering_and_another_device_are_refused(tmp_path):
    recipe = recipe_of([("fast", "lower.cpu_scan", {})])
    program = lowered(tmp_path, mixers.model("mamba2"))
    ctx = context_of(tmp_path, program.model, recipe)
    step = ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    assert slug(lambda: step.run(program, ctx)) == "scans-are-lowered"
    ctx = replace(ctx, settings=replace(ctx.settings, device="cuda"))
    assert slug(lambda: step.run(program, ctx)) == "no-scan-kernels"


def test_without_compiled_kernels_the_step_is_refused_and_a_load_does_without(tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "load_library", lambda: None)
    assert slug(lambda: lowered(tmp_path, mixers.model("mamba2"))) == "no-scan-kernels"
    assert use_mixer_kernels(mixers.model("mamba2")) == []


def test_what_the_kernels_can_not_take_goes_to_the_library():
    model = mixers.model("mamba").double()
    quick = copy.deepcopy(model)
    use_mixer_kernels(quick)
    assert max_difference(record_logits_of_sample_calls(model), record_logits_of_sample_calls(quick)) == 0
    odd = mixers.model("mamba", hidden_act="gelu")
    quick = copy.deepcopy(odd)
    use_mixer_kernels(quick)
    assert max_difference(record_logits_of_sample_calls(odd), record_logits_of_sample_calls(quick)) <= TOLERANCE
    packed = mixers.model("mamba2")
    use_mixer_kernels(packed)
    with pytest.raises(ValueError, match="packed sequences"):
        packed.backbone.layers[0].mixer(torch.zeros(1, 4, packed.config.hidden_size), seq_idx=torch.zeros(1, 4))


def test_quickening_leaves_the_librarys_functions_and_other_models_alone():
    from transformers.models.mamba2 import modeling_mamba2

    before = dict(vars(modeling_mamba2))
    model, other = mixers.model("mamba2"), mixers.model("mamba2")
    use_mixer_kernels(model)
    generated(model)
    assert all(vars(modeling_mamba2)[name] is held for name, held in before.items())
    assert not any("forward" in vars(module) for module in other.modules())
    assert fast_mixers.scan_paths(other) == fast_mixers.scan_paths(model)
