"""Zeros that stay zero while their neighbours are trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..search.masks import is_sparse


def nonzero_masks(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Masks of the nonzeros of the sparse matrices among some parameters, bool, by name."""
    return {name: p.detach() != 0 for name, p in parameters.items() if p.dim() > 1 and is_sparse(p.detach())}


class MaskedProduct(torch.autograd.Function):
    """x (mask * scale * B A)^T: a low-rank product that gives nothing where the mask is False.

    x [..., in], a [rank, in], b [out, rank], mask [out, in] bool -> [..., out]
    The matrix of the product lives within a call, forward and backward: none is kept per module.
    Source: SparsePEFT of SQFT (Munoz et al. 2024, arXiv 2410.03750), section 3.2.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, mask)
        ctx.scale = scale
        return x @ masked_lora_product(a, b, mask, scale).T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mask = ctx.saved_tensors
        of_x = gradient @ masked_lora_product(a, b, mask, ctx.scale) if ctx.needs_input_grad[0] else None
        slope = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # [out, in]
        slope.mul_(mask).mul_(ctx.scale)
        return of_x, b.T @ slope, slope @ a.T, None, None


def masked_lora_product(a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
    """mask * scale * B A, [out, in]; exactly zero where the mask is False."""
    return torch.where(mask, (b @ a) * scale, 0.0)
