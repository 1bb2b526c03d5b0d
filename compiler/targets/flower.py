"""A Flower App: clients that keep their data train adapters of the model together."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from ...dsl.diagnostics import Fault, Reject
from ...dsl.recipe import Invocation
from ...dsl.values import DataRef, Duration, Ratio, Selector
from ..ir.program import Program
from ..words.context import Context
from ..words.kinds import Form, Target, Wish, param
from .hf import Hf

unfit_strategy = Fault("unfit-strategy", "A federation's strategy can't put together what its clients are to train.")


class Flower(Target):
    """A Flower App: clients that keep their data train adapters of the model together.

    The folder holds the model, `pyproject.toml`, a server and a client on Flower's message API, and
    `fedapp/federation.json`, which says what is trained, how it is put together and whose rows are whose. `effc run`
    simulates it in one process without Flower, prints every round and writes the states; `flwr run` runs the same
    files in Flower's simulation and in its deployment. Data stay where they are: the declaration names them.

    `strategy` is `fedavg` (over adapters: FedIT); `ffa` (A frozen, B averaged: exact); `stack` (FLoRA: exact, merged
    into the weights each round); `svd` (FlexLoRA) and `hetlora`, where clients' `ranks` may differ; `abm` (FedReFT's
    All-But-Me: every client keeps a state of its own and takes a share `mix` of what the others sent, their mean or
    geometric median); `alone` (each client by itself, the baseline).

    A client that fails, is late, sends NaN or holds another model is left out of a round with a sentence. With
    `clip`, what one client can change is bounded, and `noise` hides it: `effc run` prints the epsilon.

    Source: McMahan et al. 2017 (arXiv 1602.05629); FFA-LoRA, Sun et al. 2024 (arXiv 2403.12313); FLoRA, Wang et al.
    2024 (arXiv 2409.05976); FlexLoRA, Bai et al. 2024 (arXiv 2402.11505); HetLoRA, Cho et al. 2024 (arXiv
    2401.06432); FedReFT, Siddika et al. 2025 (arXiv 2508.20295); prompt tuning, Lester et al. 2021 (arXiv 2104.08691).
    Example: flower("fed", data: calib, clients: 4, rounds: 10, strategy: abm)
    """

    loads = {
        "compact": '`compact/` is the model that clients start from: `effc.load(".")`.',
        "model": "`model/` is the model that clients start from, an ordinary checkpoint.",
    }
    extra: ClassVar[str] = "tune"
    requires: ClassVar[tuple[str, ...]] = ("peft",)

    data: DataRef | tuple[DataRef, ...] = param("Rows that clients learn from: one data set, or several.")
    clients: int = param("How many.", default=4, ge=1)
    rounds: int = param("How often states are sent and put together.", default=5, ge=1)
    strategy: Literal["fedavg", "ffa", "stack", "svd", "hetlora", "abm", "alone"] = param(
        "How states are put together.", default="fedavg"
    )
    trains: Literal["lora", "prompt", "full"] = param(
        "Adapters, embeddings in front of every row, or all weights.", default="lora"
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
    deadline: Duration = param("How long a round may take.", default=Duration(600.0))
    clip: float = param("Largest norm of a client's change; 0 for no bound.", default=0.0, ge=0)
    noise: float = param("Deviation of the noise, in units of `clip`.", default=0.0, ge=0)
    delta: float = param("For which epsilon is told.", default=1e-5, gt=0, lt=1)

    def emit(self, program: Program, into: Path, ctx: Context) -> None:
        from ..federation.app import write_app
        from ..federation.declaration import base_hash

        self.foresee(ctx)  # what no step can change is refused here, whatever a plan said of it
        full = self._full(program)
        folder = self._write_model(program, into, ctx)
        declared = self._declared(full, folder, base_hash(into / folder, ctx.settings.cache_dir), ctx)
        write_app(declared, Path(self.path).name, into)

    def foresee(self, ctx: Context) -> None:
        self._check()
        self._check_rows(ctx)

    def forms(self) -> tuple[Form, ...]:
        return (Form("compact", "effc"), Form("model", "plain"))

    @classmethod
    def open(cls, folder: Path, wish: Wish) -> tuple[Any, Any]:
        return Hf.open(folder, wish)

    # -- what is refused -------------------------------------------------------------------------------------

    def _check(self) -> None:
        from ..machine.environment import check_modules

        if self.trains == "lora":
            check_modules(self.requires, self.extra, "`flower` with `trains: lora`")
        elif self.strategy in ("ffa", "stack", "svd", "hetlora"):
            raise Reject(
                unfit_strategy(
                    f"`strategy: {self.strategy}` puts adapters together, and `trains: {self.trains}` has none",
                    help="`strategy: fedavg`, or `trains: lora`",
                )
            )
        if self.ranks and self.strategy not in ("stack", "svd", "hetlora"):
            raise Reject(
                unfit_strategy(
                    f"`strategy: {self.strategy}` needs adapters of one rank",
                    help="`strategy: stack`, `svd` or `hetlora` take several",
                )
            )
        if self.ranks and len(self.ranks) != self.clients:
            raise Reject(
                unfit_strategy(f"{len(self.ranks)} ranks for {self.clients} clients", help="give one for each client")
            )
        if self.noise and not self.clip:
            raise Reject(unfit_strategy("`noise` is measured in units of `clip`, which is 0", help="give `clip: 1.0`"))
        if self.clip and self.strategy not in ("fedavg", "ffa"):
            raise Reject(
                unfit_strategy(
                    f"`clip` bounds changes of one common state, which `strategy: {self.strategy}` has not",
                    help="`strategy: fedavg` or `ffa`",
                )
            )
        if self.clip and self.share.value < 1:
            raise Reject(
                unfit_strategy(
                    "the epsilon that is told counts every client in every round", help="leave `share` out, or `clip`"
                )
            )

    def _check_rows(self, ctx: Context) -> None:
        """Reject where a client would have no rows."""
        from ..federation.partition import divided

        sizes = [len(ctx.rows(ref)) for ref in self._refs()]
        divided(sizes, self.clients, self.split, self.beta, ctx.seed)

    # -- what is declared ------------------------------------------------------------------------------------

    def _refs(self) -> tuple[DataRef, ...]:
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def _full(self, program: Program) -> dict[str, tuple[int, ...]]:
        """Shapes of a whole state."""
        from ..training.adapters import adaptable

        if self.trains == "prompt":
            return {"prompt": (self.tokens, program.model.get_input_embeddings().weight.shape[1])}
        if self.trains == "full":
            return {name: tuple(p.shape) for name, p in program.model.named_parameters()}
        rank, full = max(self.ranks or (self.rank,)), {}
        parts = {part.path: part for part in program.skeleton.parts}
        for path in adaptable(program, self.on):
            shape = dict(parts[path].tensors)["weight"]
            out, inputs = reversed(shape) if parts[path].kind == "Conv1D" else shape
            full |= {f"{path}.A": (rank, inputs), f"{path}.B": (out, rank)}
        return full

    def _write_model(self, program: Program, into: Path, ctx: Context) -> str:
        """The model as one folder that loads; its name."""
        from ..artifacts.stock import stock_config

        form = "compact" if stock_config(program.model)[1] else "stock"
        Hf(path=self.path, form=form).emit(program, into, ctx)
        return "model" if form == "stock" else "compact"

    def _declared(self, full: dict[str, tuple[int, ...]], folder: str, base: str, ctx: Context):
        from ...dsl.values import to_json
        from ..federation.declaration import DataSet, Declaration

        def data(ref: DataRef) -> DataSet:
            call: Invocation = ctx.recipe.data[ref.name]
            return DataSet(ref.name, call.word, {k: to_json(v) for k, v in call.args.items()})

        return Declaration(
            base=base,
            folder=folder,
            trains=self.trains,
            full=full,
            alpha=self.alpha,
            ranks=self.ranks or (),
            strategy=self.strategy,
            center=self.center,
            way=self.way,
            mix=None if self.mixing == "adaptive" else self.mix.value,
            clip=self.clip,
            noise=self.noise,
            delta=self.delta,
            clients=self.clients,
            split=self.split,
            beta=self.beta,
            hold=self.hold.value,
            data=tuple(data(ref) for ref in self._refs()),
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            rounds=self.rounds,
            deadline=self.deadline.seconds,
            share=self.share.value,
            seed=ctx.seed,
        )
