"""What readers do about channels that go: least squares, on the device of the weights, solved once."""

from itertools import pairwise

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.dry_run import copy_on_meta
from effc.compiler.transforms.search import importance, reconstruct
from effc.compiler.transforms.search.reconstruct import (
    Moments,
    Reconstruction,
    readers,
    solve_takeover_if_any,
    zeroed_reader_weights,
)
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests import tiny

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(2))


def repair_weight(weight, gram, zero_columns, columns_to_remove, damping):
    """The weight whose columns `columns_to_remove` are zero and whose others make up for them as well as they can."""
    return solve_takeover_if_any(gram, zero_columns, columns_to_remove, damping).refitted_copy(weight)


def read(program, folder, ids=IDS):
    """Moments of what all readers of channels and heads are given."""
    moments = Moments(folder)
    modules = [m.tensor.rpartition(".")[0] for g in skeleton_of(program).groups for m in readers(g)]
    with torch.no_grad():
        moments.collect_missing_and_count_passes(program, modules, lambda: program.model(ids, use_cache=False), 1 << 30)
    return moments


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices; one number may come from anywhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
            assert len({t.device.type for t in tensors}) <= 1, f"{func} on {[t.device.type for t in tensors]}"
        return func(*args, **kwargs)


class Real(Moments):
    """Moments that are read as they are where everything else is only shapes."""

    def load_moment(self, module):
        with _disable_current_modes():
            return super().load_moment(module)

    def load_input_norms(self, module):
        with _disable_current_modes():
            return super().load_input_norms(module)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_everything_is_computed_on_the_device_of_the_weights(tmp_path, name):
    program = capture(tiny.model(name))
    groups = skeleton_of(program).groups
    read(program, tmp_path)
    moments = Real(tmp_path)
    there = copy_on_meta(program)  # the meta device stands for one: it is not the CPU
    assert skeleton_of(there).groups  # found before: finding reads indices off the CPU
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        for group in groups:
            for ranking in (
                importance.l1_importance(there, group),
                importance.wanda_importance(there, group, moments),
                importance.obs_importance(there, group, moments),
            ):
                assert ranking.device.type == "cpu" and ranking.shape == (group.count,)
            for weights in (
                zeroed_reader_weights(there.model, group, [1]),
                Reconstruction(there, moments).refitted_or_zeroed_reader_weights(group, {0}, [1]),
            ):
                assert {w.device.type for w in weights.values()} == {"meta"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_refused_by_module(tmp_path, value):
    program = capture(tiny.model("llama"))
    with torch.no_grad():
        program.model.model.layers[1].mlp.up_proj.weight[5] = value  # 1e30: its square is infinite
    with pytest.raises(Reject) as refused:
        read(program, tmp_path)
    found = refused.value.diagnostics[0]
    assert found.fault.slug == "not-a-number"
    assert "model.layers.1.mlp.down_proj" in found.message and found.help
    with pytest.raises(Reject):  # a run that goes on does not take what is there
        read(program, tmp_path)


def test_inputs_that_depend_on_each_other_are_solved_with_more_damping():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    moment = x.T @ x  # rank 3, and rounding makes it indefinite
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(moment.double())
    new = repair_weight(torch.ones(2, 40), moment, [], [0, 1], 0.0)
    assert new.isfinite().all() and not new[:, :2].any()


def test_items_that_depend_on_each_other_are_ranked(tmp_path):
    program = capture(tiny.model("llama"))
    moments = read(program, tmp_path, IDS[:1, :3])  # 3 tokens, 96 channels
    scores = importance.obs_importance(program, skeleton_of(program).groups[0], moments, damping_share=0.0)
    assert scores.isfinite().all()


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_an_item_costs_more_the_fewer_others_may_make_up_for_it(tmp_path, monkeypatch, kind):
    program = capture(tiny.model("llama", num_attention_heads=4, num_key_value_heads=4))
    group = next(g for g in skeleton_of(program).groups if g.kind == kind)
    (reader,) = readers(group)
    moments = read(program, tmp_path, torch.randint(3, 128, (32, 24), generator=torch.Generator().manual_seed(3)))
    found, inputs = [], program.model.get_parameter(reader.tensor).shape[1]
    for together in (inputs, inputs // 2, 1):
        monkeypatch.setattr(importance, "BATCH_ROWS", together)
        found.append(importance.obs_importance(program, group, moments, damping_share=1e-6))
    assert all((more >= less * (1 - 1e-4)).all() for less, more in pairwise(found))
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])

    weight, size = program.model.get_parameter(reader.tensor).detach().double(), inputs // group.count
    moment, half = moments.load_moment(reader.tensor.removesuffix(".weight")).double(), inputs // 2
    for item in range(group.count):  # the others of its half take over, by least squares
        start = item * size // half * half
        gone = set(range(item * size, (item + 1) * size))
        keep = [i for i in range(start, start + half) if i not in gone]
        lost = sorted(gone)
        share = torch.linalg.lstsq(moment[keep][:, keep], moment[keep][:, lost], driver="gelsd").solution
        change = torch.zeros(inputs, len(lost), dtype=torch.float64)
        change[lost], change[keep] = -torch.eye(len(lost), dtype=torch.float64), share
        error = weight[:, lost] @ change.T
        assert found[1][item] == pytest.approx(((error @ moment) * error).sum().item(), rel=0.02)


@pytest.mark.parametrize("threads", [1, 2])
def test_wide_heads_are_ranked_by_any_number_of_threads(tmp_path, threads):
    wide = tiny.model("llama", hidden_size=768, num_attention_heads=12, num_key_value_heads=4, head_dim=64)
    program, before = capture(wide), torch.get_num_threads()
    group = next(g for g in skeleton_of(program).groups if g.kind == "kv_heads")
    moments = read(program, tmp_path)
    torch.set_num_threads(threads)
    try:
        scores = importance.obs_importance(program, group, moments)
    finally:
        torch.set_num_threads(before)
    assert scores.isfinite().all() and len(scores) == 4


class Counting(Moments):
    """Moments that count how often they are read."""

    reads = 0

    def load_moment(self, module):
        self.reads += 1
        return super().load_moment(module)


def test_a_trial_and_its_cut_are_solved_once_and_give_the_same_bits(tmp_path):
    program = capture(tiny.model("llama"))
    read(program, tmp_path)
    moments = Counting(tmp_path)
    first, second = [g for g in skeleton_of(program).groups if g.kind == "channels"][:2]
    repair = Reconstruction(program, moments)
    trials = [repair.refitted_or_zeroed_reader_weights(g, set(), [1, 3]) for g in (first, second)]
    assert moments.reads == 2
    cuts = [repair.refitted_or_zeroed_reader_weights(g, set(), [1, 3]) for g in (first, second)]
    assert moments.reads == 2
    assert all(torch.equal(a[t], b[t]) for a, b in zip(trials, cuts, strict=True) for t in a)
    for items, dead in (([1, 2], set()), ([1, 3], {0}), ([1, 3], set())):  # only the newest is kept
        fresh = Reconstruction(program, Moments(tmp_path)).refitted_or_zeroed_reader_weights(first, dead, items)
        found, before = repair.refitted_or_zeroed_reader_weights(first, dead, items), moments.reads
        assert all(torch.equal(found[t], fresh[t]) for t in fresh)
        repair.refitted_or_zeroed_reader_weights(second, set(), [1, 3])
        assert moments.reads == before
    assert moments.reads == 5


def test_what_was_solved_holds_for_weights_that_changed_meanwhile(tmp_path):
    program = capture(tiny.model("llama"))
    moments, group = read(program, tmp_path), skeleton_of(program).groups[0]
    repair = Reconstruction(program, moments)
    repair.refitted_or_zeroed_reader_weights(group, set(), [1])
    with torch.no_grad():
        program.model.get_parameter(readers(group)[0].tensor).mul_(2)
    fresh = Reconstruction(program, moments).refitted_or_zeroed_reader_weights(group, set(), [1])
    assert all(torch.equal(w, fresh[t]) for t, w in repair.refitted_or_zeroed_reader_weights(group, set(), [1]).items())


PROBLEMS = {
    "out": st.integers(1, 5),
    "width": st.integers(2, 24),
    "tokens": st.integers(1, 60),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 999),
}


def problem(out, width, tokens, dtype, seed):
    """Inputs [tokens, width], weights [out, width], which columns were gone and which are lost now."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) * (0.1 + torch.rand(width, generator=generator))
    order = torch.randperm(width, generator=generator).tolist()
    first, second = sorted(torch.randint(0, width + 1, (2,), generator=generator).tolist())
    gone, lost = order[:first], order[first:second]
    weight = torch.randn(out, width, generator=generator).index_fill(1, torch.tensor(gone, dtype=torch.int64), 0.0)
    return x, weight.to(dtype), gone, lost


def damped_error(x, before, after, lost, damping):
    """What least squares over the kept inputs minimises, with the penalty on how far their weights move; float64."""
    x, before, after = x.double(), before.double(), after.double()
    kept = [i for i in range(x.shape[1]) if i not in lost]
    ridge = damping * x[:, kept].pow(2).sum(0).mean() if kept else 0.0
    return ((after - before) @ x.T).pow(2).sum() + ridge * (after - before)[:, kept].pow(2).sum()


@settings(max_examples=100, deadline=None)
@given(**PROBLEMS)
def test_lost_and_gone_columns_are_zero_and_the_dtype_stays(out, width, tokens, dtype, seed):
    x, weight, gone, lost = problem(out, width, tokens, dtype, seed)
    before = weight.clone()
    new = repair_weight(weight, x.T @ x, gone, lost, 1e-3)
    assert new.dtype == dtype and new.shape == weight.shape and new.isfinite().all()
    assert not new[:, [*gone, *lost]].any()
    assert torch.equal(weight, before)
    if not lost:
        assert torch.equal(new, weight)


@settings(max_examples=100, deadline=None)
@given(**{**PROBLEMS, "dtype": st.just(torch.float32)}, damping=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_no_other_weights_leave_a_smaller_error(out, width, tokens, dtype, seed, damping):
    x, weight, gone, lost = problem(out, width, tokens, dtype, seed)
    weight = weight.double()
    new = repair_weight(weight, (x.double().T @ x.double()), gone, lost, damping)
    least = damped_error(x, weight, new, [*gone, *lost], damping)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1, 1.0):
        step = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * size
        step[:, [*gone, *lost]] = 0
        other = damped_error(x, weight, new + step, [*gone, *lost], damping)
        assert least <= other * (1 + 1e-9) + 1e-12  # float64 rounding of the sums


@settings(max_examples=50, deadline=None)
@given(out=st.integers(1, 5), width=st.integers(2, 16), seed=st.integers(0, 999))
def test_with_little_damping_it_is_ordinary_least_squares(out, width, seed):
    x, weight, gone, lost = problem(out, width, 8 * width, torch.float32, seed)
    x, weight = x.double(), weight.double()
    kept = [i for i in range(width) if i not in {*gone, *lost}]
    new = repair_weight(weight, x.T @ x, gone, lost, 1e-12)
    if kept:
        expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
        assert torch.allclose(new[:, kept], expected, rtol=1e-7, atol=1e-7)  # 1e-7: the squared condition number


class Convolved(torch.nn.Module):
    """Channels of an image, or of a sequence, that a convolution reads; one is a multiple of another."""

    def __init__(self, kind, **more):
        super().__init__()
        shape = (2, 3, 9, 9) if kind is torch.nn.Conv2d else (2, 3, 9)
        self.first, self.last = kind(3, 6, 3), kind(6, 4, 3, **more)
        self.dummy_inputs = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        with torch.no_grad():
            self.first.weight[4], self.first.bias[4] = 2 * self.first.weight[1], 2 * self.first.bias[1]

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("more", [{}, {"stride": 2}, {"dilation": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.Conv2d])
def test_what_a_convolution_reads_is_made_up_for_by_least_squares(tmp_path, kind, more):
    torch.manual_seed(0)
    program = capture(Convolved(kind, **more).eval())
    (group,) = skeleton_of(program).groups
    moments, x = Moments(tmp_path), torch.randn(program.inputs["x"].repeat_interleave(8, 0).shape)
    with torch.no_grad():
        moments.collect_missing_and_count_passes(program, ["last"], lambda: program.model(x), 1 << 30)
        before = program.model(x)
        assert set(importance.ascending_indices(importance.obs_importance(program, group, moments))[:2]) == {1, 4}
        for path, value in Reconstruction(program, moments).refitted_or_zeroed_reader_weights(group, (), [4]).items():
            program.model.get_parameter(path).data = value
        after = program.model(x)
    assert not program.model.last.weight[:, 4].any()
    assert (after - before).abs().max() < 0.02 * before.abs().max(), "twice channel 1 is what channel 4 was"
    assert len(importance.wanda_importance(program, group, moments)) == 6


def test_moments_are_kept_up_to_the_diagonal_and_come_back_whole(tmp_path, monkeypatch):
    program = capture(tiny.model("llama"))
    module = "model.layers.0.mlp.down_proj"  # 96 inputs
    whole = read(program, tmp_path / "whole")
    expected = whole.load_moment(module)
    monkeypatch.setattr(reconstruct, "STRIPE", 20)
    parts = read(program, tmp_path / "parts")
    assert torch.allclose(parts.load_moment(module), expected, rtol=1e-6)
    files = {kept: next(kept.folder.glob(parts._file(module).name)).stat().st_size for kept in (whole, parts)}
    assert files[parts] < 0.7 * files[whole]
    assert 4 * 96 + reconstruct.bytes_on_disk(96) <= files[parts] < 4 * 96 + reconstruct.bytes_on_disk(96) + 1000
