"""How much each item of a group matters, without running the model."""

from typing import TYPE_CHECKING

import torch

from ..dsl.skeleton import Group

if TYPE_CHECKING:
    from .program import Program


def l1(program: "Program", group: Group) -> torch.Tensor:
    """Sum of magnitudes of the weights that make an item's channels; [count] float64.

    The weights that read them are left out.
    Source: MultiPruner's weight reorder (Munoz et al. 2025), gate and up rows per channel, q, k and v rows per head.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    for member in group.members[:-group.readers]:
        tensor = program.model.get_parameter(member.tensor).detach()
        sums = tensor.abs().transpose(0, member.axis).reshape(tensor.shape[member.axis], -1).sum(1).double()
        for start, size in member.segments:
            total += sums[start : start + group.count * size].reshape(group.count, size).sum(1)
    return total


def ascending(scores: torch.Tensor) -> list[int]:
    """Items from the least to the most important; equal ones by index."""
    return torch.sort(scores, stable=True).indices.tolist()
