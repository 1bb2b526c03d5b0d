"""Folds: channels scaled down where they are written and up where they are read, so that nothing changes.

What writes them is a norm whose only readers are linear modules, or a linear module whose outputs reach another's
inputs by what is linear in them: values through attention, the factor of a gate. Neither is told by names: norms are
tried by themselves, the others on the model's own inputs, with factors that are powers of two and so round nothing.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from ....dsl.checker.skeleton import Group, Member, is_submodule
from ...analysis.discovery.discover import skeleton_of
from ...ir.graphs import target_name
from ...ir.surgery import tensor_at
from ...ir.unit import Unit
from ...models.rows.forward import evaluating, main_tensor_of_output
from .reconstruct import module_of, readers
from .widths import with_parameters_replaced

if TYPE_CHECKING:
    from ...ir.program import Program

LINEAR = (nn.Linear, Conv1D)
_SIZES = ("shape", "size", "dim", "ndim", "numel", "dtype", "device")
_KINDS = ("channels", "heads", "kv_heads")
_EXACT = 1e-5  # of the largest output: powers of two round nothing, but sums may be taken in another order


@dataclass(frozen=True)
class Reader:
    """inputs    which of a linear module's inputs are channels of a fold
    channels  the channel that each of them is
    """

    path: str
    inputs: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Fold:
    """Channels that one module writes and others read.

    writer   a norm, or a linear module
    rows     which of its outputs are the channels, in their order
    offset   what a norm adds to its weight before it multiplies
    """

    writer: str
    rows: tuple[int, ...]
    readers: tuple[Reader, ...]
    offset: float = 0.0

    def input_factors_of(self, reader: Reader, channel_factors: Tensor, n_inputs: int) -> Tensor:
        """Factors [n_inputs] of a reader's inputs, from the channels'; 1 where an input is no channel of the fold."""
        factors = torch.ones(n_inputs, device=channel_factors.device)
        factors[list(reader.inputs)] = channel_factors[list(reader.channels)]
        return factors

    @torch.no_grad()
    def nearest_representable_factors(self, model: nn.Module, channel_factors: Tensor) -> Tensor:
        """The factors nearest to these, [channels], for which a norm's weight is a number of its type: then its readers
        are scaled by exactly what it lacks. 1 where that would be nothing."""
        weight = tensor_at(model, f"{self.writer}.weight").detach()
        if weight.dim() != 1:
            return channel_factors
        effective = weight.float() + self.offset
        less = (effective / channel_factors - self.offset).to(weight.dtype).float() + self.offset
        return torch.where((effective != 0) & (less != 0), effective / less, 1.0)

    @torch.no_grad()
    def scaled_tensors_by_path(self, model: nn.Module, channel_factors: Tensor) -> dict[str, Tensor]:
        """Tensors by path with every channel `channel_factors` [channels] times smaller where it is written, and larger
        where it is read."""
        writer = model.get_submodule(self.writer)
        less = torch.ones(output_count_of(writer), device=channel_factors.device)
        less[list(self.rows)] = channel_factors
        writer_weight = tensor_at(writer, "weight")
        weight = writer_weight.detach().float()
        if weight.dim() == 1:
            new = (weight + self.offset) / less - self.offset
        else:
            new = weight / (less if isinstance(writer, Conv1D) else less[:, None])
        tensors = {f"{self.writer}.weight": new.to(writer_weight.dtype)}
        if getattr(writer, "bias", None) is not None:
            bias = tensor_at(writer, "bias")
            tensors[f"{self.writer}.bias"] = (bias.detach().float() / less).to(bias.dtype)
        for reader in self.readers:
            module = model.get_submodule(reader.path)
            reader_factors = self.input_factors_of(reader, channel_factors, input_count_of(module))
            read = tensor_at(module, "weight")
            wide = read.detach().float() * (reader_factors[:, None] if isinstance(module, Conv1D) else reader_factors)
            tensors[f"{reader.path}.weight"] = wide.to(read.dtype)
        return tensors


def output_count_of(module: nn.Module) -> int:
    return tensor_at(module, "weight").shape[1 if isinstance(module, Conv1D) else 0]


def input_count_of(module: nn.Module) -> int:
    return tensor_at(module, "weight").shape[0 if isinstance(module, Conv1D) else 1]


def find_folds_by_unit(program: "Program") -> dict[str, list[Fold]]:
    """All folds of every unit, those of norms first."""
    trial, by_unit = _FoldTrials(program), {}
    for path, unit in program.units.items():
        by_unit[path] = [*_norm_folds(program, unit), *_proven_group_folds(program, unit, trial)]
    return by_unit


def _is_free(program: "Program", path: str) -> bool:
    """Whether a module's weight is its own."""
    return not any(name.startswith(f"{path}.") for names in skeleton_of(program).tied for name in names)


def _is_linear(program: "Program", path: str) -> bool:
    return isinstance(program.model.get_submodule(path), LINEAR) and _is_free(program, path)


def _random_powers_of_two(count: int, device: torch.device) -> Tensor:
    """[count] of 1/2, 1 and 2."""
    chance = torch.Generator().manual_seed(count)
    return (2.0 ** torch.randint(-1, 2, (count,), generator=chance)).to(device)


# -- norms ---------------------------------------------------------------------------------------------------


def _norm_folds(program: "Program", unit: Unit) -> Iterator[Fold]:
    calls = [node for node in unit.graph.nodes if node.op == "call_module"]
    for node in calls:
        path = f"{unit.path}.{node.target}" if unit.path else str(node.target)
        users = [user for user in node.users if not _reads_size(user)]
        if node.meta.get("role") != "norm" or not users or not _is_free(program, path):
            continue
        targets = [user.target for user in users]
        readers = [f"{unit.path}.{target}" if unit.path else str(target) for target in targets]
        once = all(sum(call.target == target for call in calls) == 1 for target in [node.target, *targets])
        if not once or not all(_is_only_input(user, node) for user in users):
            continue
        if not all(_is_linear(program, reader) for reader in readers):
            continue
        norm = program.model.get_submodule(path)
        offset = _norm_weight_offset(norm)
        weight = tensor_at(norm, "weight") if offset is not None else None
        if weight is not None and (not offset or weight.dtype == torch.float32):  # narrower ones round one more
            all_channels = tuple(range(len(weight)))
            yield Fold(
                path,
                all_channels,
                tuple(Reader(reader, all_channels, all_channels) for reader in readers),
                offset or 0.0,
            )


def _reads_size(user: fx.Node) -> bool:
    name = user.args[1] if user.target is getattr else target_name(user)
    return user.op in ("call_function", "call_method") and name in _SIZES


def _is_only_input(user: fx.Node, node: fx.Node) -> bool:
    """Whether a module is given that and nothing else."""
    return user.op == "call_module" and user.all_input_nodes == [node]


@torch.no_grad()
def _norm_weight_offset(norm: nn.Module) -> float | None:
    """0 or 1, where a norm multiplies by its weight or by so much more; None where it does neither: it is tried."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    original, count = copy.deepcopy(norm).float().cpu(), len(weight)
    x = torch.randn(1, 3, count, generator=torch.Generator().manual_seed(0))
    by = _random_powers_of_two(count, torch.device("cpu"))
    bias = getattr(norm, "bias", None)
    for offset in (0.0, 1.0):
        less = copy.deepcopy(original)
        less.get_parameter("weight").copy_((original.get_parameter("weight") + offset) / by - offset)
        if bias is not None:
            tensor_at(less, "bias").copy_(tensor_at(original, "bias") / by)
        try:
            if torch.allclose(less(x) * by, original(x), atol=1e-5):
                return offset
        except (RuntimeError, TypeError):  # it is given more than one thing
            return None
    return None


# -- what linear modules write for others --------------------------------------------------------------------


class _FoldTrials:
    """Whether folds leave the model's outputs as they are. One of each kind of layer is tried."""

    def __init__(self, program: "Program"):
        self.program = program
        self._known: dict[tuple[object, ...], bool] = {}
        self._before: Tensor | None = None

    def preserves_outputs(self, unit: Unit, fold: Fold) -> bool:
        key = id(unit.graph), fold.writer.removeprefix(unit.path), fold.rows
        if key not in self._known:
            self._known[key] = self._run_with_fold_and_compare(fold)
        return self._known[key]

    def _run_with_fold_and_compare(self, fold: Fold) -> bool:
        if self._before is None:
            self._before = self._outputs()
        device = tensor_at(self.program.model, f"{fold.writer}.weight").device
        by = _random_powers_of_two(len(fold.rows), device)
        with with_parameters_replaced(self.program, fold.scaled_tensors_by_path(self.program.model, by)):
            after = self._outputs()
        return torch.allclose(after, self._before, rtol=0, atol=_EXACT * float(self._before.abs().max()))

    def _outputs(self) -> Tensor:
        with evaluating(self.program.model):
            return main_tensor_of_output(self.program.model(**self.program.inputs)).float()


def _proven_group_folds(program: "Program", unit: Unit, trials: _FoldTrials) -> Iterator[Fold]:
    for group in skeleton_of(program).groups:
        if group.kind not in _KINDS or not is_submodule(group.site, unit.path):
            continue
        if not all(_is_linear(program, module_of(m)) and _is_input(program.model, m) for m in readers(group)):
            continue
        fold = next((fold for fold in _candidate_folds(program, group) if trials.preserves_outputs(unit, fold)), None)
        if fold is not None:
            yield fold


def _is_input(model: nn.Module, member: Member) -> bool:
    axis = 0 if isinstance(model.get_submodule(module_of(member)), Conv1D) else 1
    return member.axis == axis and len(member.segments) == 1


def _candidate_folds(program: "Program", group: Group) -> Iterator[Fold]:
    """Yield a fold for each row of channels that a linear module writes, as if it alone reached the readers."""
    writers = group.members[: len(group.members) - group.readers]
    parts = [(module_of(m), segment) for m in writers if m.tensor.endswith(".weight") for segment in m.segments]
    reading = readers(group)
    for writer, (start, size) in parts:
        fits = all(segment[1] % size == 0 for m in reading for segment in m.segments)
        if not fits or not _is_linear(program, writer) or writer in map(module_of, reading):
            continue
        rows = tuple(range(start, start + group.count * size))
        yield Fold(writer, rows, tuple(_reader(m, group.count, size) for m in reading))


def _reader(member: Member, count: int, size: int) -> Reader:
    """Query heads that share values read the same channels."""
    ((start, wide),) = member.segments
    inputs = tuple(range(start, start + count * wide))
    return Reader(module_of(member), inputs, tuple(i // wide * size + i % wide % size for i in range(count * wide)))
