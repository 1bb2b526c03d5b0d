"""Interventions: what they compute, where, and when; against a naive oracle that hooks the plain model."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.reft import FORMS, Reft, has_identity, interventions, orthonormalize
from effc.compiler.models.rows.prompt_positions import edited_counts_at_both_ends, prompts, without_interventions
from effc.compiler.plugin.registry import Registry
from effc.compiler.transforms.editing.interventions import (
    insert_interventions,
    make_interventions,
    remove_interventions,
)
from effc.compiler.transforms.editing.position_spec import parse_first_last_counts
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny


def ids_of(batch, length, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def intervened(model, form="loreft", positions="f2+l3", rank=4, tied=True, start="random", on=None, drop=0.0):
    """A copy of a model with interventions in all layers, or those numbered."""
    program = capture(copy.deepcopy(model))
    paths = tuple(p for i, p in enumerate(program.units) if on is None or i in on)
    seeds = {path: i for i, path in enumerate(paths)}
    made = make_interventions(
        program, paths, form, rank, parse_first_last_counts(positions), tied, drop, start, seeds.__getitem__
    )
    insert_interventions(program, made)
    return program


def louder(program, by=3.0):
    """The same with larger biases, so that every edit shows."""
    with torch.no_grad():
        for _, module in interventions(program.model):
            for function in module.functions.values():
                function.bias.add_(by)
    return program


def naive(model, program, ids, first, last):
    """Logits of one unpadded row [1, t] of the plain model, its layers hooked: formulas as the paper prints them."""
    t = ids.shape[1]
    p, s = (first, last) if t >= first + last else (min(first, t // 2), min(last, -(-t // 2)))
    handles = []
    for path, module in interventions(program.model):

        def edit(_module, _args, output, module=module):
            hidden = output[0] if isinstance(output, tuple) else output
            out = hidden.clone()
            for place in range(t):
                name = "prefix" if place < p else "suffix" if place >= t - s else None
                if name:
                    out[0, place] = phi(module.functions["both" if module.tied else name], hidden[0, place])
            return (out, *output[1:]) if isinstance(output, tuple) else out

        handles.append(model.get_submodule(path.removesuffix(".reft")).register_forward_hook(edit))
    try:
        with torch.no_grad():
            return model(ids).logits
    finally:
        for handle in handles:
            handle.remove()


def phi(function, h):
    v, b, w = function.project, function.bias, function.aim
    r = torch.linalg.qr(v.T)[0].T
    r = r * torch.sign((r * v).sum(1, keepdim=True))  # rows of v are orthonormal already: QR may flip them
    return {
        "loreft": lambda: h + r.T @ (w @ h + b - r @ h),
        "noreft": lambda: h + v.T @ (w @ h + b - v @ h),
        "direft": lambda: h + v.T @ (w @ h + b),
        "odireft": lambda: h + r.T @ (w @ h + b),
        "consreft": lambda: h + r.T @ (b - r @ h),
        "lobireft": lambda: h + r.T @ b,
    }[function.form]()


# -- what they compute ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_its_formula_at_both_edges_of_the_prompt(form, tied):
    model, ids = tiny.model("llama"), ids_of(1, 9)
    program = louder(intervened(model, form, tied=tied), 0.3)
    with torch.no_grad():
        found = program.model(ids).logits
        plain = model(ids).logits
    assert torch.allclose(found, naive(model, program, ids, 2, 3), atol=1e-4)  # float32 sums in another order
    assert (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("form", [form for form in FORMS if has_identity(form)])
def test_the_identity_start_leaves_logits_to_the_bit(form):
    model, ids = tiny.model("llama"), ids_of(2, 9)
    program = intervened(model, form, start="identity")
    with torch.no_grad():
        assert torch.equal(program.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("form", [form for form in FORMS if has_identity(form)])
def test_what_starts_as_the_identity_learns_from_its_first_step(form):
    program = intervened(tiny.model("llama"), form, start="identity")
    program.model(ids_of(2, 9)).logits.square().sum().backward()
    for _, module in interventions(program.model):
        assert any(p.grad.abs().max() > 0 for p in module.parameters() if p.grad is not None)


def test_a_constant_target_has_no_identity():
    assert not has_identity("consreft")


def test_interventions_that_are_off_leave_logits_to_the_bit():
    model, ids = tiny.model("llama"), ids_of(2, 9)
    program = louder(intervened(model))
    with torch.no_grad(), without_interventions(program.model):
        assert torch.equal(program.model(ids).logits, model(ids).logits)
    with torch.no_grad():
        assert not torch.equal(program.model(ids).logits, model(ids).logits)


def test_interventions_come_out_again_and_leave_the_model_as_it_was():
    model, ids = tiny.model("llama"), ids_of(2, 9)
    program = louder(intervened(model))
    remove_interventions(program)
    with torch.no_grad():
        assert torch.equal(program.model(ids).logits, model(ids).logits)
    assert set(program.model.state_dict()) == set(model.state_dict()) and not program.edits.swapped


def test_turning_rows_aims_and_biases_together_changes_nothing():
    program = louder(intervened(tiny.model("llama"), rank=4))
    ids = ids_of(2, 9)
    with torch.no_grad():
        before = program.model(ids).logits
        for _, module in interventions(program.model):
            function = module.functions["both"]
            turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
            for parameter in (function.project, function.aim, function.bias):
                parameter.copy_(turn @ parameter)
        assert torch.allclose(program.model(ids).logits, before, atol=1e-4)


@settings(max_examples=30)
@given(rank=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_rows_are_made_orthonormal_and_orthonormal_rows_are_left(rank, seed, scale):
    rows = torch.randn(rank, 16, generator=torch.Generator().manual_seed(seed)) * scale
    found = orthonormalize(rows)
    assert torch.allclose(found @ found.T, torch.eye(rank), atol=1e-5)
    assert torch.allclose(orthonormalize(found), found, atol=1e-6)
    assert torch.linalg.matrix_rank(torch.cat([found, rows / scale])) == rank  # they span the same


# -- published counts (reference: LoReFT and FedReFT tables; 2 d r + r a function) ---------------------------


@pytest.mark.parametrize(
    "width, layers, rank, tied, positions, published",
    [
        (3072, 28, 8, False, "f7+l7", 2_752_960),  # LLaMA-3.2-3B
        (3072, 28, 32, False, "f7+l7", 11_011_840),
        (4096, 32, 8, False, "f7+l7", 4_194_816),  # LLaMA-3-8B
        (4096, 32, 8, True, "f7+l7", 2_097_408),  # Llama-2-7B
        (1024, 24, 1, True, "f3", 49_176),  # RoBERTa-large
        (768, 12, 1, True, "f3", 18_444),  # RoBERTa-base
        (576, 30, 4, True, "f7+l7", 138_360),  # SmolLM2-135M
    ],
)
def test_published_parameter_counts_come_out(width, layers, rank, tied, positions, published):
    first, last = parse_first_last_counts(positions)
    with torch.device("meta"):
        module = Reft("loreft", width, rank, first, last, tied, 0.0)
    assert layers * sum(p.numel() for p in module.parameters()) == published


# -- where ---------------------------------------------------------------------------------------------------


def test_positions_are_read_as_written():
    assert [parse_first_last_counts(text) for text in ("f7+l7", "f3", "l1", "l2+f1", "f1 + l1")] == [
        (7, 7),
        (3, 0),
        (0, 1),
        (1, 2),
        (1, 1),
    ]


@pytest.mark.parametrize("text", ["", "f0", "7", "f7+f3", "x3", "f7+", "f-1", "F7"])
def test_other_positions_are_refused(text):
    with pytest.raises(Reject) as caught:
        parse_first_last_counts(text)
    assert caught.value.diagnostics[0].slug == "bad-positions"


@given(n=st.integers(0, 12), first=st.integers(0, 5), last=st.integers(0, 5))
def test_edges_of_a_prompt_never_meet_and_are_as_long_as_it_allows(n, first, last):
    p, s = (int(x) for x in edited_counts_at_both_ends(torch.tensor([n]), first, last))
    assert p + s <= n and p <= first and s <= last
    assert p + s == n or (p, s) == (first, last) or n < first + last
    if first and last and n < first + last:
        assert (p, s) == (min(first, n // 2), min(last, -(-n // 2)))


def test_only_edited_positions_differ_behind_the_layer():
    model, ids = tiny.model("llama"), ids_of(1, 9)
    program = louder(intervened(model, on=(1,)))
    held = []
    for one in (model, program.model):
        handle = one.model.layers[1].register_forward_hook(lambda _m, _a, output: held.append(output))
        with torch.no_grad():
            one(ids)
        handle.remove()
    moved = (held[0] != held[1]).any(-1)[0].tolist()
    assert moved == [True, True, False, False, False, False, True, True, True]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "bamba"])
def test_a_batch_of_mixed_lengths_is_edited_as_its_rows_one_by_one(name, tied, side):
    model, lengths, width = tiny.model(name), (9, 6, 4, 2, 1), 9
    program = louder(intervened(model, tied=tied), 0.3)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.int64)
    rows = [ids_of(1, n, seed=n) for n in lengths]
    at = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for i, row in enumerate(rows):
        ids[i, at[i]], mask[i, at[i]] = row[0], 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = {} if name == "bamba" else {"position_ids": places}
    with torch.no_grad():
        found = program.model(ids, attention_mask=mask, **more).logits
        for i, row in enumerate(rows):
            alone = program.model(row).logits[0]
            assert torch.allclose(found[i, at[i]], alone, atol=2e-4)  # float32, sums over padded lengths
            assert torch.allclose(alone, naive(model, program, row, 2, 3)[0], atol=2e-4)


def test_where_the_prompt_ends_may_be_told_and_what_follows_stays():
    model, ids = tiny.model("llama"), ids_of(2, 9)
    program = louder(intervened(model))
    with torch.no_grad():
        with prompts(program.model, torch.tensor([5, 6])):
            found = program.model(ids).logits
        for i, n in enumerate((5, 6)):
            out = program.model(ids[i : i + 1, :n], use_cache=True)
            rest = program.model(ids[i : i + 1, n:], past_key_values=out.past_key_values, use_cache=True).logits
            assert torch.allclose(found[i : i + 1], torch.cat([out.logits, rest], 1), atol=1e-4)


def test_more_prompts_than_rows_are_a_mistake_that_shows():
    program = intervened(tiny.model("llama"))
    with prompts(program.model, torch.tensor([5, 6, 7])), pytest.raises(ValueError, match="3 prompts"):
        program.model(ids_of(2, 9))


def test_coordinates_that_are_inactive_edit_nothing():
    model, ids = tiny.model("llama"), ids_of(3, 9)
    program = louder(intervened(model))
    active = torch.tensor([[False] * 4, [True] * 4, [True, True, False, False]])
    with torch.no_grad():
        with prompts(program.model, subspace=active):
            found = program.model(ids).logits
        assert torch.allclose(found[0], model(ids).logits[0], atol=1e-5)
        assert torch.allclose(found[1], program.model(ids).logits[1], atol=1e-5)
        for _, module in interventions(program.model):  # the same with the last two rows cut away
            function = module.functions["both"]
            function.project, function.aim, function.bias = (
                torch.nn.Parameter(p[:2].clone()) for p in (function.project, function.aim, function.bias)
            )
        assert torch.allclose(found[2], program.model(ids).logits[2], atol=1e-4)


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_layer_has_interventions_once():
    program = intervened(tiny.model("llama"), on=(0,))
    made = make_interventions(program, tuple(program.units), "loreft", 2, (1, 0), True, 0.0, "identity", lambda path: 0)
    with pytest.raises(Reject) as caught:
        insert_interventions(program, made)
    assert caught.value.diagnostics[0].slug == "twice-intervened"
    assert len(list(interventions(program.model))) == 1


def test_a_rank_above_the_width_is_refused():
    program = capture(tiny.model("llama"))
    with pytest.raises(Reject) as caught:
        make_interventions(program, tuple(program.units), "loreft", 65, (1, 0), True, 0.0, "identity", lambda path: 0)
    assert caught.value.diagnostics[0].slug == "rank-too-large"


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": 99},
        {"form": "x"},
        {"first": 0, "last": 0},
        {"tied": 1},
        {"dropout": 1.0},
        {"width": 1 << 40},
        {"more": 1},
    ],
)
def test_a_stored_spec_of_another_form_is_refused(change):
    spec = {"form": "loreft", "width": 32, "rank": 2, "first": 1, "last": 1, "tied": True, "dropout": 0.0}
    layer = SimpleNamespace(parameters=lambda: [torch.zeros(1)], buffers=list)
    assert Reft.from_spec(layer, spec).spec() == spec
    with pytest.raises(ValueError):
        Reft.from_spec(layer, {**spec, **change})


def test_dropout_is_of_the_edited_state_and_of_training_alone():
    torch.manual_seed(0)
    function = next(iter(interventions(intervened(tiny.model("llama"), drop=0.5).model)))[1].functions["both"]
    hidden = torch.randn(200, 64) + 3.0
    with torch.no_grad():
        still = function.eval()(hidden)
        moving = function.train()(hidden)
    kept = moving != 0
    assert 0.45 < kept.float().mean() < 0.55
    assert torch.allclose(moving[kept], 2 * still[kept], atol=1e-5)


@pytest.mark.parametrize("text", ["", "f0", "7", "f7+f3", "x3", "f7+", "f-1", "F7", "f7", "l1", "f3+l2", "l2 + f3"])
def test_the_checker_takes_the_positions_that_the_pass_takes(text):
    spelled = Registry().vocabulary.word("pass", "reft.insert").param("positions").spelled
    try:
        parse_first_last_counts(text)
        fits = True
    except Reject:
        fits = False
    assert bool(re.fullmatch(spelled, text)) == fits
