"""A checked recipe: names resolved, values typed, overrides applied, and every part still knows its span."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from posixpath import dirname
from typing import Any

from ..syntax.source import Source, Span
from .values import MetricRef, StepRef, references_in


@dataclass(frozen=True)
class Invocation:
    """A word with all its parameters, defaults filled in. `spans` has a place for each one that was written."""

    word: str
    args: Mapping[str, Any]
    span: Span | None = field(default=None, compare=False, repr=False)
    spans: Mapping[str, Span] = field(default_factory=dict, compare=False, repr=False)

    def argument_or_call_span(self, name: str) -> Span | None:
        return self.spans.get(name, self.span)

    @property
    def folder(self) -> str | None:
        """Of the file that the call stands in, a module's own: paths are relative to it. None: not from a file."""
        return dirname(self.span.source.name) if self.span else None


@dataclass(frozen=True)
class Step:
    name: str
    call: Invocation
    source: str  # name of the step it works on, or of the pipeline's model


@dataclass(frozen=True)
class Bound:
    """`metric op limit [in part] [on profile]`; with `baseline`, the limit is a factor of that model's own value.

    part        a target: what it emitted is asked; a point of a front, or "any"; "" for the result, or all points
    confidence  0.95 where rows are to decide it `with 95% confidence`
    """

    metric: MetricRef
    op: str  # "<=", "<", ">=", ">", "==", "in"
    limit: Any  # a number, Bytes, Duration, Ratio or Range
    baseline: str | None = None  # name of a model
    profile: str | None = None
    part: str = ""
    span: Span | None = field(default=None, compare=False, repr=False)
    confidence: float | None = None
    part_span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Emit:
    """A target with its path, relative to the output folder; `source` is the step that it holds: the pipeline's
    last one unless the recipe says `from:`."""

    call: Invocation
    source: str


@dataclass(frozen=True)
class Pipeline:
    name: str
    model: str
    steps: tuple[Step, ...]
    expects: tuple[Bound, ...] = ()
    emits: tuple[Emit, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def result(self) -> str:
        """The name whose result is emitted: the last step, or the model where there is none."""
        return self.steps[-1].name if self.steps else self.model

    def steps_leading_to(self, name: str) -> tuple[Step, ...]:
        """The steps that a step's result went through, first to last, its own included."""
        by_name, path = {s.name: s for s in self.steps}, []
        while name in by_name:
            path.append(by_name[name])
            name = by_name[name].source
        return tuple(path[::-1])

    def step_and_ancestors(self, step_name: str) -> tuple[Step, ...]:
        """A step and those that it followed or named, in the pipeline's order; none where it names no step."""
        by_name, led, waiting = {s.name: s for s in self.steps}, set(), [step_name]
        while waiting:
            name = waiting.pop()
            if name in by_name and name not in led:
                led.add(name)
                waiting += [r.name for r in references_in(by_name[name].call.args, StepRef)] or [by_name[name].source]
        return tuple(s for s in self.steps if s.name in led)


@dataclass(frozen=True)
class Recipe:
    """One variant of a recipe file: a `matrix` gives several."""

    source: Source = field(compare=False, repr=False)
    doc: str
    params: Mapping[str, Any]  # after overrides
    models: Mapping[str, Invocation]
    data: Mapping[str, Invocation]
    profiles: Mapping[str, Mapping[str, Any]]
    pipelines: Mapping[str, Pipeline]
    variant: str = ""  # "keep=80%" where a matrix made it
    # param -> "recipe", "--set", "EFFC_PARAM_keep", ...
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
