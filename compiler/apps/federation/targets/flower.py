"""A Flower App: clients that keep their data train adapters of the model together."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ....ir.program import Program
from ....plugin.context import Context
from ....plugin.target import ArtifactSummary, Form, RunRequest
from ....targets.hf import Hf
from ..arguments import FederationTarget

if TYPE_CHECKING:
    from torch import nn


class Flower(FederationTarget):
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
    `labels` classes; a head over whole rows is trained along and sent with the rest; `stack`, `svd` and `hetlora`
    average it by examples.

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
    calibrates: ClassVar[bool] = True  # clients learn from its `data`
    extra: ClassVar[str] = "tune"
    requires: ClassVar[tuple[str, ...]] = ("peft",)

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        from ..app import write_flower_app
        from ..declaration import base_hash
        from ..request import check_and_get_state_shapes, make_declaration, sub_network_per_client

        self.check_requirements(ctx)
        full, sizes = check_and_get_state_shapes(self, program, ctx), sub_network_per_client(self, program, ctx)
        folder = self._write_model(program, destination, ctx)
        declared = make_declaration(
            self, full, sizes, folder, base_hash(destination / folder, ctx.settings.cache_dir), ctx
        )
        write_flower_app(declared, Path(self.path).name, destination)

    def required_modules(self) -> tuple[str, ...]:
        return self.requires if self.trains == "lora" else ()

    def check_requirements(self, ctx: Context) -> None:
        from ..request import refuse_incompatible_rows

        refuse_incompatible_rows(self, ctx)

    def forms(self) -> tuple[Form, ...]:
        return (Form("compact", "effc"), Form("model", "plain"))

    @classmethod
    def check_artifact(cls, artifact: Path, cache_folder: Path) -> None:
        from ..app import PACKAGE
        from ..declaration import NAME, read_declaration, refuse_other_base

        declared = read_declaration(artifact / PACKAGE / NAME)
        refuse_other_base(declared, artifact / declared.folder, cache_folder)

    @classmethod
    def run(cls, request: RunRequest) -> bool:
        from ..simulated_run import simulate_and_write_results

        simulate_and_write_results(request)
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
        from ..outcomes import models_with_trained_states

        return models_with_trained_states(path, ctx)

    # -- the model ---------------------------------------------------------------------------------------------

    def _write_model(self, program: Program, destination: Path, ctx: Context) -> Literal["compact", "model"]:
        """The model as one folder that loads; its name."""
        from ....artifacts.stock import stock_config

        if self.trains == "reft":
            from ....artifacts import reft

            (destination / "edits").mkdir()
            dtype = str(program.model.dtype).removeprefix("torch.")
            reft.write_reft_folder(
                program, destination / "edits", {"place": "", "config": ctx.origin.config, "dtype": dtype}
            )
            (destination / "edits" / "model.safetensors").unlink()
        form: Literal["compact", "stock"] = "compact" if stock_config(program.model)[1] else "stock"
        Hf(path=self.path, form=form).emit(program, destination, ctx)
        return "model" if form == "stock" else "compact"
