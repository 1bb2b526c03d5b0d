"""Positions of an image that a module is applied to: operations of a network of images are its weights times these."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.checker.skeleton import Part
from ...ir.capture.capture import full_model_unit
from ...ir.program import Program


def parts_with_image_positions(parts: Iterable[Part], program: Program) -> Iterator[Part]:
    """Parts of a model that takes images alone with their positions; those of other models are applied to a token."""
    positions = positions_per_image_by_module(program) if takes_only_images(program.inputs) else {}
    return (replace(part, positions=positions.get(part.path, 1)) for part in parts)


def takes_only_images(inputs: Mapping[str, Any]) -> bool:
    """Whether all tensors of a model's inputs are images [b, channels, height, width]."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return bool(tensors) and all(x.dim() == 4 and x.is_floating_point() for x in tensors)


def positions_per_image_by_module(program: Program) -> dict[str, int]:
    """Positions of one image by module, over all of its calls; of a transposed convolution those that it reads."""
    batch = next(len(x) for x in program.inputs.values() if isinstance(x, Tensor))
    positions: Counter[str] = Counter()
    for node in full_model_unit(program).graph.nodes:
        module = program.model.get_submodule(node.target) if node.op == "call_module" else None
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        shape = (node.args[0] if transposed else node).meta["shape"]
        if isinstance(shape, torch.Size | tuple) and all(isinstance(n, int) for n in shape):
            positions[node.target] += math.prod(shape) // (batch * weight.shape[0])
    return dict(positions)
