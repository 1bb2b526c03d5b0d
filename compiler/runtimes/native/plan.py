"""A plan in the making: registers, steps that write them, weights that they read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....kernels.engine_steps import KV_NUMBERS, SILENT, STATEFUL, STEPS
from .layout import ColumnRun, Layout, split_into_column_runs

VERSION = 1


@dataclass(frozen=True)
class WeightEntry:
    """A weight of the file.

    kind    "packed" (a linear layer as its kernel reads it), "f32" or "bf16" (rows or vectors)
    shape   of the numbers; of a packed one [outputs, inputs]
    make    the tensor; called when the file is written, so that one copy exists at a time
    """

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Output:
    """Output form of a model's forward.

    states    hidden states: it has no head
    whole     tokens see those that follow
    first     one row for a text, made of its first token, instead of one for each token
    """

    states: bool = False
    whole: bool = False
    first: bool = False

    @property
    def predicts_next_tokens(self) -> bool:
        """Whether it predicts next tokens, so that texts can be generated."""
        return not (self.states or self.whole or self.first)


@dataclass
class Plan:
    """Steps over registers, each written once; `to_json` is what the engine reads.

    encoder      of sources whose keys and values it recalls; both name their weights alike
    kv_numbers   of cached keys and values
    layers       register of the hidden states that a layer hands on, by its path, where it is one
    """

    layout: Layout
    vocabulary: int
    context: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    slots: list[dict[str, Any]] = field(default_factory=list)
    entries: dict[str, WeightEntry] = field(default_factory=dict)
    logits: int = -1
    output: Output = Output()
    encoder: "Plan | None" = None
    kv_numbers: str = KV_NUMBERS[0]
    layers: dict[str, int] = field(default_factory=dict)
    copies: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # register -> (original, kept)
    _known: dict[Any, int] = field(default_factory=dict)
    _names: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.encoder is not None:
            self.entries, self._names = self.encoder.entries, self.encoder._names

    def append_source_cache(self, k: int, v: int, kv_heads: int, head_dim: int, value_dim: int) -> int:
        """The slot in which these keys and values of a source are kept."""
        key = ("remember", k, v, kv_heads, head_dim, value_dim)
        if key not in self._known:
            slot = self._known[key] = self.append_cache_slot(kv_heads, head_dim, value_dim)
            sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
            self.steps.append({"op": "remember", "k": k, "v": v, "slot": slot, **sizes})
        return self._known[key]

    def append_step(self, op: str, width: int, **fields: Any) -> int:
        """Append a step; return the register that it writes. Equal steps are one."""
        key = (op, width, repr(sorted(fields.items())))
        if op not in KEEPERS and key in self._known:
            return self._known[key]
        register = self._known[key] = self.layout.register(width)
        self.steps.append({"op": op, "to": register, **fields})
        return register

    def add_vector(self, name: str, values: Tensor) -> str:
        """A float32 entry; one of the same values is used again."""
        values = values.detach().float().contiguous().cpu()
        name = f"{name}.{len(self.entries)}" if name in self.entries else name  # a node may have several
        return self.add_weight_entry(
            name,
            WeightEntry("f32", tuple(values.shape), lambda: values),
            (tuple(values.shape), values.numpy().tobytes()),
        )

    def add_weight_entry(self, name: str, entry: WeightEntry, key: Any) -> str:
        """The name under which an entry is kept; entries with one key are one."""
        if key not in self._names:
            assert name not in self.entries, f"two weights are called {name}"
            self.entries[name] = entry
            self._names[key] = name
        return self._names[key]

    def entry_of_tied_linear(self, table: str) -> str:
        """The linear layer's entry that has the numbers of a table, or the table's own."""
        kinds = {name: key for key, name in self._names.items()}
        return self._names.get(("linear", *kinds[table][1:]), table)

    def append_cache_slot(self, kv_heads: int, head_dim: int, value_dim: int) -> int:
        numbers = {} if self.kv_numbers == KV_NUMBERS[0] else {"numbers": self.kv_numbers}
        self.slots.append({"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim, **numbers})
        return len(self.slots) - 1

    def materialize_columns(self, columns: Tensor) -> int:
        """A register that holds these columns, in this order; the one that they lie in where they fill it."""
        register, _ = self.layout.register_column_of_element(int(columns[0]))
        if torch.equal(columns, self.layout.columns(register)):
            return register
        columns = self._prefer_copied_columns(columns)
        register, _ = self.layout.register_column_of_element(int(columns[0]))
        if torch.equal(columns, self.layout.columns(register)):
            return register
        parts = [self._register_of_column_run(run) for run in split_into_column_runs(self.layout, columns)]
        if len(parts) == 1:
            return parts[0]
        return self.append_step("join", len(columns), **{"from": parts})

    def _register_of_column_run(self, run: ColumnRun) -> int:
        """The register that holds a run of columns: a new one, unless the run is a whole register already."""
        width = run.block * run.count
        if run.count == 1 and width == self.layout.widths[run.register]:
            return run.register
        return self.append_step(
            "columns", width, x=run.register, start=run.start, block=run.block, stride=run.stride, count=run.count
        )

    def _prefer_copied_columns(self, columns: Tensor) -> Tensor:
        """Columns read from a register that has copies of them beside what else is asked for."""
        owners = [self.layout.register_column_of_element(element) for element in columns.tolist()]
        registers = {register for register, _ in owners}
        for register in registers & self.copies.keys():
            original, copied = self.copies[register]
            if original in registers:
                copy_columns = self.layout.columns(register)
                elements = [
                    int(copy_columns[column]) if owner == original and bool(copied[column]) else element
                    for (owner, column), element in zip(owners, columns.tolist(), strict=True)
                ]
                return torch.tensor(elements)
        return columns

    def to_json(self) -> dict[str, Any]:
        """Steps that lead to the logits or write a cache; registers are numbered anew."""
        needed = self._live_steps()
        registers = [step["to"] for step in needed if "to" in step]
        number = {register: i for i, register in enumerate(registers)}
        body = {
            "context": self.context,
            "registers": [self.layout.widths[register] for register in registers],
            "slots": self.slots,
            "steps": [renumber_registers(step, number) for step in needed],
        }
        if self.logits < 0:
            return body
        behind = {} if self.encoder is None else {"encoder": self.encoder.to_json()}
        layers = {path: number[register] for path, register in self.layers.items() if register in number}
        return {
            "version": VERSION,
            "vocabulary": self.vocabulary,
            **body,
            "logits": number[self.logits],
            "layers": layers,
            **behind,
        }

    def live_weight_entries(self) -> dict[str, WeightEntry]:
        """The entries that those steps read."""
        needed_steps = [*self._live_steps(), *(self.encoder._live_steps() if self.encoder else ())]
        names = {name for step in needed_steps for name in weights_read_by_step(step)}
        return {name: entry for name, entry in self.entries.items() if name in names}

    def _live_steps(self) -> list[dict[str, Any]]:
        needed, live = {self.logits}, []
        for step in reversed(self.steps):
            if step.get("to") in needed or step["op"] in KEEPERS:
                live.append(step)
                needed |= set(registers_read_by_step(step))
        return live[::-1]


KEEPERS = ("attention", *SILENT, *STATEFUL)  # of something of the tokens before, or for those that follow


def registers_read_by_step(step: Mapping[str, Any]) -> list[int]:
    """The registers that a step reads."""
    kinds = STEPS[step["op"]]
    registers = [step.get(name) for name, kind in kinds.items() if kind in ("r", "r?")]
    several = [register for name, kind in kinds.items() if kind == "R" for register in step.get(name, ())]
    return [register for register in registers if register is not None] + several


def weights_read_by_step(step: Mapping[str, Any]) -> list[str]:
    """The names of the weights that a step reads."""
    kinds = STEPS[step["op"]]
    names = (step.get(name) for name, kind in kinds.items() if kind in ("w", "w?"))
    several = (name for field, kind in kinds.items() if kind == "W" for name in step.get(field) or ())
    return [*(name for name in names if name is not None), *several]


def renumber_registers(step: Mapping[str, Any], new_register: Mapping[int, int]) -> dict[str, Any]:
    """A step with its registers called by their new numbers."""

    def value(name: str, old: Any) -> Any:
        kind = "r" if name == "to" else STEPS[step["op"]].get(name)
        if kind == "R":
            return [new_register[register] for register in old]
        return new_register[old] if kind in ("r", "r?") and old is not None else old

    return {name: value(name, old) for name, old in step.items()}
