"""The intermediate representation: the model's own module tree, and fx graphs over it.

The tree owns parameters and leaf modules under their original names. There is one graph per repeated layer
(`Unit`; equal layers share one); `capture.full_model_unit` gives one flat graph of the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from .edits import Edits
from .unit import Unit

T = TypeVar("T")


@dataclass
class Program:
    """A model and its graphs.

    model    owns parameters and leaf modules, under their original names
    inputs   the keyword arguments it was captured with: a small left-padded batch
    units    one per repeated layer, in the order in which the model runs them
    opaque   module path -> why it is one node of the graph though it isn't a leaf by kind
    version  grows with every change; analyses are kept for as long as it stays
    edits    what was changed since the base config, as plain data to replay on a fresh skeleton
    shared   whether layers run several times in one forward, so that none is a unit
    notes    what passes decided and why, as plain data for the manifest
    """

    model: nn.Module
    inputs: dict[str, Any]
    units: dict[str, Unit] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    version: int = 0
    edits: Edits = field(default_factory=Edits)
    notes: list[dict[str, Any]] = field(default_factory=list)
    shared: bool = False
    _analyses: dict[Callable[["Program"], Any], tuple[int, Any]] = field(default_factory=dict, repr=False)

    def note(self, **decision: Any) -> None:
        """Say what was decided; the manifest and `effc inspect` show it."""
        self.notes.append(decision)

    def analysis(self, analyse: Callable[["Program"], T]) -> T:
        """`analyse(program)`, computed once per version."""
        known = self._analyses.get(analyse)
        if known is None or known[0] != self.version:
            known = self._analyses[analyse] = (self.version, analyse(self))
        return known[1]

    def to_cpu(self) -> None:
        """Move the model, and the batch that it is looked at with: files are written from there."""
        self.model.to("cpu")
        self.inputs = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in self.inputs.items()}

    def changed(self) -> None:
        """Say that the model or a graph is not what it was."""
        self.version += 1
        self._analyses.clear()


@dataclass(frozen=True)
class ProgramVersion:
    """A program at one version."""

    program: Program
    version: int

    @property
    def model(self) -> nn.Module | None:
        """The model at this version; None once it was changed."""
        return self.program.model if self.program.version == self.version else None
