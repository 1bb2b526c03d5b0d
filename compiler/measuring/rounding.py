"""How far a model itself moves where what its products with weights read is rounded to bfloat16.

A form that computes so is as far from the model as one such rounding takes it. Most models are moved alike little; some
much, as where a router is nearly undecided between two experts, or weights make attention sharp. Which of them a model
is can't be seen from outside, so it is tried: some draws, each of which rounds otherwise.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = 8  # the chance that one more is further off than all of them is one in nine, where it rounds no better

aten = torch.ops.aten
_PRODUCTS = {  # where the two factors stand
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.linear.default: (0, 1),
    aten._grouped_mm.default: (0, 1),
    aten.convolution.default: (0, 1),
}
_ATTENTIONS = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
)


def exact_twin(model: nn.Module) -> nn.Module:
    """The model itself where it computes in float32, else a copy that does."""
    halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return copy.deepcopy(model).float() if halves else model


def draws(model: nn.Module, probe: Callable[[nn.Module], Any], seed: int, count: int = DRAWS) -> list[Any]:
    """What `probe` sees of a model of float32, once for each way of rounding."""
    found = []
    for number in range(count):
        with torch.no_grad(), _Rounding(model, seed + number):
            found.append(probe(model))
    return found


class _Rounding(TorchDispatchMode):
    """Weights to the nearest bfloat16; what they meet, keys and values up or down by chance, to themselves on average.

    Products of two activations are left alone, and embeddings are weights.
    """

    def __init__(self, model: nn.Module, seed: int):
        super().__init__()
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = list(args), kwargs or {}
        if places := _PRODUCTS.get(func):
            if any(self._is_weight(args[place]) for place in places):
                for place in places:
                    args[place] = self._rounded(args[place])
        elif func in _ATTENTIONS:
            args[1:3] = [self._rounded(x) for x in args[1:3]]
        elif func is aten.embedding.default:
            return _nearest(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _is_weight(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._weights

    def _rounded(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        return _nearest(x) if self._is_weight(x) else self._by_chance(x)

    def _by_chance(self, x: Tensor) -> Tensor:
        """To the bfloat16 below or above, the nearer the likelier."""
        noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, generator=self._generator)
        drawn = ((x.contiguous().view(torch.int32) + noise) & ~0xFFFF).view(torch.float32)
        return torch.where(x.isfinite() & drawn.isfinite(), drawn, x)


def _nearest(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x
