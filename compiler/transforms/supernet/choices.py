"""Search space of a family: elastic dimensions, each with its values, and the choices that they span."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from typing import Any, Literal

from ....dsl.checker.skeleton import Skeleton, is_submodule
from ..training.schedule import seed_of

RANK, LAYERS, BLOCKS, KERNEL = "rank", "layers", "blocks", "kernel"
WIDTHS = ("channels", "heads", "kv_heads", "ssm_heads", "ssm_channels", "ssm_state", "experts")


@dataclass(frozen=True)
class ElasticDim:
    """One thing that may be chosen; all its places take the value that it is set to.

    name     unique in its space
    kind     "rank" of adapters; "channels", "heads" or "kv_heads" that stay, and those of scans with "ssm_" before,
             "ssm_state" and "experts", too; "layers" or "blocks", 1 where they run; "kernel" of convolutions, its
             height and width
    values   the largest first
    places   adapted modules, sites of groups, units, sites of branches, or convolutions
    """

    name: str
    kind: str
    values: tuple[int, ...]
    places: tuple[str, ...]

    def __post_init__(self) -> None:
        fallen = all(a > b for a, b in zip(self.values, self.values[1:], strict=False))
        assert self.values and fallen, f"{self.name}: {self.values} do not fall"


@dataclass(frozen=True)
class Space:
    """All choices of a family. A choice is dimension -> value; a genome is the same as places in the dimensions'
    values."""

    dims: tuple[ElasticDim, ...]

    @staticmethod
    def of_ranks(
        paths: Sequence[str], shared_by: Literal["layer", "module", "kind"], skeleton: Skeleton, ranks: Sequence[int]
    ) -> "Space":
        """One of `ranks` for each layer, module, or kind of modules."""
        return Space(tuple(rank_dims(paths, shared_by, skeleton, ranks)))

    @property
    def size(self) -> int:
        """Number of choices."""
        return prod(len(dim.values) for dim in self.dims)

    @property
    def identity(self) -> str:
        """sha256 over all that a genome's numbers mean."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    def of(self, kind: str) -> tuple[ElasticDim, ...]:
        return tuple(dim for dim in self.dims if dim.kind == kind)

    def choice(self, size: Literal["largest", "middle", "smallest"]) -> dict[str, int]:
        """ "largest", "smallest", or "middle": the median, the upper of two."""
        index_of = {"largest": lambda n: 0, "smallest": lambda n: n - 1, "middle": lambda n: (n - 1) // 2}[size]
        return {dim.name: dim.values[index_of(len(dim.values))] for dim in self.dims}

    def draw(self, seed: int, open_share: float = 1.0) -> dict[str, int]:
        """Every dimension by itself, every value as likely as the others; of each the first two and this share of the
        others."""
        chance = random.Random(seed)
        return {dim.name: chance.choice(dim.values[: _open_count(len(dim.values), open_share)]) for dim in self.dims}

    def by_path(self, choice: Mapping[str, int], kind: str) -> dict[str, int]:
        """The values of one kind of dimensions at each of their places."""
        return {site: choice[dim.name] for dim in self.of(kind) for site in dim.places}

    def genome(self, choice: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dim.values.index(choice[dim.name]) for dim in self.dims)

    def decoded(self, genome: Sequence[int]) -> dict[str, int]:
        return {dim.name: dim.values[index] for dim, index in zip(self.dims, genome, strict=True)}

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(dim) for dim in self.dims]

    @staticmethod
    def from_json(body: Sequence[Mapping[str, Any]]) -> "Space":
        return Space(tuple(ElasticDim(d["name"], d["kind"], tuple(d["values"]), tuple(d["places"])) for d in body))


def _open_count(count: int, open_share: float) -> int:
    return min(count, 2 + ceil((count - 2) * open_share)) if count > 2 else count


def rank_dims(
    module_paths: Sequence[str], shared_by: Literal["layer", "module", "kind"], skeleton: Skeleton, ranks: Sequence[int]
) -> list[ElasticDim]:
    """Dials of adapters' ranks, per "layer", "module" or "kind" such as `q_proj`."""
    sites: dict[str, tuple[str, ...]] = {}
    for path in module_paths:
        unit = next((u for u in skeleton.units if is_submodule(path, u)), path)
        name = {"module": path, "layer": unit, "kind": path.rpartition(".")[2]}[shared_by]
        sites[name] = (*sites.get(name, ()), path)
    return [ElasticDim(f"{name}:{RANK}", RANK, tuple(ranks), paths_of) for name, paths_of in sites.items()]


@dataclass
class ChoiceSampler:
    """Sampler of the choices of a training step. They follow from its number alone: whatever runs again within the
    step, layers in the backward pass or the whole step after a kill, meets the same ones.

    The published code draws whenever a weight is read, so that with gradient checkpointing loss and gradient are
    those of two different sub-networks (SQFT's ElasticLoRALinear).

    each      how many are drawn for a step
    sandwich  whether a step is of the largest and the smallest choice, too
    opening   steps over which values beyond the first two come in, the larger ones first
    ranks     of adapters, by path, as they act now
    on_choice  called with every choice that is taken

    Source: sandwich rule, Yu and Huang 2019 (arXiv 1903.05134); opening, in the manner of progressive shrinking,
    Cai et al. 2020 (arXiv 1908.09791).
    """

    space: Space
    seed: int
    each: int = 1
    sandwich: bool = False
    opening: int = 0
    on_choice: Callable[[Mapping[str, int]], None] | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    choices: list[dict[str, int]] = field(default_factory=list)
    step: int = 0

    def draw_and_activate_first(self, step: int) -> None:
        """Draw for a step, counted from 1, and take the first."""
        share = 1.0 if not self.opening else min(1.0, (step - 1) / self.opening)
        random_choices = [self.space.draw(seed_of("choice", self.seed, step, i), share) for i in range(self.each)]
        extremes = [self.space.choice("largest"), self.space.choice("smallest")] if self.sandwich else []
        self.choices, self.step = [*extremes[:1], *random_choices, *extremes[1:]], step
        self.activate(self.choices[0])

    def activate(self, choice: Mapping[str, int]) -> None:
        self.ranks.update(self.space.by_path(choice, RANK))
        if self.on_choice is not None:
            self.on_choice(choice)
