"""Choice of a kernel, if any, for each linear module, with the reason."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ....kernels.native import KernelError
from ....kernels.ops import KERNELS
from ...core.quantity import duration_text, significant_digits
from ...evaluation.promise import observed
from ...ir.layers.linear import KernelLinear, weight_of
from ...ir.layers.number_formats import BY_KERNEL, NUMBER_FORMATS
from ...models.rows.forward import REMEDY, evaluating, not_a_number
from ..search.masks import INPUTS, OUTPUTS
from ..search.sparsity import zero_share
from .contenders import DYNAMIC, EAGER, PREPACKED
from .prediction_error import Accuracy, output_error, sample_module_inputs
from .speed import ROUNDED, KernelCase

if TYPE_CHECKING:
    from ...ir.program import Program

FORMATS = {f.name: f.kernel for f in NUMBER_FORMATS}
FORMAT_OF = {f.kernel: f.name for f in NUMBER_FORMATS}
WINS = 1.05  # how many times faster something is to be preferred: less is noise

lowering_inaccurate = Fault(
    "lowering-inaccurate",
    "A model whose modules run kernels predicts something else than it did, by more than a recipe allows.\n\n"
    "bfloat16 kernels round what comes in and add in another order; int8 ones round weights and inputs to 127 "
    "steps (`dense_int8_int16` inputs but for outliers), int4 ones weights to 15. Which modules suffer most stands in "
    "the note.",
    exit="gate",
)
cant_pack = Fault("cant-pack", "A kernel can't take the weight of a module that a recipe lowers.", exit="failure")
nothing_lowered = Fault(
    "nothing-lowered",
    "No linear module is better off with a kernel.\n\n"
    "Each stays as it is where no kernel takes it, or none is faster than torch on that machine.",
)


@dataclass(frozen=True)
class Site:
    """A linear module: what it is, and what its weight has of zeros."""

    path: str
    case: KernelCase
    zeros: float
    bytes: int


@dataclass(frozen=True)
class KernelChoice:
    """Choice for a module: a kernel, or none with the reason.

    error     how far its outputs are off, as a share, on some inputs; None where nothing was run
    seconds   of the contenders, by name; empty where a format was asked for
    """

    site: Site
    kernel: str
    reason: str
    bytes: int
    error: float | None
    seconds: Mapping[str, float]

    def ratio(self, contender: str) -> float | None:
        """Time of another contender as a multiple of this one's."""
        chosen_seconds = self.seconds.get(self.kernel or EAGER)
        return (
            round(self.seconds[contender] / chosen_seconds, 3) if chosen_seconds and contender in self.seconds else None
        )

    def with_finer_kernel(self, kernel: str, trial: "KernelTrial") -> "KernelChoice":
        """Choice of a kernel with a finer grid for this module."""
        reason = f"{FORMAT_OF[self.kernel]} was off by {self.error:.1%} of its outputs, and all together by too much"
        return replace(
            self,
            kernel=kernel,
            reason=reason,
            bytes=trial.pack_or_reject(kernel).packed.numel(),
            error=trial.relative_output_error(kernel),
        )

    def to_json(self) -> dict[str, Any]:
        contenders = (EAGER, PREPACKED, DYNAMIC, "dense_linear", "dense_linear_int8")
        ratios = {name: self.ratio(name) for name in contenders if name != (self.kernel or EAGER)}
        return {
            "module": self.site.path,
            "shape": [self.site.case.n, self.site.case.k],
            "zeros": round(self.site.zeros, 4),
            "kernel": self.kernel,
            "format": FORMAT_OF.get(self.kernel, "dense"),
            "bytes": self.bytes,
            "bytes_before": self.site.bytes,
            "error": self.error,
            "why": self.reason,
            "faster_than": {name: ratio for name, ratio in ratios.items() if ratio is not None},
        }


def linear_site_or_reject_non_finite(path: str, module: nn.Module) -> Site:
    """Raises Reject (not-a-number) where a weight holds NaN or infinity."""
    weight = weight_of(module)
    if not weight.isfinite().all():
        raise not_a_number(f"{path}.weight holds NaN or infinite numbers", help=REMEDY).rejection()
    share = zero_share(weight)
    return Site(path, KernelCase.of(weight, share, zero_block_share(weight) if share else 0.0), share, weight.nbytes)


def zero_block_share(weight: Tensor) -> float:
    """Share of the blocks of 16 outputs by 2 inputs that are all zero."""
    n, k = weight.shape
    padded = nn.functional.pad(weight != 0, (0, -k % INPUTS, 0, -n % OUTPUTS))
    nonzero_blocks = padded.reshape(-1, OUTPUTS, padded.shape[1] // INPUTS, INPUTS).any(3).any(1)
    return 1.0 - int(nonzero_blocks.count_nonzero()) / nonzero_blocks.numel()


def no_kernel_reasons_from_run(program: "Program", module_paths: Sequence[str]) -> dict[str, str]:
    """Why modules can't run a kernel: their weight is read past them, or nothing calls them."""
    read: set[str] = set()
    called: set[str] = set()
    handles = []
    kinds = {path: type(program.model.get_submodule(path)) for path in module_paths}
    try:
        for path, kind in kinds.items():
            module = program.model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(lambda *_, p=path: called.add(p)))
            module.__class__ = _subclass_recording_weight_reads(kind, path, read)
        with evaluating(program.model):
            observed(program)
    finally:
        for handle in handles:
            handle.remove()
        for path, kind in kinds.items():
            program.model.get_submodule(path).__class__ = kind
    return {path: "its weight is read by other code than its own" for path in module_paths if path in read} | {
        path: "nothing runs it" for path in module_paths if path not in called | read
    }


def _subclass_recording_weight_reads(
    module_class: type[nn.Module], path: str, recorded_paths: set[str]
) -> type[nn.Module]:
    """The class, noting where the weight is read outside of its own forward."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        vars(self)["effc_inside"] = True
        try:
            return module_class.forward(self, *args, **kwargs)
        finally:
            del vars(self)["effc_inside"]

    def getattr_(self: nn.Module, name: str) -> Any:
        if name == "weight" and "effc_inside" not in vars(self):
            recorded_paths.add(path)
        return nn.Module.__getattr__(self, name)

    members = {"forward": forward, "__getattr__": getattr_, "__module__": module_class.__module__}
    return type(module_class.__name__, (module_class,), members)


class UsableKernels(NamedTuple):
    kernels: list[str]
    refusal: str


def usable_kernels(site: Site, format_or_auto: str) -> UsableKernels:
    """The kernels that may take a module, and why others, or all, may not."""
    requested = list(FORMATS.values()) if format_or_auto == "auto" else [FORMATS[format_or_auto]]
    refusals = {
        kernel: KERNELS[kernel].unsupported_reason(site.case.n, site.case.k, getattr(torch, site.case.dtype))
        for kernel in requested
    }
    usable = [kernel for kernel in requested if not refusals[kernel]]
    if format_or_auto == "auto":  # zeros that are not there can't be skipped
        shares = {"": 1.0, "weights": site.zeros, "blocks": site.case.blocks}
        usable = [k for k in usable if shares[BY_KERNEL[k].skips] >= BY_KERNEL[k].worth_from]
    return UsableKernels(usable, next(filter(None, refusals.values()), ""))


class ReasonedKernel(NamedTuple):
    kernel: str
    reason: str


def choose_kernel(
    kernels: Sequence[str],
    seconds_by_kernel: Mapping[str, float],
    relative_error_of: Callable[[str], float | None],
    max_relative_error: float,
) -> ReasonedKernel:
    """(kernel or "", why) of a module whose contenders were timed.

    Of kernels that are equally fast it is the one of the finest grid; int8 and int4 only where they are not too far
    off. `relative_output_error` is asked for those alone that win by it.
    """
    off: dict[str, float] = {}

    def fits(kernel: str) -> bool:
        if kernel not in off:
            off[kernel] = (relative_error_of(kernel) or 0.0) if kernel in ROUNDED else 0.0
        return off[kernel] <= max_relative_error or kernel not in ROUNDED

    by_time = sorted((k for k in kernels if k in seconds_by_kernel), key=seconds_by_kernel.__getitem__)
    fastest = next(filter(fits, by_time), None)
    barred = [k for k in by_time if off.get(k, 0.0) > max_relative_error]
    barred_text = ", ".join(f"{FORMAT_OF[k]} would be off by {off[k]:.1%} of its outputs" for k in barred)
    left_out = f"; {barred_text}" if barred_text else ""
    if fastest is None:
        return ReasonedKernel("", f"no kernel takes it{left_out}")
    behind = by_time[by_time.index(fastest) + 1 :]
    tied = [fastest, *(k for k in behind if seconds_by_kernel[k] <= seconds_by_kernel[fastest] * WINS)]
    kernel = next(filter(fits, sorted(tied, key=lambda k: (BY_KERNEL[k].tolerance, seconds_by_kernel[k]))))
    if seconds_by_kernel[kernel] * WINS > seconds_by_kernel[EAGER]:
        return ReasonedKernel(
            "",
            (
                f"torch takes {duration_text(seconds_by_kernel[EAGER])} and the fastest kernel, {FORMAT_OF[kernel]}, "
                f"{duration_text(seconds_by_kernel[kernel])}{left_out}"
            ),
        )
    speedup = significant_digits(seconds_by_kernel[EAGER] / seconds_by_kernel[kernel], 3)
    return ReasonedKernel(kernel, f"{speedup} times as fast as torch{left_out}")


def finer_kernels_by_path(choices: Sequence[KernelChoice], squared_error_share_to_remove: float) -> dict[str, str]:
    """Paths of modules that are to be more exact -> the fastest kernel of a finer grid that took part in the race.

    The furthest off come first, as many as make up this share of all squared errors; {} where none can be finer.
    """
    off = sorted((c for c in choices if c.kernel in ROUNDED and c.error), key=lambda c: -(c.error or 0.0))
    target, removed_error = squared_error_share_to_remove * sum((c.error or 0.0) ** 2 for c in off), 0.0
    changes: dict[str, str] = {}
    for c in off:
        if changes and removed_error >= target:
            break
        limit = BY_KERNEL[c.kernel].tolerance
        able = [k for k in c.seconds if k in BY_KERNEL and BY_KERNEL[k].tolerance < limit]
        if able:
            changes[c.site.path] = min(able, key=c.seconds.__getitem__)
            removed_error += (c.error or 0.0) ** 2
    return changes


class KernelTrial:
    """One module on kernels, each packed when it is asked for.

    x   some inputs of the module; None where nothing runs it
    """

    def __init__(self, path: str, module: nn.Module, x: Tensor | None):
        self.path, self.module, self.x = path, module, x
        self._errors: dict[str, float] = {}  # by numbers
        self._last: tuple[str, KernelLinear] | None = None

    def pack_or_reject(self, kernel: str) -> KernelLinear:
        """The module on a kernel; Reject with its path where the weight can't be packed."""
        if self._last is None or self._last[0] != kernel:
            try:
                self._last = kernel, KernelLinear.of(self.module, kernel)
            except KernelError as error:
                help = "leave it out of `on:`, or ask for another format"
                raise cant_pack(f"{self.path}: {error}", help=help).rejection() from error
        return self._last[1]

    def relative_output_error(self, kernel: str) -> float | None:
        """Relative error of its outputs; equal for kernels that store equal numbers."""
        if self.x is None:
            return None
        numbers = BY_KERNEL[kernel].numbers
        if numbers not in self._errors:
            self._errors[numbers] = output_error(self.module, self.pack_or_reject(kernel), self.x)
        return self._errors[numbers]


def sample_inputs_if_rows(program: "Program", paths: Sequence[str], rows: Tensor | None) -> dict[str, Tensor]:
    return {} if rows is None else sample_module_inputs(program.model, list(paths), rows)


def refuse_inaccurate(accuracy: Accuracy, max_divergence_nats: float, choices: Sequence[KernelChoice]) -> None:
    """Reject (lowering-inaccurate) where it cost more than allowed, naming the modules that are furthest off."""
    if accuracy.divergence <= max_divergence_nats:
        return
    off = sorted((c for c in choices if c.kernel and c.error is not None), key=lambda c: -(c.error or 0.0))[:3]
    worst = "; ".join(f"{c.site.path} on {FORMAT_OF[c.kernel]} is off by {c.error:.2%}" for c in off)
    perplexity_text = ""
    if accuracy.perplexity:
        before, after = accuracy.perplexity
        perplexity_text = f", perplexity {significant_digits(before)} became {significant_digits(after)}"
    raise lowering_inaccurate(
        f"predictions moved by {significant_digits(accuracy.divergence)} nats, "
        f"at most {significant_digits(max_divergence_nats)} are allowed{perplexity_text}",
        note=worst,
        help="allow more with `divergence:`, lower `error:`, or ask for `format: sparse_bf16`",
    ).rejection()


def choice_sentences(choices: Sequence[KernelChoice]) -> list[str]:
    """A sentence for each case and what became of it."""
    groups: dict[tuple[str, str], list[KernelChoice]] = {}
    for c in choices:
        groups.setdefault((c.site.case.name, FORMAT_OF.get(c.kernel, "as it is")), []).append(c)
    return [
        f"{name}: {len(members)} on {format}, {members[0].reason}"
        if format != "as it is"
        else f"{name}: {len(members)} stay dense, {members[0].reason}"
        for (name, format), members in groups.items()
    ]
