"""Declaration of a federation: the model by hash, what is trained and sent, whose rows are whose. `federation.json`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.json_types import from_json, make_range_predicate
from ...core.cache import canonical_json_sha256
from ...core.hashes import names_and_contents_hash
from ...core.json_errors import reject_on_error
from ...core.safe_read import CONFIG, read_json
from .all_but_me import Center
from .averaging import FedAvg, FrozenA
from .checkpoint import Checkpoint
from .grid import Grid
from .history import Round
from .partition import Split
from .personal import AllButMe
from .products import PaddedAverage, StackedAverage, TruncatedAverage
from .rotations import Way
from .rounds import Federation, Terms
from .search import RetrievalFederation, RetrievalStrategy
from .secure import SecureSum
from .sizes import Coverage, SubNetwork
from .state import Shapes
from .strategy import Strategy

NAME, FORMAT = "federation.json", 3

invalid_federation = Fault(
    "bad-federation", "The declaration of a federation is not one that this effc reads.", exit="environment"
)
other_base = Fault(
    "other-federation-base",
    "The model in a folder is not the one that a federation was declared for.",
    exit="environment",
)

Number = Annotated[float, make_range_predicate(0, 1e300)]
Count = Annotated[int, make_range_predicate(1, 1_000_000)]


@dataclass(frozen=True)
class DataSet:
    """A data word of the recipe: its arguments as plain JSON, paths relative to a folder that every machine names."""

    name: str
    word: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Declaration:
    """
    base       sha256 over the weights and config of the model in `folder` of the artifact
    trains     "lora", "reft", "prompt" or "full"; "index": nothing is trained, documents are sought (search.py)
    top        how many documents answer a question
    full       shapes of a whole state, that of the client with the largest rank
    ranks      of the clients' adapters, by number; empty: all have the largest
    mix        share of the others that a client takes in; None: what its validation likes best
    clip       bound of a client's change, 0 for none; with `noise` times it as deviation
    hold       share of its rows that a client keeps back to judge by
    share      of the clients that take part in a round
    protects   whom `clip` and `noise` hide: "clients" from the server's mean, or "rows" of each client
    secure     the server is given sums of masked states
    stream     data sets are tasks that come one after another; `anchor` holds fast to what was learned before
    sizes      sub-networks, and which one each client trains; empty: the whole model
    counted    among whom what a client changed of an entry counts (coverage.py)
    allocation "budgets": a client trains its own size in all rounds; "sandwich": sizes are drawn anew each round
    budgets    of the clients, as the recipe has them, and what they are of
    examples   rows that a client counts with at most, whatever it says; 0: no bound, as in older declarations
    """

    base: str
    folder: Literal["compact", "model"]  # beside it, never a path
    trains: Literal["lora", "reft", "prompt", "full", "index"]
    full: Shapes
    alpha: Number
    ranks: tuple[Count, ...]
    strategy: Literal["fedavg", "ffa", "stack", "svd", "hetlora", "abm", "coverage", "alone", "search"]
    center: Center
    way: Way
    mix: Number | None
    clip: Number
    noise: Number
    delta: Number
    clients: Count
    split: Split
    beta: Number
    hold: Number
    data: tuple[DataSet, ...]
    steps: Count
    batch: Count
    lr: Number
    rounds: Count
    deadline: Number
    share: Number
    seed: int
    protects: Literal["clients", "rows"]
    secure: bool
    sizes: tuple[SubNetwork, ...]
    size_of: tuple[int, ...]
    stream: bool
    anchor: Number
    top: Count
    counted: Literal["all", "holders"] = "holders"  # what declarations that don't say it did
    allocation: Literal["budgets", "sandwich"] = "budgets"
    budgets: tuple[str, ...] = ()
    counts: Literal["params", "flops"] = "params"
    examples: Annotated[int, make_range_predicate(0, 1 << 62)] = 0

    def assignable_size_indices(self, client: int) -> tuple[int, ...]:
        """Numbers of the sizes that a client may have to train, its own first; -1 of the whole model without sizes."""
        if not self.sizes:
            return (-1,)
        assigned = self.size_of[client]
        if self.allocation == "budgets":
            return (assigned,)
        smaller = [n for n, size in enumerate(self.sizes) if size.params < self.sizes[assigned].params]
        return (assigned, *sorted(smaller, key=lambda n: -self.sizes[n].params))

    @property
    def identity(self) -> str:
        """sha256 of all that decides a run but how many rounds it has: more of them go on from fewer."""
        left_out = ("deadline",) if self.stream else ("rounds", "deadline")  # tasks share a stream's rounds
        older = {"examples": 0}  # what declarations did not have yet changes no identity of theirs
        body = self.to_json().items()
        return canonical_json_sha256({k: v for k, v in body if k not in left_out and (k not in older or v != older[k])})

    def with_changes(self, **changes: Any) -> "Declaration":
        return replace(self, **changes)

    def make_round_terms(self) -> Terms:
        return Terms(
            self.rounds,
            self.clients,
            self.base,
            share=self.share,
            deadline=self.deadline,
            seed=self.seed,
            partitions=self.clients,
            examples=self.examples,
        )

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        body["full"] = {name: list(shape) for name, shape in self.full.items()}
        return {"format": FORMAT, **json.loads(json.dumps(body))}

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Declaration":
        """Raises LookupError, TypeError or ValueError on data of another form."""
        # declarations of early 0.2 call the indices `kept`
        sizes = [{"indices" if n == "kept" else n: v for n, v in size.items()} for size in body["sizes"]]
        declared = from_json({**{n: v for n, v in body.items() if n != "format"}, "sizes": sizes}, Declaration)
        if not (
            all(size.indices_fit(declared.full) for size in declared.sizes)
            and (not declared.sizes or len(declared.size_of) == declared.clients)
            and all(0 <= n < len(declared.sizes) for n in declared.size_of)
            and len(declared.budgets) in (0, declared.clients)
        ):
            raise ValueError("`sizes` are not of the model's arrays")
        return declared


def read_declaration(file: Path) -> Declaration:
    with reject_on_error(invalid_federation, f"{file} is no declaration of a federation", "compile the recipe again"):
        body = read_json(file, CONFIG)
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}, this effc reads {FORMAT}")
        return Declaration.from_json(body)


def base_hash(folder: Path, cache_dir: Path) -> str:
    """sha256 over names and contents of the weights and the config in a model's folder."""
    files = sorted(f for f in folder.glob("*") if f.suffix == ".safetensors" or f.name == "config.json")
    if not files:
        raise other_base(
            f"{folder} holds no weights", help="bring the folder of the model that was emitted"
        ).rejection()
    return names_and_contents_hash(files, cache_dir)


def refuse_other_base(declaration: Declaration, folder: Path, cache_dir: Path) -> None:
    """Reject where the folder holds another model."""
    actual = base_hash(folder, cache_dir)
    if actual != declaration.base:
        raise other_base(
            f"{folder} is {actual[:12]}, the federation is of {declaration.base[:12]}",
            help="bring the folder of the model that was emitted with the federation",
        ).rejection()


def make_strategy(declaration: Declaration) -> Strategy:
    """The server's side."""
    if declaration.strategy == "search":
        return RetrievalStrategy({})
    ranks = dict(enumerate(declaration.ranks))
    clip = declaration.clip if declaration.protects == "clients" else 0.0
    if declaration.secure:
        return SecureSum(declaration.full, declaration.strategy == "abm", declaration.mix)
    if declaration.strategy == "coverage":
        anew = declaration.seed if declaration.allocation == "sandwich" else None
        size_of_client = dict(enumerate(declaration.size_of))
        return Coverage(declaration.full, declaration.sizes, size_of_client, declaration.counted, anew)
    if declaration.strategy == "fedavg":
        return FedAvg(declaration.full, clip, declaration.noise)
    if declaration.strategy == "ffa":
        return FrozenA(declaration.full, clip, declaration.noise)
    if declaration.strategy in ("stack", "svd", "hetlora"):
        kinds: dict[str, type[StackedAverage] | type[TruncatedAverage] | type[PaddedAverage]] = {
            "stack": StackedAverage,
            "svd": TruncatedAverage,
            "hetlora": PaddedAverage,
        }
        return kinds[declaration.strategy](declaration.full, declaration.alpha, ranks)
    mix = 0.0 if declaration.strategy == "alone" else declaration.mix
    return AllButMe(declaration.full, declaration.center, declaration.way, mix)


def make_federation(
    declaration: Declaration, grid: Grid, checkpoint: Checkpoint | None, on_round: Callable[[Round], None]
) -> Federation:
    """A run of a declaration over a grid."""
    if declaration.strategy != "search":
        return Federation(grid, make_strategy(declaration), declaration.make_round_terms(), checkpoint, on_round)
    library = RetrievalFederation(grid, make_strategy(declaration), declaration.make_round_terms(), None, on_round)
    library.count = declaration.top
    return library
