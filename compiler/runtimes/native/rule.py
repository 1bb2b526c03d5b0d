"""Rules of the plan reader: a predicate of a call, and the function that lowers it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx, nn

from . import calls
from .trees import leaves, mapped
from .values import OF_TOKENS

if TYPE_CHECKING:
    from .plan_builder import PlanBuilder


@dataclass(frozen=True)
class NodeCall:
    """A node of the graph with the values of its operands.

    role     of the node in its model, as capture labels it; None where it has none
    module   that the node calls; None for functions and methods
    """

    node: fx.Node
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    role: str | None = None
    module: nn.Module | None = None

    @cached_property
    def name(self) -> str:
        return calls.operation_name(self.node)

    @property
    def first(self) -> Any:
        return self.args[0] if self.args else None

    @cached_property
    def operands(self) -> list[Any]:
        """Operands, those in lists and by name among them."""
        return leaves((self.args, self.kwargs))

    @cached_property
    def kinds(self) -> frozenset[type]:
        return frozenset(map(type, self.operands))

    @property
    def of_tokens(self) -> bool:
        """Whether an operand holds numbers of tokens."""
        return any(isinstance(x, OF_TOKENS) for x in self.operands)

    def mapped(self, change: Callable[[Any], Any]) -> "NodeCall":
        """The call of changed operands."""
        return replace(self, args=mapped(self.args, change), kwargs=mapped(self.kwargs, change))


class Rule(NamedTuple):
    """A row of the table: `lower` gives the value of a call that `matches`, or NotImplemented to pass it on."""

    matches: "Callable[[PlanBuilder, NodeCall], bool]"
    lower: "Callable[[PlanBuilder, NodeCall], Any]"


Predicate = Callable[["PlanBuilder", NodeCall], bool]


def role(*roles: str, first: type | tuple[type, ...] = object) -> Predicate:
    """Predicate of calls by the role of their node, and the type of their first operand."""
    return lambda _, call: call.role in roles and isinstance(call.first, first)


def function(*names: str, first: type | tuple[type, ...] = object) -> Predicate:
    """Predicate of functions and methods by name, and the type of their first operand."""
    return lambda _, call: call.module is None and call.name in names and isinstance(call.first, first)


def operand(*types: type) -> Predicate:
    """Predicate of calls by the type of any operand."""
    return lambda _, call: not call.kinds.isdisjoint(types)


def module(*classes: type[nn.Module]) -> Predicate:
    """Predicate of calls by the class of their module."""
    return lambda _, call: isinstance(call.module, classes or nn.Module)


def anything(_: "PlanBuilder", __: NodeCall) -> bool:
    return True
