"""Abstract classes of plug-ins but targets (`plugin/target.py`), and `param`.

A file in passes/, compiler/targets, compiler/evaluation/metrics, compiler/inputs/data or compiler/inputs/sources
holds one final subclass. Its header (docstring, class-level literals, `param` fields, and the methods of `Rules`) is
taken from the source by `effc check`, without importing the file (compiler/plugin/header.py); a test holds both
readings equal.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

from ...dsl.checker.rules import Rules

if TYPE_CHECKING:
    import torch

    from ...dsl.checker.skeleton import Skeleton
    from ...dsl.checker.values import DataRef
    from ..ir.outcome import Outcome
    from ..ir.program import Program
    from .clock import Clock
    from .context import Context
    from .row_scores import RowScores


def param(
    doc: str,
    *,
    default: Any = MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    of: tuple[str, ...] = (),
    unit: str = "",
    among: tuple[int, ...] = (),
    multiple: int = 0,
    parity: Literal["", "odd"] = "",
    least: int = 0,
    distinct: bool = False,
    falling: bool = False,
    starts_full: bool = False,
    spelled: str = "",
    lines: bool = False,
    rows_kind: str = "",
    positional: bool = False,
) -> Any:
    """A parameter of a recipe word: a field with a sentence, a default, and what else `dsl.vocabulary.Param` says."""
    facts = {name: value for name, value in locals().items() if name != "default"}
    return field(kw_only=True, default=default, metadata=facts)


@dataclass(frozen=True)
class Close:
    """Promise: float32 logits are kept within `atol`, narrower ones within their rounding; checked after every
    run. 0 means bit for bit."""

    atol: float = 0.0


@dataclass(frozen=True)
class Lossy:
    """Promise of nothing but a legal program; the report measures what it cost."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(param,))
class Plugin(Rules, ABC):
    """Base of everything a recipe can name: subclasses become frozen, keyword-only dataclasses.

    extra      the optional dependency group it needs, e.g. "gguf"
    requires   modules that must import, e.g. ("gguf", "accelerate")
    disjoint   {"held_out": "data"}: a parameter whose rows judge, and the one that they must not be among
    answers    parameters whose rows must say where a prompt ends and its answer begins
    reads      {parameter: ("file", ...)}: it is a path of a "file" or "folder", unless it is one of the words after
    """

    extra: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    disjoint: ClassVar[dict[str, str]] = {}
    answers: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True)(cls)

    def required_modules(self) -> tuple[str, ...]:
        """Modules that it imports with these arguments: `plan` refuses it where one is missing."""
        return self.requires


@dataclass(frozen=True)
class Effort:
    """Cost of a pass besides its scores, for `plan`.

    tokens   that go through the whole model, once for a measure and three times to learn from them
    bytes    held besides the weights while it scores or learns
    n_separate  held besides the weights before it scores
    work     other work by the machine's speed for it (`machine.speeds.Speeds`): {"select": numbers}
    streams  tensors of new shapes are stored as they are made, and hold no memory
    files    bytes on disk while it runs, besides what it makes
    """

    tokens: int = 0
    bytes: int = 0
    n_separate: int = 0
    work: "Mapping[str, float]" = field(default_factory=dict)
    streams: bool = False
    files: int = 0


class Pass(Plugin):
    """Changes a program. May assume a legal one, must leave a legal one, owes nothing in between.

    keeps          Close(atol) or Lossy()
    acts_on        what `on:` selects: "channels", "heads", "kv_heads", "experts", "branches", "layers", "linear",
                   "width" (the residual stream) or ""; of state-space mixers: "ssm" (whole blocks), "scans",
                   "ssm_heads", "ssm_channels", "ssm_state"
    everywhere     what it selects without `on` lies outside of the layers, too: output heads
    divides        the parameter whose number divides the inputs of every module, 0 for all, or whose pattern of zeros
                   ("2:4") does; rank_param: the one that is no larger than hidden states are wide, or whose numbers are
                   no larger than every module
    changes        "weights": it gives weights of modules other numbers or shapes; "values": its aim is to give those
                   that stay other values, as training and solving do, which leave a grid; "branches": it takes whole
                   branches, scans or layers out, so that what is left of a layer gets a graph of its own
    after          {pass: reason}: if both occur in a line, this one must come later; {"changes: weights": reason} for
                   every pass that changes them
    makes          what some targets can't hold: "uneven widths", "packed weights"; `effects` says it of arguments
    determinism    "deterministic", "seeded" or "nondeterministic"
    foreseeable    shapes after it follow from the skeleton; False where weights or a choice decide, so that `forecast`
                   is only the most that is left
    elsewhere      a profile that it names may be of another machine: it decides by estimates then
    accepts        kinds of results that it works on: "model", "adapters", "front"; of the step before it, or of the
                   steps that it names
    results        kinds of its result, the first unless `result_kind` says another
    """

    keeps: ClassVar[Close | Lossy] = Lossy()
    acts_on: ClassVar[str] = ""
    everywhere: ClassVar[bool] = False
    changes: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[dict[str, str]] = {}
    makes: ClassVar[tuple[str, ...]] = ()
    determinism: ClassVar[str] = "seeded"
    foreseeable: ClassVar[bool] = True
    elsewhere: ClassVar[bool] = False
    divides: ClassVar[str] = ""
    rank_param: ClassVar[str] = ""
    accepts: ClassVar[tuple[str, ...]] = ("model",)
    results: ClassVar[tuple[str, ...]] = ("model",)

    def effects(self) -> Iterator[str]:
        yield from self.makes

    def result_kind(self) -> str:
        return self.results[0]

    def result_of(self, outcome: "Outcome", ctx: "Context") -> "Outcome":
        """Result of the pass: the model, changed in place; a pass that returns another kind overrides this.

        One that names steps is handed an empty front, and asks `ctx.result` for what it named.
        """
        assert outcome.program is not None, f"{type(self).__name__} works on one program"
        self.run(outcome.program, ctx)
        return outcome

    def run(self, program: "Program", ctx: "Context") -> None:
        """Change the program in place."""
        raise AssertionError(f"{type(self).__name__} changes no program")

    def originals(self) -> "tuple[DataRef, ...]":
        """Data on which it compares with the original, whose words compiler/evaluation/reference.py keeps."""
        return ()

    def reads_clock(self) -> bool:
        """Whether what it decides depends on how fast this machine is: then the machine is part of the key."""
        return False

    def files(self) -> tuple[str, ...]:
        """Paths, as the recipe has them, of files that it reads: their content is part of its result's key."""
        return ()

    def forecast(self, skeleton: "Skeleton") -> "Skeleton":
        """The skeleton after this pass, as far as shapes are known without weights (`plan`)."""
        return skeleton

    def forwards(self, skeleton: "Skeleton") -> int:
        """Number of evaluations of its score (whole-model forwards over its data), for time estimates."""
        return 0

    def effort(self, skeleton: "Skeleton", ctx: "Context") -> Effort:
        """Cost besides scores; none where it neither trains nor refits."""
        return Effort()


class Metric(Plugin):
    """Measures a model.

    unit             as printed: "nats/token", "ms", "B"
    better           "lower" or "higher"
    lowest, highest  values that no model goes beyond, a number, bytes or seconds; None where none is
    exact            it counts shapes and needs no weights: also right on the meta device
    timed            it reads a clock: differs between runs and machines, is never taken from a cache
    needs_original   it compares with the original's outputs on its `data`, which compiler/evaluation/reference.py keeps
                     before the first pass
    compares         what of the original's outputs: "predictions", or hidden "states"
    rowwise          its value is that of `score_rows`, and bounds on it are judged with their uncertainty
    """

    unit: ClassVar[str] = ""
    better: ClassVar[str] = "lower"
    lowest: ClassVar[float | None] = None
    highest: ClassVar[float | None] = None
    exact: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    needs_original: ClassVar[bool] = False
    compares: ClassVar[str] = "predictions"
    rowwise: ClassVar[bool] = False

    def cannot_measure(self) -> "Mapping[str, str]":
        if self.exact or self.timed:
            return {}
        remedy = "bound `perplexity(DATA, decoded: 32)`"
        return {"pruned caches": f"it reads rows at once, and a cache is pruned while tokens are decoded: {remedy}"}

    def score_rows(
        self, model: "torch.nn.Module", ctx: "Context", indices: "Sequence[int] | None" = None
    ) -> "RowScores":
        """Of rowwise metrics: the score of each row, or of the rows of some indices."""
        raise AssertionError(f"{type(self).__name__} has no rows")

    def row_count(self, ctx: "Context") -> int:
        """Of rowwise metrics: the number of rows of their data."""
        return len(ctx.rows(vars(self)["data"]))

    def clock(self, model: "torch.nn.Module") -> "Clock":
        """Of timed metrics: how one timing of a model is taken, so that two can take turns."""
        raise AssertionError(f"{type(self).__name__} reads no clock")

    def timed_tokens(self) -> int:
        """Of timed metrics: tokens of the longest sequence that a timing reads and decodes."""
        return 0

    def dearer(self, value: float, log_increase: float) -> float | None:
        """The value when every token that is predicted of its rows costs so many nats more; None where that does not
        follow."""
        return None

    def measure(self, model: "torch.nn.Module", ctx: "Context") -> float:
        """The value for a model that can `forward`; asks `ctx` for data and for the original's outputs."""
        return self.score_rows(model, ctx).value


class Data(Plugin):
    """Rows of tokens from somewhere.

    prompted   a row is a prompt and its answer, or its class: `prompts` says where the one ends
    padded     rows of unlike lengths are padded to one
    rows_kind  of effc's own `choices` and `texts`: "questions with options" or "texts", which `choice` and `retrieval`
               read of those alone
    """

    prompted: ClassVar[bool] = False
    padded: ClassVar[bool] = False
    rows_kind: ClassVar[str] = ""

    @abstractmethod
    def rows(self, tokenizer, ctx: "Context") -> Iterator[Any]:
        """Rows for language modelling: [length] int64 tensors, all of one length unless the file says otherwise."""

    def assistant_masks(self, tokenizer, ctx: "Context") -> Iterator[Any] | None:
        """For each row which tokens an assistant says, [length] bool; None where nobody speaks."""
        return None

    def prompts(self, tokenizer, ctx: "Context") -> Iterator[int] | None:
        """For each row how many of its first tokens ask; None where a row is not one prompt and its answer."""
        return None

    def labels(self, tokenizer, ctx: "Context") -> Iterator[int] | None:
        """For each row the number of its class; None where rows have none."""
        return None

    @abstractmethod
    def identity(self, ctx: "Context") -> str:
        """sha256 over what decides the rows: content, parameters and the tokenizer; reads no model."""


class Source(Plugin):
    """Source of a model: resolves to a config now and to weights later.

    plain   nobody has put its weights on a grid: they are as training left them, or drawn
    """

    plain: ClassVar[bool] = False

    @abstractmethod
    def resolve(self, ctx: "Context") -> Any:
        """A `compiler.checkpoints.origin.Origin`: config, tokenizer files, identity hash; reads no weights."""
