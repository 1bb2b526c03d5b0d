"""prune.multi against a naive oracle: masks on the whole model, whole forwards, no code of effc's search."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.shrink import flops_per_token
from effc.compiler.core.events import Recorded, Warned
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.values import DataRef, MetricRef, ProfileRef, Ratio, Shares
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save_file

from tests import tiny
from tests.grids import wide
from tests.recipes_in_memory import SCORE, context_of, recipe_of

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
OTHER_IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(9))
OTHER = MetricRef("perplexity", (("data", DataRef("other")),))
PUBLISHED = Shares((("blocks", 44.0), ("channels", 52.0), ("heads", 4.0)))
COSTS = {}  # what the last search said that it cost
DEFAULTS = {
    "on": None,
    "score": SCORE,
    "split": None,
    "order": ("blocks", "channels", "heads"),
    "search": "racing",
    "estimate": "none",
    "together": 1,
    "rank": None,
    "reorder": None,
    "repair": None,
    "group": 16,
    "heads": 1,
    "width_score": None,
    "check": None,
    "clock": MetricRef("decode.p50"),
    "data": DataRef("rows"),
}


def pruned(tmp_path, model, tell=lambda event: None, **args):
    recipe = recipe_of([("step", "prune.multi", {**DEFAULTS, **args})])
    ctx = context_of(tmp_path, model, recipe)
    save_file({"rows": OTHER_IDS}, tmp_path / "other.safetensors")
    recipe.data["other"] = replace(recipe.data["rows"], args={**recipe.data["rows"].args, "path": "other.safetensors"})
    program = capture(copy.deepcopy(model))
    COSTS.clear()

    def hear(event):
        tell(event)
        if isinstance(event, Recorded):
            COSTS[event.name] = event.value

    ctx = replace(ctx, settings=replace(ctx.settings, on_event=hear))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def cuts(program):
    return [note["cut"] for note in program.notes if "cut" in note]


def share_of_naive():
    """Layer forwards of the last search, as a share of those of a search by whole models."""
    return COSTS["layer forwards"] / COSTS["layer forwards, were every candidate scored by the whole model"]


@pytest.mark.slow
def test_an_exact_search_runs_about_half_of_the_layers_of_whole_forwards(tmp_path):
    model = tiny.model("llama", num_hidden_layers=12)
    pruned(tmp_path, model, remove=Ratio(0.1, "params"), search="exact", split=PUBLISHED)
    assert share_of_naive() <= 0.60  # 12 layers: (L + 1) / 2L is 0.54, and the first look


@pytest.mark.slow
def test_racing_runs_a_fifth_of_the_layers_or_less(tmp_path):
    model = tiny.model("llama", num_hidden_layers=12)
    pruned(tmp_path, model, remove=Ratio(0.2, "params"))
    assert share_of_naive() <= 0.20


@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
@pytest.mark.parametrize("of", ["params", "flops"])
def test_every_architecture_meets_its_budget_and_computes_what_was_scored(tmp_path, name, of):
    model = tiny.model(name)
    program = pruned(tmp_path, model, remove=Ratio(0.25, of), group=8)
    last = [note for note in program.notes if "cut" in note][-1]
    assert 0.25 <= last["share"] < 0.5
    with torch.no_grad():
        values = program.model(input_ids=IDS).logits[:, :-1].reshape(-1, 128)
    loss = torch.nn.functional.cross_entropy(values, IDS[:, 1:].reshape(-1))
    assert torch.allclose(loss.exp(), torch.tensor(last["score"]), rtol=1e-3)  # sliced and masked sums differ
    if of == "flops":
        before, after = (flops_per_token(x, 512) for x in (skeleton_of(capture(model)), skeleton_of(program)))
        assert 1 - after / before == pytest.approx(last["share"], abs=1e-3)
    else:
        before = sum(p.numel() for p in model.parameters())
        after = sum(p.numel() for p in program.model.parameters())
        assert 1 - after / before == pytest.approx(last["share"], abs=1e-3)


@pytest.mark.parametrize("group", [8, 96])
def test_far_more_than_was_asked_for_goes_only_where_nothing_smaller_can_and_is_said(tmp_path, group):
    """A branch of this model is a tenth of it; groups of 8 channels are a hundredth."""
    heard = []
    model = tiny.model("llama")
    before = sum(p.numel() for p in model.parameters())
    program = pruned(tmp_path, model, heard.append, remove=Ratio(0.03, "params"), group=group, overshoot=group == 96)
    gone = 1 - sum(p.numel() for p in program.model.parameters()) / before
    warned = [e.message for e in heard if isinstance(e, Warned) and "of params went where 3.0% was to" in e.message]
    assert gone <= 0.045 if group == 8 else (gone > 0.045 and len(warned) == 1)


def test_far_more_than_was_asked_for_is_refused_unless_the_recipe_allows_it(tmp_path):
    with pytest.raises(
        Reject, match=r"overshoots: 3\.0% of params are to go, and the smallest part .* is \d+\.\d%"
    ) as no:
        pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.03, "params"), group=48, heads=2)
    assert "`overshoot: true`" in no.value.diagnostics[0].help


def test_repair_leaves_less_damage_than_none(tmp_path):
    model = tiny.model("llama")
    scores = {}
    for repair in (True, False):
        (tmp_path / str(repair)).mkdir()
        program = pruned(
            tmp_path / str(repair),
            model,
            remove=Ratio(0.2, "params"),
            order=("channels",),
            repair=repair,
            rank="loss",
            search="exact",
            reorder="wanda",
            group=8,
        )
        scores[repair] = [n["score"] for n in program.notes if "cut" in n][-1]
    assert scores[True] < scores[False]


@pytest.mark.parametrize("search", ["exact", "racing", "estimated"])
@pytest.mark.slow
def test_a_search_that_was_cut_short_goes_on_to_the_same_model(tmp_path, search, monkeypatch):
    model = tiny.model("llama")
    args = {"remove": Ratio(0.25, "params"), "search": search}
    if search == "estimated":
        args |= {"search": "racing", "estimate": "taylor", "together": 3, "group": 8}
    (tmp_path / "whole").mkdir()
    whole = pruned(tmp_path / "whole", model, **args)
    cost = COSTS["layer forwards"]
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupted_after(
            2 if search == "estimated" else 9, monkeypatch, lambda: pruned(tmp_path / "cut", model, **args)
        )
    again = pruned(tmp_path / "cut", model, **args)
    assert cuts(again) == cuts(whole)
    assert again.notes == whole.notes
    assert COSTS["layer forwards"] < cost
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupted_after(scores, monkeypatch, run):
    """Run with an interrupt in place of a score, as Ctrl-C would come."""
    from effc.compiler.transforms.search.loop import Search

    real, count = Search._timed_score, 0

    def measure(self, *args):
        nonlocal count
        if count == scores:
            raise KeyboardInterrupt
        count += 1
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "_timed_score", measure)
        run()


def test_a_pruned_model_can_be_pruned_again(tmp_path):
    model = tiny.model("llama")
    recipe = recipe_of([("one", "prune.multi", {**DEFAULTS, "remove": Ratio(0.15, "params")})])
    program = capture(copy.deepcopy(model))
    ctx = context_of(tmp_path, model, recipe)
    step = ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    sizes = [sum(p.numel() for p in program.model.parameters())]
    for _ in range(2):
        (tmp_path / "work" / "scores.jsonl").unlink(missing_ok=True)
        for file in tmp_path.glob("work/moments/*"):
            file.unlink()
        step.run(program, ctx)
        sizes.append(sum(p.numel() for p in program.model.parameters()))
    assert sizes[1] <= 0.851 * sizes[0] and sizes[2] <= 0.851 * sizes[1]
    made = [program.model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*made)


def test_a_budget_beyond_reach_is_refused_with_what_can_be_reached(tmp_path):
    with pytest.raises(Reject) as refused:
        pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.9, "params"), order=("channels",))
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "out-of-reach"
    assert "90.0% of params are to go, and at most" in found.message
    reach = float(found.help.split("at most ")[1].split("%")[0]) / 100
    (tmp_path / "again").mkdir()
    assert cuts(pruned(tmp_path / "again", tiny.model("llama"), remove=Ratio(reach, "params"), order=("channels",)))


def test_a_model_that_scores_nan_everywhere_is_refused(tmp_path):
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(Reject) as refused:
        pruned(tmp_path, model, remove=Ratio(0.1, "params"), search="exact", split=PUBLISHED)
    assert refused.value.diagnostics[0].fault.slug in ("not-a-number", "no-finite-score")


def test_a_single_layer_is_pruned_too(tmp_path):
    program = pruned(tmp_path, tiny.model("llama", num_hidden_layers=1), remove=Ratio(0.1, "params"), group=8)
    assert cuts(program)


def test_every_decision_is_noted_with_the_scores_that_it_was_made_on(tmp_path):
    program = pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.2, "params"))
    decisions = [note for note in program.notes if "cut" in note]
    assert all(note["cut"] in note["scores"] and note["by"] == "perplexity" for note in decisions)
    shares = [note["share"] for note in decisions]
    assert shares == sorted(shares)
    json.dumps(program.notes)


def test_a_metric_beside_the_search_is_measured_on_rows_that_no_decision_reads(tmp_path):
    plain = pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.2, "params"))
    (tmp_path / "again").mkdir()
    watched = pruned(tmp_path / "again", tiny.model("llama"), remove=Ratio(0.2, "params"), check=OTHER)
    (note,) = [n for n in watched.notes if "beside" in n]
    assert note["beside"] == "perplexity(other)"
    with torch.no_grad():
        values = tiny.model("llama")(input_ids=OTHER_IDS).logits[:, :-1].reshape(-1, 128)
    first = torch.nn.functional.cross_entropy(values, OTHER_IDS[:, 1:].reshape(-1)).exp().item()
    assert note["seen"][0][3] == pytest.approx(first, rel=1e-4)
    assert [s[0] for s in note["seen"]] == sorted(s[0] for s in note["seen"]) and len(note["seen"]) >= 3
    assert cuts(watched) == cuts(plain)


def test_a_metric_beside_is_compared_with_the_score_of_its_own_turn(tmp_path):
    program = pruned(
        tmp_path,
        tiny.model("llama"),
        remove=Ratio(0.3, "params"),
        check=OTHER,
        split=PUBLISHED,
        width_score=OTHER,
        group=8,
    )
    (note,) = [n for n in program.notes if "beside" in n]
    by = [s[1] for s in note["seen"]]
    assert by[0] == "perplexity(rows)" and by[-1] == "perplexity(other)"
    assert all(s[2] == pytest.approx(s[3]) for s in note["seen"] if s[1] == "perplexity(other)")


def test_shares_count_among_the_kinds_in_order(tmp_path):
    program = pruned(
        tmp_path,
        tiny.model("llama"),
        remove=Ratio(0.2, "params"),
        split=PUBLISHED,
        order=("channels", "heads"),
        group=4,
    )
    first = [n for n in program.notes if "cut" in n and n["kind"] == "channels"][-1]["share"]
    assert 0.2 * 52 / 56 <= first < 0.2 * 52 / 56 + 0.01


def test_what_can_not_be_reached_is_refused_before_anything_is_scored(tmp_path):
    with pytest.raises(Reject, match="out-of-reach"):
        pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.9, "params"))
    assert not (tmp_path / "work/scores.jsonl").exists()


def test_a_candidate_without_a_score_costs_the_search_nothing(tmp_path, monkeypatch):
    """A layer that overflows without another one: its score is no number, and the result can be kept."""
    from effc.compiler.core.cache import canonical_json
    from effc.compiler.transforms.search.loop import Search

    real = Search._measure
    monkeypatch.setattr(Search, "_measure", lambda self, metric: refuse_one(self, real(self, metric)))
    program = pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.2, "params"), search="exact", split=PUBLISHED)
    first = next(n for n in program.notes if "cut" in n)
    assert list(first["scores"].values()).count(None) == 1
    canonical_json(program.notes)


def refuse_one(search, value):
    """NaN for the third score, as a metric reports it."""
    from effc.compiler.models.rows.forward import finite

    search.scored_here = getattr(search, "scored_here", 0) + 1
    return finite(float("nan"), "perplexity") if search.scored_here == 3 else value


@pytest.mark.slow
def test_latency_is_measured_and_saved(tmp_path):
    model = tiny.model("llama", num_hidden_layers=6, intermediate_size=512)
    clock = MetricRef("decode.p50", (("prompt", 8), ("steps", 8)))
    for attempt in range(3):  # the clock of a busy machine may say that no branch takes any time
        work = tmp_path / str(attempt)
        work.mkdir()
        try:
            program = pruned(work, model, remove=Ratio(0.2, "latency"), group=64, clock=clock)
            break
        except Reject as refused:
            assert attempt < 2 and refused.diagnostics[0].slug == "out-of-reach", refused
    (measured,) = [n for n in program.notes if "latency" in n]
    assert measured["latency"] > 0 and set(measured["per_branch"]) == {"attention", "mlp"}
    assert [n for n in program.notes if "cut" in n][-1]["share"] >= 0.2
    (tmp_path / "again").mkdir()
    (tmp_path / "again/work").mkdir()
    journal = (work / "work/scores.jsonl").read_bytes()
    (tmp_path / "again/work/scores.jsonl").write_bytes(journal)  # one that goes on has the same table
    again = pruned(tmp_path / "again", model, remove=Ratio(0.2, "latency"), group=64, clock=clock)
    assert again.notes == program.notes


def test_a_latency_without_a_clock_is_refused(tmp_path):
    with pytest.raises(Reject, match="no-clock"):
        pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.2, "latency"), clock=SCORE)


@pytest.mark.parametrize(("step", "remedy"), [({"group": 5000}, "group: "), ({"heads": 9}, "heads: 1")])
def test_a_step_larger_than_every_module_is_refused_with_one_that_fits(tmp_path, step, remedy):
    with pytest.raises(Reject) as refused:
        pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.2, "params"), **step)
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "too-coarse" and remedy in found.help


@pytest.mark.slow
def test_rows_of_their_own_rank_and_refit(tmp_path):
    notes = {}
    for name, data in (("none", None), ("same", DataRef("rows")), ("other", DataRef("other"))):
        (tmp_path / name).mkdir()
        notes[name] = pruned(tmp_path / name, tiny.model("llama"), remove=Ratio(0.2, "params"), data=data).notes
    assert notes["other"] != notes["same"] != notes["none"]


def test_without_rows_those_that_the_original_writes_rank_and_refit(tmp_path, monkeypatch):
    from effc.compiler.inputs.data.generated import Generated

    monkeypatch.setattr(Generated, "fitting", classmethod(lambda cls, origin: cls(count=3, length=9)))
    model = tiny.model("llama")
    (tmp_path / "first").mkdir()
    alone = pruned(tmp_path / "first", model, remove=Ratio(0.2, "params"), data=None)
    to_write_as_well = COSTS["layer forwards"]
    ctx = context_of(tmp_path, model, recipe_of([]))
    written = torch.stack(list(Generated(count=3, length=9).rows(None, ctx)))
    monkeypatch.setitem(globals(), "OTHER_IDS", written)
    (tmp_path / "second").mkdir()
    given = pruned(tmp_path / "second", model, remove=Ratio(0.2, "params"), data=DataRef("other"))
    assert alone.notes == given.notes
    reading = written.numel() / IDS.numel() * len(given.units)
    assert to_write_as_well == pytest.approx(COSTS["layer forwards"] + reading)


def test_a_model_that_writes_nothing_is_ranked_on_the_scores_rows(tmp_path):
    notes = {}
    for name, data in (("none", None), ("same", DataRef("rows"))):
        (tmp_path / name).mkdir()
        model = tiny.model("llama")
        model.can_generate = lambda: False
        notes[name] = pruned(tmp_path / name, model, remove=Ratio(0.2, "params"), data=data).notes
    assert notes["none"] == notes["same"]


@pytest.mark.slow
def test_kept_outputs_are_bounded_by_the_memory_that_is_allowed(tmp_path, monkeypatch):
    model = tiny.model("llama", num_hidden_layers=8)
    free = pruned(tmp_path, model, remove=Ratio(0.1, "params"))
    most = COSTS["layer outputs kept"]
    monkeypatch.setattr(
        "effc.compiler.transforms.search.loop.memory_budget_bytes_on", lambda device, max_memory: most // 3
    )
    (tmp_path / "again").mkdir()
    bound = pruned(tmp_path / "again", model, remove=Ratio(0.1, "params"))
    one = IDS.numel() * 64 * 4  # the outputs of one layer: the one last asked for
    assert COSTS["layer outputs kept"] <= most // 3 + one
    assert bound.notes == free.notes


def test_a_machine_is_only_named_where_latency_is_saved(tmp_path):
    with pytest.raises(Reject, match="no-clock"):
        pruned(tmp_path, tiny.model("llama"), remove=Ratio(0.2, "params"), machine=ProfileRef("laptop"))
