"""lower.sparse_cpu: what wins, what stays as it is and why, what it costs, and what is refused."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.layer_profile import layer_group_counts, layer_group_counts_of_packed
from effc.compiler.analysis.planning.machine_profile import refuse_other_machine_profiles
from effc.compiler.analysis.planning.shape_change import describe_change
from effc.compiler.core.fingerprint import usable_cpu_count
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import kernel_linears
from effc.compiler.ir.layers.number_formats import BY_NAME, DENSE
from effc.compiler.plugin.registry import Registry
from effc.compiler.transforms.lowering import choice, racing, speed
from effc.compiler.transforms.lowering.choice import Site
from effc.compiler.transforms.lowering.contenders import EAGER
from effc.compiler.transforms.lowering.speed import KernelCase, estimate_seconds_by_contender
from effc.dsl.checker.values import DataRef, ProfileRef, Selector
from effc.kernels import levels
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults, refused, torch_packs_bfloat16

IDS = torch.arange(3, 23).view(2, 10)
SPARSE = {"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.mlp.up_proj": 0.9}


@pytest.fixture(autouse=True)
def short_races(monkeypatch):
    """Copies for a real cache and races that settle would take the tests' time; decisions are not asserted here."""
    monkeypatch.setattr(racing, "last_level_cache_bytes", lambda: 1 << 14)
    monkeypatch.setattr(speed, "SECONDS", 1e-3)


def decided(weight, kernels, rows, isa):
    """A race in which torch is slowest, and kernels are the faster the later they come."""
    return {EAGER: 2.0, **{kernel: 1.0 / (i + 1) for i, kernel in enumerate(kernels)}}


def on(*globs: str) -> Selector:
    return Selector(tuple(("|", glob) for glob in globs))


def sparse(name: str = "llama", zeros=SPARSE, **changes):
    model = tiny.model(name, **changes)
    for path, share in zeros.items():
        weight = model.get_parameter(f"{path}.weight").data
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share] = 0
    return model


def prepared(tmp_path, model, profiles=None, **args):
    given = {**defaults("pass", "lower.sparse_cpu"), "data": DataRef("rows"), "divergence": 9.0, **args}
    recipe = recipe_of([("cpu", "lower.sparse_cpu", given)])
    recipe = type(recipe)(**{**vars(recipe), "profiles": profiles or {}})
    ctx = context_of(tmp_path, model, recipe)
    return capture(copy.deepcopy(model)), ctx, ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)


def run(tmp_path, model, **args):
    """The program after the pass, and its note."""
    program, ctx, pass_ = prepared(tmp_path, model, **args)
    pass_.run(program, ctx)
    return program, program.notes[-1]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_packed_modules_tell_the_widths_that_their_groups_had(tmp_path, name):
    before = skeleton_of(capture(tiny.model(name)))
    program, _ = run(tmp_path, tiny.model(name), format="dense_bf16")
    assert skeleton_of(program).groups == ()
    wanted, found = (
        layer_group_counts(before),
        layer_group_counts_of_packed(before, skeleton_of(program), program.edits.swapped),
    )
    for layer, branches in wanted.items():
        for branch, widths in branches.items():
            fused = {"heads", "kv_heads"} & (widths.keys() - found[layer][branch].keys())
            assert found[layer][branch] == {k: v for k, v in widths.items() if k not in fused}
        assert any("channels" in widths for widths in found[layer].values())
    assert describe_change(before, skeleton_of(program)).summary.endswith("linear modules on kernels")


def test_every_pass_that_changes_a_weight_comes_before_it():
    """All but those that take whole layers and branches, which are as easily taken once they are packed, those that put
    interventions beside the weights and train these alone, and those that only gather results."""
    passes = Registry().vocabulary.words("pass")
    assert set(passes["lower.sparse_cpu"].facts["after"]) == {"changes: weights"}
    changing = {name for name in passes if not name.startswith("lower.")}
    assert {name for name in passes if "weights" in passes[name].facts["changes"]} == changing - {
        "prune.blocks",
        "shed.blocks",
        "reft.insert",
        "tune.reft",
        "search.front",
        "search.steps",
    }


def test_no_pass_lists_those_that_change_the_same_by_hand():
    passes = Registry().vocabulary.words("pass")
    changes = {name: set(passes[name].facts["changes"]) for name in passes}
    classes = set().union(*changes.values())
    assert classes == {"weights", "values", "branches"}
    for name in passes:
        rules = {rule.removeprefix("changes: ") for rule in passes[name].facts["after"]}
        assert len(rules & passes.keys()) <= 1 and rules <= classes | passes.keys()


@pytest.mark.parametrize("format", sorted(choice.FORMATS))
def test_a_format_by_name_takes_all_and_the_model_says_nearly_the_same(tmp_path, format):
    model = sparse()
    few = "int4" in format  # 15 steps of a weight show in a model that was not trained
    program, note = run(tmp_path, model, format=format, divergence=1.0 if few else 0.05)
    kernels = {m.kernel for _, m in kernel_linears(program.model)}
    assert (
        kernels == {choice.FORMATS[format]} and len(note["lowered"]) == len(dict(kernel_linears(program.model))) == 22
    )
    ours, theirs = logits(program.model), logits(model)
    shares = {"bf16": 0.02, "int8_int16": 0.05, "int8": 0.15, "int4": 0.6}
    share = shares.get(BY_NAME[format].numbers, BY_NAME[format].tolerance)
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()
    entry = next(e for e in note["lowered"] if e["module"] == "model.layers.1.mlp.up_proj")
    assert (
        entry["format"] == format and 0 < entry["error"] < (0.3 if few else 0.05) and abs(entry["zeros"] - 0.9) < 0.02
    )
    assert entry["bytes"] == program.model.model.layers[1].mlp.up_proj.packed.numel()
    assert 0 < note["accuracy"]["divergence"] < (1.0 if few else 0.05) and note["accuracy"]["perplexity"] > 1
    assert note["times"] == "none"


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "mixtral", "mamba2", "bamba"])
def test_auto_decides_for_every_module_and_gives_a_reason(tmp_path, monkeypatch, name):
    model = tiny.model(name)
    monkeypatch.setattr(
        "effc.passes.lower.sparse_cpu.race_kernels_and_torch",
        lambda w, kernels, rows, isa: {EAGER: 2.0, **dict.fromkeys(kernels, 1.0)},
    )
    program, note = run(tmp_path, model)
    assert note["times"] == "raced here"
    assert all(e["kernel"] == "dense_linear" or e["why"] for e in note["lowered"])
    assert sum(e["kernel"] == "dense_linear" for e in note["lowered"]) == len(dict(kernel_linears(program.model))) > 0
    ours, theirs = logits(program.model), logits(model)
    assert (ours - theirs).abs().median() <= 0.01 * theirs.abs().max()  # a router of mixtral may change its mind


def test_a_race_times_torchs_three_and_every_kernel_that_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "WINS", 0.0)  # whatever is fastest, something is lowered
    _, note = run(tmp_path, sparse(), on=on("*.up_proj"), error=1.0, divergence=10.0)
    cases = {(t["n"], t["k"], t["zeros"]): t["seconds"] for t in note["timings"]}
    assert cases.keys() == {(96, 64, 0.0), (96, 64, 0.5), (96, 64, 0.9)}
    torchs = {"torch", "torch int8 dynamic"} | ({"torch pre-packed"} if torch_packs_bfloat16() else set())
    assert cases[96, 64, 0.9].keys() == {
        *torchs,
        *(k for k in choice.FORMATS.values() if k != "block_sparse_linear"),
    }, "no block is all zero"
    assert cases[96, 64, 0.0].keys() == {*torchs, *(format.kernel for format in DENSE.values())}


def test_a_resumed_build_decides_by_what_was_measured_before_the_kill(tmp_path, monkeypatch):
    model = sparse()
    monkeypatch.setattr("effc.passes.lower.sparse_cpu.race_kernels_and_torch", decided)
    _, first = run(tmp_path, model, on=on("*.up_proj"))
    monkeypatch.setattr("effc.passes.lower.sparse_cpu.race_kernels_and_torch", lambda *_: pytest.fail("raced again"))
    _, again = run(tmp_path, model, on=on("*.up_proj"))
    assert again["lowered"] == first["lowered"] and again["timings"] == first["timings"]


def test_only_a_raced_choice_has_the_machine_in_its_key(tmp_path):
    assert prepared(tmp_path, sparse())[2].reads_clock()
    assert not prepared(tmp_path, sparse(), format="sparse_bf16")[2].reads_clock()
    told = prepared(tmp_path, sparse(), timings="there.json")[2]
    assert not told.reads_clock() and told.files() == ("there.json",)


def test_timings_of_another_machine_decide_as_if_measured_here(tmp_path, monkeypatch):
    model = sparse()
    monkeypatch.setattr("effc.passes.lower.sparse_cpu.race_kernels_and_torch", decided)
    _, first = run(tmp_path, model, on=on("*.up_proj"))
    (tmp_path / "there.json").write_text(json.dumps({"steps": [{"decisions": [first]}]}))
    shutil.rmtree(tmp_path / "work")
    _, again = run(tmp_path, model, on=on("*.up_proj"), timings="there.json")
    assert again["times"] == "from there.json"
    assert [e["kernel"] for e in again["lowered"]] == [e["kernel"] for e in first["lowered"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no timings that can be read"),
        ('{"timings": [{}]}', "can be read"),
        ("{}", "no timing of 96 x 64 float32"),
        (None, "can be read"),
    ],
)
def test_a_file_without_the_timings_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "there.json").write_text(text)
    found = refused(lambda: run(tmp_path, sparse(), on=on("*.up_proj"), timings="there.json")).diagnostics[0]
    assert found.slug == "bad-timings" and said in found.message


def test_for_a_machine_that_this_is_not_times_are_estimated(tmp_path, monkeypatch):
    threads = usable_cpu_count() + 14  # whatever it is, it has no more of them
    profiles = {"xeon": {"isa": "amx_bf16", "threads": threads}}
    monkeypatch.setattr(speed, "CALL", 0.0)  # tiny layers are all calls
    monkeypatch.setattr("effc.passes.lower.sparse_cpu.race_kernels_and_torch", lambda *_: pytest.fail("raced here"))
    program, note = run(tmp_path, sparse(), on=on("*.up_proj"), machine=ProfileRef("xeon"), profiles=profiles)
    assert note["times"] == "estimated"
    assert (note["isa"], note["threads"]) == ("amx", threads) and list(kernel_linears(program.model))


def test_for_a_machine_that_this_is_contenders_race_at_the_level_that_its_profile_names(tmp_path, monkeypatch):
    asked = []

    def noted(weight, kernels, rows, isa):
        asked.append(isa)
        return decided(weight, kernels, rows, isa)

    monkeypatch.setattr("effc.passes.lower.sparse_cpu.race_kernels_and_torch", noted)
    here = levels.available_levels()[-1]
    profiles = {"this": {"isa": here, "threads": 1}}
    _, note = run(tmp_path, sparse(), on=on("*.up_proj"), machine=ProfileRef("this"), profiles=profiles)
    assert note["times"] == "raced here" and set(asked) == {note["isa"]} == {here}


def test_a_profile_of_another_machine_is_no_reason_to_refuse_the_step(tmp_path):
    _, ctx, _ = prepared(tmp_path, sparse(), machine=ProfileRef("xeon"), profiles={"xeon": {"isa": "amx_bf16"}})
    refuse_other_machine_profiles([step.call for step in ctx.recipe.pipelines["lean"].steps], ctx)


def test_weights_that_no_kernel_can_pack_are_refused_with_their_path(tmp_path):
    module = torch.nn.Linear(4, 4)
    module.weight.data[0, 0] = float("nan")
    found = refused(lambda: choice.KernelTrial("up", module, None).pack_or_reject("sparse_linear")).diagnostics[0]
    assert found.slug == "cant-pack" and found.message.startswith("up: ") and "NaN or infinite" in found.message


def test_reckoned_times_know_what_limits_whom():
    case, sizes = KernelCase(4096, 4096, "bfloat16", 0.5, 0.0), {"dense_linear": 2 << 24, "sparse_linear": 9 << 21}
    fast, slow = (estimate_seconds_by_contender(case, sizes, 1, isa, 2) for isa in ("avx512_bf16", "portable"))
    assert fast["torch"] > fast["dense_linear"] > fast["sparse_linear"]  # memory decides
    assert slow["dense_linear"] < slow["sparse_linear"]  # expanding decides
    assert estimate_seconds_by_contender(case, sizes, 1, "avx512_bf16", 8)["dense_linear"] < fast["dense_linear"]
    tiles = [estimate_seconds_by_contender(case, sizes, rows, "amx", 2) for rows in (1, 8, 512)]
    assert tiles[0] == tiles[1] and tiles[0]["torch"] > tiles[0]["dense_linear"] > tiles[0]["sparse_linear"]
    assert tiles[2]["sparse_linear"] > 10 * tiles[0]["sparse_linear"]  # many rows take as long as they compute


def test_times_at_a_level_that_was_never_measured_are_refused():
    case = KernelCase(64, 64, "bfloat16", 0.0, 0.0)
    found = refused(lambda: estimate_seconds_by_contender(case, {"dense_linear": 8192}, 1, "neon", 2)).diagnostics[0]
    assert found.slug == "no-rates" and "neon" in found.message


def test_inputs_of_16_bits_are_reckoned_to_cost_time_where_products_take_it_and_memory_does_not():
    case, sizes = (
        KernelCase(4096, 4096, "bfloat16", 0.0, 0.0),
        dict.fromkeys(("dense_linear_int8_int16", "dense_linear_int8"), 1 << 24),
    )
    one, many = (estimate_seconds_by_contender(case, sizes, rows, "avx512_bf16", 2) for rows in (1, 64))
    assert one["dense_linear_int8_int16"] == one["dense_linear_int8"]
    assert 1.05 < many["dense_linear_int8_int16"] / many["dense_linear_int8"] < 1.3


def test_weights_that_other_code_reads_stay_as_they_are(tmp_path):
    _, note = run(tmp_path, tiny.model("mamba"), format="dense_bf16")
    by_name = {e["module"].rpartition(".")[2]: e for e in note["lowered"]}
    assert by_name["dt_proj"]["kernel"] == "" and "read by other code" in by_name["dt_proj"]["why"]
    assert by_name["in_proj"]["kernel"] == "dense_linear"


# -- what is refused -----------------------------------------------------------------------------------------


def test_more_than_the_divergence_allowed_is_a_missed_expectation_with_names_and_figures(tmp_path):
    with pytest.raises(Exception) as caught:
        run(tmp_path, sparse(), format="dense_int8", divergence=1e-9)
    found = caught.value.diagnostics[0]
    assert (found.slug, found.exit) == ("lowering-inaccurate", 4)
    assert "nats" in found.message and "perplexity" in found.message
    assert "model.layers." in found.note and "dense_int8" in found.note


@pytest.mark.slow
def test_modules_furthest_off_take_finer_grids_until_predictions_move_by_no_more_than_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "effc.passes.lower.sparse_cpu.race_kernels_and_torch",
        lambda *race: {**decided(*race), "dense_linear_int4": 0.01},
    )
    _, coarse = run(tmp_path, sparse(), error=1.0)
    moved = coarse["accuracy"]["divergence"]
    program, note = run(tmp_path, sparse(), error=1.0, divergence=moved / 4)
    assert note["accuracy"]["divergence"] <= moved / 4 < moved
    was, now = ({e["module"]: e for e in found["lowered"]} for found in (coarse, note))
    changed = [m for m in now if now[m]["format"] != was[m]["format"]]
    kept = [m for m in now if m not in changed and now[m]["format"] == "dense_int4"]
    assert changed and kept and all(now[m]["error"] < was[m]["error"] for m in changed)
    assert max(now[m]["error"] for m in kept) <= min(was[m]["error"] for m in changed)
    assert all("was off by" in now[m]["why"] for m in changed)
    assert {p: m.kernel for p, m in kernel_linears(program.model)} == {m: now[m]["kernel"] for m in now}
    found = refused(lambda: run(tmp_path, sparse(), error=1.0, divergence=1e-12)).diagnostics[0]
    assert found.slug == "lowering-inaccurate" and "int" not in found.note  # the finest that there is


def test_where_nothing_wins_the_step_is_refused_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "effc.passes.lower.sparse_cpu.race_kernels_and_torch",
        lambda w, kernels, rows, isa: {EAGER: 1.0, **dict.fromkeys(kernels, 2.0)},
    )
    found = refused(lambda: run(tmp_path, sparse())).diagnostics[0]
    assert found.slug == "nothing-lowered" and "torch takes" in found.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, bad):
    model = sparse()
    model.model.layers[2].mlp.down_proj.weight.data[3, 4] = bad
    found = refused(lambda: run(tmp_path, model, data=None, on=on("*.down_proj"))).diagnostics[0]
    assert found.slug == "not-a-number"


def test_a_layer_with_more_inputs_than_a_kernel_holds_stays_and_says_so(tmp_path):
    site = Site("wide", KernelCase(4, 70000, "float32", 0.0, 0.0), 0.0, 4 * 70000 * 4)
    assert choice.usable_kernels(site, "dense_int8") == ([], "it has 70000 inputs, and int32 sums hold 66000")
    found, why = choice.usable_kernels(site, "auto")
    assert found == ["dense_linear", "dense_linear_int4"] and why


def test_a_layer_without_inputs_or_outputs_stays_and_says_so():
    for n, k in ((4, 0), (0, 4)):
        site = Site("none", KernelCase(n, k, "float32", 0.0, 0.0), 0.0, 0)
        assert choice.usable_kernels(site, "auto") == ([], "it has no outputs or no inputs")


def test_another_device_is_refused(tmp_path):
    program, ctx, pass_ = prepared(tmp_path, sparse())
    ctx = replace(ctx, settings=replace(ctx.settings, device="cuda"))
    assert refused(lambda: pass_.run(program, ctx)).diagnostics[0].slug == "cpu-only"


def test_a_model_that_is_lowered_already_has_nothing_left(tmp_path):
    program, ctx, pass_ = prepared(tmp_path, sparse(), format="dense_bf16")
    pass_.run(program, ctx)
    assert refused(lambda: pass_.run(program, ctx)).diagnostics[0].slug == "no-linear"


def test_unless_told_otherwise_accuracy_is_measured_on_what_the_model_writes(tmp_path, monkeypatch):
    from effc.compiler.inputs.data.generated import Generated
    from effc.compiler.inputs.sources.zoo import zoo_folders_by_name

    monkeypatch.setattr(Generated, "fitting", classmethod(lambda cls, _: cls(count=2, length=12)))
    model = AutoModelForCausalLM.from_pretrained(zoo_folders_by_name()["tiny-llama"]).eval()
    program, ctx, pass_ = prepared(tmp_path, model, format="dense_bf16", data=None, on=on("*.up_proj"))
    pass_.run(program, ctx)
    assert 0 < program.notes[-1]["accuracy"]["divergence"] < 1e-3
