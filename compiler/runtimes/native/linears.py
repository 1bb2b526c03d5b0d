"""Linear layers: the weight as the program has it, packed for the engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....kernels import packed as packing
from ....kernels.engine_steps import KV_NUMBERS
from ....kernels.ops import LINEARS
from ....kernels.packed_linear import unpack_packed_weight
from ...ir.layers.number_formats import DENSE
from .plan import Plan, WeightEntry


@dataclass(frozen=True)
class NumberFormats:
    """Number formats of linear layers, unless a pass lowered them, and of the cache.

    weights   `NumberFormat.numbers` of a dense format; `int8_int16` is int8 with the inputs' outliers in 16 bits
    group     int4: inputs of an output that share a scale, where a weight is on no grid of other groups
    head      of the layer that makes the logits; "" for what the format of the others says
    kv_cache  of cached keys and values: one of `KV_NUMBERS`
    """

    weights: str
    group: int = 64
    head: str = ""
    kv_cache: str = KV_NUMBERS[0]

    @property
    def of_head(self) -> str:
        return self.head or DENSE[self.weights].head or self.weights

    @staticmethod
    def from_target_arguments(
        weights: str, inputs: str, group_size: int, head: str, kv_cache: str = KV_NUMBERS[0]
    ) -> "NumberFormats":
        """Of a target's arguments: inputs of 16 bits are those of all layers on int8, its head among them."""
        fine = {"int8": "int8_int16"} if inputs == "int16" else {}
        return NumberFormats(
            fine.get(weights, weights), group_size, "" if head == "auto" else fine.get(head, head), kv_cache
        )


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias.

    packed   a lowered module's own buffer, which is kept as it is; else `weight` [out, in] is packed
    """

    shape: tuple[int, int]
    bias: Tensor | None
    weight: Tensor | None = None
    packed: Tensor | None = None

    def make_packer(self, weights: str, group_size: int) -> Callable[[], Tensor]:
        """Function that returns the packed bytes."""
        packed, weight = self.packed, self.weight
        if packed is not None:
            return lambda: packed
        assert weight is not None, "a layer without a weight"
        format = DENSE[weights]
        options = {"group_size": group_size} if format.grouped else {}
        return lambda: LINEARS[format.kernel].pack(weight, **options)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for modules that share a weight."""
        tensor = self.weight if self.packed is None else self.packed
        assert tensor is not None, "a layer without a weight"
        return "linear", *memory_identity(tensor)


@dataclass(frozen=True)
class Stacked:
    """A linear layer without a bias whose weights [out, in] lie in several tensors, one after another."""

    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(part) for part in self.parts), self.parts[0].shape[1]

    @property
    def key(self) -> tuple[object, ...]:
        return "linear", *(memory_identity(part) for part in self.parts)

    def make_packer(self, weights: str, group_size: int) -> Callable[[], Tensor]:
        """Function that returns the packed bytes."""
        return lambda: Linear(self.shape, None, weight=torch.cat(self.parts)).make_packer(weights, group_size)()


def holds_rows_of_table(packed: Tensor, table: Tensor) -> bool:
    """Whether a packed weight has exactly the rows of a table, so that they can be read from it."""
    if packing.kernel_of(packed) != DENSE["bf16"].kernel:
        return False
    return torch.equal(unpack_packed_weight(packed).to(table.dtype), table)


def add_head_weight_entry(plan: Plan, formats: NumberFormats, name: str, linear: Linear) -> None:
    """Store the layer that makes the logits in its own number format."""
    plan.entries[name] = WeightEntry("packed", linear.shape, linear.make_packer(formats.of_head, formats.group))


def tie_embedding_weights(plan: Plan, packed_weights: Mapping[str, Tensor]) -> None:
    """Embeddings whose table is a linear layer's weight read rows of that, in its numbers.

    packed_weights   packed weights that a pass left, by their entries
    """
    for step in (*plan.steps, *(plan.encoder.steps if plan.encoder else ())):
        if step["op"] != "embedding":
            continue
        name = plan.entry_of_tied_linear(step["table"])
        table = plan.entries[name]
        matching = (
            n
            for n, w in packed_weights.items()
            if plan.entries[n].shape == table.shape and holds_rows_of_table(w, table.make())
        )
        step["table"] = next(matching, name)


def memory_identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same numbers in memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


@torch.no_grad()
def recognise_linear(module: nn.Module) -> Linear | None:
    """The linear layer that a module is, or None; anything but a plain one is tried on a sample."""
    packed, bias = getattr(module, "packed", None), getattr(module, "bias", None)
    if isinstance(packed, Tensor) and packed.dtype == torch.uint8:
        n, k = (getattr(module, name) for name in ("out_features", "in_features"))
        return Linear((n, k), bias, packed=packed.detach())
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    if type(module).forward is nn.Linear.forward:
        return Linear((weight.shape[0], weight.shape[1]), bias, weight=weight.detach())
    for candidate in (weight.detach().T, weight.detach()):
        x = torch.ones((1, candidate.shape[1]), dtype=weight.dtype).cumsum(-1).sin()
        actual = nn.functional.linear(x, candidate, bias)
        try:
            expected = module(x)
        except (RuntimeError, ValueError):  # the other way round
            continue
        if expected.shape == actual.shape and torch.allclose(expected.float(), actual.float(), rtol=1e-2, atol=1e-3):
            return Linear((candidate.shape[0], candidate.shape[1]), bias, weight=candidate)
    return None
