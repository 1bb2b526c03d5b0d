"""Elastic serving: a smaller model answers new requests of a larger one for as long as that has no free slot."""

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Fault
from .metrics import Metrics

if TYPE_CHECKING:
    from .api import Service

MODEL_HEADER = "X-Effc-Model"  # of an elastic model's answers: the model that gave them

no_elastic = Fault(
    "no-elastic",
    "A model was to answer requests of another under load, and can't stand in for it.\n\n"
    "`effc serve big=A small=B --elastic big:small` names two models that are served. Both have one vocabulary and one "
    "chat template, and the smaller takes as long a context: a request means the same to either.",
    exit="usage",
)


def parse_elastic_options(options: Sequence[str], model_names: Sequence[str]) -> dict[str, str]:
    """Names of smaller models by those of larger ones, out of `LARGE:SMALL`. Raises Reject (no-elastic)."""
    pairs = {f"{large}:{small}": (large, small) for large in model_names for small in model_names if large != small}
    smaller: dict[str, str] = {}
    for text in options:
        if text not in pairs:
            known = ", ".join(f"`{name:.80}`" for name in model_names)
            raise no_elastic(
                f"`--elastic {text:.80}` names no two models of {known}", help="write --elastic LARGE:SMALL"
            ).rejection()
        large, small = pairs[text]
        if large in smaller:
            raise no_elastic(f"`{large:.80}` has two smaller models", help="name one of them").rejection()
        smaller[large] = small
    if both := next((name for name in smaller if name in smaller.values()), None):
        raise no_elastic(
            f"`{both:.80}` is the smaller model of one, and has one itself", help="name one step: LARGE:SMALL"
        ).rejection()
    return smaller


def text_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary and chat template: requests mean the same to models for which it is equal."""
    template = getattr(tokenizer, "chat_template", None)
    return sha256(repr((sorted(tokenizer.get_vocab().items()), template)).encode()).hexdigest()


class Elastic:
    """Choice between a model and a smaller one, with hysteresis.

    Down as soon as the larger has no free slot; up again once both together answer no more requests than half of its
    slots. While down, all new requests are the smaller's, as far as its queue goes: both compute with the same threads,
    so that whatever the larger answers beside it holds it up. Every request ends on the model that it began on: the two
    have keys and values of other shapes.
    """

    def __init__(self, large: "Service", small: "Service", metrics: Metrics):
        self.small_name = small.name
        if reason := _incompatibility(large, small):
            raise no_elastic(
                f"`{small.name}` {reason} than `{large.name}`", help="serve models of one kind"
            ).rejection()
        self._is_down = False
        self._answered_by = {name: metrics.elastic.labels(large.name, name) for name in (large.name, small.name)}
        metrics.elastic_active.labels(large.name).set_function(lambda: float(self._is_down))

    def choose(self, large: "Service", small: "Service | None") -> "Service":
        """The model that answers the next request; the larger where a reload has left them with different texts, or
        the smaller's place to an encoder (None)."""
        n_large, n_small = large.n_requests, small.n_requests if small else 0
        if n_large >= large.n_slots:
            self._is_down = True
        elif 2 * (n_large + n_small) <= large.n_slots:
            self._is_down = False
        chosen = large
        if self._is_down and small and n_small < small.capacity and not _incompatibility(large, small):
            chosen = small
        self._answered_by[chosen.name].inc()
        return chosen


def _incompatibility(large: "Service", small: "Service") -> str:
    """Property by which one can't stand in for the other; "" where there is none."""
    if large.text_fingerprint != small.text_fingerprint:
        return "has another vocabulary or chat template"
    return "has a shorter context" if small.context < large.context else ""
