"""All the numbers of a model put into another of its shapes, for tests of what is replayed without weights."""

import torch
from effc.compiler.ir import surgery
from torch import nn


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that a skeleton lacks: parameters (tied ones once) and buffers, also what checkpoints leave out."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[path] = tensor.detach()
    return found


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fill a skeleton with what `weights_of` gave; ties stay."""
    expected = weights_of(model)
    odd = sorted(set(expected) ^ set(weights)) or [
        path for path, tensor in weights.items() if tensor.shape != expected[path].shape
    ]
    assert not odd, f"other weights than the skeleton has: {', '.join(odd[:3])}"
    for path, tensor in weights.items():
        surgery.replace_tensor_everywhere(model, path, tensor)
