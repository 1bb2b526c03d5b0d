"""Steps against the structure of their model: what `on:` selects, and whether the amounts are possible.

Works on the skeleton that the model starts with. Once an earlier step has changed how many of something there
are, amounts of it are left to `plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.nearest import nearest_name
from ..syntax.source import Span
from .amounts import report_invalid_amount
from .inputs import report_incompatible_module_widths
from .literals import span_inside_text
from .pipelines import PipelineBuild, Stage
from .selectors import UnmatchedPart, glob_matches_path, resolve_selector, unmatched_parts
from .skeleton import Group, Skeleton, is_submodule
from .value_text import quoted
from .values import Ratio, Selector

no_match = Fault("no-match", "A selector, or one alternative of it, matches nothing that the pass works on.")
nothing_to_select = Fault(
    "nothing-to-select", "A pass works on something that the model doesn't have, or has and can't lose."
)

_KIND_PHRASES = {
    "ssm_heads": "heads of its scan",
    "ssm_channels": "channels of its scan",
    "ssm_state": "states of its scan",
}
_GROUPS_OF = {  # kinds of groups by the words of `order`
    "heads": ("heads", "kv_heads"),
    "scan_heads": ("ssm_heads",),
    "scan_channels": ("ssm_channels",),
    "states": ("ssm_state",),
}
_OF_MIXERS = ("ssm", "scans", "ssm_heads", "ssm_channels", "ssm_state")
LINEAR = ("Linear", "Conv1D")
NOUNS = {
    "channels": "groups of channels",
    "heads": "attention modules",
    "kv_heads": "attention modules with KV heads",
    "experts": "layers of experts",
    "branches": "residual branches",
    "parts": "residual branches, channels and heads",
    "layers": "layers",
    "linear": "linear modules",
    "width": "the residual stream",
    "ssm": "state-space blocks",
    "scans": "scans of state-space mixers",
    "ssm_heads": "scans with heads",
    "ssm_channels": "scans with a time step per channel",
    "ssm_state": "scans with a state of their own",
}


@dataclass(frozen=True)
class Selectable:
    """Selectable parts of a step: their kind, paths, and for channels and heads the groups behind the paths."""

    kind: str
    paths: tuple[str, ...]
    groups: tuple[Group, ...] = ()

    @property
    def noun(self) -> str:
        return NOUNS[self.kind]

    def selected(self, selector: Selector | None) -> "Selectable":
        if selector is None:
            return self
        chosen = resolve_selector(selector, self.paths)
        return Selectable(self.kind, chosen, tuple(g for g in self.groups if g.site in set(chosen)))


def report_steps_incompatible_with_skeleton(build: PipelineBuild, skeleton: Skeleton) -> None:
    """Check every step of a line; faults go to its scope."""
    for stage in build.stages:
        if stage.word is None or not stage.word.facts.get("acts_on") or not _has_valid_selection_arguments(stage):
            continue
        candidates = selectable_parts_of_step(stage, skeleton)
        if not candidates.paths:
            build.report(stage, _absent_parts_diagnostic(stage, candidates, skeleton))
            continue
        on = stage.call.args.get("on")
        if isinstance(on, Selector):
            unmatched = [d for d in unmatched_parts(on, candidates.paths) if not on.allow_empty]
            for part in unmatched[:3]:
                build.report(stage, _no_match_diagnostic(stage, part, candidates, skeleton))
            if not unmatched and not resolve_selector(on, candidates.paths) and not on.allow_empty:
                build.report(
                    stage,
                    no_match(
                        f"nothing is left of {len(candidates.paths)} {candidates.noun}",
                        stage.call.argument_or_call_span("on"),
                        help="subtract less",
                    ),
                )
            if unmatched:
                continue
        if stage.sound:
            report_invalid_amount(stage, candidates.kind, candidates, candidates.selected(on), build)
            report_incompatible_module_widths(stage, candidates.selected(on), skeleton, build)


def _has_valid_selection_arguments(stage: Stage) -> bool:
    """Whether the arguments that decide it have no fault: `on`, and `unit` where the pass has it."""
    unit = stage.sound or stage.word.param("unit") is None or "unit" in stage.call.spans
    return unit and all(name in stage.call.args for name in ("on", "unit") if stage.word.param(name))


def selectable_parts_of_step(stage: Stage, skeleton: Skeleton) -> Selectable:
    """Parts that a step's `on:` chooses from."""
    kind, args = stage.word.facts["acts_on"], stage.call.args
    if kind == "branches" and args.get("unit") == "layer":
        kind = "layers"
    if kind in ("heads", "kv_heads", "channels", "experts"):
        bases = [v.of for v in args.values() if isinstance(v, Ratio) and v.of in ("heads", "kv_heads")]
        kind = bases[0] if bases and kind not in ("channels", "experts") else kind
        groups = tuple(g for g in skeleton.groups if g.kind == kind)
        if not groups and kind == "kv_heads":  # every query head has a KV head of its own
            groups = tuple(g for g in skeleton.groups if g.kind == "heads")
        return Selectable(kind, tuple(dict.fromkeys(g.site for g in groups)), groups)
    if kind in ("ssm_heads", "ssm_channels", "ssm_state"):
        groups = tuple(g for g in skeleton.groups if g.kind == kind)
        return Selectable(kind, tuple(g.site for g in groups), groups)
    if kind == "width":
        return (
            Selectable(kind, (skeleton.stream.site,), (skeleton.stream,)) if skeleton.stream else Selectable(kind, ())
        )
    if kind == "scans":
        return Selectable(kind, tuple(s.site for s in skeleton.scans))
    if kind == "ssm":
        return Selectable(kind, tuple(b.site for b in skeleton.branches if b.role == "ssm"))
    if kind == "linear":
        return Selectable(kind, tuple(p.path for p in skeleton.parts if p.kind in LINEAR))
    if kind == "layers":
        return Selectable(kind, skeleton.units)
    assert kind == "branches", f"{stage.word.name} acts on {kind}"
    if not args.get("order"):
        return Selectable(kind, tuple(b.site for b in skeleton.branches if b.site not in skeleton.stays))
    return _selectable_of_kinds(args["order"], skeleton)


def _selectable_of_kinds(cut_kinds: Sequence[str], skeleton: Skeleton) -> Selectable:
    """Parts of a step that cuts any of several kinds: branches, or groups where the model has no branches."""
    if skeleton.branches:
        return Selectable("branches", tuple(b.site for b in skeleton.branches))
    kinds = {kind for name in cut_kinds for kind in _GROUPS_OF.get(name, (name,))}
    sites = tuple(dict.fromkeys(g.site for g in skeleton.groups if g.kind in kinds))
    return Selectable("parts", sites)


def _absent_parts_diagnostic(stage: Stage, candidates: Selectable, skeleton: Skeleton) -> Diagnostic:
    stays = list(skeleton.stays.items()) if candidates.kind == "branches" else []
    refusals = stays or skeleton.facts.get("refused") or []
    narrows = candidates.kind in ("heads", "kv_heads", "channels", "experts", *_KIND_PHRASES)
    relevant = stays or [r for r in refusals if narrows and is_refusal_for_kind(r, candidates.kind, skeleton)]
    unread = [r for r in refusals if r[0] in dict(skeleton.opaque)]
    lack, note = "which the model doesn't have", ""
    if candidates.kind == "width":
        return nothing_to_select(
            f"`{stage.word.name}` works on {candidates.noun}, which keeps its width in this model",
            stage.call.span,
            note=skeleton.facts.get("fixed_stream") or "",
            help="narrow what is inside of layers: `prune.channels`, `prune.heads`",
        )
    if candidates.groups == () and (relevant or unread):
        path, reason = (relevant or unread)[0]
        note = f"`{path}`: {reason_with_opaque_cause(skeleton, path, reason)}"
        lack = f"none of which {'can be cut' if relevant else 'is found'} in this model"
    elif not skeleton.units and candidates.kind != "linear":
        lack, note = "none of which is found in this model", "it has no repeated layers that effc recognises"
    return nothing_to_select(
        f"`{stage.word.name}` works on {candidates.noun}, {lack}",
        stage.call.span,
        note=note,
        help=_alternative_pass_text(candidates, skeleton),
    )


def _alternative_pass_text(candidates: Selectable, skeleton: Skeleton) -> str:
    """Alternative: passes for scans of the other kind, and for models without scans."""
    has = {g.kind for g in skeleton.groups}
    if candidates.kind == "ssm_heads" and "ssm_channels" in has:
        return "its scans have a time step per channel, not per head: `shed.channels` narrows them"
    if candidates.kind == "ssm_channels" and "ssm_heads" in has:
        return "its scans have a time step per head: `shed.heads` removes heads"
    if candidates.kind in _OF_MIXERS and not skeleton.scans:
        return "no layer of it scans a state along the sequence: the passes of `prune` are for other layers"
    return ""


def is_refusal_for_kind(refusal: Sequence[str], kind: str, skeleton: Skeleton) -> bool:
    """Whether discovery's reason is about groups of this kind: heads are attention's, channels anything else's."""
    path, reason = refusal
    if kind in _KIND_PHRASES:
        return reason.startswith(_KIND_PHRASES[kind])
    if kind == "experts" or reason.startswith("whole experts"):
        return kind == "experts" and reason.startswith("whole experts")
    roles = {b.role for b in skeleton.branches if is_submodule(path, b.site) or is_submodule(b.site, path)}
    return "attention" in roles if kind in ("heads", "kv_heads") else roles != {"attention"}


def reason_with_opaque_cause(skeleton: Skeleton, path: str, reason: str) -> str:
    """Why a module can't be narrowed; of one that is a single node of the graph also what made it so."""
    opaque = dict(skeleton.opaque).get(path)
    return f"{reason}: {opaque}" if opaque else reason


def _no_match_diagnostic(
    stage: Stage, unmatched: UnmatchedPart, candidates: Selectable, skeleton: Skeleton
) -> Diagnostic:
    """Says which part of a selector is dead, among how many, and what was probably meant."""
    span = stage.call.argument_or_call_span("on")
    dead_span = _selector_span(span, unmatched)
    if unmatched.subtracts:
        return no_match(
            f"`{unmatched.glob}` matches nothing that is selected before it",
            dead_span,
            help='drop it, or let `**` cross the dots: "layers.0.**"',
        )
    of = "" if unmatched.text == unmatched.glob else f" in `{unmatched.glob}`"
    closest = _closest_glob(unmatched, candidates.paths)
    sample = f"there is `{candidates.paths[0]}`" + (
        f" and {len(candidates.paths) - 1} more" if len(candidates.paths) > 1 else ""
    )
    return no_match(
        f"`{unmatched.text}`{of} matches none of {len(candidates.paths)} {candidates.noun}",
        dead_span,
        help=f"did you mean `{closest}`?" if closest else f"{sample}; write `allow empty` if none may match",
        note=_other_kind_note(unmatched, candidates, skeleton),
        fix=Fix(dead_span, closest) if closest and dead_span and dead_span != span else None,
    )


def _selector_span(span: Span | None, unmatched: UnmatchedPart) -> Span | None:
    """The part inside the quotes of the selector's text; the whole argument where it came by a name."""
    if span is None:
        return None
    glob = span.text.find(quoted(unmatched.glob))
    if glob < 0:
        return span
    start = span.start + glob + 1
    return span_inside_text(
        Span(span.source, start, start + len(unmatched.glob)),
        unmatched.glob,
        unmatched.start,
        unmatched.start + len(unmatched.text),
    )


def _closest_glob(unmatched: UnmatchedPart, paths: Sequence[str]) -> str:
    """The glob or alternative that was probably meant: each name compared with those that the paths have."""
    known = {c for p in paths for c in p.split(".") if not c.isdigit()}
    if unmatched.text != unmatched.glob:
        before, after = unmatched.glob[: unmatched.start], unmatched.glob[unmatched.start + len(unmatched.text) :]
        head = before.rpartition("{")[0].rsplit(".", 1)[-1]
        tail = after.partition("}")[2].split(".", 1)[0]
        if set(head + tail) & set("*{}"):
            return ""
        closest = nearest_name(head + unmatched.text + tail, known)
        inner = (
            closest[len(head) : len(closest) - len(tail)] if closest.startswith(head) and closest.endswith(tail) else ""
        )
        return "" if inner in before.rpartition("{")[2].split(",") or inner in after.partition("}")[0] else inner
    if below := _plainest_glob_below(unmatched.glob, paths):
        return below
    words = [
        c if set(c) & set("*{}") or c.isdigit() or c in known else nearest_name(c, known) or c
        for c in unmatched.glob.split(".")
    ]
    guess = ".".join(words)
    return guess if guess != unmatched.glob and any(glob_matches_path(guess, p) for p in paths) else ""


def _plainest_glob_below(glob: str, paths: Sequence[str]) -> str:
    """The plainest glob of what lies below the modules that a glob matches; "" where nothing does."""
    below = [p for p in paths if glob_matches_path(f"{glob}.**", p)]
    plain = f"{glob}*" if glob.endswith(".*") else f"{glob}.*"
    return (plain if [p for p in paths if glob_matches_path(plain, p)] == below else f"{glob}.**") if below else ""


def _other_kind_note(unmatched: UnmatchedPart, candidates: Selectable, skeleton: Skeleton) -> str:
    """Note where the glob matches a module of another kind, or one whose channels form no group."""
    glob = unmatched.glob
    for path, reason in skeleton.facts.get("refused") or []:
        if glob_matches_path(glob, path):
            return f"`{path}`: {reason}"
    modules: dict[str, None] = {}
    for owned in skeleton.parts:
        names = owned.path.split(".")
        modules |= {".".join(names[:i]): None for i in range(1, len(names) + 1)}
    if unmatched.text != glob:
        return ""
    module = next((m for m in modules if glob_matches_path(glob, m)), "")
    return f"`{module}` is a module, but `{candidates.paths[0]}` is what can be selected here" if module else ""
