"""Changes that a search of steps combines: of shape, of zeros and of numbers, and what becomes of each target.

An axis is a list of alternatives, of which the first one changes nothing. A candidate takes one of each axis.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import MetricRef
from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.nearest import nearest_name_help
from .wish import Wish

REMOVED = (5, 10, 15, 20, 30)  # percent of the parameters
ZEROS = (30, 50, 65)  # percent of the weights of linear layers
MIXED = (5, 6)  # bits a weight on average, between the formats of four and eight
# nats by which packing in a format that is asked for by name may move predictions: near those of a model that says
# nothing, so that the bounds of the wish judge, not a limit of the pass; `auto` mends what it loses by itself
DIVERGENCE = 10
HEALING = "fit = tune.heal(data: {train}, held_out: {data}, steps: 200, distill: 50%, every: 20)"

unknown_candidate = Fault(
    "unknown-candidate", "`effc tune --candidate` names none of the candidates of a search of steps.", exit="usage"
)


@dataclass(frozen=True)
class Alternative:
    """One change.

    steps      of the recipe, `name = pass(...)`
    arguments  of the target
    words      passes and formats, for `among`
    packs      the kernel's format where zeros are packed beside it; "" where zeros gain nothing
    """

    name: str
    steps: tuple[str, ...] = ()
    arguments: str = ""
    words: tuple[str, ...] = ()
    packs: str = ""


@dataclass(frozen=True)
class Candidate:
    """One alternative of each axis."""

    shape: Alternative
    zeros: Alternative
    numbers: Alternative

    @property
    def axes(self) -> tuple[Alternative, Alternative, Alternative]:
        return self.shape, self.zeros, self.numbers

    @property
    def name(self) -> str:
        changed = [a.name for a in self.axes if a.name != UNCHANGED.name]
        return ", ".join(changed) or "default format"

    @property
    def suffix(self) -> str:
        """Suffix of its files among those of a front: `-10-pruned-int8-inputs-int16`."""
        return "-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def changes(self) -> int:
        """Number of axes that differ from the unchanged model."""
        return sum(a.name != UNCHANGED.name for a in self.axes)

    def steps(self, data: str) -> list[str]:
        steps = [*self.shape.steps, *self.zeros.steps]
        if self.zeros.steps and self.numbers.packs:
            limit = "" if self.numbers.packs == "auto" else f", divergence: {DIVERGENCE}"
            return [*steps, f"cpu = lower.sparse_cpu(format: {self.numbers.packs}, data: {data}{limit})"]
        return [*steps, *self.numbers.steps]


UNCHANGED = Alternative("unchanged")


def allowed_candidates(wish: Wish) -> list[Candidate]:
    """All combinations that the target can hold and `among` allows; the unchanged model first."""
    skeleton = wish.session.skeleton(wish.recipe.models[wish.pipeline.model])
    zeros = [UNCHANGED, *(a for a in _sparsity_alternatives(wish) if wish.allows_all(a.words))]
    shapes = [UNCHANGED, *(a for a in _pruning_alternatives(wish, skeleton) if wish.allows_all(a.words))]
    numbers = [
        UNCHANGED_NATIVE if wish.is_native else UNCHANGED,
        *(a for a in _format_alternatives(wish, skeleton) if wish.allows_all(a.words)),
    ]
    combinations = (Candidate(*axes) for axes in product(shapes, zeros, numbers))
    return [c for c in combinations if not c.zeros.steps or c.numbers.packs]


def all_alternatives(wish: Wish, skeleton: Skeleton | None) -> list[Alternative]:
    """All alternatives that change something, whatever `among` allows; of a model that is not known, all that a model
    may have."""
    return [
        *_pruning_alternatives(wish, skeleton),
        *_sparsity_alternatives(wish),
        *_format_alternatives(wish, skeleton),
    ]


def candidate_named(name: str, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of that name. Raises Reject (unknown-candidate)."""
    for candidate in candidates:
        if candidate.name == name:
            return candidate
    names = [c.name for c in candidates]
    raise unknown_candidate(
        f"no candidate is called `{name}`", help=nearest_name_help(name, names, "there is")
    ).rejection()


UNCHANGED_NATIVE = Alternative("unchanged", packs="sparse_bf16")


def search_score_text(wish: Wish) -> str:
    """Score of searches that prune: the metric of the first bound on quality, on rows that passes read."""
    metrics = [b.metric for b in wish.bounds if dict(b.metric.args).get("data") is not None]
    metric = metrics[0] if metrics else MetricRef("perplexity")
    arguments = dict(metric.args) | {"data": wish.data}
    return value_text(MetricRef(metric.name, tuple(sorted(arguments.items()))))


def _pruning_alternatives(wish: Wish, skeleton: Skeleton | None) -> Iterator[Alternative]:
    score = search_score_text(wish)
    for percent, word in product(REMOVED, _pruning_pass_names(skeleton)):
        step = f"slim = {word}(remove: {percent}% of params, group: 32, score: {score})"
        yield Alternative(f"{percent} % pruned", (step,), words=(word,))
        if wish.train is not None:
            healing = HEALING.format(train=wish.train.name, data=wish.data.name)
            yield Alternative(f"{percent} % pruned and healed", (step, healing), words=(word, "tune.heal"))


def _pruning_pass_names(skeleton: Skeleton | None) -> tuple[str, ...]:
    """Pass that cuts all kinds of parts that the model has; all such passes where it is not known."""
    if skeleton is None:
        return "prune.multi", "shed.multi"
    has_experts = any(group.kind == "experts" for group in skeleton.groups)
    return ("shed.multi" if skeleton.scans or has_experts else "prune.multi",)


def _sparsity_alternatives(wish: Wish) -> Iterator[Alternative]:
    for percent in ZEROS if wish.is_native else ():
        step = f"thin = sparsify.sparsegpt(sparsity: {percent}% of weights, data: {wish.data.name})"
        yield Alternative(f"{percent} % zeros", (step,), words=("sparsify.sparsegpt",))


def _format_alternatives(wish: Wish, skeleton: Skeleton | None) -> Iterator[Alternative]:
    """Formats that the target declares, as far as its arguments are not written; of four bits also calibrated."""
    word = wish.session.registry.vocabulary.word("target", wish.emit.call.word)
    assert word is not None, f"no target {wish.emit.call.word}"
    data, spans = wish.data.name, wish.emit.call.spans
    for arguments, steps, packs in word.facts.get("formats", ()):
        if any(name in spans for name in arguments):
            continue
        passes = tuple(step.partition("(")[0] for step in steps)
        texts = tuple(f"{p.rpartition('.')[2]} = {s.format(data=data)}" for p, s in zip(passes, steps, strict=True))
        format = list(map(str, arguments.values()))[:1]
        further = [f"{name} {value}" for name, value in list(arguments.items())[1:]]
        calibrated = " and ".join(p.partition(".")[2] for p in passes)
        label = ", ".join([*format, *further]) + (" by " if format and passes else "") + calibrated
        argument_text = ", ".join(f"{name}: {value}" for name, value in arguments.items())
        yield Alternative(label, texts, argument_text, (*format, *passes), packs)
    if wish.is_native and "weights" not in spans:
        yield from _mixed_format_alternatives(wish, skeleton)


def _mixed_format_alternatives(wish: Wish, skeleton: Skeleton | None) -> Iterator[Alternative]:
    """Formats of each module for a number of bits on average."""
    width = 16 if skeleton is None or skeleton.facts.get("dtype") in ("bfloat16", "float16") else 32
    for bits in MIXED:
        step = f"cpu = lower.mixed(keep: {100 * bits / width:g}% of bytes, data: {wish.data.name})"
        yield Alternative(f"mixed, {bits} bits", (step,), "weights: int4", ("lower.mixed",))
