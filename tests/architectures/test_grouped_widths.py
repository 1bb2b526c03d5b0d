"""Packed experts are multiplied in one product, which takes widths of whole steps of 16 bytes: no cut leaves others."""

import copy
from pathlib import Path

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.compat import plan_padding_to_stock
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.program import Program
from effc.compiler.models.checkpoints.pretrained import pretrained
from effc.compiler.plugin.registry import Registry
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.widths import slice_groups
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.skeleton import Group, Skeleton
from effc.dsl.checker.values import Ratio
from safetensors.torch import save_file
from torch import nn

from tests import tiny
from tests.architectures import table
from tests.architectures.passes import PASSES, in_halves
from tests.recipes_in_memory import SCORE, context_of, recipe_of

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
STEP = {torch.float32: 4, torch.bfloat16: 8}


def widths(skeleton: Skeleton) -> list[Group]:
    return [g for g in skeleton.groups if g.kind == "channels" and g.multiple > 1]


def cut(model: nn.Module, tmp_path: Path, word: str, **args: object) -> Program:
    program = capture(copy.deepcopy(model))
    step = Registry().make("pass", Invocation(word, {**PASSES[word], **args}))
    step.run(program, context_of(tmp_path, model, recipe_of([])))
    return program


@torch.no_grad()
def mask(model: nn.Module, groups: list[Group], count: int) -> None:
    """Let nobody read the first items of some groups."""
    for group in groups:
        for member in group.members[-group.readers :]:
            dead = torch.tensor([i for item in range(count) for i in member.indices(item)])
            model.get_parameter(member.tensor).index_fill_(member.axis, dead, 0.0)


def made(dtype: torch.dtype) -> nn.Module:
    model = tiny.model("mixtral")
    return in_halves(model) if dtype == torch.bfloat16 else model


@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize("dead", [1, 5, 11])
def test_dead_channels_of_experts_go_in_whole_steps(tmp_path, dtype, dead):
    model = made(dtype)
    before = widths(skeleton_of(capture(model)))
    assert before and all(g.multiple == STEP[dtype] for g in before)
    mask(model, before, dead)
    mask(
        model, [g for g in skeleton_of(capture(model)).groups if g.kind == "kv_heads"], 1
    )  # where no step is dead whole
    expected = model(IDS).logits
    program = cut(model, tmp_path, "clean.dead", align=1)
    left = widths(skeleton_of(program))
    assert [g.count for g in left] == [g.count - dead // STEP[dtype] * STEP[dtype] for g in before]
    torch.testing.assert_close(program.model(IDS).logits, expected, atol=2e-2 if dtype.itemsize == 2 else 1e-4, rtol=0)


@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize(
    ("word", "args"),
    [
        ("prune.channels", {"keep": Ratio(0.8, "channels"), "align": 3, "score": None}),
        ("prune.channels", {"keep": Ratio(0.8, "channels"), "align": 3, "score": SCORE}),
        ("prune.multi", {"remove": Ratio(0.1, "params"), "group": 3, "score": SCORE, "order": ("channels",)}),
    ],
)
def test_passes_that_narrow_experts_take_whole_steps(tmp_path, word, args, dtype):
    model = made(dtype)
    skeleton = skeleton_of(capture(model))
    step = Registry().make("pass", Invocation(word, {**PASSES[word], **args}))
    foreseen = step.forecast(skeleton)
    left = widths(skeleton_of(cut(model, tmp_path, word, **args)))
    assert len(left) == len(widths(skeleton)) and sum(g.count for g in left) < sum(g.count for g in widths(skeleton))
    assert all(g.count % STEP[dtype] == 0 for g in (*left, *widths(foreseen)))
    if args["score"] is None:
        assert [g.count for g in left] == [g.count for g in widths(foreseen)]


@pytest.mark.parametrize("name", ["afmoe", "ernie4_5_moe"])
@pytest.mark.slow
def test_a_checkpoint_that_is_filled_up_has_widths_that_can_be_multiplied(tmp_path, name):
    program = capture(table.model(name))
    cuts = [(g, set(range(4))) for g in skeleton_of(program).groups if g.kind == "channels"]
    with Rewriter(program) as rewrite:  # 28 of 32 for each expert, 60 of 64 for two shared ones together: 30 each
        slice_groups(program, rewrite, cuts)
    filled = plan_padding_to_stock(program)
    assert not filled.reasons
    filled.config.save_pretrained(tmp_path)
    save_file(
        {p.name: p.make().contiguous() for p in filled.padded_tensor_pieces(program)}, tmp_path / "model.safetensors"
    )
    again = type(pretrained(program.model)).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, program.model(IDS).logits, atol=1e-4, rtol=0)


def test_a_model_whose_experts_have_odd_widths_may_keep_them():
    model = tiny.model("mixtral", intermediate_size=30)
    model.set_experts_implementation("eager")
    assert not widths(skeleton_of(capture(model)))
