"""`effc federate`: a local deployment of a federation on Flower, started, watched and ended."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.syntax.diagnostics import Reject
from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ...apps.federation.deployment import Deployment, RunStatus

_app = argument("FOLDER", "An artifact of the target `flower`.")
_data = option("A client's own data; once for each client, or left out.", "--data", metavar="FOLDER")
_port = option("Of the SuperLink; 0 takes a free one.", "--port", metavar="PORT", min=0, max=65535, show_default=True)
_wait = option("Stay until the run is over; the exit code is its end.", "--wait", show_default=True)


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Deploy a federation here on Flower.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="federate")

    @make_verb(group, name="up", flag_panels=("cache", "machine"), signed_arguments=("folder",))
    def start(
        folder: Annotated[Path, _app],
        shared: SharedFlags,
        data: Annotated[list[Path], _data] = (),  # type: ignore[assignment]
        port: Annotated[int, _port] = 0,
        wait: Annotated[bool, _wait] = False,
    ) -> None:
        """Start a SuperLink with TLS and the clients' nodes, and submit the run."""
        deployment = _start_federation(folder.resolve(), shared, data, port)
        if wait:
            return _wait_and_print_status(deployment, shared)
        if shared.format == "json":
            return shared.screen.answer_json(
                "federate up", run=deployment.run, port=deployment.port, folder=str(deployment.folder)
            )
        return shared.screen.note(f"effc federate status {quote(str(folder.resolve()))}")

    @make_verb(group, name="status")
    def watch(folder: Annotated[Path, _app], shared: SharedFlags, wait: Annotated[bool, _wait] = False) -> None:
        """Say how the run goes and which processes live; the exit code is that of a run that is over."""
        from ...apps.federation.deployment import read_deployment

        deployment = read_deployment(existing_deployment_folder(folder.resolve()))
        return _wait_and_print_status(deployment, shared) if wait else _print_status(deployment, shared)

    @make_verb(group, name="down")
    def stop(folder: Annotated[Path, _app], shared: SharedFlags) -> None:
        """End the deployment's processes; logs, checkpoints and results stay."""
        from ...apps.federation.deployment import read_deployment, stop_deployment

        deployment = read_deployment(existing_deployment_folder(folder.resolve()))
        names = stop_deployment(deployment)
        if shared.format == "json":
            return shared.screen.answer_json("federate down", ended=names, folder=str(deployment.folder))
        return shared.screen.note(f"ended {', '.join(names) or 'nothing'}; results and logs are in {deployment.folder}")


def _start_federation(folder: Path, shared: SharedFlags, data: Sequence[Path], port: int) -> "Deployment":
    from ...apps.federation.app import PACKAGE
    from ...apps.federation.declaration import NAME, read_declaration, refuse_other_base
    from ...apps.federation.deployment import flower_command_folder, start_deployment
    from ...apps.federation.generated_code import refuse_foreign_code
    from ...apps.federation.simulated_run import recipe_folder
    from ...artifacts.manifest import verify_files

    target = existing_deployment_folder(folder)
    flower_command_folder()
    verify_files(folder)
    declared = read_declaration(folder / PACKAGE / NAME)
    if not shared.trust_remote_code:
        refuse_foreign_code(folder, declared)
    refuse_other_base(declared, folder / declared.folder, shared.cache_folder)
    common = folder if data else recipe_folder(folder)
    threads = shared.settings().threads
    deployment = start_deployment(folder, declared, target, common, list(data), shared.cache_folder, port, threads)
    shared.screen.note(f"run {deployment.run} on {declared.clients} nodes, SuperLink at 127.0.0.1:{deployment.port}")
    return deployment


def existing_deployment_folder(app: Path) -> Path:
    """The folder of an app's deployment, beside it. Raises Reject (odd-file) where links lie in it."""
    from ...core.safe_read import refuse_unsafe_write_folder

    folder = app.with_name(f"{app.name}-deployment")
    refuse_unsafe_write_folder(folder)
    return folder


def _wait_and_print_status(deployment: "Deployment", shared: SharedFlags) -> None:
    from ...apps.federation.deployment import wait_for_run_or_dead_process

    _print_status(deployment, shared, wait_for_run_or_dead_process(deployment))


def _print_status(deployment: "Deployment", shared: SharedFlags, status: "RunStatus | None" = None) -> None:
    from ...apps.federation.deployment import deployment_failed, run_status
    from ...apps.federation.processes import last_log_line

    if status is None and any(p.name == "superlink" for p in deployment.broken):
        raise _process_ended_error(deployment)  # and nobody else knows how the run goes
    status = status or run_status(deployment)
    word, details = status.status, status.details
    if shared.format == "json":
        living = {p.name: p.is_alive for p in deployment.processes}
        body = {**status._asdict(), "run": deployment.run, "processes": living}
        shared.screen.answer_json("federate status", **body)
    else:
        rows = [
            (p.name, str(p.pid), "lives" if p.is_alive else f"ended: {last_log_line(p.log)}")
            for p in deployment.processes
        ]
        shared.screen.answer(shared.screen.table([("process", "pid", ""), *rows], right=(1,)).rstrip("\n"))
        shared.screen.answer(f"run {deployment.run}: {word}")
        if status.bytes_up:
            shared.screen.answer(_traffic_sentence(status, len(deployment.nodes)))
    if word in ("finished:failed", "finished:stopped"):
        raise deployment_failed(f"the run is {word}: {details}", help=f"logs are in {deployment.folder}").rejection()
    if deployment.broken and word != "finished:completed":
        raise _process_ended_error(deployment)


def _traffic_sentence(status: "RunStatus", nodes: int) -> str:
    """Bytes of all nodes, and of one a minute."""
    from ...core.quantity import size_text

    rate = (status.bytes_up + status.bytes_down) * 60 / max(status.seconds, 1.0) / max(nodes, 1)
    sums = f"{size_text(status.bytes_up)} up, {size_text(status.bytes_down)} down"
    return f"Flower counts {sums}: {size_text(round(rate))} a minute and node, without polls, HTTP and TLS"


def _process_ended_error(deployment: "Deployment") -> Reject:
    from ...apps.federation.deployment import deployment_failed
    from ...apps.federation.processes import last_log_line

    process = deployment.broken[0]
    return deployment_failed(
        f"{process.name} has ended: {last_log_line(process.log)}",
        note=f"see {process.log}",
        help="`effc federate down`, then `up`: the run goes on from its last round",
    ).rejection()
