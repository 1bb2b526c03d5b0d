"""Decompositions for ONNX: a few casts are rewritten in place, and torch takes the rest apart as ever."""

import pytest
import torch
from effc.compiler.runtimes.onnx.decompositions import light_decompositions
from torch import nn

aten = torch.ops.aten


class Casts(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = (mask.to(torch.bool) & (x > 0)).to(x.dtype)
        return torch.sin(x.detach_()) * kept + x.to("cpu", torch.float32)


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.cos(x).add_(mask.to(x.dtype))


class GivesBackItself(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (torch.cos(x) * mask).detach()


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    rows = torch.export.Dim.AUTO
    arguments = torch.randn(3, 4), torch.tensor([[1, 0, 1, 1]] * 3)
    return torch.export.export(module, arguments, dynamic_shapes=[{0: rows}, {0: rows}])


def targets(program: torch.export.ExportedProgram) -> set:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(("module", "same"), [(Casts(), True), (InPlace(), False), (GivesBackItself(), False)])
def test_a_program_is_traced_again_only_where_more_than_casts_is_to_be_taken_apart(module, same):
    program, table = exported(module), torch.export.default_decompositions()
    with light_decompositions():
        result = program.run_decompositions(table)
    assert (result is program) == same
    assert not any(t._schema.is_mutable for t in targets(result) if isinstance(t, torch._ops.OpOverload))
    assert targets(result).isdisjoint({aten.to.dtype, aten.to.dtype_layout, aten.__and__.Tensor, aten.detach_.default})
    x, mask = torch.randn(5, 4), torch.tensor([[0, 1, 1, 0]] * 5)
    assert torch.equal(result.module(check_guards=False)(x, mask), module(x.clone(), mask))


def test_outside_of_an_export_decompositions_are_torchs():
    stock = torch.export.ExportedProgram.run_decompositions
    with pytest.raises(ZeroDivisionError), light_decompositions():
        assert torch.export.ExportedProgram.run_decompositions is not stock
        raise ZeroDivisionError
    assert torch.export.ExportedProgram.run_decompositions is stock
