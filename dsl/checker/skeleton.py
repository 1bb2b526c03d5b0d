"""A model without its weights: module paths, shapes and discovered structure, as plain data and JSON.

Made once per config on the meta device by `compiler/analysis/discovery/discover.py`, cached by config hash, and read by
`check`, `plan` and passes. Nothing here imports torch.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..syntax.json_types import from_json

Kind = Literal["channels", "heads", "kv_heads", "experts", "ssm_heads", "ssm_channels", "ssm_state", "width"]
FORMAT = 1


def is_submodule(path: str, root: str) -> bool:
    """Whether a module's path is `root` or lies below it; all lie below "", the model itself."""
    return not root or path == root or path.startswith(f"{root}.")


@dataclass(frozen=True)
class Part:
    """A module that owns parameters. `tensors`: (name below the module, shape), in registration order."""

    path: str  # "model.layers.3.mlp.gate_proj"
    kind: str  # class name: "Linear", "LlamaRMSNorm", "Embedding"
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    positions: int = 1  # of an image that it is applied to; 1 of models that read tokens


@dataclass(frozen=True)
class Member:
    """Layout of a group's items along one axis of one tensor.

    Item i owns, for every segment (start, size), the indices start + i*size .. start + (i+1)*size - 1.
    Plain rows are ((0, 1),); the q rows of a KV group are ((0, repeat*head_dim),); a fused gate_up of width
    96 is ((0, 1), (96, 1)).
    """

    tensor: str  # "model.layers.3.mlp.gate_proj.weight"
    axis: int
    segments: tuple[tuple[int, int], ...]

    def indices(self, item: int) -> list[int]:
        return [start + item * size + k for start, size in self.segments for k in range(size)]


@dataclass(frozen=True)
class Group:
    """Channels or heads that live and die together across tensors.

    site        the smallest module that encloses all members: what a selector matches
    count       how many items there are now
    per_block   for query heads under grouped-query attention: items per KV head. Each block of that many
                consecutive items must keep the same number. 0 where any subset may go
    members     tensors whose rows write the items first, those that read them (`readers` of them) last
    attributes  (module path, attribute, value per kept item): integers that must follow, value = count * per;
                for kind "heads" with blocks, num_key_value_groups-like ones have per = 1 / blocks. A dotted
                attribute, "config.num_attention_heads", is one of the module's config: give the module its
                own copy first, others read the shared one. None for a group of one item. Of a state-space
                mixer's groups, per is what one item less takes from the value, which need not be count * per
    multiple    what is computed with them takes multiples of that many items only: packed experts
    """

    site: str
    kind: Kind
    count: int
    members: tuple[Member, ...]
    attributes: tuple[tuple[str, str, float], ...] = ()
    per_block: int = 0
    readers: int = 1
    multiple: int = 1

    def renamed(self, new_path_of: Callable[[str], str]) -> "Group":
        """The group where modules and tensors have other paths."""
        return replace(
            self,
            site=new_path_of(self.site),
            members=tuple(replace(m, tensor=new_path_of(m.tensor)) for m in self.members),
            attributes=tuple((new_path_of(path), attribute, per) for path, attribute, per in self.attributes),
        )


@dataclass(frozen=True)
class Scan:
    """The scan of a state-space mixer, and what dies with it.

    cuts   (tensor, shape without the scan): time step, B, C, decay and skip go, and what only makes them; None
           where nothing of the tensor is left
    """

    site: str  # "model.layers.3.mamba"
    unit: str
    cuts: tuple[tuple[str, tuple[int, ...] | None], ...]


@dataclass(frozen=True)
class Branch:
    """One residual branch of a unit: what is added to the stream at `join`.

    Without it, `join` is its other operand. Branches that run in parallel (a + b + x) meet in one join.
    """

    site: str  # "model.layers.3.mlp"; the module that does the work
    unit: str  # "model.layers.3"
    role: str  # "attention", "mlp", "ssm" or "other"
    parts: tuple[str, ...]  # modules that die with it, its norms included
    join: str  # node name of the add in the unit's graph
    value: str = ""  # node name of the operand of `join` that is the branch


@dataclass(frozen=True)
class Skeleton:
    model_type: str  # config.model_type
    parts: tuple[Part, ...]
    units: tuple[str, ...]  # repeated layers in order: "model.layers.0", ...
    branches: tuple[Branch, ...] = ()
    groups: tuple[Group, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()  # tensors that are one storage; the first one counts
    opaque: tuple[tuple[str, str], ...] = ()  # (module path, reason): captured only as a leaf
    scans: tuple[Scan, ...] = ()  # those that are left
    stream: Group | None = None  # channels of the residual stream, through all layers; None where they can't go
    # hidden, vocab, positions, dtype, causal_lm, layers, layer_class, head_dim; of the config, whatever
    # single layers have: heads, kv_heads, active_experts; refused: [module path, why it can't be narrowed];
    # stays: [site of a branch, why it can't be removed]; fixed_stream: why `stream` is None
    facts: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def stays(self) -> dict[str, str]:
        """Sites of branches that can't be removed, with the reason, as far as a rehearsal without weights told."""
        return dict(self.facts.get("stays", ()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by path, tied ones too."""
        return {
            f"{part.path}.{name}" if part.path else name: shape for part in self.parts for name, shape in part.tensors
        }

    def to_json(self) -> dict:
        data = {"format": FORMAT, **asdict(self)}
        data["groups"] = [{n: v for n, v in g.items() if n != "multiple" or v > 1} for g in data["groups"]]
        return {name: value for name, value in data.items() if value or name not in ("scans", "stream")}

    @staticmethod
    def from_json(data: dict) -> "Skeleton":
        """Raises KeyError, TypeError or ValueError on data of another form."""
        if data["format"] != FORMAT:
            raise ValueError(f"skeleton format {data['format']}, this effc reads {FORMAT}")
        return from_json({name: value for name, value in data.items() if name != "format"}, Skeleton)
