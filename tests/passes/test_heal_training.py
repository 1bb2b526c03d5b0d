"""What `tune.heal` trains with: the loss, the schedule, adapters on and off, and a loop that survives kills."""

import copy
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from effc.compiler.evaluation.reference import OriginalOutputs
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.batch_limit import BatchLimit
from effc.compiler.models.rows.forward import total_nll
from effc.compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
from effc.compiler.transforms.training.loop import TrainingLoop, TrainingSettings
from effc.compiler.transforms.training.objective import Objective
from effc.compiler.transforms.training.schedule import RowOrder, learning_rate_factor
from effc.compiler.transforms.training.trainable import TrainedParameters, activation_checkpointing, training_mode
from effc.dsl.checker.values import Selector
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.killing import kill_often
from tests.recipes_in_memory import context_of, recipe_of

ROWS = torch.randint(3, 128, (6, 10), generator=torch.Generator().manual_seed(1))
SAID = torch.rand(6, 10, generator=torch.Generator().manual_seed(2)) < 0.4
SHAPE = AdapterShape(rank=4, alpha=8.0, dropout=0.0)
# Their linear modules are called in ways that the ten of `tiny.NAMES` don't show: experts, scans, convolutions.
UNUSUAL = ("mixtral", "qwen3_moe", "mamba", "mamba2", "jamba", "qwen3_next", "lfm2", "bloom", "mpt")
EXPERTS = ("mixtral", "qwen3_moe", "jamba", "qwen3_next")


def logits(model, ids=ROWS):
    with torch.no_grad():
        return model(input_ids=ids).logits


# -- order and rate ------------------------------------------------------------------------------------------


@given(count=st.integers(1, 9), start=st.integers(0, 40), taken=st.integers(1, 20), seed=st.integers(0, 99))
def test_rows_come_once_an_epoch_and_an_order_can_be_entered_anywhere(count, start, taken, seed):
    whole = RowOrder(count, seed).take(0, start + taken)
    assert torch.equal(RowOrder(count, seed).take(start, taken), whole[start:])
    for epoch in whole.split(count):
        assert len(set(epoch.tolist())) == len(epoch)


@given(steps=st.integers(1, 50), share=st.floats(0, 1), schedule=st.sampled_from(["cosine", "linear", "constant"]))
def test_the_rate_rises_to_its_peak_once_and_never_falls_to_nothing(steps, share, schedule):
    warmup = round(share * steps)
    rates = [learning_rate_factor(step, steps, warmup, schedule) for step in range(1, steps + 1)]
    assert max(rates) == 1.0 and min(rates) > 0
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)


# -- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [None, SAID], ids=["all", "responses"])
@pytest.mark.parametrize("share, temperature", [(0.0, 1.0), (0.4, 1.0), (0.4, 2.0), (1.0, 3.0)])
def test_the_loss_and_its_gradient_are_those_of_the_formula(share, temperature, learned):
    model, teacher = tiny.model("llama"), logits(tiny.model("llama", seed=1))
    chosen = torch.tensor([4, 0, 2])
    original = OriginalOutputs(teacher.argmax(-1).int(), teacher)
    loss = Objective(model, ROWS, original, share, temperature, learned).accumulate_gradients(
        chosen, gradient_factor=0.5
    )
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    keep = torch.ones_like(ROWS).bool() if learned is None else learned
    keep = keep[chosen][:, 1:].reshape(-1)
    ours = model(input_ids=ROWS[chosen]).logits[:, :-1].reshape(-1, 128)[keep]
    theirs = teacher[chosen][:, :-1].reshape(-1, 128)[keep]
    told = torch.nn.functional.cross_entropy(ours, ROWS[chosen][:, 1:].reshape(-1)[keep])
    p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
    apart = (p * (p / q).log()).sum(-1).mean()
    expected = (1 - share) * told + share * temperature**2 * apart
    (0.5 * expected).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name  # 1e-6: float32 sums in another order


def test_distilling_from_another_vocabulary_is_refused():
    said = torch.zeros(6, 10, 99)
    with pytest.raises(Reject, match="other-vocabulary"):
        Objective(tiny.model("llama"), ROWS, OriginalOutputs(said.argmax(-1), said), 0.5).accumulate_gradients(
            torch.tensor([0]), 1.0
        )


@pytest.mark.parametrize("bound", [False, True], ids=["class", "graph"])
def test_recomputed_layers_run_twice_and_give_the_same_gradient(bound):
    model, chosen, calls, found = tiny.model("gpt2"), torch.tensor([0, 3]), [], []
    program = capture(model)
    if bound:
        for unit in program.units.values():
            unit.install_graph_forward(model)
    model.get_submodule("transformer.h.1.mlp.c_fc").register_forward_pre_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    for layers in ((), [unit.module(model) for unit in program.units.values()]):
        calls.clear()
        torch.manual_seed(0)  # of the dropout
        with training_mode(model, parameters), activation_checkpointing(layers):
            Objective(model, ROWS).accumulate_gradients(chosen, 1.0)
            found.append((len(calls), {name: p.grad.clone() for name, p in parameters.items()}))
    (once, plain), (twice, again) = found
    assert (once, twice) == (1, 2)
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_layers_that_can_t_recompute_are_refused():
    with pytest.raises(Reject, match="no-checkpointing"), activation_checkpointing([torch.nn.Linear(2, 2)]):
        pass


# -- adapters ------------------------------------------------------------------------------------------------


def portrait(model):
    """All that an adapter could leave behind."""
    modules = [(path, id(module), module.training, sorted(vars(module))) for path, module in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()], list(model.state_dict())


@pytest.mark.parametrize("name", [*tiny.NAMES, *UNUSUAL])
def test_merged_adapters_compute_what_they_did_beside_the_weights_and_leave_no_trace(name):
    model = tiny.model(name)
    program = capture(model)
    before, start = portrait(model), logits(model)
    least = len(ROWS) - (name in EXPERTS)  # a rounding may turn a router's choice, and with it a row
    with with_adapters(model, require_adaptable_modules(program, None), SHAPE, init_seed=0) as adapters:
        # A new adapter changes nothing; 1e-5: scans and experts add up in another order from run to run.
        assert alike(logits(model), start, 1e-5) >= least
        for place, parameter in enumerate(adapters.parameters().values()):
            generator = torch.Generator().manual_seed(place)
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        beside = logits(model)
        adapters.merge_into_weights()
    assert portrait(model) == before
    assert (beside - start).abs().max() > 1e-2
    assert alike(logits(model), beside, 1e-4) >= least  # 1e-4: (W + BA)x against Wx + B(Ax)


def alike(left, right, tolerance):
    """How many rows are equal."""
    return sum(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(left, right, strict=True))


def test_adapters_come_off_when_something_breaks():
    model = tiny.model("llama")
    program, before, start = capture(model), portrait(model), logits(model)
    with (
        pytest.raises(ZeroDivisionError),
        with_adapters(model, require_adaptable_modules(program, None), SHAPE, init_seed=0),
    ):
        _ = 1 / 0
    assert portrait(model) == before and torch.equal(logits(model), start)


def test_adapters_go_on_what_is_selected_and_not_on_a_tied_weight():
    program = capture(tiny.model("llama", tie_word_embeddings=True))
    up = require_adaptable_modules(program, Selector((("|", "layers.{0,2}.mlp.up_proj"),)))
    assert up == ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj")
    assert "lm_head" not in require_adaptable_modules(program, None)
    with pytest.raises(Reject, match="tied-adapter"):
        require_adaptable_modules(program, Selector((("|", "lm_head"),)))


# -- the loop ------------------------------------------------------------------------------------------------


def regime(**changes):
    facts = {
        "steps": 12,
        "lr": 1e-2,
        "warmup": 2,
        "schedule": "cosine",
        "batch": 2,
        "accumulate": 1,
        "clip": 1.0,
        "weight_decay": 0.01,
        "every": 3,
        "patience": 9,
        "save": 4,
        "seed": 0,
    }
    return TrainingSettings(**facts | changes)


class Stopped(Exception):
    pass


def trained(folder, stop_at=None, judged=True, dtype=torch.float32, nan=("", 0), **changes):
    """(weights, course) of a run in a folder; `stop_at`: the forward of that number breaks it off; `nan`: the "loss" or
    the "gradient" of that one is no number."""
    model = tiny.model("gpt2").to(dtype)  # gpt2: dropout needs its own randomness
    folder.mkdir(exist_ok=True)
    ctx = context_of(folder, model, recipe_of([]))
    lesson, forwards = Objective(model, ROWS), [0]

    def learn(rows, weight):
        forwards[0] += 1
        if forwards[0] == stop_at:
            raise Stopped
        loss = lesson.accumulate_gradients(rows, weight)
        if nan == ("gradient", forwards[0]):
            model.get_parameter("transformer.ln_f.weight").grad.fill_(math.nan)
        return math.nan if nan == ("loss", forwards[0]) else loss

    def judge():
        nats, tokens = total_nll(model, ROWS.flip(1))
        return nats / tokens

    parameters = dict(model.named_parameters())
    with training_mode(model, parameters):
        course = TrainingLoop(
            TrainedParameters(parameters), regime(**changes), len(ROWS), learn, judge if judged else None, ctx
        ).run()
    return model.state_dict(), course


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_a_run_broken_off_at_any_forward_goes_on_to_the_same_bits(tmp_path, dtype):
    facts = {"dtype": dtype, "accumulate": 2, "steps": 5, "every": 2, "save": 2}
    whole, course = trained(tmp_path / "whole", **facts)
    assert len(course.held_out) == 4 and course.step == 5
    for stop in range(1, 11) if dtype == torch.float32 else (6, 9):
        with pytest.raises(Stopped):
            trained(tmp_path / f"{stop}", stop_at=stop, **facts)
        weights, again = trained(tmp_path / f"{stop}", **facts)
        assert equal(weights, whole), stop
        assert again == course


def test_a_finished_run_is_not_trained_again(tmp_path):
    whole, course = trained(tmp_path / "a")
    again, known = trained(tmp_path / "a", stop_at=1)  # the first forward would break it
    assert equal(whole, again) and known == course


@pytest.mark.slow
def test_a_run_of_other_settings_starts_anew(tmp_path):
    trained(tmp_path / "a")
    other, _ = trained(tmp_path / "a", lr=3e-3)
    assert equal(other, trained(tmp_path / "b", lr=3e-3)[0])


def test_accumulating_two_batches_is_one_batch_of_twice_the_rows(tmp_path, monkeypatch):
    """So are the parts that a batch is learned from in where a device has no room for it."""
    start, facts = tiny.model("llama"), {"steps": 1, "warmup": 0}
    wide, narrow, parted = (copy.deepcopy(start) for _ in range(3))
    losses = []
    for model, fewer, more in (
        (wide, None, {"batch": 4}),
        (narrow, None, {"batch": 2, "accumulate": 2}),
        (parted, 3, {"batch": 4, "accumulate": 1}),
    ):
        monkeypatch.setattr(BatchLimit, "fewer", fewer)
        ctx = context_of(tmp_path, model, recipe_of([]))
        parameters = dict(model.named_parameters())
        course = TrainingLoop(
            TrainedParameters(parameters),
            regime(**facts, **more, save=100 + len(more)),
            len(ROWS),
            Objective(model, ROWS).accumulate_gradients,
            None,
            ctx,
        ).run()
        losses.append(course.curve[0][1])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    far = [(a - b).abs().max().item() for a, b in zip(wide.parameters(), start.parameters(), strict=True)]
    assert min(far) > 5e-3
    for other in (
        narrow,
        parted,
    ):  # AdamW's first step is a sign: of a tiny gradient it may flip, so the middle is held
        moved = [(a - b).abs().max().item() for a, b in zip(wide.parameters(), other.parameters(), strict=True)]
        assert sorted(moved)[len(moved) // 2] < 1e-5


def test_the_best_weights_are_kept_and_waiting_ends_the_run(tmp_path):
    weights, course = trained(tmp_path / "a", steps=200, lr=3e-2, every=2, patience=3, save=50)
    assert course.step < 200 and course.best == course.step - 6
    assert dict(course.held_out)[course.best] == course.lowest
    model = tiny.model("gpt2")
    model.load_state_dict(weights)
    nats, tokens = total_nll(model, ROWS.flip(1))
    assert nats / tokens == course.lowest


@pytest.mark.slow
def test_a_narrow_model_learns_from_steps_that_its_own_type_rounds_off(tmp_path):
    weights, course = trained(
        tmp_path / "a", dtype=torch.bfloat16, steps=40, lr=1e-4, judged=False, schedule="constant"
    )
    start = tiny.model("gpt2").to(torch.bfloat16).state_dict()
    assert weights["transformer.wte.weight"].dtype == torch.bfloat16
    assert not torch.equal(weights["transformer.h.1.mlp.c_fc.weight"], start["transformer.h.1.mlp.c_fc.weight"])
    assert course.curve[-1][1] < course.curve[0][1]


def test_a_loss_that_is_no_number_names_the_step_and_the_rate(tmp_path):
    with pytest.raises(Reject, match="diverged") as refused:
        trained(tmp_path / "a", lr=1e18, judged=False, steps=30)
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.exit == 1 and "lower `lr`, which is 1e+18" in diagnostic.help


@pytest.mark.parametrize(("what", "kept"), [("loss", 10), ("gradient", 12)])
@pytest.mark.slow
def test_what_was_sound_before_a_number_that_is_none_is_kept_and_gone_on_from(tmp_path, what, kept):
    facts = {"judged": False, "steps": 20, "save": 5, "accumulate": 1}
    with pytest.raises(Reject, match="diverged") as refused:
        trained(tmp_path / "a", nan=(what, 13), **facts)
    (said,) = refused.value.diagnostics
    assert f"the {what} is NaN at step 13" in said.message and f"after step {kept} are kept" in said.note
    again, course = trained(tmp_path / "a", stop_at=20 - kept + 1, **facts)  # as many forwards as are left
    assert course.step == 20 and equal(again, trained(tmp_path / "b", **facts)[0])


def killed_anywhere(folder: Path) -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    facts = {"steps": 60, "every": 7, "save": 2}
    whole, course = trained(folder / "whole", **facts)
    place = folder / "killed"
    kill_often(lambda: trained(place, **facts), lambda: shutil.rmtree(place), time.monotonic() - started, seed=3)
    weights, again = trained(place, **facts)
    assert equal(weights, whole) and again == course


@pytest.mark.slow
def test_killed_anywhere_a_run_goes_on_to_the_same_bits(tmp_path):
    # In a process of its own: once another test has made autograd start threads, a fork can't learn any more.
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; "
            "from tests.passes.test_heal_training import killed_anywhere; "
            "killed_anywhere(Path(sys.argv[1]))",
            tmp_path,
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
