"""Clocking a model: batch 1, warmed up, with its KV cache, and two models in turn in one process.

Times of one process swing with what else the machine does. `measure_interleaved` lets models take turns, step by step,
and compares within a round: the median of those ratios holds where two separate runs would not.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...dsl.syntax.diagnostics import Fault
from ...kernels.native import KernelError
from ..core.events import iterate_and_report
from ..core.memory import fits_in_memory
from ..core.resource_errors import is_out_of_memory
from ..models.checkpoints.origin import max_row_tokens
from ..models.checkpoints.pretrained import pretrained
from ..models.rows.decoding import cache_kwargs_of, no_cache, use_cache_kwargs
from ..models.rows.forward import evaluating, logits_of_output
from ..models.rows.inputs import decoder_inputs_of, device_of, is_encoder_decoder, vocabulary_size
from ..plugin.clock import Clock, runtime_of

prompt_too_long = Fault(
    "timed-prompt-too-long", "A measure of time reads a prompt that the model has no positions for."
)

WARMUP = 3  # runs that are not counted: allocations, page faults, lazily built tables


def make_prompt_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Prompt ids, equal for every model of a vocabulary: [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    known = min(
        vocabulary_size(model) or 256, vocabulary_size(model, decoder=True) or 256
    )  # to both sides, where there are two
    ids = torch.randint(min(3, known - 1), known, (batch, length), generator=generator)  # special tokens come first
    return ids.to(device_of(model))


def measure_single(clock: Clock, model: nn.Module) -> float:
    """Value of a model that is timed without others, after `WARMUP` untimed steps."""
    with timing_conditions(model):
        for _ in range(WARMUP):
            clock.step()
        return clock.value([clock.step() for _ in range(clock.count)])


def make_prefill_step(model: nn.Module, length: int) -> Callable[[], float]:
    """A forward over a prompt that fills the cache."""
    if runtime := runtime_of(model):
        return runtime.make_prefill_step(make_prompt_ids(model, 1, length)[0].tolist())
    ids, device = make_prompt_ids(model, 1, length), device_of(model)
    inputs = {**_prompt_kwargs(model, ids), **use_cache_kwargs(model)}

    def step() -> float:
        started = _synchronized_time_s(device)
        with _too_long_as_diagnostic(model, length):
            model(**inputs)
        return _synchronized_time_s(device) - started

    return step


def _prompt_kwargs(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """A prompt as a model takes it: to an encoder with a decoder it is the source, of which nothing is said yet."""
    return {"input_ids": ids} | (
        {"decoder_input_ids": decoder_inputs_of(model, ids[:, :1])} if is_encoder_decoder(model) else {}
    )


def _next_token_kwargs(model: nn.Module, token: Tensor, output: Any) -> dict[str, Any]:
    if not is_encoder_decoder(model):
        return {"input_ids": token}
    encoder_states = output.get("encoder_last_hidden_state")  # the engine keeps it to itself
    return {"decoder_input_ids": token} | ({} if encoder_states is None else {"encoder_outputs": (encoder_states,)})


def make_decode_step(model: nn.Module, length: int, batch: int = 1) -> Callable[[], float]:
    """The next token after a prompt of `length` tokens, greedy, with the cache; the first step reads the prompt."""
    if runtime := runtime_of(model):
        return runtime.decode_step(make_prompt_ids(model, 1, length)[0].tolist(), batch)
    caching, device = use_cache_kwargs(model), device_of(model)
    if not caching:
        raise no_cache(
            f"the forward of {type(model).__name__} takes no `use_cache`", help="time it with `prefill`"
        ).rejection()
    output: Any = None

    def step() -> float:
        nonlocal output
        if output is None:
            with _too_long_as_diagnostic(model, length):
                output = model(**_prompt_kwargs(model, make_prompt_ids(model, batch, length)), **caching)
        token = logits_of_output(output)[:, -1:].argmax(-1)  # [batch, 1]
        inputs = {
            **_next_token_kwargs(model, token, output),
            **caching,
            **cache_kwargs_of(output),
        }  # not a part of what is timed
        started = _synchronized_time_s(device)
        with _failure_as_diagnostic(model):
            output = model(**inputs)
        return _synchronized_time_s(device) - started

    return step


@contextmanager
def _failure_as_diagnostic(model: nn.Module) -> Iterator[None]:
    """Turn the failure of a forward that takes `use_cache` and no single token (CPM-Ant's) into a Reject."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error) or isinstance(error, KernelError):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        message = f"{type(model).__name__} can't go on by one token behind what it cached: {reason}"
        raise no_cache(message, help="time it with `prefill`").rejection() from error


@contextmanager
def _too_long_as_diagnostic(model: nn.Module, length: int) -> Iterator[None]:
    """Turn the failure of a prompt that is longer than the model's positions into a Reject."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        longest = max_row_tokens(pretrained(model).config.to_dict()) if hasattr(model, "config") else None
        if longest is None or length <= longest:
            raise
        raise prompt_too_long(
            f"a prompt of {length} tokens is timed, and the model has {longest} positions",
            help=f"set `prompt:` of the measure to less than {longest}",
        ).rejection() from error


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of a hundred values don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@dataclass(frozen=True)
class InterleavedTimes:
    """Times of interleaved runs. `ratio` is the median over rounds of (last model / first model)."""

    values: Mapping[str, float]
    ratio: float
    rounds: tuple[Mapping[str, float], ...]

    @property
    def ratios(self) -> list[float]:
        """Of each round: the last model's value by the first one's."""
        return _ratios(self.rounds)

    @property
    def compiled(self) -> list[float]:
        """The last model's value in each round."""
        return [list(r.values())[-1] for r in self.rounds]

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of a round."""
        ratios = _ratios(self.rounds)
        return min(ratios), max(ratios)


def measure_interleaved(
    models: Mapping[str, nn.Module],
    metric: Any,
    rounds: int = 5,
    is_decided: Callable[[InterleavedTimes], bool] = lambda timings: True,
    min_seconds: float = 0.0,
    calls_per_round: int = 1,
    max_seconds: float = math.inf,
) -> InterleavedTimes:
    """Measure a timed metric on models that take turns step by step; whoever begins alternates.

    Models that memory does not hold together take turns by the round: step by step each would read its weights from
    disk again whenever its turn comes.

    models           name -> model, the one to compare with first
    is_decided       whether the rounds so far will do; if not, more follow until `min_seconds` have passed
    calls_per_round  how many rounds divide the metric's number of timings among them
    max_seconds      seconds after which no further one of `rounds` begins
    A machine that others use is slow for some milliseconds at a time, longer than many steps take: turns of whole
    measures would give such a time to one of the models alone.
    """
    start_time = time.monotonic()
    rounds_run: list[dict[str, float]] = []
    until = start_time + min_seconds
    for number in range(1, rounds + 1):
        if rounds_run and time.monotonic() - start_time > max_seconds:
            break
        rounds_run.append(_measure_round(models, metric, f"round {number} of {rounds}", calls_per_round))
    while time.monotonic() < until and not is_decided(_interleaved(rounds_run)):
        rounds_run.append(
            _measure_round(models, metric, f"round {len(rounds_run) + 1}, until it decides", calls_per_round)
        )
    return _interleaved(rounds_run)


def _measure_round(models: Mapping[str, nn.Module], metric: Any, label: str, calls_per_round: int) -> dict[str, float]:
    names = list(models)
    clocks = {name: metric.clock(model) for name, model in models.items()}
    seconds_by_name: dict[str, list[float]] = {name: [] for name in names}
    with timing_conditions(*models.values()):
        steps = WARMUP + -(-max(clock.count for clock in clocks.values()) // calls_per_round)
        if fit_in_memory_together(models.values()):
            order = [name for step_index in range(steps) for name in (names if step_index % 2 == 0 else names[::-1])]
        else:
            order = [name for name in names for _ in range(steps)]
        for name in iterate_and_report(order, f"steps of timing, {label}"):
            seconds_by_name[name].append(clocks[name].step())
    return {name: clocks[name].value(seconds_by_name[name][WARMUP:]) for name in names}


def fit_in_memory_together(models: Iterable[nn.Module]) -> bool:
    """Whether memory holds the weights of all of them at once."""
    return fits_in_memory(sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers())))


def _interleaved(rounds_run: Sequence[Mapping[str, float]]) -> InterleavedTimes:
    values = {name: statistics.median(r[name] for r in rounds_run) for name in rounds_run[0]}
    return InterleavedTimes(values, statistics.median(_ratios(rounds_run)), tuple(rounds_run))


def _ratios(rounds: Sequence[Mapping[str, float]]) -> list[float]:
    return [last / first for first, *_, last in (tuple(r.values()) for r in rounds)]


@contextmanager
def timing_conditions(*models: nn.Module) -> Iterator[None]:
    """No gradients, no garbage collection while the clock runs."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(evaluating(model))
            stack.enter_context(torch.inference_mode())
            yield
    finally:
        if collecting:
            gc.enable()


def _synchronized_time_s(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
