"""Whether families that a cache holds fit their program: who can write to a cache can make seals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ....dsl.checker.skeleton import Group
from ...analysis.discovery.discover import skeleton_of
from ..search.savings import step_count_of
from ..training.adapter_checks import assert_adapters_fit_program
from .choices import BLOCKS, KERNEL, LAYERS, RANK, WIDTHS, ElasticDim
from .elastic_dims import sizes_of_larger_kernels
from .kernels import identity_crop_matrices
from .mixtures import EXPERTS, is_maskable_experts
from .scans import SCANNED, is_maskable_scan

if TYPE_CHECKING:
    from .family import Family


def assert_family_fits_program(family: "Family") -> None:
    """Raises AssertionError, or what comes of taking data of another form, unless its choices are the program's."""
    assert isinstance(family.base, str) and type(family.masked) is bool, "a family without a base"
    assert family.shape is not None or not family.tensors, "adapters without a shape"
    if family.shape is not None:
        assert_adapters_fit_program(family.program, family.shape, family.tensors)
    if family.grid is not None:
        _assert_grid_fits(family)
    if family.norms is not None:
        assert family.norms.is_floating_point() and family.norms.dim() == 4 and len(family.norms), "no images for norms"
    skeleton = skeleton_of(family.program)
    groups: dict[tuple[str, str], Group] = {(g.site, g.kind): g for g in skeleton.groups}
    known = {RANK: set(family.paths), LAYERS: set(skeleton.units), BLOCKS: {b.site for b in skeleton.branches}}
    kernels = sizes_of_larger_kernels(skeleton, None, [1])
    dims = family.space.dims
    assert dims and len({dim.name for dim in dims}) == len(dims), "two dimensions of a name"
    for dim in dims:
        assert isinstance(dim.name, str) and all(type(value) is int for value in dim.values), (
            "a dimension of no numbers"
        )
        upper, least = 1, 0
        if dim.kind in WIDTHS:
            chosen = [groups[site, dim.kind] for site in dim.places]
            upper, least = min(map(step_count_of, chosen)), 1
            if dim.kind in SCANNED:
                assert all(is_maskable_scan(family.program.model, g) for g in chosen), f"{dim.name} can't be silenced"
            if dim.kind == EXPERTS:
                assert all(is_maskable_experts(family.program, g) for g in chosen), (
                    f"{dim.name} are not chosen by a router"
                )
            assert all(_is_order(family.orders[f"{g.site}:{g.kind}"], g.count) for g in chosen), "no order of items"
        elif dim.kind == KERNEL:
            upper, least = min(kernels[site] for site in dim.places), 1
            assert all(value % 2 for value in dim.values) and dim.values[0] == upper, "kernels without a middle"
        else:
            assert set(dim.places) <= known[dim.kind], f"{dim.name} is of another model"
        if dim.kind == RANK:
            upper, least = family.shape.rank if family.shape else 0, 1
        assert dim.places and _is_within(dim, least, upper), f"{dim.name} has values beyond {upper}"
    learned = identity_crop_matrices(family.space) if family.crops else {}
    assert family.crops.keys() == learned.keys(), "kernels that were learned for other sizes"
    assert all(t.shape == learned[n].shape and t.is_floating_point() for n, t in family.crops.items()), "no kernels"


def _assert_grid_fits(family: "Family") -> None:
    grid = family.grid
    assert type(grid.bits) is int and 2 <= grid.bits <= 8, f"a grid of {grid.bits} bits"
    assert type(grid.group) is int and grid.group >= 0, f"groups of {grid.group}"
    assert type(grid.symmetric) is bool and type(grid.search) is bool, "a grid of another form"
    for path in family.paths:
        inside = family.tensors[f"{path}.lora_A"].shape[1]
        assert inside % grid.width(inside) == 0, f"groups of {grid.group} don't divide what {path} is given"


def _is_within(dim: ElasticDim, minimum: int, maximum: int) -> bool:
    return all(minimum <= value <= maximum for value in dim.values)


def _is_order(items: Sequence[Any], count: int) -> bool:
    return len(items) == count and all(type(item) is int for item in items) and sorted(items) == list(range(count))
