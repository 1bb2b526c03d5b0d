"""Artifact of the native engine: packed weights and a plan of the decode step, for CPUs."""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...dsl.checker.rules import Conflict, Problem
from ...kernels.packed_sizes import packed_weight_bytes
from ..artifacts.load import other_kind
from ..ir.layers.number_formats import BY_KERNEL, DENSE, DenseNumbers
from ..plugin.context import Context
from ..plugin.interfaces import param
from ..plugin.target import Form, LoadRequest, Target
from ..plugin.weight_sizes import Weight, Weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..ir.program import Program
    from ..runtimes.native.linears import NumberFormats

FOLDER = "native"
PAGE = 4096  # at which entries of that size or more begin in `weights.bin`
_RECORD = 620  # bytes that an entry and its step take in `plan.json`

# Tolerances of `ir/layers/number_formats.py`.
#
# An original that computes in bfloat16 is itself twice as far from its numbers in float32 as the engine is: both
# together come to 0.006..0.025 over those architectures, and to 0.023 in 30 layers with large weights.
SHARES = {numbers: format.tolerance for numbers, format in DENSE.items()}
SHARE_OF_BFLOAT16 = 0.06
_REASON = "root mean squares: weights, what linear layers read, keys and values are rounded over all layers"


def native_logit_tolerance(packed_formats: frozenset[str], model: "nn.Module") -> float:
    """For int8 and int4 wherever they are: as the target's weights or its head's, or in layers that a pass lowered."""
    import torch

    from ..ir.layers.linear import kernel_linears

    kernels = {module.kernel for _, module in kernel_linears(model)}
    numbers = {name for name in packed_formats if name} | {BY_KERNEL[kernel].numbers for kernel in kernels}
    coarsest = max((DENSE[name] for name in numbers), key=lambda format: format.tolerance)
    if coarsest.grid:
        return SHARES[coarsest.numbers]
    rounded = any(p.dtype == torch.bfloat16 for p in model.parameters())
    return SHARE_OF_BFLOAT16 if rounded else SHARES["bf16"]


def _routes_to_experts(folder: Path) -> bool:
    from ..runtimes.native.plan_files import read_plan

    plan = read_plan(folder).plan
    return any(step["op"] == "route" for part in (plan, plan.get("encoder", {"steps": ()})) for step in part["steps"])


class Native(Target):
    """Artifact of the native engine: packed weights and a plan of the decode step, for CPUs.

    `effc.load` gives a model that computes logits and generates, `effc run` talks to it; a token is one call
    into compiled code, which runs without torch and without Python. The plan is read from the model's graph,
    whatever its architecture, pruned shapes, state-space mixers and mixtures of experts too; what the engine has no
    step for is refused with the module and the line. Of an encoder it gives hidden states or classes of texts.
    Linear layers that `lower` packed stay as they are, the others are packed here; on int4 those that `quantize`
    left on a grid of 4 bits keep it exactly, others are rounded to one. Embeddings are bfloat16, states of scans and
    all else float32; an embedding that is tied to the head reads the head's rows. Keys and values are cached in
    bfloat16, or in int8: 32 numbers of a key share a scale, and so does a token's value of a head.

    Source: own.
    Example: native("cpu")
    """

    on_cpu = True
    loads = {"native": '`native/` is run by effc\'s engine: `effc.load(".")`, `effc run .` or `effc serve .`.'}
    marks = {"native": "plan.json"}
    does = {"native": "effc's engine runs a plan that is checked first, over packed weights"}
    checksummed_files = ("weights.bin",)
    formats = (
        ({}, ("lower.sparse_cpu(data: {data})",), "auto"),
        ({"weights": "int8", "inputs": "int16"}, (), ""),
        ({"weights": "int8"}, (), "sparse_int8"),
        ({"weights": "int8", "inputs": "int16"}, ("quantize.scale(data: {data}, bits: 8, group: 0)",), ""),
        ({"weights": "int8"}, ("quantize.scale(data: {data}, bits: 8, group: 0, inputs: int8)",), ""),
        ({"weights": "int4", "group": 64}, (), ""),
        ({"weights": "int4", "group": 32}, (), ""),
        ({"weights": "int4", "group": 64}, ("quantize.gptq(data: {data}, group: 64)",), ""),
        ({"weights": "int4", "group": 32}, ("quantize.gptq(data: {data}, group: 32)",), ""),
        (
            {"weights": "int4", "group": 32},
            ("quantize.scale(data: {data}, group: 32)", "quantize.gptq(data: {data}, group: 32)"),
            "",
        ),
    )

    weights: DenseNumbers = param(
        "Numbers of linear layers that are not lowered: bfloat16, int8 with a scale for each output, or int4 with one "
        "for each group of inputs.",
        default="bf16",
    )
    inputs: Literal["int8", "int16"] = param(
        "What int8 weights meet: inputs rounded token by token to 8 bits, or with the largest, one in 96, in 16 bits. "
        "That loses far less, decodes as fast and takes 1.1 to 1.2 times as long over prompts.",
        default="int8",
    )
    group: int = param(
        "Inputs that share a scale on int4: 32, 64 or 128. A weight that `quantize` left on a grid keeps its own.",
        default=64,
        among=(32, 64, 128),
        unit="inputs",
    )
    head: Literal["auto"] | DenseNumbers = param(
        "Numbers of the layer that makes the logits, and of an embedding that shares them; `auto` is int8 where "
        "`weights` are int4.",
        default="auto",
    )
    kv_cache: Literal["bf16", "int8"] = param(
        "Numbers of cached keys and values: int8 holds nearly twice the context in equal memory.", default="bf16"
    )

    def problems(self) -> Iterator[Problem]:
        if self.inputs == "int16" and self.weights != "int8":
            yield Conflict(
                ("inputs", "weights"),
                "inputs of 16 bits meet int8 weights alone",
                "take `weights: int8`, or leave `inputs` out",
            )
        if self.group != 64 and "int4" not in (self.weights, self.head):
            yield Conflict(
                ("group", "weights", "head"),
                "groups share scales of int4 alone",
                "take `weights: int4`, or leave `group` out",
            )

    def cannot_hold(self) -> Mapping[str, str]:
        return {
            "interventions": "no plan has steps that edit hidden states; `--adapter` puts a folder of `reft` beside one"
        }

    def emit(self, program: "Program", destination: Path, ctx: Context) -> None:
        from ..runtimes.native.emission import write_native_artifact

        folder = destination / FOLDER
        folder.mkdir()
        write_native_artifact(program, folder, ctx, self._number_formats())

    def foresee(self, ctx: Context) -> None:
        from ..runtimes.native.engine_support import refuse_unsupported_model

        refuse_unsupported_model(ctx, self._number_formats())

    def _number_formats(self) -> "NumberFormats":
        from ..runtimes.native.linears import NumberFormats

        return NumberFormats.from_target_arguments(self.weights, self.inputs, self.group, self.head, self.kv_cache)

    def files(self, weights: Weights) -> tuple[int, dict[str, float]]:
        """Large entries begin at pages, and the plan has a record of each."""
        entries = [size for weight in weights.tensors for size in self._entry_bytes(weight)]
        total = sum(-(-size // PAGE) * PAGE if size >= PAGE else size for size in entries)
        packing = "grid" if DENSE[self.weights].grouped else "pack"
        return total + _RECORD * len(entries) + weights.sidecars, {packing: weights.numbers_to_pack}

    def weight_bytes(self, weights: Weights) -> int:
        return sum(size for weight in weights.tensors for size in self._entry_bytes(weight))

    def _entry_bytes(self, weight: Weight) -> Iterator[int]:
        """Bytes of the entries of a weight: tables are bfloat16 unless a head that is packed here has their rows, and
        what a step packed stays as it is."""
        if weight.packed:
            yield weight.packed
        elif weight.matrix:
            yield self._estimated_packed_bytes(weight)
        elif not weight.table:
            yield 4 * weight.numel
        if weight.table and (weight.packed or not weight.matrix):
            yield 2 * weight.numel

    def _estimated_packed_bytes(self, weight: Weight) -> int:
        """Bytes of a matrix, or of the matrices of experts, in the numbers of this target."""
        format = DENSE[self.weights]
        if weight.head:
            format = DENSE[(format.head or self.weights) if self.head == "auto" else self.head]
        group, zero_codes = self.group, True
        if weight.grid and weight.grid[0] <= 4:  # which it keeps, of groups that the kernel has
            _, size, middle = weight.grid
            group = self.group if size % self.group == 0 else next((g for g in (128, 64, 32) if size % g == 0), group)
            zero_codes = not middle
        *experts, n, k = weight.shape
        return prod(experts) * packed_weight_bytes(format.kernel, n, k, group_size=group, has_zero_codes=zero_codes)

    def forms(self) -> tuple[Form, ...]:
        formats = self._number_formats()
        # Keys and values of 8 bits lose about as much as weights of 8 bits do.
        cached = "int8_int16" if self.kv_cache == "int8" else ""
        packed_formats = frozenset((formats.weights, formats.head, cached))
        return (
            Form(
                FOLDER,
                "engine",
                rounds=partial(native_logit_tolerance, packed_formats),
                routes=_routes_to_experts,
                reason=_REASON,
            ),
        )

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        from ..runtimes.native.opening import verify_native_folder

        verify_native_folder(folder)

    @classmethod
    def tensors(cls, file: Path) -> "Iterator[tuple[str, torch.Tensor]]":
        from ...kernels.packed_linear import unpack_packed_weight
        from ..runtimes.native.plan_files import WEIGHTS, load_weights, read_plan

        if file.name != WEIGHTS:
            yield from super().tensors(file)
        else:
            for name, x in load_weights(file.parent, read_plan(file.parent), mapped=True).items():
                yield name, unpack_packed_weight(x) if str(x.dtype) == "torch.uint8" else x

    @classmethod
    def summary(cls, folder: Path) -> Any:
        from ..runtimes.native.summary import summarise_native

        return summarise_native(folder)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, None]:
        from ..ir.layers.linear import cpu_only
        from ..runtimes.native.opening import open_native

        if load_request.device is not None and str(load_request.device).partition(":")[0] != "cpu":
            raise cpu_only(
                f"{folder} is run by the native engine, which {load_request.device} has not", help="load it on the CPU"
            ).rejection()
        if load_request.dtype is not None:
            raise other_kind(
                f"{folder} holds packed weights, which have no other dtype", help="load it without `dtype`"
            ).rejection()
        limit = load_request.max_sequences
        options: dict[str, Any] = {} if limit is None else {"max_sequences": limit}
        return open_native(
            folder,
            threads=load_request.threads,
            batch_invariant=load_request.batch_invariant,
            mapped=load_request.mapped,
            **options,
        ), None
