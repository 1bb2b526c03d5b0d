"""Number of items that `keep:` or `remove:` means: counts, shares and alignment, rounded in one place."""

from dataclasses import dataclass
from typing import overload

from ....dsl.checker.values import Ratio
from ....dsl.syntax.diagnostics import Fault

overshoots = Fault(
    "overshoots",
    "Even the smallest part that a pass may cut is far more than is to go.\n\n"
    "A recipe that asks for 10 % is not to lose 29 %: cut in smaller steps, `align` among them, or say "
    "`overshoot: true` where a pass has that.",
)

SPARE = 0.5  # of what is to go, how much more may go where nothing smaller can


@dataclass(frozen=True)
class Amount:
    """A share or count to keep of something, as a recipe says it."""

    value: int | Ratio
    removes: bool = False  # `remove:` rather than `keep:`

    @overload
    def remaining_count(self, total: int, align: int = 1) -> int: ...

    @overload
    def remaining_count(self, total: float, align: int = 1) -> float: ...

    def remaining_count(self, total: float, align: int = 1) -> float:
        """Number of `total` items that stay: the nearest multiple of `align`, at least one step, at most all.

        Ties go to keeping more.
        """
        share = self.value.value * total if isinstance(self.value, Ratio) else self.value
        target = total - share if self.removes else share
        steps = int(target / align + 0.5 + 1e-9)  # 1e-9: 0.85 * 20 is 16.999999999999996
        return min(max(steps, 1) * align, total)

    @property
    def of(self) -> str | None:
        return self.value.of if isinstance(self.value, Ratio) else None
