"""Blocks that several layers share stay shared, whatever is cut."""


import torch
from effc.compiler.bypass import staying
from effc.compiler.capture import capture
from effc.compiler.compat import padding
from effc.compiler.rewrite import Rewriter

from tests.architectures import table

torch.set_num_threads(1)


def without_branch(name: str, layer: int, role: str):
    program = capture(table.model(name))
    unit = list(program.units)[layer]
    branch = next(b for b in program.skeleton.branches if b.unit == unit and b.role == role)
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(unit, branch.join, staying(program.units[unit].graph, branch))
    return program


def test_a_dropped_branch_that_another_layer_still_runs_can_not_come_back_as_zeros():
    program = without_branch("zamba2", 2, "attention")
    assert "shared_transformer" in " ".join(padding(program).why)
