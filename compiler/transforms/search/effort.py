"""Cost of ranking and refitting besides scores, from shapes alone: for `plan`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....dsl.checker.skeleton import Group, Skeleton
from ....dsl.checker.values import DataRef
from ...analysis.planning.cost import token_or_image_count
from ...analysis.planning.peak_memory import bytes_per_parameter
from ...core.memory import reuse_budget_bytes
from ...inputs.data.generated import AT_ONCE, Generated
from ...plugin.interfaces import Effort
from .importance import input_block_count
from .reconstruct import bytes_on_disk, readers

if TYPE_CHECKING:
    from ...plugin.context import Context

_SOLVED = 3 * 8  # bytes per entry: the float64 factor, what is solved, and the weights that read it


def estimate_fitting_effort(
    skeleton: Skeleton, ctx: "Context", groups: Sequence[Group], data: DataRef | None
) -> Effort:
    """Moments of all that reads the groups, over the data's rows or over rows that the model writes first."""
    shapes = skeleton.shapes()
    widths = {m.tensor: shapes[m.tensor][m.axis] for g in groups for m in readers(g)}
    if not widths:
        return Effort()
    files = sum(map(bytes_on_disk, widths.values()))
    widest, moments = max(widths.values()), sum(4 * w * w for w in widths.values())
    solving, factored = _SOLVED * widest**2, sum(map(_factored, widths.values()))
    collecting = min(moments, max(reuse_budget_bytes(ctx.settings.max_memory), 4 * widest**2))
    rounds, rows = math.ceil(moments / collecting), Generated.fitting(ctx.origin)
    tokens = rows.count * rows.length if data is None else token_or_image_count(ctx.rows(data))
    work = {"float64": factored, "float32": 2.0 * tokens * sum(w * w for w in widths.values())}
    if data is not None:
        return Effort(rounds * tokens, solving, collecting, work, files=files)
    writing = min(AT_ONCE, rows.count) * rows.length * _cache_bytes_per_token(skeleton)
    return Effort((1 + rounds) * tokens, solving, max(collecting, writing), work, files=files)


def _factored(width: int) -> float:
    """Operations for a reader: of each part a factor (1/3) and an inverse (2/3) for the order, of all a first fit."""
    return width**3 / input_block_count(width) ** 2 + width**3 / 3


def _cache_bytes_per_token(skeleton: Skeleton) -> int:
    """Bytes of keys and values of a token over all layers."""
    by_site = {g.site: g for g in skeleton.groups if g.kind in ("heads", "kv_heads")}  # kv_heads come last
    widths = [min(g.count * m.segments[0][1] for m in g.members) for g in by_site.values()]
    return 2 * bytes_per_parameter(skeleton) * sum(widths)
