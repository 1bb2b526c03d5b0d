"""Adapters of elastic rank, trained so that any choice of ranks is an adapter of its own: a family of models."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Part, Skeleton
from ..ir.edits import is_below
from ..ir.outcome import Outcome
from ..ir.program import Program
from ..report.quantity import count, counted
from ..search.masks import is_sparse
from .adapters import Adapters, Shape, adapted
from .schedule import seed_of
from .unmerged import Unmerged

unfit_ranks = Fault(
    "unfit-ranks",
    "Ranks of elastic adapters are to be two or more, each smaller than the one before, and none larger than a module "
    "that it is for.",
)


@dataclass(frozen=True)
class Space:
    """What may be chosen: one of `ranks`, the largest first, for each site; modules of a site share it.

    sites   name -> paths: layers, modules, or kinds of modules such as `q_proj`
    """

    sites: Mapping[str, tuple[str, ...]]
    ranks: tuple[int, ...]

    @staticmethod
    def over(paths: Sequence[str], per: str, skeleton: Skeleton, ranks: Sequence[int]) -> "Space":
        sites: dict[str, tuple[str, ...]] = {}
        for path in paths:
            unit = next((u for u in skeleton.units if is_below(path, u)), path)
            name = {"module": path, "layer": unit, "kind": path.rpartition(".")[2]}[per]
            sites[name] = (*sites.get(name, ()), path)
        return Space(sites, tuple(ranks))

    @property
    def size(self) -> int:
        """How many choices there are."""
        return len(self.ranks) ** len(self.sites)

    def choice(self, how: str) -> dict[str, int]:
        """ "largest", "smallest", or "middle": the median, the upper of two."""
        rank = {"largest": self.ranks[0], "smallest": self.ranks[-1], "middle": self.ranks[(len(self.ranks) - 1) // 2]}[
            how
        ]
        return dict.fromkeys(self.sites, rank)

    def draw(self, seed: int) -> dict[str, int]:
        """Every site by itself, every rank as likely as the others."""
        chance = random.Random(seed)
        return {site: chance.choice(self.ranks) for site in self.sites}

    def by_path(self, choice: Mapping[str, int]) -> dict[str, int]:
        return {path: choice[site] for site, paths in self.sites.items() for path in paths}


@dataclass
class Drawn:
    """Which ranks act now, by path. A step's draw follows from its number alone: whatever runs again within the
    step, layers in the backward pass or the whole step after a kill, meets the same ranks.

    The published code draws whenever a weight is read, so that with gradient checkpointing loss and gradient are
    those of two different sub-networks (SQFT's ElasticLoRALinear).
    """

    space: Space
    seed: int
    ranks: dict[str, int] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        self.take(self.space.draw(seed_of("ranks", self.seed, step)))

    def take(self, choice: Mapping[str, int]) -> None:
        self.ranks.update(self.space.by_path(choice))


@dataclass
class Family(Outcome):
    """A program, and adapters of which the first so many ranks of each site are an adapter, too.

    base      key of the program's own result; "" of the recipe's model
    shape     the largest rank, scale and dropout; of every choice the scale is alpha / largest rank
    tensors   as `Unmerged` has them
    masked    whether adapters give nothing where a sparse weight is zero
    """

    kind: ClassVar[str] = "family"
    program: Program
    base: str
    shape: Shape
    tensors: Mapping[str, Tensor]
    space: Space
    masked: bool

    @property
    def summary(self) -> str:
        trained = sum(tensor.numel() for tensor in self.tensors.values())
        return f"{counted(len(self.space.sites), 'site')} of {len(self.space.ranks)} ranks, {count(trained)} parameters"

    def members(self) -> Iterator[tuple[str, Program]]:
        """The program with all ranks on, for as long as it is its turn."""
        with self.applied(self.space.choice("largest")):
            yield "", self.program

    def extract(self, choice: Mapping[str, int]) -> dict[str, Tensor]:
        """The adapters of a choice alone."""
        found = {}
        for path, rank in self.space.by_path(choice).items():
            found[f"{path}.lora_A"] = self.tensors[f"{path}.lora_A"][:rank].contiguous()
            found[f"{path}.lora_B"] = self.tensors[f"{path}.lora_B"][:, :rank].contiguous()
        return found

    def unmerged(self, choice: Mapping[str, int]) -> Unmerged:
        return Unmerged(self.program, self.base, self.shape, self.extract(choice))

    @contextmanager
    def applied(self, choice: Mapping[str, int]) -> Iterator[Adapters]:
        """The program with the adapters of a choice on."""
        paths, zeros = tuple(self.space.by_path(choice)), "keep" if self.masked else "fill"
        with adapted(self.program.model, paths, self.shape, seed=0, zeros=zeros) as adapters:
            adapters.load(self.extract(choice))
            for layer in adapters.layers.values():
                layer.eval()
            yield adapters

    @property
    def acts_on_zeros(self) -> bool:
        """Whether one of the weights beneath is sparse."""
        model = self.program.model
        return any(
            is_sparse(model.get_submodule(path).weight.detach())
            for path in self.space.by_path(self.space.choice("largest"))
        )

    def to_json(self) -> dict[str, Any]:
        """All but the program and the tensors."""
        return {
            "base": self.base,
            "shape": vars(self.shape),
            "masked": self.masked,
            "ranks": list(self.space.ranks),
            "sites": {site: list(paths) for site, paths in self.space.sites.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any], program: Program, tensors: Mapping[str, Tensor]) -> "Family":
        space = Space({site: tuple(paths) for site, paths in body["sites"].items()}, tuple(body["ranks"]))
        return cls(program, body["base"], Shape(**body["shape"]), tensors, space, body["masked"])


def check_ranks(ranks: Sequence[int], chosen: Sequence[Part]) -> None:
    """Reject (unfit-ranks) ranks that don't fall, a choice of one, and what is larger than a module."""
    faults = []
    if list(ranks) != sorted(set(ranks), reverse=True) or ranks[-1] < 1:
        fallen = sorted({rank for rank in ranks if rank > 0}, reverse=True)
        faults.append(
            unfit_ranks(
                f"`ranks` are {_listed(ranks)}, which don't fall from one to the next",
                help=f"write `ranks: [{_listed(fallen)}]`"
                if len(fallen) > 1
                else "write some, the largest first, as in `ranks: [32, 24, 16]`",
            )
        )
    elif len(ranks) < 2:
        faults.append(
            unfit_ranks(
                f"`ranks` has {ranks[0]} alone, and there is nothing to choose",
                help=f"give two or more, or train with `tune.heal(rank: {ranks[0]})`",
            )
        )
    for part in chosen:
        narrow = min(dict(part.tensors)["weight"])
        if narrow < max(ranks):
            faults.append(
                unfit_ranks(
                    f"rank {max(ranks)} is more than {part.path} has: it is {narrow} wide",
                    help=f"give ranks of at most {narrow}, or leave it out of `on:`",
                )
            )
            break
    if faults:
        raise Reject(*faults)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
