"""Linear modules whose weights are on a grid, for formats that store the codes of one."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...kernels.codes import GROUPS, Codes, codes_if_on_grid
from ..core.events import iterate_and_report
from ..ir.program import Program
from ..models.checkpoints.pack_quantized import Scheme
from ..plugin.interfaces import Pass
from ..transforms.search.quantizing import Quantizer

nothing_quantized = Fault(
    "nothing-quantized",
    "A recipe asks for packed weights of a model that has none on a grid.\n\n"
    "`format: compressed` of `hf` and `weights: nbits` of `onnx` round nothing: they write the codes that "
    "`quantize.round` or `quantize.gptq` left.",
)
incompatible_grid = Fault(
    "unfit-grid",
    "Weights that were put on a grid can't be packed in the format that a recipe asks for.\n\n"
    "Formats have the codes of a grid, and each its limits. Weights that a later step changed or cut are on no grid "
    "any more. `pack-quantized` has scales in the model's own type, and float16 has not every scale; transformers "
    "unpacks zeros that lie anywhere only where all modules are on grids of one kind. A scale of MatMulNBits is for a "
    "power of two of inputs, 16 at least.",
)

# Of a model that came quantized, in groups that `native` looks for, too.
_UNRECORDED = tuple(Scheme(4, group, symmetric) for symmetric in (True, False) for group in GROUPS)
_Packed = TypeVar("_Packed")


@dataclass(frozen=True)
class PackedFormat:
    """Argument by which a recipe asks for packed weights, as `format: compressed`."""

    param: str
    value: str

    def no_grid_diagnostic(self) -> Diagnostic:
        return nothing_quantized(
            f"nothing is quantised: no linear module's weights are on a grid, and `{self.param}: {self.value}` "
            "rounds none",
            help="put `quantize.gptq(bits: 4, group: 32, zero: middle, data: ...)` before it, or leave "
            f"`{self.param}` out",
            argument=self.param,
        )

    def off_grid(self, path: str, scheme: Scheme) -> Diagnostic:
        return incompatible_grid(
            f"`{path}` was put on a grid in groups of {scheme.group or 'a row'}, and is on it no more",
            help=f"quantise behind the steps that cut or train, or leave `{self.param}` out",
            argument=self.param,
        )


@dataclass(frozen=True)
class PackedLinears(Generic[_Packed]):
    """Packed weights by the path of their module, and why other modules on a grid stay dense."""

    packed: Mapping[str, _Packed]
    dense: Mapping[str, str]


def notes_on_dense_modules(reason_by_path: Mapping[str, str]) -> list[str]:
    """Sentences for the model card on modules that stay dense, with the reason of each."""
    return [f"`{path}` stays dense: {reason}." for path, reason in reason_by_path.items()]


def pack_linear_modules(
    program: Program, packed_format: PackedFormat, pack: Callable[[str, Tensor, Scheme, Codes], _Packed]
) -> PackedLinears[_Packed]:
    """Linear modules that are on a grid, each by `pack` of its path, weight, scheme and codes.

    Raises Reject where there are none, where a step's grid is one no more, and with what `pack` rejects.
    """
    model, by_path = program.model, recorded_schemes(program.notes)
    schemes = tuple(dict.fromkeys(by_path.values())) or _UNRECORDED
    tied = _paths_of_tied_weights(model)
    dense = {path: reason for path, reason in _reasons_to_stay_dense_by_path(model, tied).items() if path in by_path}
    linear = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in tied}
    packed: dict[str, _Packed] = {}
    faults: list[Diagnostic] = []
    for path, module in iterate_and_report(linear.items(), "modules packed", len(linear)):
        weight, scheme = module.weight.detach().cpu(), by_path.get(path)
        grid = _first_matching_scheme(weight, schemes if scheme is None else (scheme, *schemes))
        if grid is None:
            faults += [] if scheme is None else [packed_format.off_grid(path, scheme)]
            continue
        try:
            packed[path] = pack(path, weight, *grid)
        except Reject as rejection:
            faults += rejection.diagnostics
    if faults or not packed:
        raise Reject(*(faults or [packed_format.no_grid_diagnostic()]))
    return PackedLinears(packed, dense)


def recorded_schemes(notes: Iterable[Mapping[str, Any]]) -> dict[str, Scheme]:
    """Schemes of the modules that steps put on a grid, by path."""
    schemes: dict[str, Scheme] = {}
    for note in notes:
        if {"quantized", "bits", "group", "symmetric"} <= note.keys():
            scheme = Scheme.smallest_for_grid(note["bits"], note["group"], note["symmetric"])
            schemes |= dict.fromkeys(note["quantized"], scheme)
    return schemes


def quantizer_steps(steps: Sequence[Pass]) -> list[Quantizer]:
    """The steps that put weights on a grid."""
    return [step for step in steps if isinstance(step, Quantizer)]


def _first_matching_scheme(weight: Tensor, schemes: Iterable[Scheme]) -> tuple[Scheme, Codes] | None:
    """The first scheme whose grid a weight is on, and its codes; None where it is on none."""
    for scheme in dict.fromkeys(schemes):
        if weight.shape[1] % (scheme.group or weight.shape[1]):
            continue
        codes = codes_if_on_grid(weight, scheme.group, scheme.bits, scheme.symmetric)
        if codes is not None:
            return scheme, codes
    return None


def _reasons_to_stay_dense_by_path(model: nn.Module, tied_module_paths: set[str]) -> dict[str, str]:
    """By path, why modules (all kinds but `Linear`, too) are beyond a format of linear modules."""
    return {
        path: "another module has its weight, too" if path in tied_module_paths else "it is no `Linear` of torch"
        for path, module in model.named_modules()
        if path in tied_module_paths or not isinstance(module, nn.Linear)
    }


def _paths_of_tied_weights(model: nn.Module) -> set[str]:
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    return {name.removesuffix(".weight") for name, parameter in named if uses[id(parameter)] > 1}
