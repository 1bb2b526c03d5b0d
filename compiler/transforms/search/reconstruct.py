"""Compensation by the readers of removed channels: least squares over their inputs.

Where the items D of a group go, a reader y = W x can only use the kept inputs K. The weights that lose least over
the calibration inputs are W_K + W_D H_DK (H_KK + damping)^-1 with H = sum of x x^T: nothing else is trained.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ....dsl.checker.skeleton import Group, Member
from ...ir.surgery import tensor_at
from ...models.rows.forward import not_a_number

if TYPE_CHECKING:
    from ...ir.program import Program

DAMPING = 1e-3  # of the mean diagonal: keeps nearly equal channels from cancelling each other
_RAISES = 12  # what rounding adds to the least eigenvalue is at most in^2 * 6e-8 of the mean diagonal
STRIPE = 2048  # rows of moments that are kept together, up to the diagonal: what lies above is the same
_ROWS = 512  # gathered at once: a whole float32 copy beside the float64 one would be half as large


def bytes_on_disk(width: int) -> int:
    """Of the moments of a module of so many inputs."""
    return sum(4 * min(STRIPE, width - start) * min(width, start + STRIPE) for start in range(0, width, STRIPE))


def readers(group: Group) -> tuple[Member, ...]:
    return group.members[len(group.members) - group.readers :]


def module_of(member: Member) -> str:
    return member.tensor.rpartition(".")[0]


def zeroed_reader_weights(model: nn.Module, group: Group, removed_items: Sequence[int]) -> dict[str, Tensor]:
    """The readers' weights with zeros for what comes from the items, by tensor path."""
    weights: dict[str, Tensor] = {}
    for member in readers(group):
        weight = weights.get(member.tensor, model.get_parameter(member.tensor).detach())
        indices = torch.tensor(item_indices(member, removed_items), dtype=torch.int64, device=weight.device)
        weights[member.tensor] = weight.index_fill(member.axis, indices, 0.0)
    return weights


class Moments:
    """Second moments H [in, in] float32 of what modules are given, kept in files so that they needn't fit in memory.

    Source: the statistics of Optimal Brain Surgeon and its layer-wise heirs (Frantar and Alistarh 2022,
    arXiv 2208.11580).
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def collect_missing_and_count_passes(
        self, program: "Program", module_paths: Sequence[str], run_model: Callable[[], object], max_bytes: int
    ) -> int:
        """Run the model over the rows as often as `max_bytes` bytes of moments make necessary; returns how often.

        Raises Reject (not-a-number) naming the first module whose inputs are not finite.
        """
        missing = [m for m in dict.fromkeys(module_paths) if not self._file(m).exists()]
        rounds = 0
        for chunk in _chunks_that_fit(
            missing, [4 * _width(program.model.get_submodule(m)) ** 2 for m in missing], max_bytes
        ):
            sums: dict[str, Tensor] = {}
            with ExitStack() as stack:
                for path in chunk:
                    handle = program.model.get_submodule(path).register_forward_pre_hook(_make_gram_hook(sums, path))
                    stack.callback(handle.remove)
                run_model()
            for path, moment in sums.items():
                _refuse_non_finite(path, moment.diagonal())
                self._write_moment(path, moment)
            rounds += 1
        return rounds

    def load_moment(self, module_path: str) -> Tensor | None:
        """Load the second-moment matrix of a module's inputs; None where the module was not run."""
        file = self._file(module_path)
        if not file.exists():
            return None
        with safe_open(file, "pt") as opened:
            width = opened.get_slice("diagonal").get_shape()[0]
            full = torch.empty(width, width)
            for start in range(0, width, STRIPE):
                stripe = opened.get_tensor(f"rows {start}")  # [rows, start + rows]
                full[start : start + STRIPE, : stripe.shape[1]] = stripe
                full[:start, start : start + STRIPE] = stripe[:, :start].T
            return full

    def load_input_norms(self, module_path: str) -> Tensor | None:
        """Root of the summed squares per input channel, [in] float64."""
        file = self._file(module_path)
        if not file.exists():
            return None
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("diagonal").double().clamp(min=0).sqrt()

    def _file(self, module_path: str) -> Path:
        return self.folder / f"{hashlib.sha256(module_path.encode()).hexdigest()[:24]}.safetensors"

    def _write_moment(self, module_path: str, gram: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(module_path)
        draft = file.with_suffix(".draft")
        stripes = {f"rows {i}": gram[i : i + STRIPE, : i + STRIPE].contiguous() for i in range(0, len(gram), STRIPE)}
        save_file({**stripes, "diagonal": gram.diagonal().contiguous()}, draft, {"module": module_path})
        draft.rename(file)


class Reconstruction:
    """Weights of readers after items of a group have gone, by least squares over collected moments.

    What was solved last is kept per reader, [kept, lost] float64, so that a cut costs nothing after its trial.

    Source: ridge regression on the calibration inputs, as in OBC (arXiv 2208.11580) and SliceGPT-like repairs.
    """

    def __init__(self, program: "Program", moments: Moments):
        self.program, self.moments = program, moments
        self._solved: dict[tuple[str, str, str], tuple[object, Takeover | None]] = {}

    def refitted_or_zeroed_reader_weights(
        self, group: Group, removed_before: Collection[int], items_to_remove: Sequence[int]
    ) -> dict[str, Tensor]:
        """Weights by tensor path, fitted without both kinds of removed items; readers that aren't plain matrices only
        lose their columns."""
        weights = zeroed_reader_weights(self.program.model, group, items_to_remove)
        for member in readers(group):
            takeover = self._get_or_solve_takeover(group, member, sorted(removed_before), list(items_to_remove))
            if takeover is not None:
                weight = self.program.model.get_parameter(member.tensor).detach()
                new = takeover.refitted_copy(as_matrix(weight, member))
                weights[member.tensor] = new.view(weight.shape) if member.axis == 1 else new.T.contiguous()
        return weights

    def _get_or_solve_takeover(
        self, group: Group, reader: Member, removed_before: list[int], items_to_remove: list[int]
    ) -> "Takeover | None":
        """Fit, or take from the cache, how other items take over removed ones; None where the module was not run, or is
        no matrix."""
        key = (group.site, group.kind, reader.tensor)
        known = self._solved.get(key)
        if known is None or known[0] != (removed_before, items_to_remove):
            self._solved.pop(key, None)
            known = self._solved[key] = (
                (removed_before, items_to_remove),
                self._solve_takeover_if_matrix(reader, removed_before, items_to_remove),
            )
        return known[1]

    def _solve_takeover_if_matrix(
        self, reader: Member, removed_before: list[int], items_to_remove: list[int]
    ) -> "Takeover | None":
        module = self.program.model.get_submodule(module_of(reader))
        moment = self.moments.load_moment(module_of(reader)) if _is_matrix(module, reader) else None
        if moment is None:
            return None
        weight = self.program.model.get_parameter(reader.tensor)
        dead_columns, item_columns = (
            input_columns_of_items(weight, reader, some) for some in (removed_before, items_to_remove)
        )
        return solve_takeover_if_any(moment.to(exact_device(weight)), dead_columns, item_columns, DAMPING)


@dataclass(frozen=True)
class Takeover:
    """Coefficients of each removed input in the remaining ones; valid for any weights that read them.

    share   [kept, lost] float64; None where nothing is kept or lost
    """

    keep: list[int]
    removed: list[int]
    share: Tensor | None

    def refitted_copy(self, weight: Tensor) -> Tensor:
        """[out, in] in the weight's dtype and on its device: zero where inputs are lost, the others fitted."""
        new = weight.index_fill(1, torch.tensor(self.removed, dtype=torch.int64, device=weight.device), 0.0)
        if self.share is not None:
            removed_weight = weight[:, self.removed].to(self.share.device).double()
            new[:, self.keep] += (removed_weight @ self.share.T).to(weight.dtype).to(weight.device)
        return new


def solve_takeover_if_any(
    input_gram: Tensor, columns_removed_before: Sequence[int], columns_to_remove: Sequence[int], damping_share: float
) -> Takeover:
    """Least squares over the moments, where they lie; `columns_removed_before` inputs are neither kept nor lost now."""
    out = {*columns_removed_before, *columns_to_remove}
    keep = [i for i in range(len(input_gram)) if i not in out]
    return Takeover(
        keep,
        list(columns_to_remove),
        takeover_coefficients(input_gram, keep, columns_to_remove, damping_share)
        if keep and columns_to_remove
        else None,
    )


def takeover_coefficients(
    gram: Tensor, columns_to_keep: Sequence[int], columns_to_remove: Sequence[int], damping_share: float
) -> Tensor:
    """The weights with which kept inputs give the lost ones best, [kept, lost] float64."""
    lower = damped_cholesky_factor(gram, columns_to_keep, damping_share)
    solution = gram[:, columns_to_remove][columns_to_keep].double()
    solution = torch.linalg.solve_triangular(lower, solution, upper=False)  # cholesky_solve would copy the factor
    return torch.linalg.solve_triangular(lower.mT, solution, upper=True)


def damped_cholesky_factor(gram: Tensor, columns_to_keep: Sequence[int], damping_share: float) -> Tensor:
    """Lower Cholesky factor of the damped moments of some inputs, [kept, kept] float64, in one copy of them.

    damping_share  of the mean diagonal; inputs that depend on each other get ten times as much until they have one
    """
    index = torch.tensor(columns_to_keep, device=gram.device)
    inner = torch.empty(len(index), len(index), dtype=torch.float64, device=gram.device).mT  # as LAPACK has it
    for _ in range(_RAISES):
        for start, rows in zip(range(0, len(index), _ROWS), index.split(_ROWS), strict=True):
            inner[start : start + _ROWS] = gram[rows][:, index]
        inner.diagonal().add_(damping_share * inner.diagonal().mean().clamp(min=1e-30))
        try:
            return torch.linalg.cholesky(inner, out=inner)
        except torch.linalg.LinAlgError:
            damping_share = max(10 * damping_share, 1e-8)  # 1e-8: about the rounding of float32 sums
    raise AssertionError(f"finite moments have no Cholesky factor with a damping of {damping_share:g}")


def item_indices(member: Member, items: Sequence[int]) -> list[int]:
    """Indices of items along a member's axis, item by item."""
    return [i for item in items for i in member.indices(item)]


def as_matrix(weight: Tensor, member: Member) -> Tensor:
    """A reader's weight [out, in]; of a convolution the inputs are channels and places of its kernel."""
    return weight.flatten(1) if member.axis == 1 else weight.T


def input_columns_of_items(weight: Tensor, member: Member, items: Sequence[int]) -> list[int]:
    """Input columns of items in that matrix, item by item."""
    each = math.prod(weight.shape[2:])
    return [i * each + offset for i in item_indices(member, items) for offset in range(each)]


def exact_device(weight: Tensor) -> torch.device:
    """Device for float64 computations with a weight: its own, or the CPU where that has no float64."""
    return torch.device("cpu") if weight.device.type == "mps" else weight.device


def has_moments(model: nn.Module, member: Member) -> bool:
    """Whether a reader is a matrix, whose inputs have second moments; grouped convolutions and experts are none."""
    return _is_matrix(model.get_submodule(module_of(member)), member)


def _is_matrix(module: nn.Module, member: Member) -> bool:
    return (
        isinstance(module, nn.Linear)
        or (type(module).__name__ == "Conv1D" and member.axis == 0)
        or (_convolves(module) and module.groups == 1 and member.axis == 1)
    )


def _convolves(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d]:
    """Whether a module is a convolution as torch computes it, of zeros around and a number of them."""
    return type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward) and (
        module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )


def _width(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    weight = tensor_at(module, "weight")
    return weight[0].numel() if _convolves(module) else weight.shape[0]


def as_matrix_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a module as a matrix product, [n, in] float32."""
    if not _convolves(module):
        return x.flatten(0, -2).float()
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    padding = module.padding
    assert not isinstance(padding, str), "a padding by name"
    if isinstance(module, nn.Conv1d):  # as an image of one row
        kernel, dilation, padding, stride = (1, kernel[0]), (1, dilation[0]), (0, padding[0]), (1, stride[0])
        x = x.unsqueeze(-2)
    return nn.functional.unfold(x.float(), kernel, dilation, padding, stride).movedim(1, 2).flatten(0, 1)


def _make_gram_hook(
    gram_by_path: dict[str, Tensor], module_path: str
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = as_matrix_inputs(module, args[0].detach())  # [tokens, in]
        if module_path in gram_by_path:
            gram_by_path[module_path].addmm_(x.T, x)
        else:
            gram_by_path[module_path] = x.T @ x

    return hook


def _refuse_non_finite(module_path: str, squared_sums: Tensor) -> None:
    """Reject sums of which one isn't finite: no other entry is larger than the diagonal's largest."""
    if not squared_sums.isfinite().all():
        problem = "not a number" if squared_sums.isnan().any() else "infinite, or its square is"
        raise not_a_number(
            f"what {module_path} is given on the calibration rows is {problem}",
            help="look at what made the weights, or decide by weights alone: `reorder: l1, repair: false`",
        ).rejection()


def _chunks_that_fit(items: Sequence[str], byte_sizes: Sequence[int], max_bytes: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    chunk_bytes = 0
    for item, size in zip(items, byte_sizes, strict=True):
        if chunk and chunk_bytes + size > max_bytes:
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(item)
        chunk_bytes += size
    if chunk:
        yield chunk
