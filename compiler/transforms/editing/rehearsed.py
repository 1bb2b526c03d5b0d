"""The skeleton of a model with what a rehearsal says of its branches, kept so that `check` and `plan` know it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ....dsl.checker.skeleton import Branch, Skeleton
from ....dsl.syntax.diagnostics import Reject
from ...analysis.discovery.structure import cache_skeleton, cached_skeleton, shipped_skeleton, skeleton_key_of
from ...analysis.planning import shrink
from ...core.events import tick
from ...core.settings import Settings
from ...models.checkpoints.origin import Origin

if TYPE_CHECKING:
    from ...ir.program import Program


# Skeletons that this process discovered, by their keys: a cache folder may be closed, or another one than before.
_DISCOVERED: dict[str, Skeleton] = {}


def load_or_discover_skeleton(origin: Origin, settings: Settings) -> Skeleton:
    """The skeleton of a model: shipped, kept, or discovered on the meta device and kept."""
    known = shipped_skeleton(origin) or cached_skeleton(origin, settings)
    if known is None:
        key = skeleton_key_of(origin)
        known = _DISCOVERED[key] = _DISCOVERED.get(key) or _discover_skeleton(origin)
        cache_skeleton(origin, settings, known)
    return known


def _discover_skeleton(origin: Origin) -> Skeleton:
    """Skeleton of a model on the meta device, with the branches that can't be removed."""
    from ...analysis.discovery.streams import skeleton_with_stream
    from ...ir.capture.meta_capture import capture_on_meta  # torch, which a kept skeleton does without

    tick("capturing the model's graph")
    program = capture_on_meta(origin)
    tick("discovering what can be pruned")
    skeleton = skeleton_with_stream(program)
    tick("trying which branches can go")
    if stays := unremovable_branch_reasons(program):
        return replace(skeleton, facts={**skeleton.facts, "stays": [[site, reason] for site, reason in stays.items()]})
    return skeleton


def unremovable_branch_reasons(program: "Program") -> dict[str, str]:
    """Sites of branches that can't be removed, with the reason; one that goes speaks for those of equal layers.

    Nothing for a model that does not run without weights: then the edit itself will show.
    """
    from ...analysis.discovery.discover import skeleton_of
    from .dry_run import copy_on_meta, forward_runs

    reasons: dict[str, str] = {}
    going: set[tuple[str, str]] = set()
    if len(skeleton_of(program).branches) < 2 or not forward_runs(copy_on_meta(program)):
        return reasons
    for branch in skeleton_of(program).branches:
        kind = (program.units[branch.unit].key, branch.join)
        if kind in going:
            continue
        if reason := _removal_refusal_on_meta_copy(program, branch):
            reasons[branch.site] = reason
        else:
            going.add(kind)
    return reasons


def _removal_refusal_on_meta_copy(program: "Program", branch: Branch) -> str | None:
    """Reason why a copy without weights can't lose a branch; None where it can."""
    from ...analysis.discovery.bypass import other_operand_of_join
    from ...analysis.discovery.discover import skeleton_of
    from .dry_run import copy_on_meta
    from .rewrite import Rewriter

    trial, skeleton = copy_on_meta(program), skeleton_of(program)
    frees = shrink.param_count(skeleton) - shrink.param_count(shrink.without_branch(skeleton, branch))
    try:
        with Rewriter(trial) as rewrite:
            keep = other_operand_of_join(trial.units[branch.unit].graph, branch)
            rewrite.drop_branch(branch.unit, branch.join, keep=keep, frees=frees)
    except Reject as rejection:
        return rejection.diagnostics[0].message
    except RuntimeError:  # of torch, which has not every function for tensors without numbers: that tells nothing
        return None
    return None
