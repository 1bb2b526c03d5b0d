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

Listen = Callable[[str, nn.Module, Tensor], None]  # path, module, what it is given


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

    def observe_inputs(self, stage: Stage, callback: Listen) -> None:
        """Let `callback` hear what the modules of a stage are given over all rows, batch by batch."""
        chain = self.layer_chain if stage.unit else None  # is tried now, before anyone listens
        with _input_hooks(self.program.model, stage.modules, callback):
            if chain is not None and chain.chain:
                chain.passing(self._index(stage.unit))
            else:
                self._run_until_after(self.program.model.get_submodule(stage.unit) if stage.unit else None)

    def leave(self, stage: Stage) -> None:
        """Say that a stage's modules are as they stay: what follows is given their outputs."""
        if stage.unit and self._prefix is not None:
            self._prefix.changed_at(self._index(stage.unit))

    @property
    def layer_chain(self) -> Prefix:
        """Entered for the first time, it is tried on one batch whether layers can be."""
        if self._prefix is None:
            model = self.program.model
            sample_batches = list(memory_batches(model, self.rows))
            calls = [MetricForward(*forward_args_and_kwargs(model, batch), batch.numel()) for batch in sample_batches]
            self._prefix = prefix = Prefix(self.program, max_bytes=0)
            with evaluating(model):
                prefix.measure_from(lambda: float(outputs(model, sample_batches[0]).numel()))
            if prefix.chain:
                prefix.begin_anew(calls)
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
def _input_hooks(model: nn.Module, paths: Sequence[str], listen: Listen) -> Iterator[None]:
    def hook(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            listen(path, module, args[0] if args else next(iter(kwargs.values())))

        return record

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
            stack.callback(handle.remove)
        yield


# -- what is kept of it --------------------------------------------------------------------------------------


@dataclass
class Norms:
    """Summed squares of each input of modules, [in] float64; a module that was not run has none."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def listen(self, path: str, module: nn.Module, x: Tensor) -> None:
        squares = as_matrix_inputs(module, x).square().sum(0).double().cpu()
        self.sums[path] = self.sums[path] + squares if path in self.sums else squares

    def of(self, path: str) -> list[float]:
        """Their roots, [] of a module that was not run. Reject (not-a-number) where one is no number."""
        if path not in self.sums:
            return []
        refuse_non_finite(path, self.sums[path])
        return self.sums[path].sqrt().tolist()


@dataclass
class Grams:
    """Sums of x x^T over what modules are given, [in, in] float32; one for all that are given the same tensor.

    leader   the first of the modules that are given the same
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    _inputs: dict[str, Tensor] = field(default_factory=dict)

    def accumulate(self, path: str, module: nn.Module, x: Tensor) -> None:
        if path not in self.leader:
            self.leader[path] = next((p for p, y in self._inputs.items() if y is x), path)
        leader = self.leader[path]
        if leader != path:
            assert self._inputs.get(leader) is x, f"{path} is not given what {leader} is any more"
            return
        self._inputs[path] = x
        rows = as_matrix_inputs(module, x)  # [tokens, in]
        if path in self.sums:
            self.sums[path].addmm_(rows.T, rows)
        else:
            self.sums[path] = rows.T @ rows

    def gram_of(self, path: str) -> Tensor | None:
        """Gram matrix of a module's inputs; None of a module that was not run. Reject (not-a-number) where a number is
        none."""
        if path not in self.leader:
            return None
        gram = self.sums[self.leader[path]]
        refuse_non_finite(path, gram.diagonal())
        return gram


def refuse_non_finite(path: str, squares: Tensor) -> None:
    if not squares.isfinite().all():
        problem = "not a number" if squares.isnan().any() else "infinite, or its square is"
        raise not_a_number(f"what {path} is given is {problem}", help=REMEDY).rejection()


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
