"""Parameters of a federation, and the rules for them together."""

from collections.abc import Iterator
from typing import Literal

from ....dsl.checker.rules import Conflict, MissingStep, Problem, Unread
from ....dsl.checker.values import Bytes, DataRef, Duration, Ratio, Selector
from ...artifacts.checkpoint_folders import CheckpointTarget
from ...plugin.interfaces import param


class FederationTarget(CheckpointTarget):
    """Arguments of the target `flower`."""

    data: DataRef | tuple[DataRef, ...] = param("Rows that clients learn from: one data set, or several.")
    clients: int = param("How many.", default=4, ge=1)
    rounds: int = param("How often states are sent and put together.", default=5, ge=1)
    strategy: Literal["fedavg", "ffa", "stack", "svd", "hetlora", "abm", "coverage", "alone", "search"] = param(
        "How states are put together.", default="fedavg"
    )
    trains: Literal["lora", "reft", "prompt", "full", "index"] = param(
        "Adapters, interventions, embeddings in front of every row, all weights, or nothing but an index.",
        default="lora",
    )
    on: Selector | None = param(
        "Linear modules with adapters; all inside the layers where it is left out.", default=None
    )
    rank: int = param("Rank of the adapters.", default=8, ge=1)
    ranks: tuple[int, ...] | None = param(
        "Ranks of the clients' adapters, one for each, where they differ.", default=None
    )
    alpha: float = param("What an adapter's product is multiplied with, divided by its rank.", default=16.0, gt=0)
    tokens: int = param("Embeddings of a soft prompt.", default=16, ge=1)
    top: int = param("Of `search`: how many documents answer a question.", default=5, ge=1)
    mix: Ratio = param("Of `abm`: share of the others that a client takes in.", default=Ratio(0.5), ge=0, le=1)
    mixing: Literal["fixed", "adaptive"] = param(
        "Of `abm`: `mix` for all, or for each client what its own held-back rows like best.", default="fixed"
    )
    center: Literal["mean", "median"] = param("Of `abm`: mean or geometric median of the others.", default="mean")
    way: Literal["project", "align", "function"] = param(
        "Of `abm`, where interventions are trained: how R stays orthonormal.", default="align"
    )
    split: Literal["even", "blocks", "dirichlet", "distinct"] = param(
        "Whose rows are whose: dealt out, cut into blocks, drawn, or a data set for each client.", default="even"
    )
    beta: float = param("Of `split: dirichlet`: the smaller, the more clients differ.", default=0.5, gt=0)
    hold: Ratio = param(
        "Share of its rows that a client judges itself by and does not learn from.", default=Ratio(0.1), ge=0, lt=1
    )
    share: Ratio = param("Share of the clients that take part in a round.", default=Ratio(1.0), gt=0, le=1)
    steps: int = param("Updates that a client makes in a round.", default=10, ge=1, unit="steps")
    batch: int = param("Rows of an update.", default=4, ge=1, unit="rows")
    lr: float = param("Learning rate of AdamW.", default=1e-3, gt=0)
    deadline: Duration = param("How long a round may take.", default=Duration(600.0), gt=0)
    budgets: tuple[int | Ratio | Bytes | Duration, ...] | None = param(
        "Of `coverage`: what each client affords: a share or a number of the parameters, `64MiB` while it trains, or "
        "`30ms` an update on this machine.",
        default=None,
        gt=0,
    )
    counts: Literal["params", "flops"] = param(
        "What shares and numbers in `budgets` are of: parameters, or operations of a token.", default="params"
    )
    allocation: Literal["budgets", "sandwich"] = param(
        "Of `coverage`: each client trains what its budget allows, or sizes are drawn anew each round.",
        default="budgets",
    )
    counted: Literal["all", "holders"] = param(
        "Of `coverage`: what a client changes counts among all clients, or among those that hold it.", default="all"
    )
    secure: bool = param("The server is given sums of masked states, and no state.", default=False)
    protects: Literal["clients", "rows"] = param("Whom `clip` and `noise` hide.", default="clients")
    stream: bool = param("Data sets are tasks that come one after another: each has its rounds.", default=False)
    anchor: float = param(
        "Of `stream`: how strongly training is pulled back to what the task began with; 0 not at all.",
        default=0.0,
        ge=0,
    )
    examples: int | None = param(
        "Rows that a client counts with at most, whatever it says; those of the largest part dealt unless given.",
        default=None,
        ge=1,
    )
    clip: float = param("Largest norm of a client's change, or of a row's gradient; 0 for no bound.", default=0.0, ge=0)
    noise: float = param("Deviation of the noise, in units of `clip`.", default=0.0, ge=0)
    delta: float = param("For which epsilon is told.", default=1e-5, gt=0, lt=1)

    def min_rows(self) -> int:
        return self.clients

    def problems(self) -> Iterator[Problem]:
        yield from self._rank_and_budget_problems()
        yield from self._stream_and_selector_problems()
        yield from self._clip_problems()
        yield from self._secure_sum_problems()
        yield from self._index_share_and_all_but_me_problems()
        yield from self._unused_parameter_problems()
        if self.trains == "reft":
            yield MissingStep("reft.insert", "`trains: reft` federates what that step inserts", ("trains",))

    def _rank_and_budget_problems(self) -> Iterator[Problem]:
        """Adapters of several ranks, and sub-networks of several sizes."""
        if self.strategy in ("ffa", "stack", "svd", "hetlora") and self.trains != "lora":
            yield Conflict(
                ("strategy", "trains"), "`ffa`, `stack`, `svd` and `hetlora` put adapters together", "`trains: lora`"
            )
        if self.ranks and self.strategy not in ("stack", "svd", "hetlora"):
            yield Conflict(
                ("ranks", "strategy"), "this strategy needs adapters of one rank", "`strategy: stack`, `svd`, `hetlora`"
            )
        if self.strategy == "coverage" and not self.budgets:
            yield Conflict(
                ("strategy",), "no client has a budget", "give each a share of the parameters: `budgets: [100%, 50%]`"
            )
        if self.ranks and len(self.ranks) != self.clients:
            yield Conflict(("ranks", "clients"), "`ranks` are not as many as clients", "give one for each client")
        if self.budgets and len(self.budgets) != self.clients:
            yield Conflict(("budgets", "clients"), "`budgets` are not as many as clients", "give one for each client")
        if self.budgets and all(isinstance(budget, Ratio) and budget.value < 1 for budget in self.budgets):
            yield Conflict(
                ("budgets",), "no client has a budget of 100%, from which the others start", "give one of them `100%`"
            )
        if self.budgets and self.strategy != "coverage":
            yield Conflict(
                ("budgets", "strategy"), "only `coverage` takes sub-networks of several sizes", "`strategy: coverage`"
            )
        if self.strategy == "coverage" and self.trains != "full":
            yield Conflict(("strategy", "trains"), "`coverage` trains weights of sub-networks", "`trains: full`")

    def _stream_and_selector_problems(self) -> Iterator[Problem]:
        """Tasks one after another, data sets of clients, and the modules that learn."""
        sets = len(self.data) if isinstance(self.data, tuple) else 1
        if self.anchor and not self.stream:
            yield Conflict(
                ("anchor",), "`anchor` holds fast to earlier tasks, and there is no stream of them", "`stream: true`"
            )
        if self.anchor * self.lr >= 1:
            yield Conflict(
                ("anchor", "lr"), "each step would go all the way back, and learn nothing", "`anchor` below `1 / lr`"
            )
        if self.stream and self.split == "distinct":
            yield Conflict(
                ("stream", "split"), "`distinct` gives a client one data set, `stream` all in turn", "another `split`"
            )
        if self.stream and sets < 2:
            yield Conflict(("stream", "data"), "a stream of one data set has one task", "give two data sets or more")
        if self.stream and self.rounds < sets:
            yield Conflict(("stream", "rounds", "data"), "a stream needs a round for each set", "give more `rounds`")
        if self.split == "distinct" and sets != self.clients:
            yield Conflict(
                ("split", "data", "clients"), "the data sets are not as many as clients", "give one for each client"
            )
        if self.on and self.trains != "lora":
            yield Conflict(("on", "trains"), "`on` selects for adapters, and none are trained", "leave `on` out")

    def _clip_problems(self) -> Iterator[Problem]:
        """Bounds on what a client or a row changes, and the noise that hides it."""
        if self.protects == "rows" and not self.clip:
            yield Conflict(("protects",), "`protects: rows` bounds rows by `clip`, which is 0", "give `clip: 1.0`")
        if self.noise and not self.clip:
            yield Conflict(("noise",), "`noise` is measured in units of `clip`, which is 0", "give `clip: 1.0`")
        if not self.clip or self.protects != "clients":
            return
        if self.strategy not in ("fedavg", "ffa"):
            yield Conflict(
                ("clip", "protects", "strategy"),
                "`clip` bounds changes of one common state, which this strategy has not",
                "`strategy: fedavg` or `ffa`, or `protects: rows`",
            )
        if self.secure:
            yield Conflict(
                ("clip", "protects", "secure"), "with `secure` the server sees no state to clip", "`protects: rows`"
            )
        if self.share.value != 1:
            yield Conflict(
                ("clip", "protects", "share"), "the epsilon counts every client in every round", "leave `share` out"
            )

    def _secure_sum_problems(self) -> Iterator[Problem]:
        """Sums of masked states, where a strategy needs the states."""
        if not self.secure:
            return
        if self.strategy not in ("fedavg", "abm"):
            yield Conflict(("secure", "strategy"), "this strategy needs the states, not a sum", "`fedavg` or `abm`")
        if self.clients < 3:
            yield Conflict(
                ("secure", "clients"), "a sum of fewer than three states tells whose they are", "`clients: 3` or more"
            )
        if self.center == "median":
            yield Conflict(("secure", "center"), "a median needs the states, `secure` gives a sum", "`center: mean`")
        if self.strategy == "abm" and self.way != "project":
            yield Conflict(
                ("secure", "strategy", "way"), "rotations are aligned by state, `secure` gives a sum", "`way: project`"
            )

    def _index_share_and_all_but_me_problems(self) -> Iterator[Problem]:
        """An index, All-But-Me, and a share of the clients."""
        if self.strategy == "search" and self.trains != "index":
            yield Conflict(("strategy", "trains"), "`strategy: search` trains nothing", "`trains: index`")
        if self.trains == "index" and self.strategy != "search":
            yield Conflict(("trains", "strategy"), "an index is searched, and not trained", "`strategy: search`")
        if self.share.value * self.clients < 0.5:
            yield Conflict(("share", "clients"), "such a share of the clients is nobody", "give a larger `share`")
        if self.strategy != "abm":
            return
        if self.clients < 2:
            yield Conflict(("strategy", "clients"), "one client has no others", "`clients: 2` or more, or `alone`")
        if self.center == "median" and self.clients < 3:
            yield Conflict(
                ("center", "clients"), "a median of what one other client sent is just that", "`center: mean`"
            )
        if self.mixing == "adaptive" and self.hold.value == 0:
            yield Conflict(("mixing", "hold"), "`adaptive` is judged by rows that a client holds back", "`hold: 10%`")
        if self.way == "function" and self.trains == "reft" and self.clients > 64:
            yield Conflict(
                ("way", "clients"), "for more than 64 clients `way: function` grows with their square", "`way: align`"
            )

    def _unused_parameter_problems(self) -> Iterator[Problem]:
        """Parameters of other strategies and of other things to train."""
        if self.trains != "lora" or self.ranks:
            yield Unread(("rank",), "`trains: lora` without `ranks`", ("trains",))
        if self.trains != "lora":
            yield Unread(("alpha",), "`trains: lora`", ("trains",))
        if self.trains != "prompt":
            yield Unread(("tokens",), "`trains: prompt`", ("trains",))
        if self.trains != "index":
            yield Unread(("top",), "`trains: index`", ("trains",))
        else:
            yield Unread(("hold", "share", "steps", "batch", "lr"), "calls without `trains: index`", ("trains",))
        if self.strategy != "abm" or self.mixing != "fixed":
            yield Unread(("mix",), "`strategy: abm` and `mixing: fixed`", ("strategy", "mixing"))
        if self.strategy != "abm":
            yield Unread(("mixing", "center", "way"), "`strategy: abm`", ("strategy",))
        if self.split != "dirichlet":
            yield Unread(("beta",), "`split: dirichlet`", ("split",))
        if self.strategy != "coverage":
            yield Unread(("counted", "counts", "allocation"), "`strategy: coverage`", ("strategy",))
        if not self.clip:
            yield Unread(("protects",), "`clip`", ())
        if not self.noise:
            yield Unread(("delta",), "`noise`", ())
