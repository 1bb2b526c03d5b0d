"""Adapters whose sum with the weight is rounded to a grid, while they are trained as when they are merged."""

import torch
from torch import Tensor

from ....kernels.grid import Scales
from .masks import masked_lora_product


class RoundedProduct(torch.autograd.Function):
    """x (Q(W + mask * scale * B A) - W)^T: what a weight on a grid gives beyond the one beneath.

    x [..., in], a [rank, in], b [out, rank], mask [out, in] bool, weight W [out, in] -> [..., out]
    The gradient is that of the product before it is rounded. Its matrix lives within a call, forward and backward.
    Source: QA-SparsePEFT of SQFT (Munoz et al. 2024, arXiv 2410.03750), section 3.3. There dropout falls on what the
    weight is given, too; here on what is beyond it alone.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, weight: Tensor, scales: Scales
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, mask, weight)
        ctx.scale, ctx.scales = scale, scales
        return x @ _rounded_minus_weight(a, b, mask, scale, weight, scales).to(x.dtype).T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mask, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _rounded_minus_weight(a, b, mask, ctx.scale, weight, ctx.scales).to(gradient.dtype)
        slope = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # [out, in]
        slope.mul_(mask).mul_(ctx.scale)
        return of_x, b.T @ slope, slope @ a.T, None, None, None, None


def rounded_weight_and_adapter(
    a: Tensor, b: Tensor, mask: Tensor, scale: float, weight: Tensor, scales: Scales
) -> Tensor:
    """Q(W + mask * scale * B A), [out, in] float32; exactly zero where W and the mask are."""
    return scales.round(weight.float() + masked_lora_product(a.float(), b.float(), mask, scale))


def _rounded_minus_weight(a: Tensor, b: Tensor, mask: Tensor, scale: float, weight: Tensor, scales: Scales) -> Tensor:
    return rounded_weight_and_adapter(a, b, mask, scale, weight, scales) - weight.float()
