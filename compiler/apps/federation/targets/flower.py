"""A Flower App: clients that keep their data train adapters of the model together."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from .....dsl.checker.values import Bytes, DataRef, Duration, Ratio, Selector
from ....artifacts.checkpoint_folders import CheckpointTarget
from ....ir.program import Program
from ....plugin.context import Context
from ....plugin.interfaces import param
from ....plugin.target import ArtifactSummary, Form, RunRequest
from ....targets.hf import Hf

if TYPE_CHECKING:
    from torch import nn


class Flower(CheckpointTarget):
    """A Flower App: clients that keep their data train adapters of the model together.

    The folder holds the model, `pyproject.toml`, a server and a client on Flower's message API, and
    `fedapp/federation.json`, which says what is trained, how it is put together and whose rows are whose. `effc run`
    simulates it in one process without Flower, prints every round and writes the states; `flwr run` runs the same
    files in Flower's simulation and in its deployment. Data stay where they are: the declaration names them.

    `strategy` is `fedavg` (over adapters: FedIT); `ffa` (A frozen, B averaged: exact); `stack` (FLoRA: exact, merged
    into the weights each round); `svd` (FlexLoRA) and `hetlora`, where clients' `ranks` may differ; `abm` (FedReFT's
    All-But-Me: every client keeps a state of its own and takes a share `mix` of what the others sent, their mean or
    geometric median); `alone` (each client by itself, the baseline); `coverage` (RaFFM and HeteroFL: clients train
    sub-networks within their `budgets`; with `allocation: sandwich` one trains the largest of them in a round, one the
    smallest, each of the others any that it affords). What a client changes of an entry counts among all clients, as
    its share of the data; with `counted: holders`, as in HeteroFL, among those that hold it, so that what one client
    holds alone follows its rows alone: faster where rows are dealt evenly, and far off where it has one class.

    `trains: reft` federates the interventions that `reft.insert` put in. Rows of `pairs` teach answers, rows of
    `labels` classes; a head over whole rows is trained along and sent with the rest.

    `trains: index, strategy: search` trains nothing: documents stay with their clients, and the vectors of each
    client's questions are searched by all.

    With `stream` the data sets are tasks that come one after another, as continual learning has it; `anchor` pulls
    what is trained back to what a task began with. Told is how well every earlier task is still done.

    With `secure` the server is given sums of masked states and never a state of three or more clients.

    A client that fails, is late, sends NaN or holds another model is left out of a round with a sentence. With
    `clip`, what one client, or with `protects: rows` what one row can change is bounded, and `noise` hides it:
    `effc run` prints the epsilon.

    Bounds of `expect` that are `in flower` are judged by `effc test` on what the federation gave, on every state that
    it left; compiling can't know yet.

    Source: McMahan et al. 2017 (arXiv 1602.05629); FFA-LoRA, Sun et al. 2024 (arXiv 2403.12313); FLoRA, Wang et al.
    2024 (arXiv 2409.05976); FlexLoRA, Bai et al. 2024 (arXiv 2402.11505); HetLoRA, Cho et al. 2024 (arXiv
    2401.06432); FedReFT, Siddika et al. 2025 (arXiv 2508.20295); prompt tuning, Lester et al. 2021 (arXiv 2104.08691);
    RaFFM, Yu et al. 2023 (arXiv 2310.00247); HeteroFL, Diao et al. 2021 (arXiv 2010.01264); secure sums, Bonawitz
    et al. 2017; DP-SGD, Abadi et al. 2016 (arXiv 1607.00133).
    Example: flower("fed", data: calib, clients: 4, rounds: 10, strategy: abm)
    """

    loads = {
        "compact": '`compact/` is the model that clients start from: `effc.load(".")`.',
        "model": "`model/` is the model that clients start from, an ordinary checkpoint.",
    }
    does = {
        "fedapp": "is a Flower App: `effc federate up` runs its Python files where they are those that effc writes; "
        "`flwr run` runs whatever they are"
    }
    later = "it speaks of what the federation gives: `effc run`, then `effc test`"
    extra: ClassVar[str] = "tune"
    requires: ClassVar[tuple[str, ...]] = ("peft",)
    needs: ClassVar[dict[str, str]] = {
        "reft.insert & trains: reft": "`trains: reft` federates the interventions that a step inserts"
    }
    conflicts: ClassVar[dict[str, tuple[str, str]]] = {
        "strategy: ffa | stack | svd | hetlora & not trains: lora": (
            "`strategy: ffa`, `stack`, `svd` and `hetlora` put adapters together, and nothing else is trained with any",
            "`strategy: fedavg`, or `trains: lora`",
        ),
        "ranks & not strategy: stack | svd | hetlora": (
            "`ranks` differ, and this strategy needs adapters of one rank",
            "`strategy: stack`, `svd` or `hetlora` take several",
        ),
        "strategy: coverage & not budgets": (
            "`strategy: coverage` puts sub-networks together, and no client has a budget",
            "give `budgets`, a share of the parameters for each client: `[100%, 50%]`",
        ),
        "ranks & count ranks != clients": ("`ranks` are not as many as clients", "give one for each client"),
        "budgets & count budgets != clients": ("`budgets` are not as many as clients", "give one for each client"),
        "budgets & most budgets < 100%": (
            "no client has a budget of 100%, and one tells the others the weights to start from",
            "give one of them `100%`",
        ),
        "budgets & not strategy: coverage": (
            "`budgets` make sub-networks of several sizes, which this strategy can't put together",
            "`strategy: coverage`",
        ),
        "strategy: coverage & not trains: full": (
            "`strategy: coverage` puts sub-networks together, whose weights are trained",
            "`trains: full`",
        ),
        "anchor & not stream": (
            "`anchor` holds fast to what earlier tasks taught, and there is no stream of them",
            "`stream: true`",
        ),
        "stream & split: distinct": (
            "`split: distinct` gives a client one data set, and `stream` gives all of them in turn",
            "`split: even`, or `dirichlet`",
        ),
        "stream & count data < 2": ("a stream of one data set has one task", "give two data sets or more"),
        "stream & rounds < count data": (
            "a stream has fewer rounds than data sets, and each of them needs one",
            "give a round for each data set, or more",
        ),
        "split: distinct & count data != clients": (
            "`split: distinct` gives every client a data set of its own, and there are not as many as clients",
            "give one for each client, or another `split`",
        ),
        "on & not trains: lora": (
            "`on` selects modules that get adapters, and none are trained",
            "`trains: lora`, or leave `on` out",
        ),
        "protects: rows & not clip": (
            "`protects: rows` bounds what a row can change by `clip`, which is 0",
            "give `clip: 1.0`, and `noise`",
        ),
        "strategy: search & not trains: index": ("`strategy: search` trains nothing", "`trains: index`"),
        "trains: index & not strategy: search": ("an index is searched, and not trained", "`strategy: search`"),
        "noise & not clip": ("`noise` is measured in units of `clip`, which is 0", "give `clip: 1.0`"),
        "clip & protects: clients & not strategy: fedavg | ffa": (
            "`clip` bounds changes of one common state, which this strategy has not",
            "`strategy: fedavg` or `ffa`, or `protects: rows`",
        ),
        "clip & protects: clients & secure": (
            "with `secure` the server sees no state that it could clip",
            "`protects: rows` clips at the clients",
        ),
        "clip & protects: clients & not share: 100%": (
            "the epsilon that is told counts every client in every round",
            "leave `share` out, or `clip`",
        ),
        "secure & not strategy: fedavg | abm": (
            "`secure` gives the server a sum, and this strategy needs the states",
            "`strategy: fedavg` or `abm`",
        ),
        "secure & clients < 3": ("a sum of fewer than three states tells whose they are", "`clients: 3` or more"),
        "secure & center: median": ("`secure` gives the server a sum, and a median needs the states", "`center: mean`"),
        "secure & strategy: abm & not way: project": (
            "`secure` gives the server a sum, and rotations are aligned state by state",
            "`way: project`",
        ),
        "strategy: abm & clients < 2": (
            "All-But-Me puts together what the others sent, and one client has no others",
            "`clients: 2` or more, or `strategy: alone`",
        ),
        "center: median & strategy: abm & clients < 3": (
            "the median of what one other client sent is what it sent",
            "`center: mean`; a median protects from outliers from `clients: 4` on",
        ),
        "mixing: adaptive & strategy: abm & hold: 0%": (
            "`mixing: adaptive` tries shares on rows that a client holds back, and `hold` is 0%",
            "`hold: 10%`, or `mixing: fixed`",
        ),
        "way: function & strategy: abm & trains: reft & clients > 64": (
            "`way: function` puts the others together for each client anew, whose cost grows with their square",
            "`way: align`, or at most `clients: 64`",
        ),
        "share * clients < 0.5": (
            "such a share of the clients is nobody",
            "give a `share` that is a client at least, or leave it out",
        ),
    }

    only: ClassVar[dict[str, str]] = {
        "rank": "trains: lora & not ranks",
        "alpha": "trains: lora",
        "tokens": "trains: prompt",
        "top": "trains: index",
        "mix": "strategy: abm & mixing: fixed",
        "mixing": "strategy: abm",
        "center": "strategy: abm",
        "way": "strategy: abm",
        "beta": "split: dirichlet",
        "hold": "not trains: index",
        "share": "not trains: index",
        "steps": "not trains: index",
        "batch": "not trains: index",
        "lr": "not trains: index",
        "counted": "strategy: coverage",
        "counts": "strategy: coverage",
        "allocation": "strategy: coverage",
        "protects": "clip",
        "delta": "noise",
    }

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

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        from ..app import write_app
        from ..declaration import base_hash
        from ..request import client_sizes, make_declaration, state_shapes

        self.foresee(ctx)  # what no step can change is refused here, whatever a plan said of it
        full, sizes = state_shapes(self, program, ctx), client_sizes(self, program, ctx)
        folder = self._write_model(program, destination, ctx)
        declared = make_declaration(
            self, full, sizes, folder, base_hash(destination / folder, ctx.settings.cache_dir), ctx
        )
        write_app(declared, Path(self.path).name, destination)

    def foresee(self, ctx: Context) -> None:
        from ....core.environment import check_modules
        from ..request import check_rows

        if self.trains == "lora":
            check_modules(self.requires, self.extra, "`flower` with `trains: lora`")
        check_rows(self, ctx)

    def forms(self) -> tuple[Form, ...]:
        return (Form("compact", "effc"), Form("model", "plain"))

    @classmethod
    def check_artifact(cls, artifact: Path, cache_folder: Path) -> None:
        from ..app import PACKAGE
        from ..declaration import NAME, check_base, read_declaration

        declared = read_declaration(artifact / PACKAGE / NAME)
        check_base(declared, artifact / declared.folder, cache_folder)

    @classmethod
    def run(cls, request: RunRequest) -> bool:
        from ..simulated_run import simulate_artifact

        simulate_artifact(request)
        return True

    @classmethod
    def summary(cls, folder: Path) -> "ArtifactSummary":
        from ..app import PACKAGE
        from ..declaration import NAME, read_declaration
        from ..outcomes import read_rounds
        from ..summary import FederationSummary

        declared = read_declaration(folder.parent / PACKAGE / NAME)
        return FederationSummary(declared, read_rounds(folder.parent, declared))

    @classmethod
    def results(cls, path: Path, ctx: Context) -> "Iterator[tuple[str, nn.Module]] | None":
        from ..outcomes import models_with_states

        return models_with_states(path, ctx)

    # -- the model ---------------------------------------------------------------------------------------------

    def _write_model(self, program: Program, destination: Path, ctx: Context) -> str:
        """The model as one folder that loads; its name."""
        from ....artifacts.stock import stock_config

        if self.trains == "reft":
            from ....artifacts import reft

            (destination / "edits").mkdir()
            dtype = str(program.model.dtype).removeprefix("torch.")
            reft.write_reft(program, destination / "edits", {"place": "", "config": ctx.origin.config, "dtype": dtype})
            (destination / "edits" / "model.safetensors").unlink()
        form: Literal["compact", "stock"] = "compact" if stock_config(program.model)[1] else "stock"
        Hf(path=self.path, form=form).emit(program, destination, ctx)
        return "model" if form == "stock" else "compact"
