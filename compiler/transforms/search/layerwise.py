"""Running a program layer by layer over rows, with a look at what modules are given before they change."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ....dsl.checker.skeleton import Part, is_submodule
from ...models.rows.forward import REMEDY, evaluating, memory_batches, not_a_number, outputs
from ...models.rows.inputs import forward_args_and_kwargs
from .prefix import MetricForward, Prefix
from .reconstruct import as_matrix_inputs

if TYPE_CHECKING:
    from ...ir.program import Program

OnInput = Callable[[str, nn.Module, Tensor], None]  # path, module, what it is given


@dataclass(frozen=True)
class Stage:
    """A unit and its chosen modules; `unit` is "" for those outside all units, which come last."""

    unit: str
    modules: tuple[str, ...]


def stages(program: "Program", selected: Sequence[Part]) -> list[Stage]:
    """Units in the order in which they run, each with its chosen modules."""
    paths = [part.path for part in selected]
    by_unit = [Stage(unit, tuple(p for p in paths if unit and is_submodule(p, unit))) for unit in program.units]
    inside = {path for stage in by_unit for path in stage.modules}
    return [s for s in (*by_unit, Stage("", tuple(p for p in paths if p not in inside))) if s.modules]


class Layerwise:
    """The layers one after another over rows, each given what those before it give as they are now.

    Outputs of one layer are held at a time, so that a look at every layer costs two forwards of the model, not
    one for each. Where layers can't be entered in the middle, which is tried and not assumed, a look at a layer
    is a forward that ends behind it.

    Source: the loop of Wanda and SparseGPT (Sun et al. 2023, arXiv 2306.11695, section 3; Frantar and Alistarh
    2023, arXiv 2301.00774), on graphs of any architecture.
    """

    def __init__(self, program: "Program", rows: Tensor):
        self.program, self.rows = program, rows
        self._prefix: Prefix | None = None

    def run_and_observe_inputs(self, stage: Stage, on_input: OnInput) -> None:
        """Let `on_input` hear what the modules of a stage are given over all rows, batch by batch."""
        chain = self.tested_prefix if stage.unit else None  # is tried now, before anyone listens
        with _with_input_hooks(self.program.model, stage.modules, on_input):
            if chain is not None and chain.chain:
                chain.run_layer(self._index(stage.unit))
            else:
                self._run_until_after(self.program.model.get_submodule(stage.unit) if stage.unit else None)

    def mark_changed(self, stage: Stage) -> None:
        """Note that a stage's modules were changed: what follows is given their outputs."""
        if stage.unit and self._prefix is not None:
            self._prefix.forget_outputs_from(self._index(stage.unit))

    @property
    def tested_prefix(self) -> Prefix:
        """Entered for the first time, it is tried on one batch whether layers can be."""
        if self._prefix is None:
            model = self.program.model
            sample_batches = list(memory_batches(model, self.rows))
            calls = [MetricForward(*forward_args_and_kwargs(model, batch), batch.numel()) for batch in sample_batches]
            self._prefix = prefix = Prefix(self.program, max_bytes=0)
            with evaluating(model):
                prefix.measure_from(lambda: float(outputs(model, sample_batches[0]).numel()))
            if prefix.chain:
                prefix.replace_calls(calls)
        return self._prefix

    def _index(self, unit: str) -> int:
        return list(self.program.units).index(unit)

    def _run_until_after(self, last_module: nn.Module | None) -> None:
        model = self.program.model
        with evaluating(model), _stop_forward_after(last_module):
            for batch in memory_batches(model, self.rows):
                with suppress(_Enough):
                    outputs(model, batch)


@contextmanager
def _with_input_hooks(model: nn.Module, module_paths: Sequence[str], on_input: OnInput) -> Iterator[None]:
    def hook(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_input(path, module, args[0] if args else next(iter(kwargs.values())))

        return record

    with ExitStack() as stack:
        for path in module_paths:
            handle = model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
            stack.callback(handle.remove)
        yield


# -- what is kept of it --------------------------------------------------------------------------------------


@dataclass
class Norms:
    """Summed squares of each input of modules, [in] float64; a module that was not run has none."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def accumulate(self, module_path: str, module: nn.Module, x: Tensor) -> None:
        squares = as_matrix_inputs(module, x).square().sum(0).double().cpu()
        self.sums[module_path] = self.sums[module_path] + squares if module_path in self.sums else squares

    def input_norms_or_empty(self, module_path: str) -> list[float]:
        """Their roots, [] of a module that was not run. Reject (not-a-number) where one is no number."""
        if module_path not in self.sums:
            return []
        refuse_non_finite(module_path, self.sums[module_path])
        return self.sums[module_path].sqrt().tolist()


@dataclass
class Grams:
    """Sums of x x^T over what modules are given, [in, in] float32; one for all that are given the same tensor.

    leader   the first of the modules that are given the same
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    _inputs: dict[str, Tensor] = field(default_factory=dict)

    def accumulate(self, module_path: str, module: nn.Module, x: Tensor) -> None:
        if module_path not in self.leader:
            self.leader[module_path] = next((p for p, y in self._inputs.items() if y is x), module_path)
        leader = self.leader[module_path]
        if leader != module_path:
            assert self._inputs.get(leader) is x, f"{module_path} is not given what {leader} is any more"
            return
        self._inputs[module_path] = x
        rows = as_matrix_inputs(module, x)  # [tokens, in]
        if module_path in self.sums:
            self.sums[module_path].addmm_(rows.T, rows)
        else:
            self.sums[module_path] = rows.T @ rows

    def finite_gram_or_none(self, module_path: str) -> Tensor | None:
        """Gram matrix of a module's inputs; None of a module that was not run. Reject (not-a-number) where a number is
        none."""
        if module_path not in self.leader:
            return None
        gram = self.sums[self.leader[module_path]]
        refuse_non_finite(module_path, gram.diagonal())
        return gram


def refuse_non_finite(module_path: str, input_squares: Tensor) -> None:
    if not input_squares.isfinite().all():
        problem = "not a number" if input_squares.isnan().any() else "infinite, or its square is"
        raise not_a_number(f"what {module_path} is given is {problem}", help=REMEDY).rejection()


class _Enough(Exception):
    """A forward has passed what it was run for."""


@contextmanager
def _stop_forward_after(module: nn.Module | None) -> Iterator[None]:
    """Forwards end with `_Enough` once a module has run."""

    def leave(*_: Any) -> None:
        raise _Enough

    hook = module.register_forward_hook(leave) if module is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
