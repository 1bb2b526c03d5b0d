"""Linear modules whose weights are on a grid, as `pack-quantized` of compressed-tensors stores them: the same codes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.codes import Codes
from ..core.quantity import count_text
from ..ir.program import Program
from ..models.checkpoints.pack_quantized import FORMAT, METHOD, Scheme, pack
from .gridded_modules import PackedFormat, incompatible_grid, notes_on_dense_modules, pack_linear_modules

COMPRESSED = PackedFormat("format", "compressed")


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
        return lines + notes_on_dense_modules(self.dense)


def pack_modules(program: Program) -> PackedModules:
    """Linear modules that are on a grid. Raises Reject where there are none, or a step's grid can't be packed."""
    linears = pack_linear_modules(program, COMPRESSED, _pack_module)
    _refuse_several_asymmetric_schemes(linears.packed)
    return PackedModules(linears.packed, linears.dense)


def _pack_module(path: str, weight: Tensor, scheme: Scheme, codes: Codes) -> PackedModule:
    if not torch.equal(codes.scale.to(weight.dtype).float(), codes.scale):
        kind = str(weight.dtype).removeprefix("torch.")
        raise incompatible_grid(
            f"`{path}` has scales that {kind} has not",
            help="take the model in bfloat16: `dtype: bfloat16` of `hf`, or leave `format` out",
            argument="format",
        ).rejection()
    return PackedModule(scheme, pack(codes.code, codes.scale, codes.zero, scheme, weight.dtype))


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
