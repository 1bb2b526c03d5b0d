"""Sizes of convolutions' kernels that may be chosen: a smaller one is the middle of the larger, as was learned."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ir.layers.linear import weight_of
from ...ir.weights import assign_tensors
from ..editing.rewrite import Rewriter
from .choices import KERNEL, Space

if TYPE_CHECKING:
    from ...ir.program import Program


def crop_matrix_name(path: str, size: int) -> str:
    """The name of what is learned for a size; no parameter's name has spaces."""
    return f"{path} {size}"


def identity_crop_matrices(space: Space) -> dict[str, nn.Parameter]:
    """New parameters: for every size below the largest a matrix over the positions of its kernel, the identity."""
    return {
        crop_matrix_name(path, size): nn.Parameter(torch.eye(size * size))
        for dim in space.of(KERNEL)
        for path in dim.places
        for size in dim.values[1:]
    }


def crop_weight(
    weight: Tensor,
    conv_path: str,
    descending_sizes: Sequence[int],
    target_size: int,
    crop_matrices: Mapping[str, Tensor],
) -> Tensor:
    """[out, in, k, k] -> [out, in, target_size, target_size]: from value to value the middle, times its learned matrix.

    Source: kernel transformation matrices of Once-for-all (Cai et al. 2020, arXiv 1908.09791), section 3.3, which
    BootstrapNAS uses (Munoz et al. 2021, arXiv 2112.10878).
    """
    for value in descending_sizes[1:]:
        if value < target_size:
            break
        rim = (weight.shape[-1] - value) // 2
        weight = weight[..., rim : rim + value, rim : rim + value]
        if (learned := crop_matrices.get(crop_matrix_name(conv_path, value))) is not None:
            weight = (weight.flatten(2) @ learned.to(weight)).unflatten(2, (value, value))
    return weight


def pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """A kernel [out, in, k, k] in zeros, [out, in, own, own], which convolves as it does with fewer zeros around."""
    rim = (size - kernel.shape[-1]) // 2
    return nn.functional.pad(kernel, [rim] * 4)


def crop_convolution_kernels(
    program: "Program", space: Space, choice: Mapping[str, int], crop_matrices: Mapping[str, Tensor]
) -> None:
    """Give convolutions the kernels of a choice, and as much less zeros around."""
    weights = {}
    with Rewriter(program) as rewrite:
        for dim in space.of(KERNEL):
            rim = (dim.values[0] - choice[dim.name]) // 2
            for path in dim.places if rim else ():
                weight = weight_of(program.model.get_submodule(path))
                weights[f"{path}.weight"] = crop_weight(
                    weight, path, dim.values, choice[dim.name], crop_matrices
                ).contiguous()
                less = reduced_padding_attributes(program, path, rim)
                assert less is not None, f"{path} is padded in another way than it was"
                for axis in (2, 3):
                    rewrite.narrow(f"{path}.weight", axis, range(rim, dim.values[0] - rim))
                for where, value in less.items():
                    rewrite.set_attr(where, value)
    if weights:
        assign_tensors(program.model, weights)
        program.changed()


# -- zeros around --------------------------------------------------------------------------------------------


def reduced_padding_attributes(program: "Program", conv_path: str, removed_border: int) -> dict[str, list[int]] | None:
    """Attributes that make the zeros around a convolution fewer, so that a kernel without its
    outermost `removed_border` places gives as many outputs; None where it can't be told who puts them there.

    They are the module's own, or those of a ZeroPad2d within it or right before it.
    """
    module = program.model.get_submodule(conv_path)
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros" or type(module.weight) is not nn.Parameter:
        return None
    less = [removed_border * step for step in module.dilation]  # [high, wide]
    attributes = _reduced_module_padding_attributes(module, conv_path, less)
    if attributes is None:
        attributes = _reduced_zero_pad_attributes(_preceding_zero_pad(program, conv_path), less)
    elif type(module).forward is not nn.Conv2d.forward and not _smaller_padding_equals_crop(
        module, conv_path, removed_border, attributes
    ):
        attributes = None
    return attributes


def _reduced_module_padding_attributes(
    module: nn.Conv2d, conv_path: str, removed_height_width: Sequence[int]
) -> dict[str, list[int]] | None:
    if module.padding == "same":
        return {}
    if isinstance(module.padding, tuple | list) and all(
        p >= n for p, n in zip(module.padding, removed_height_width, strict=True)
    ):
        return {f"{conv_path}.padding": [p - n for p, n in zip(module.padding, removed_height_width, strict=True)]}
    inner = [(f"{conv_path}.{name}", child) for name, child in module.named_children() if type(child) is nn.ZeroPad2d]
    return _reduced_zero_pad_attributes(inner[0], removed_height_width) if len(inner) == 1 else None


def _reduced_zero_pad_attributes(
    path_and_pad: tuple[str, nn.ZeroPad2d] | None, removed_height_width: Sequence[int]
) -> dict[str, list[int]] | None:
    if path_and_pad is None:
        return None
    path, module = path_and_pad
    left = [
        p - n
        for p, n in zip(
            module.padding,
            (removed_height_width[1], removed_height_width[1], removed_height_width[0], removed_height_width[0]),
            strict=True,
        )
    ]
    return {f"{path}.padding": left} if min(left) >= 0 else None


def _preceding_zero_pad(program: "Program", conv_path: str) -> tuple[str, nn.ZeroPad2d] | None:
    """A ZeroPad2d whose output one convolution alone is given."""
    module = program.model.get_submodule(conv_path)
    if type(module).forward is not nn.Conv2d.forward or module.padding not in ("valid", (0, 0)):
        return None
    for unit in program.units.values():
        for node in unit.graph.nodes:
            if node.op == "call_module" and f"{unit.path}.{node.target}" == conv_path:
                before = node.args[0]
                if getattr(before, "op", "") != "call_module" or len(before.users) > 1:
                    return None
                pad = program.model.get_submodule(f"{unit.path}.{before.target}")
                return (f"{unit.path}.{before.target}", pad) if type(pad) is nn.ZeroPad2d else None
    return None


@torch.no_grad()
def _smaller_padding_equals_crop(
    module: nn.Conv2d, conv_path: str, border: int, padding_attributes: Mapping[str, Any]
) -> bool:
    """Whether a convolution of another class, smaller and with fewer zeros around, gives what its middle does."""
    original, size = copy.deepcopy(module).float(), module.kernel_size[0]
    small = copy.deepcopy(original)
    middle = original.weight[..., border : size - border, border : size - border].clone()
    original.weight.copy_(pad_kernel(middle, size))
    small.weight, small.kernel_size = nn.Parameter(middle), (size - 2 * border,) * 2
    for where, value in padding_attributes.items():
        owner, _, name = where.removeprefix(f"{conv_path}.").rpartition(".")
        setattr(small.get_submodule(owner), name, value)
    x = torch.randn(1, module.in_channels, 2 * size, 2 * size, generator=torch.Generator().manual_seed(0))
    one, other = original(x.to(middle.device)), small(x.to(middle.device))
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))
