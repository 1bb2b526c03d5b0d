"""Clocking a model: batch 1, warmed up, with its KV cache, and two models in turn in one process.

Times of one process swing with what else the machine does. `interleaved` lets models take turns, round by
round, and compares within a round: the median of those ratios holds where two separate runs would not.
"""

import gc
import inspect
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..dsl.diagnostics import Fault, Reject
from .evaluate import device_of, evaluating, output_logits, vocabulary

if TYPE_CHECKING:
    from .context import Context

no_cache = Fault("no-cache", "Decoding is timed with a cache of keys and values, and the model has none.")

WARMUP = 3                       # runs that are not counted: allocations, page faults, lazily built tables
CACHES = ("cache", "past_key_values", "cache_params")    # newest name first; later ones may be its aliases


def prompt_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """The same ids for every model of a vocabulary: [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary(model) or 256, (batch, length), generator=generator)
    return ids.to(device_of(model))


def prefill_seconds(model: nn.Module, length: int, repeats: int) -> list[float]:
    """Seconds of a forward over a prompt that fills the cache, once per repeat."""
    ids = prompt_ids(model, 1, length)
    found = []
    with _still(model):
        for _ in range(WARMUP + repeats):
            started = _now(model)
            model(input_ids=ids, **_caching(model))
            found.append(_now(model) - started)
    return found[WARMUP:]


def decode_seconds(model: nn.Module, length: int, steps: int, batch: int = 1) -> list[float]:
    """Seconds of each decoded token after a prompt of `length` tokens, greedy, with the cache."""
    if not _caching(model):
        raise Reject(no_cache(f"the forward of {type(model).__name__} takes no `use_cache`",
                              help="time it with `prefill`"))
    found = []
    with _still(model):
        output = model(input_ids=prompt_ids(model, batch, length), **_caching(model))
        for _ in range(WARMUP + steps):
            token = output_logits(output)[:, -1:].argmax(-1)                   # [batch, 1]
            started = _now(model)
            output = model(input_ids=token, **_caching(model), **_cache_of(output))
            found.append(_now(model) - started)
    return found[WARMUP:]


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of a hundred values don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@dataclass(frozen=True)
class Turns:
    """What taking turns showed. `ratio` is the median over rounds of (last model / first model)."""

    values: Mapping[str, float]
    ratio: float
    rounds: tuple[Mapping[str, float], ...]

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of a round."""
        ratios = _ratios(self.rounds)
        return min(ratios), max(ratios)


def interleaved(models: Mapping[str, nn.Module], metric: Any, ctx: "Context", rounds: int = 5) -> Turns:
    """Measure a timed metric on models that take turns; whoever begins alternates.

    models  name -> model, the one to compare with first
    """
    names, seen = list(models), []
    for turn in range(rounds):
        order = names if turn % 2 == 0 else names[::-1]
        taken = {name: metric.measure(models[name], ctx) for name in order}
        seen.append({name: taken[name] for name in names})
    values = {name: statistics.median(r[name] for r in seen) for name in names}
    return Turns(values, statistics.median(_ratios(seen)), tuple(seen))


def _ratios(rounds: Sequence[Mapping[str, float]]) -> list[float]:
    return [last / first for first, *_, last in (tuple(r.values()) for r in rounds)]


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """No gradients, no garbage collection while the clock runs."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with evaluating(model), torch.inference_mode():
            yield
    finally:
        if collecting:
            gc.enable()


def _now(model: nn.Module) -> float:
    if device_of(model).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _caching(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": True} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _cache_of(output: Any) -> dict[str, Any]:
    """The cache that a forward returned, as the next one takes it."""
    name = next((n for n in CACHES if n in output), None)
    if name is None:
        raise Reject(no_cache(f"{type(output).__name__} holds none of {', '.join(CACHES)}"))
    return {name: output[name]}
