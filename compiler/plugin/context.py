"""All that a pass, metric, target or data file may know of the outside."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

from ...dsl.checker.recipe import Invocation, Recipe
from ...dsl.checker.values import DataRef, MetricRef, StepRef
from ...dsl.syntax.source import Source
from ..core.error_location import diagnostics_located_at
from ..core.events import Event, Listener, Recorded, iterate_with_progress
from ..core.run_state import RunState
from ..core.settings import Settings

if TYPE_CHECKING:
    import torch

    from ..ir.program import Program, ProgramVersion
    from ..ir.step_results import StepResults
    from ..models.checkpoints.origin import Origin
    from .interfaces import Data
    from .registry import Registry
    from .remote_scorer import RemoteScorer, TaskSource

T = TypeVar("T")


class KeyedProgram(NamedTuple):
    key: str
    program: "Program"


@dataclass
class Context:
    """Data of a recipe's step, and services below a pass.

    folder         that relative paths in the recipe start from
    workdir        scratch folder of the running step, kept until its result is in the cache, so that a killed step can
                   go on
    results        of the running pipeline's steps, under the keys that `step_keys` has by their names
    original       program that the running step works on, where that is the recipe's model
    run            limits on what runs now
    remote_scorer  workers that compute values of the step, if there are any
    task_source    in a worker: the tasks that it answers
    """

    settings: Settings
    recipe: Recipe
    folder: Path
    registry: "Registry"
    origin: "Origin"
    workdir: Path
    run: RunState = field(default_factory=RunState)
    _rows: dict[str, "torch.Tensor"] = field(default_factory=dict)
    _references: dict[str, Any] = field(default_factory=dict)
    results: "StepResults | None" = None
    step_keys: Mapping[str, str] = field(default_factory=dict)
    remote_scorer: "RemoteScorer | None" = None
    task_source: "TaskSource | None" = None
    original: "ProgramVersion | None" = None

    @classmethod
    def without_recipe(
        cls,
        settings: Settings,
        folder: Path,
        registry: "Registry",
        origin: "Origin | None" = None,
        workdir: Path | None = None,
    ) -> "Context":
        """A context for work that no recipe asks for. Whoever finds an origin has none yet, and nothing may ask for
        it."""
        empty_recipe = Recipe(Source("", ""), "", {}, {}, {}, {}, {})
        return cls(settings, empty_recipe, folder, registry, cast("Origin", origin), workdir or settings.cache_dir)

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def emit_event(self) -> Listener:
        return self.settings.on_event

    @property
    def tokenizer(self) -> Any:
        return self.origin.tokenizer()

    def data(self, ref: DataRef) -> "Data":
        """A declared data set."""
        return self.registry.make("data", self.recipe.data[ref.name])

    def relative_to(self, call: Invocation) -> "Context":
        """The same, with paths relative to the file that a call stands in: a module's lie beside the module."""
        return self if call.folder is None else replace(self, folder=Path(call.folder))

    def rows(self, ref: DataRef) -> "torch.Tensor":
        """Token rows of a declared data set, [rows, length] int64, the same object every time."""
        return self.tokenize_rows_once(ref.name)

    def tokenize_rows_once(self, name: str) -> "torch.Tensor":
        if name not in self._rows:
            import torch

            from .row_checks import refuse_rows_beyond_model

            call = self.recipe.data[name]
            with diagnostics_located_at(call):
                rows = torch.stack(list(self.data(DataRef(name)).rows(self.tokenizer, self.relative_to(call))))
                refuse_rows_beyond_model(rows, name, self.origin)
            self._rows[name] = rows
        return self._rows[name]

    def assistant_masks(self, ref: DataRef) -> "torch.Tensor | None":
        """Mask of the assistant's tokens, [rows, length] bool; None for rows without roles."""
        import torch

        masks = self._facts_of_rows(ref, "assistant_masks")
        return None if masks is None else torch.stack(masks).bool()

    def _facts_of_rows(self, ref: DataRef, method: Literal["assistant_masks", "prompts", "labels"]) -> list[Any] | None:
        """Results of a method of a data set, row by row; None where it says nothing of its rows."""
        call = self.recipe.data[ref.name]
        with diagnostics_located_at(call):
            values = getattr(self.data(ref), method)(self.tokenizer, self.relative_to(call))
            return None if values is None else list(values)

    def loss_mask(self, ref: DataRef) -> "torch.Tensor | None":
        """Mask of tokens that a loss counts, [rows, length] bool: answers, or all but padding; None for all tokens."""
        import torch

        if (lengths := self.prompts(ref)) is None:
            return None
        answers = self.assistant_masks(ref)
        return torch.arange(self.rows(ref).shape[1]) < lengths[:, None] if answers is None else answers

    def text_lengths(self, ref: DataRef) -> "torch.Tensor | None":
        """Number of tokens of each row in front of its padding, [rows] int64; None where no row is padded."""
        import torch

        loss_mask, prompts = self.loss_mask(ref), self.prompts(ref)
        if loss_mask is None or prompts is None:
            return None
        positions = torch.arange(1, loss_mask.shape[1] + 1)
        return torch.maximum(torch.where(loss_mask, positions, 0).amax(1), prompts)

    def result(self, ref: StepRef) -> "KeyedProgram":
        """The key of another step's result, and the program that it gave."""
        assert self.results is not None, f"no pipeline runs that could have a step {ref.name}"
        key = self.step_keys[ref.name]
        return KeyedProgram(key, self.results.program_of(key))

    def prompts(self, ref: DataRef) -> "torch.Tensor | None":
        """Number of prompt tokens of each row, [rows] int64; None where rows are no prompts with answers."""
        import torch

        lengths = self._facts_of_rows(ref, "prompts")
        return None if lengths is None else torch.tensor(lengths)

    def labels(self, ref: DataRef) -> "torch.Tensor | None":
        """The number of each row's class, [rows] int64; None where rows have none."""
        import torch

        numbers = self._facts_of_rows(ref, "labels")
        return None if numbers is None else torch.tensor(numbers)

    def metric(self, ref: MetricRef) -> Any:
        """The metric that a recipe names, with its arguments."""
        return self.registry.metric(ref)

    def each(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate with progress; raises Reject (memory-bound) once the stage holds more than it may."""
        for item in iterate_with_progress(items, label, self.emit_event, total):
            self.run.check()
            yield item

    def tick(self, event: Event) -> None:
        """Tell how far it is where `each` doesn't fit; raises as `each` does."""
        self.emit_event(event)
        self.run.check()

    def map_from_cache(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Copy of a tensor mapped from the cache if it is large, so that results of passes take no memory.

        The tensor is kept under its hash, as it will be when the step has finished.
        """
        from ..core.cache import LARGE, Cache

        if tensor.device.type != "cpu" or tensor.nbytes < LARGE:
            return tensor
        cache = Cache(self.settings.cache_dir)
        return cache.map_stored_tensor(cache.store_tensor(tensor))

    def record(self, name: str, value: float, unit: str = "") -> None:
        self.emit_event(Recorded(name, value, unit))
