"""The native engine: a plan and packed weights that run without torch, one C call for a batch of tokens.

The tokens of a call are flat: each belongs to a sequence and follows that sequence's last one. Chunks of a
prompt, a step of many sequences of different lengths, and mixtures of both are one call.
"""

import ctypes
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from . import levels, native, packed
from .cores import usable_cores
from .engine_adapters import AdapterLayout, LowRankUpdate
from .engine_plan import Layout, check_plan_and_weights
from .engine_steps import Plan, Slot, Step, Weight
from .native import KernelError

MAX_THREADS = 256
MAX_SEQUENCES = 65536
COPIED_BYTES = 16 << 20  # of a weight, that one thread copies at a time
LAYOUT = 10  # of what C++ is handed; api.cc has the same number
SPENT = ("rows", "prepare", "multiply", "mix", "append", "attend", "scan", "waiting")


class Cancelled(Exception):
    """Another thread asked a running call to stop; its sequences are as before the call."""


class Engine:
    """A model that runs.

    plan        as `engine_steps.py` lists its steps
    weights     by name: packed ones as rows of bytes, others float32 or bfloat16
    threads     of its own; at most as many as there are cores for
    max_sequences
                that it remembers at once
    context     tokens of a sequence; at most, and by default, the model's limit
    copy_weights   move the weights to huge pages of their own, which are read a quarter faster than a file's
    compares_checksums   compare the checksums of packed weights, which reads them whole
    batch_invariant
                a sequence's logits depend, to the bit, neither on what else a call computes nor on threads
    """

    def __init__(
        self,
        plan: Mapping,
        weights: Mapping[str, Tensor],
        threads: int,
        max_sequences: int = 1,
        context: int | None = None,
        copy_weights: bool = True,
        compares_checksums: bool = False,
        batch_invariant: bool = False,
    ):
        self._handle, self._users, self._free = ctypes.c_void_p(), 0, threading.Condition()
        for name, value in {"threads": threads, "sequences": max_sequences, "tokens of context": context}.items():
            if value is not None and (not isinstance(value, int) or not 1 <= value < 2**31):
                raise KernelError(f"an engine with {value} {name} can't be made")
        _refuse_stale_kernels()
        if max_sequences > MAX_SEQUENCES:
            raise KernelError(f"an engine remembers at most {MAX_SEQUENCES} sequences, not {max_sequences}")
        layout = check_plan_and_weights(plan, weights, compares_checksums)
        if context is not None and context > layout.context:
            raise KernelError(
                f"the model's limit is {layout.context} tokens of a sequence, and {context} are asked for"
            )
        self.context, self.max_sequences = context or layout.context, max_sequences
        self.vocabulary, self.width = layout.vocabulary, layout.widths[layout.logits]
        self.bidirectional = layout.bidirectional
        self.sources = layout.encoder.context if layout.encoder else 0  # tokens of a source at most; 0: it reads none
        self.source_vocabulary = layout.encoder.vocabulary if layout.encoder else 0
        self.backward = not layout.stateful
        self.threads = min(threads, usable_cores(), MAX_THREADS)
        self._steps, self._widths = layout.steps, layout.widths
        self._adapters: dict[int, AdapterLayout] = {}
        self._adapters_change = threading.Lock()  # numbers here and in C++ change together
        self._weights = self._copy_into_one_block(layout.weights) if copy_weights else weights
        c_plan = self._ctypes_plan(layout, self.context, int(batch_invariant))
        native.call_or_raise("engine_create", ctypes.byref(c_plan), ctypes.byref(self._handle), label="the engine")

    def _ctypes_plan(self, layout: Layout, context: int, batch_invariant: int) -> Plan:
        """A plan as C++ reads it, with that of its encoder, if it has one; it keeps what it points to."""
        steps, widths = _array(Step, layout.steps), _array(ctypes.c_int32, layout.widths)
        weights, slots = _array(Weight, layout.weights), _array(Slot, layout.slots)
        inner = layout.encoder and ctypes.pointer(
            self._ctypes_plan(layout.encoder, layout.encoder.context, batch_invariant)
        )
        counts = (len(part) for part in (steps, widths, weights, slots))
        constants = (
            layout.logits,
            levels.active_level_code(),
            self.threads,
            self.max_sequences,
            batch_invariant,
            0,
            context,
        )
        return Plan(steps, widths, weights, slots, *counts, *constants, inner)

    def _copy_into_one_block(self, weights: list[Weight]) -> Tensor:
        """One block of memory that holds all weights, which then point to it. Threads share the copying."""
        starts: list[int] = []
        known: dict[tuple[int, int], int] = {}
        end = 0
        for weight in weights:
            starts.append(known.setdefault((weight.at, weight.bytes), end))
            end += -(-weight.bytes // 64) * 64 if starts[-1] == end else 0
        block = packed.allocate_zero_bytes(end)

        def copy(piece: tuple[int, int, int]) -> None:
            to, source, count = piece
            ctypes.memmove(block.data_ptr() + to, source, count)  # without Python's lock

        pieces = (
            (start + at, source + at, min(COPIED_BYTES, count - at))
            for (source, count), start in known.items()
            for at in range(0, count, COPIED_BYTES)
        )
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(copy, pieces))
        for weight, start in zip(weights, starts, strict=True):
            weight.at = block.data_ptr() + start
        return block

    def run(
        self,
        token_ids: Sequence[int] | Tensor,
        sequence_of_token: Sequence[int] | Tensor,
        output_positions: Sequence[int] | Tensor | None = None,
        adapter_of_token: Sequence[int] | None = None,
    ) -> Tensor:
        """Append tokens to their sequences; the logits [wanted, vocabulary] float32 of some of them.

        token_ids           [n] tokens
        sequence_of_token   [n] the sequence of each
        output_positions    increasing positions in `token_ids` whose logits are computed, or [n] bool; None for all
        adapter_of_token    [n] the adapter of each, -1 for none; None: none has any. Tokens before stay as they are
        """
        token_ids, owners = _to_int_array("tokens", token_ids), _to_int_array("sequences", sequence_of_token)
        rows = _to_int_array(
            "wanted positions", range(len(token_ids)) if output_positions is None else output_positions
        )
        self._refuse_invalid_batch(token_ids, owners, rows)
        adapters_of_tokens = (
            None if adapter_of_token is None else self._checked_adapters(adapter_of_token, len(token_ids))
        )
        logits = torch.empty(len(rows), self.width)
        with self._handle_in_use() as handle:
            status = native.library_function("engine_run")(
                handle,
                len(token_ids),
                *(_address(n) for n in (token_ids, owners)),
                len(rows),
                _address(rows),
                None if adapters_of_tokens is None else _address(adapters_of_tokens),
                logits.data_ptr(),
            )
        if status == 17:
            raise Cancelled("the call was cancelled; its sequences are as before")
        if status:
            raise native.error_of_status(status, "the engine")
        return logits

    def add_adapter(self, updates: Sequence[LowRankUpdate]) -> int:
        """The number by which tokens name an adapter from now on. Raises KernelError where the plan has no place for
        it, or while another thread runs a call."""
        layout, number = AdapterLayout(self._steps, self._widths, updates), ctypes.c_int32()
        with self._adapters_change, self._handle_in_use() as handle:
            arguments = (handle, len(layout.updates), layout.updates, ctypes.byref(number))
            native.call_or_raise("engine_add_adapter", *arguments, label="the engine")
            self._adapters[number.value] = layout
        return number.value

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter, whose number another one may get. Raises KernelError where there is none, or while another
        thread runs a call."""
        with self._adapters_change, self._handle_in_use() as handle:
            if number not in self._adapters:
                raise KernelError(f"the engine has no adapter {number}")
            native.call_or_raise("engine_remove_adapter", handle, number, label=f"adapter {number}")
            del self._adapters[number]

    def _checked_adapters(self, adapter_of_token: Sequence[int], num_tokens: int) -> array:
        numbers = _to_int_array("adapters", adapter_of_token)
        if len(numbers) != num_tokens:
            raise KernelError(f"{num_tokens} tokens need as many adapters, not {len(numbers)}")
        if unknown := set(numbers) - self._adapters.keys() - {-1}:
            raise KernelError(f"the engine has no adapter {min(unknown)}")
        return array("i", numbers)

    def encode(self, token_ids: Sequence[int] | Tensor, sequence_of_token: Sequence[int] | Tensor) -> None:
        """Read sources, each whole into a sequence that has none; what `run` appends there recalls them.

        token_ids           [n] tokens
        sequence_of_token   [n] the sequence of each
        """
        token_ids, owners = _to_int_array("tokens", token_ids), _to_int_array("sequences", sequence_of_token)
        if not self.sources:
            raise KernelError("the plan has no encoder, so it reads no sources")
        self._refuse_invalid_tokens(token_ids, owners, self.source_vocabulary)
        if not len(token_ids):
            return
        self._refuse_split_or_continued_texts(owners, self.source)
        longest = max(Counter(owners).values())
        if longest > self.sources:
            raise KernelError(f"a source of {longest} tokens exceeds the {self.sources} that the encoder reads")
        with self._handle_in_use() as handle:
            status = native.library_function("engine_encode")(
                handle, len(token_ids), *(_address(n) for n in (token_ids, owners))
            )
        if status == 17:
            raise Cancelled("the call was cancelled; its sequences are as before")
        if status:
            raise native.error_of_status(status, "the engine")

    def _refuse_invalid_tokens(self, ids: array, owners: array, vocabulary: int) -> None:
        if len(ids) != len(owners):
            raise KernelError(f"{len(ids)} tokens need as many sequences, not {len(owners)}")
        if not len(ids):
            return
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise KernelError(f"tokens {min(ids)}..{max(ids)} are not all among the {vocabulary} that the model knows")
        if min(owners) < 0 or max(owners) >= self.max_sequences:
            raise KernelError(
                f"sequences {min(owners)}..{max(owners)} are not all among this engine's {self.max_sequences}"
            )

    def _refuse_invalid_batch(self, ids: array, sequences: array, output_rows: array) -> None:
        self._refuse_invalid_tokens(ids, sequences, self.vocabulary)
        if not len(ids):
            return
        if self.bidirectional:
            self._refuse_split_or_continued_texts(sequences, self.length)
        for sequence in set(sequences) if self.sources else ():
            if not self.source(sequence):
                raise KernelError(f"sequence {sequence} has no source, which its tokens are to recall")
        for sequence, count in Counter(sequences).items():
            if self.length(sequence) + count > self.context:
                raise KernelError(
                    f"sequence {sequence} has {self.length(sequence)} tokens, and {count} more "
                    f"exceed the context of {self.context}"
                )
        if len(output_rows) and (
            output_rows[0] < 0 or output_rows[-1] >= len(ids) or any(a >= b for a, b in pairwise(output_rows))
        ):
            raise KernelError(f"the wanted positions do not increase within {len(ids)} tokens")

    def _refuse_split_or_continued_texts(self, sequences: array, length: Callable[[int], int]) -> None:
        """Refuse texts that come in pieces, or into a sequence that has tokens, where attention sees texts whole."""
        runs = [sequences[0], *(b for a, b in pairwise(sequences) if a != b)]
        if len(set(runs)) < len(runs):
            raise KernelError("the tokens of a text lie apart, and this plan sees each text whole")
        for sequence in runs:
            if length(sequence):
                raise KernelError(f"sequence {sequence} has tokens already, and this plan sees each text whole")

    def length(self, sequence: int) -> int:
        """Tokens that a sequence has."""
        count = ctypes.c_int64()
        with self._handle_in_use() as handle:
            native.call_or_raise("engine_length", handle, sequence, ctypes.byref(count), label=f"sequence {sequence}")
        return count.value

    def source(self, sequence: int) -> int:
        """Tokens of a sequence's source."""
        count = ctypes.c_int64()
        with self._handle_in_use() as handle:
            native.call_or_raise("engine_source", handle, sequence, ctypes.byref(count), label=f"sequence {sequence}")
        return count.value

    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        """Cut a sequence back to its first `num_remaining` tokens; the others' memory is free. Without any its
        source goes too."""
        with self._handle_in_use() as handle:
            native.call_or_raise("engine_forget", handle, sequence, num_remaining, label=f"sequence {sequence}")

    def cancel(self) -> None:
        """From any thread: the call that runs now raises `Cancelled`."""
        with self._handle_in_use() as handle:
            native.call_or_raise("engine_cancel", handle, label="the engine")

    def thread_seconds_by_work(self, continue_measuring: bool = True) -> dict[str, float]:
        """Seconds of all threads by kind of work since the last call of this; the first begins to measure."""
        sums = (ctypes.c_int64 * len(SPENT))()
        with self._handle_in_use() as handle:
            native.call_or_raise("engine_profile", handle, sums, int(continue_measuring), label="the engine")
        return {name: nanoseconds / 1e9 for name, nanoseconds in zip(SPENT, sums, strict=True)}

    def close(self) -> None:
        """Free memory and threads; it does not run afterwards. A call that another thread runs is cancelled first."""
        with self._free:
            handle, self._handle = self._handle, ctypes.c_void_p()
            while handle and self._users:
                native.call_or_raise("engine_cancel", handle, label="the engine")
                self._free.wait(0.01)  # a call that had not begun yet when it was cancelled is cancelled again
        if handle:
            native.call_or_raise("engine_free", handle, label="the engine")

    @contextmanager
    def _handle_in_use(self) -> Iterator[ctypes.c_void_p]:
        """The engine for one call, which it outlives."""
        with self._free:
            if not self._handle:
                raise KernelError("the engine is closed")
            handle, self._users = self._handle, self._users + 1
        try:
            yield handle
        finally:
            with self._free:
                self._users -= 1
                self._free.notify_all()

    def __del__(self) -> None:
        try:  # noqa: SIM105 (when the interpreter ends, `suppress` is gone, and so is `native`)
            self.close()
        except (TypeError, AttributeError):
            pass


def _refuse_stale_kernels() -> None:
    try:
        layout = native.library_function("engine_layout")()
    except AttributeError:
        layout = 0
    if layout != LAYOUT:
        raise KernelError("the compiled kernels are of other sources than effc's Python; install effc again")


def _to_int_array(label: str, integers_or_flags: Sequence[int] | Tensor) -> array:
    """Convert whole numbers to an int64 array; of booleans the positions of those that are true."""
    values = integers_or_flags.tolist() if isinstance(integers_or_flags, Tensor) else list(integers_or_flags)
    if values and isinstance(values[0], bool):
        values = [i for i, flag in enumerate(values) if flag]
    try:
        return array("q", values)
    except (TypeError, OverflowError) as error:
        raise KernelError(f"the {label} are not a row of whole numbers") from error


def _address(integers: array) -> int:
    return integers.buffer_info()[0]


def _array(element_type: type[Step | Weight | Slot | ctypes.c_int32], values: list) -> ctypes.Array:
    return (element_type * len(values))(*values)
