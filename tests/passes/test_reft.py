"""`reft.insert` and `tune.reft`: interventions learn, alone, and stay what they are through saving and loading."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.cache import Cache, canonical_json_sha256
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.ir.layers.reft import interventions
from effc.compiler.ir.outcome import Model
from effc.compiler.ir.step_results import StepResults
from effc.compiler.ir.weights import assign_tensors
from effc.compiler.models.rows.forward import total_nll
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef, MetricRef, Ratio, Selector
from effc.dsl.syntax.diagnostics import Reject

from tests import mixers, worlds

RULES = [(f"{a} and {b}", "one" if a < b else "two") for a in "bcdfghkmp" for b in "bcdfghkmp" if a != b]
TRAIN, DEV = {"data": DataRef("train")}, {"held_out": DataRef("dev")}
SHORT = {**TRAIN, "steps": 6, "batch": 8, "lr": 1e-2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reft")
    worlds.llama(folder / "m")
    worlds.tokenizer(folder / "m")
    for name, part in (("train", RULES[::2]), ("dev", RULES[1::2])):
        lines = [json.dumps({"prompt": p, "answer": a}) for p, a in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def ctx(home, tmp_path):
    return context(home, tmp_path)


def context(home, work, **changes):
    origin = Hf(name=str(home / "m")).resolve(worlds.context(home))
    data = {
        name: ("pairs", {"path": f"{name}.jsonl", "join": " ", "length": 13, **changes}) for name in ("train", "dev")
    }
    made = worlds.context(home, origin, data)
    made.workdir = work
    return made


def run(program, ctx, word, **args):
    call = Invocation(word, {**worlds.defaults("pass", word), **args})
    ctx.registry.make("pass", call).run(program, ctx)


def taught(ctx, insert=None, **train):
    program = capture(ctx.origin.load())
    run(program, ctx, "reft.insert", **{"positions": "f2+l2", "rank": 2, **(insert or {})})
    run(program, ctx, "tune.reft", **{**SHORT, **train})
    return program


def loss(program, ctx, name="dev"):
    ref = DataRef(name)
    nats, tokens = total_nll(program.model, ctx.rows(ref), ctx.assistant_masks(ref), ctx.prompts(ref))
    return nats / tokens


def off_orthonormal(model):
    return max(
        float((f.projection_rows() @ f.projection_rows().T - torch.eye(len(f.projection_rows()))).abs().max())
        for _, m in interventions(model)
        for f in m.functions.values()
    )


# -- rows of prompts and answers -----------------------------------------------------------------------------


def test_a_row_is_a_prompt_and_its_answer_and_says_which_is_which(ctx):
    rows, said, asked = ctx.rows(DataRef("train")), ctx.assistant_masks(DataRef("train")), ctx.prompts(DataRef("train"))
    assert rows.shape == said.shape == (len(RULES[::2]), 13) and len(asked) == len(rows)
    for row, tells, n, (prompt, answer) in zip(rows, said, asked, RULES[::2], strict=True):
        assert row[0] == ctx.tokenizer.bos_token_id
        assert ctx.tokenizer.decode(row[1:n]) == prompt
        assert ctx.tokenizer.decode(row[tells]) == f" {answer}</s>"
        assert tells.nonzero()[0] == n and not tells[int(n) + len(answer) + 2 :].any()


def test_fewer_samples_are_the_same_rows_in_every_way_of_telling(home, tmp_path):
    some = context(home, tmp_path, samples=5, seed=3)
    whole = context(home, tmp_path)
    ref = DataRef("train")
    places = [whole.rows(ref).tolist().index(row) for row in some.rows(ref).tolist()]
    assert len(set(places)) == 5
    assert torch.equal(some.assistant_masks(ref), whole.assistant_masks(ref)[places])
    assert torch.equal(some.prompts(ref), whole.prompts(ref)[places])


def test_pairs_that_fit_into_no_row_are_refused_or_dropped_where_that_is_asked(home, tmp_path):
    with pytest.raises(Reject) as caught:
        context(home, tmp_path, length=9).rows(DataRef("train"))
    assert caught.value.diagnostics[0].slug == "pair-too-long" and "length: 13" in caught.value.diagnostics[0].help
    text = home / "long.jsonl"
    text.write_text('{"prompt": "abc", "answer": "d"}\n{"prompt": "abcdefghijklm", "answer": "d"}')
    few = context(home, tmp_path, path="long.jsonl", longer="drop")
    assert few.rows(DataRef("train")).shape == (1, 13)


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, start",
    [
        ("loreft", "identity"),
        ("noreft", "identity"),
        ("direft", "identity"),
        ("odireft", "random"),
        ("consreft", "random"),
        ("lobireft", "identity"),
    ],
)
def test_every_form_learns_and_nothing_else_changes(ctx, form, start):
    program = taught(
        ctx, {"form": form, "start": start, "tied": False}, steps=20, lr=1.0 if form == "lobireft" else 3e-2
    )
    base = ctx.origin.load()
    before = loss(capture(copy.deepcopy(base)), ctx)
    assert loss(program, ctx) < 0.8 * before
    state = program.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.state_dict().items())
    assert all(p.grad is None for p in program.model.parameters())
    note = program.notes[-1]
    assert (
        note["trained"]
        == program.notes[0]["parameters"]
        == sum(p.numel() for _, m in interventions(program.model) for p in m.parameters())
    )
    assert note["loss"][-1][1] < note["loss"][0][1] and json.loads(json.dumps(note))


def test_rows_stay_orthonormal_through_training_saving_loading_and_the_step_after(ctx, tmp_path):
    program = taught(ctx, lr=0.3)
    assert off_orthonormal(program.model) < 1e-5
    cache = Cache(tmp_path / "cache")
    StepResults(cache, ctx.origin).save_outcome(
        canonical_json_sha256({}), Model(program), {}, {"program": program.notes}
    )
    again = StepResults(cache, ctx.origin).load_outcome(canonical_json_sha256({})).program
    ids = ctx.rows(DataRef("dev"))
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, program.model(ids).logits)
    stored = dict(again.model.named_parameters())
    name = next(n for n in stored if n.endswith("project"))
    assert torch.allclose(stored[name] @ stored[name].T, torch.eye(2), atol=1e-5)  # what lies in the file is R
    moved = stored[name].clone()
    run(again, ctx, "tune.reft", **{**SHORT, "steps": 1, "lr": 0.3, "warmup": Ratio(0.0)})
    assert (stored[name] - moved).abs().max() > 1e-2 and off_orthonormal(again.model) < 1e-5


@pytest.mark.slow
def test_the_seed_decides_the_interventions_bit_for_bit(home, tmp_path):
    one, two, other = (
        taught(context(home, tmp_path / name), batch=batch) for name, batch in (("a", 8), ("b", 8), ("c", 7))
    )
    same = [torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.slow
def test_layers_that_run_again_in_the_backward_pass_edit_the_same_places(home, tmp_path):
    one, two = (
        taught(context(home, tmp_path / name), gradient_checkpointing=again)
        for name, again in (("a", False), ("b", True))
    )
    assert all(
        torch.allclose(p, q, atol=1e-6) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True)
    )


def test_a_subspace_is_trained_alone(ctx, tmp_path):
    program = taught(ctx, {"rank": 4})
    held = {n: p.detach().clone() for n, p in program.model.named_parameters() if ".reft." in n}
    run(program, replace(ctx, workdir=tmp_path / "second"), "tune.reft", **{**SHORT, "subspace": (2, 3)})
    for name, p in program.model.named_parameters():
        if name in held:
            assert torch.allclose(p[:2], held[name][:2], atol=1e-6) and (p[2:] - held[name][2:]).abs().max() > 1e-4


def test_a_narrow_model_learns_and_keeps_its_dtype(ctx):
    program = capture(ctx.origin.load().bfloat16())
    run(program, ctx, "reft.insert", positions="f2+l2", rank=2)
    before = loss(program, ctx)
    run(program, ctx, "tune.reft", **{**SHORT, "steps": 20, "lr": 3e-2})
    assert loss(program, ctx) < 0.9 * before and off_orthonormal(program.model) < 1e-5
    kinds = {p.dtype for n, p in program.model.named_parameters() if ".reft." not in n}
    assert kinds == {torch.bfloat16}


def test_the_answer_is_predicted_from_an_edited_prompt_and_never_edited(ctx):
    program = taught(ctx, {"positions": "l1"}, steps=1)
    row = ctx.rows(DataRef("train"))[:1]
    n = int(ctx.prompts(DataRef("train"))[0])
    seen = []
    layer = program.model.model.layers[0].reft
    handle = layer.register_forward_hook(lambda _m, given, out: seen.append((given[0] != out).any(-1)[0]))
    with torch.no_grad():
        for function in layer.functions.values():
            function.bias.add_(1.0)
    loss(program, ctx, "train")
    handle.remove()
    moved = torch.cat([x.nonzero()[:, 0] for x in seen[:1]]).tolist()
    assert moved == [n - 1] and len(row) == 1


# -- on changed models ---------------------------------------------------------------------------------------

FIRST = {
    "branch gone": [("prune.blocks", {"remove": 1, "score": MetricRef("perplexity", (("data", DataRef("dev")),))})],
    "narrow": [("prune.channels", {"keep": Ratio(0.5, "channels"), "align": 8})],
    "quantised": [("quantize.round", {"bits": 4, "group": 16})],
    "sparse": [("sparsify.magnitude", {"on": Selector((("|", "*_proj"),)), "sparsity": Ratio(0.5, "weights")})],
}


@pytest.mark.slow
@pytest.mark.parametrize("before", FIRST)
def test_a_changed_model_takes_interventions_and_keeps_its_change(ctx, before):
    program = capture(ctx.origin.load())
    for word, args in FIRST[before]:
        run(program, ctx, word, **args)
    start, shapes = loss(program, ctx), {n: (p.shape, int((p == 0).sum())) for n, p in program.model.named_parameters()}
    run(program, ctx, "reft.insert", positions="f2+l2", rank=2)
    assert loss(program, ctx) == pytest.approx(start, abs=1e-6)
    run(program, ctx, "tune.reft", **{**SHORT, "steps": 20, "lr": 3e-2})
    assert loss(program, ctx) < start
    left = {n: (p.shape, int((p == 0).sum())) for n, p in program.model.named_parameters() if ".reft." not in n}
    assert left == shapes
    model = ctx.origin.load()
    replay_edits(model, Edits.from_json(json.loads(json.dumps(program.edits.to_json()))))
    assign_tensors(model, dict(program.model.state_dict()))
    ids = ctx.rows(DataRef("dev"))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, program.model(ids).logits)


@pytest.mark.parametrize("name", ["mamba2", "bamba"])
def test_a_shed_model_takes_interventions(ctx, name):
    from effc.compiler.transforms.editing.rewrite import Rewriter
    from effc.compiler.transforms.editing.scan_removal import drop_scan

    program = capture(mixers.model(name))
    with Rewriter(program) as rewrite:
        drop_scan(program, rewrite, skeleton_of(program).scans[-1])
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = program.model(ids).logits
        run(program, ctx, "reft.insert", positions="f2+l2", rank=2)
        assert (program.model(ids).logits - before).abs().max() == 0
        for _, module in interventions(program.model):
            module.functions["both"].bias.add_(1.0)
        assert not torch.allclose(program.model(ids).logits, before, atol=1e-2)


def test_a_model_with_interventions_is_pruned_and_keeps_them(ctx):
    program = taught(ctx)
    run(program, ctx, "prune.channels", keep=Ratio(0.5, "channels"), align=8)
    assert len(list(interventions(program.model))) == 2
    assert torch.isfinite(torch.tensor(loss(program, ctx)))


# -- what is refused -----------------------------------------------------------------------------------------


def refused(call):
    with pytest.raises(Reject) as caught:
        call()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.help
    return diagnostic.slug


@pytest.mark.parametrize(
    "insert, train, slug",
    [
        ({"positions": "7"}, {}, "bad-positions"),
        ({"rank": 33}, {}, "rank-too-large"),
        ({"form": "consreft"}, {}, "no-identity"),
        ({"positions": "f9+l9"}, {}, "prompts-too-short"),
        ({}, {"held_out": DataRef("train")}, "held-out-learned"),
        ({}, {"subspace": (2,)}, "no-coordinate"),
        ({}, {**DEV, "lr": 30.0, "steps": 4, "every": 1, "warmup": Ratio(0.0)}, "not-healed"),
    ],
)
def test_what_can_not_be_trained_is_refused_by_name(ctx, insert, train, slug):
    assert refused(lambda: taught(ctx, insert, **train)) == slug


def test_an_insertion_that_can_not_be_is_refused_before_weights_are_read(ctx):
    skeleton = skeleton_of(capture(ctx.origin.load()))
    for args, slug in (
        ({"rank": 33}, "rank-too-large"),
        ({"positions": "x"}, "bad-positions"),
        ({"form": "consreft"}, "no-identity"),
    ):
        made = Registry().make("pass", Invocation("reft.insert", {**worlds.defaults("pass", "reft.insert"), **args}))
        assert refused(lambda made=made: made.forecast(skeleton)) == slug


def test_what_is_foreseen_is_what_comes(ctx):
    program = capture(ctx.origin.load())
    before = skeleton_of(program)
    args = {**worlds.defaults("pass", "reft.insert"), "tied": False, "rank": 3}
    made = Registry().make("pass", Invocation("reft.insert", args))
    made.run(program, ctx)
    assert sorted(made.forecast(before).parts, key=lambda p: p.path) == sorted(
        skeleton_of(program).parts, key=lambda p: p.path
    )


def test_training_without_interventions_or_without_prompts_is_refused(ctx):
    program = capture(ctx.origin.load())
    assert refused(lambda: run(program, ctx, "tune.reft", **SHORT)) == "nothing-inserted"
    ctx.recipe.data["noise"] = Invocation(
        "synthetic", {**worlds.defaults("data", "synthetic"), "count": 4, "length": 9}
    )
    run(program, ctx, "reft.insert", positions="f1")
    assert refused(lambda: run(program, ctx, "tune.reft", **{**SHORT, "data": DataRef("noise")})) == "no-prompts"
