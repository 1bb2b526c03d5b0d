"""Linear modules whose weights are on a grid, as `pack-quantized` of compressed-tensors stores them: the same codes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...kernels.codes import GROUPS, codes_if_on_grid
from ..core.events import follow
from ..core.quantity import count_text
from ..ir.program import Program
from ..models.checkpoints.pack_quantized import FORMAT, METHOD, Scheme, pack
from ..plugin.interfaces import Pass
from ..transforms.search.quantizing import Quantizer

nothing_quantized = Fault(
    "nothing-quantized",
    "A recipe asks for packed weights of a model that has none on a grid.\n\n"
    "`format: compressed` rounds nothing: it writes the codes that `quantize.round` or `quantize.gptq` left.",
)
incompatible_grid = Fault(
    "unfit-grid",
    "Weights that were put on a grid can't be packed as `pack-quantized`.\n\n"
    "The format has the codes of a grid, and scales in the model's own type. Weights that a later step changed or cut "
    "are on no grid any more, and float16 has not every scale. transformers unpacks zeros that lie anywhere only where "
    "all modules are on grids of one kind.",
)

# Of a model that came quantized, in groups that `native` looks for, too.
_UNRECORDED = tuple(Scheme(4, group, symmetric) for symmetric in (True, False) for group in GROUPS)


@dataclass(frozen=True)
class PackedModule:
    """A module's weight as the format stores it: tensors by their names behind the module's path."""

    scheme: Scheme
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class PackedModules:
    """Modules of a model that are packed, by path, and why others on a grid stay dense."""

    packed: Mapping[str, PackedModule]
    dense: Mapping[str, str]

    def config(self, model: nn.Module) -> dict[str, Any]:
        """`quantization_config` of the model: one group for each scheme.

        Packed zeros need `dequantize`: without it transformers 5.24 builds modules with unpacked ones, whose shape is
        another, before compressed-tensors 0.20 unpacks what was read.
        """
        paths: dict[Scheme, list[str]] = {}
        for path, module in self.packed.items():
            paths.setdefault(module.scheme, []).append(path)
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": ["Linear"] if len(paths) == 1 else paths[scheme],
                    "weights": scheme.to_json(),
                    "input_activations": None,
                    "output_activations": None,
                    "format": FORMAT,
                }
                for number, scheme in enumerate(paths)
            },
            "ignore": [path for path in linear if path not in self.packed],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({} if all(scheme.symmetric for scheme in paths) else {"dequantize": True}),
        }

    def replace_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the model by name, with those of the format for the weights of packed modules."""
        for name, tensor in tensors:
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and path in self.packed:
                yield from ((f"{path}.{part}", stored) for part, stored in self.packed[path].tensors.items())
            else:
                yield name, tensor

    def notes(self) -> list[str]:
        """Sentences for the model card."""
        count = count_text(len(self.packed), "linear module")
        lines = [
            f"The weights of {count} are packed as `{FORMAT}`: transformers reads `model/` where "
            "compressed-tensors is installed, `effc.load` without it."
        ]
        return lines + [f"`{path}` stays dense: {reason}." for path, reason in self.dense.items()]


def pack_modules(program: Program) -> PackedModules:
    """Linear modules that are on a grid. Raises Reject where there are none, or a step's grid can't be packed."""
    model, by_path = program.model, recorded_schemes(program.notes)
    schemes = tuple(dict.fromkeys(by_path.values())) or _UNRECORDED
    tied = _paths_of_tied_weights(model)
    dense = {path: reason for path, reason in _reasons_to_stay_dense(model, tied).items() if path in by_path}
    linear = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in tied}
    packed: dict[str, PackedModule] = {}
    faults: list[Diagnostic] = []
    for path, module in follow(linear.items(), "modules packed", len(linear)):
        weight, scheme = module.weight.detach().cpu(), by_path.get(path)
        try:
            result = _pack_by_first_scheme(path, weight, schemes if scheme is None else (scheme, *schemes))
        except Reject as rejection:
            faults += rejection.diagnostics
            continue
        if result is not None:
            packed[path] = result
        elif scheme is not None:
            faults.append(_off_grid(path, scheme))
    if faults or not packed:
        raise Reject(*(faults or [no_grid()]))
    _refuse_several_asymmetric_schemes(packed)
    return PackedModules(packed, dense)


def recorded_schemes(notes: Iterable[Mapping[str, Any]]) -> dict[str, Scheme]:
    """Schemes of the modules that steps put on a grid, by path."""
    schemes: dict[str, Scheme] = {}
    for note in notes:
        if {"quantized", "bits", "group", "symmetric"} <= note.keys():
            scheme = Scheme.holding(note["bits"], note["group"], note["symmetric"])
            schemes |= dict.fromkeys(note["quantized"], scheme)
    return schemes


def quantizes(steps: Sequence[Pass]) -> bool:
    """Whether one of the steps puts weights on a grid."""
    return any(isinstance(step, Quantizer) for step in steps)


def no_grid() -> Diagnostic:
    return nothing_quantized(
        "nothing is quantised: no linear module's weights are on a grid, and `format: compressed` rounds none",
        help="put `quantize.gptq(bits: 4, group: 32, zero: middle, data: ...)` before it, or leave `format` out",
        argument="format",
    )


def _pack_by_first_scheme(path: str, weight: Tensor, schemes: Iterable[Scheme]) -> PackedModule | None:
    """The weight by the first scheme whose grid it is on; None where it is on none."""
    for scheme in dict.fromkeys(schemes):
        if weight.shape[1] % (scheme.group or weight.shape[1]):
            continue
        codes = codes_if_on_grid(weight, scheme.group, scheme.bits, scheme.symmetric)
        if codes is None:
            continue
        if not torch.equal(codes.scale.to(weight.dtype).float(), codes.scale):
            kind = str(weight.dtype).removeprefix("torch.")
            raise incompatible_grid(
                f"`{path}` has scales that {kind} has not",
                help="take the model in bfloat16: `dtype: bfloat16` of `hf`, or leave `format` out",
                argument="format",
            ).rejection()
        return PackedModule(scheme, pack(codes.code, codes.scale, codes.zero, scheme, weight.dtype))
    return None


def _refuse_several_asymmetric_schemes(packed: Mapping[str, PackedModule]) -> None:
    example: dict[Scheme, str] = {}
    for path, module in packed.items():
        example.setdefault(module.scheme, path)
    if len(example) > 1 and not all(scheme.symmetric for scheme in example):
        paths = " and ".join(f"`{path}`" for path in list(example.values())[:2])
        raise incompatible_grid(
            f"{paths} are on grids of different kinds, and 0 is any code: transformers unpacks those of one kind",
            help="quantise with `zero: middle`, or all modules with equal `bits` and `group`",
            argument="format",
        ).rejection()


def _off_grid(path: str, scheme: Scheme) -> Diagnostic:
    return incompatible_grid(
        f"`{path}` was put on a grid in groups of {scheme.group or 'a row'}, and is on it no more",
        help="quantise behind the steps that cut or train, or leave `format` out",
        argument="format",
    )


def _reasons_to_stay_dense(model: nn.Module, tied: set[str]) -> dict[str, str]:
    """Modules that the format can't hold, by path."""
    return {
        path: "another module has its weight, too" if path in tied else "it is no `Linear` of torch"
        for path, module in model.named_modules()
        if path in tied or not isinstance(module, nn.Linear)
    }


def _paths_of_tied_weights(model: nn.Module) -> set[str]:
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    return {name.removesuffix(".weight") for name, parameter in named if uses[id(parameter)] > 1}
