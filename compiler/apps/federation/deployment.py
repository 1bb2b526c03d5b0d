"""A deployment of a federation on this machine: one SuperLink with TLS, a process that runs the server, the nodes.

Everything that it makes lies in one folder: certificates and keys, the database, logs, checkpoints, and
`deployment.json`, which names the processes. The SuperLink listens at loopback alone, since whoever reaches it may run
code on the nodes; it survives `kill -9` with its run, as isolation is by process and the database is on disk.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.json_types import from_json
from ...core.json_errors import reject_on_error
from ...core.safe_read import MIB, irregular_file, parse_strict_json, read_json
from .declaration import Declaration
from .identities import check_certificates, write_keys_and_certificates
from .processes import (
    Process,
    accepts_connections,
    free_ports,
    is_port_in_use,
    last_log_line,
    start_process,
    terminate_live_processes,
)

NAME, FORMAT = "deployment.json", 1
ENTRY = "effc"  # of Flower's config
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
POLL_SECONDS = 2.0  # seconds between two looks at the processes of a deployment
LONGEST_STREAM = 600.0  # seconds after which the run itself is asked, whatever its log does
VITAL = ("superlink", "server")
COMMANDS = ("flwr", "flower-superlink", "flower-superexec", "flower-supernode")
VERSIONS = ((1, 42), (1, 43))

no_flower = Fault(
    "no-flower", "A deployment needs Flower, which is not installed or is of another version.", exit="environment"
)
port_taken = Fault("port-taken", "A port that a deployment is to listen at is in use.", exit="usage")
deployed_already = Fault("deployed-already", "A federation is deployed and is to be deployed again.", exit="usage")
not_deployed = Fault("not-deployed", "A federation that is not deployed was asked after.", exit="usage")
deployment_failed = Fault(
    "deployment-failed", "A process of a deployment ended, or Flower's run did not complete.", exit="failure"
)


@dataclass(frozen=True)
class Deployment:
    """`run` is the id that Flower gave the run; "" before it was submitted."""

    folder: Path
    port: int
    processes: tuple[Process, ...]
    run: str = ""

    def save(self) -> "Deployment":
        """Write deployment.json; the deployment itself."""
        from ...core.cache import write_atomic

        body = {"format": FORMAT, "port": self.port, "run": self.run, "processes": [asdict(p) for p in self.processes]}
        write_atomic(self.folder / NAME, (json.dumps(body, indent=1) + "\n").encode())
        return self

    @property
    def stopped_processes(self) -> list[Process]:
        return [p for p in self.processes if not p.is_alive]

    @property
    def nodes(self) -> list[Process]:
        return [p for p in self.processes if p.name not in VITAL]

    @property
    def broken(self) -> list[Process]:
        """Lost ones that no run goes on without: rounds go on without a node."""
        return [p for p in self.stopped_processes if p.name in VITAL]


def read_deployment(folder: Path) -> Deployment:
    with reject_on_error(not_deployed, f"{folder} holds no deployment", "`effc federate up FOLDER` starts one"):
        body = read_json(folder / NAME, MIB)
        processes = from_json(body["processes"], tuple[Process, ...], "processes")
        if any(Path(p.log) != folder / f"{p.name}.log" or "/" in p.name for p in processes):
            raise ValueError("a log lies elsewhere")
        port, run = body["port"], body["run"]
        if type(port) is not int or not 0 < port < 1 << 16 or not isinstance(run, str) or (run and not run.isalnum()):
            raise ValueError("there is no such port or run")
        return Deployment(folder, port, processes, run)


def flower_command_folder() -> Path:
    """The folder of Flower's commands; Reject (no-flower) where they are not there, or of another version."""
    from importlib.metadata import PackageNotFoundError, version

    requirement = f"flwr >={'.'.join(map(str, VERSIONS[0]))},<{'.'.join(map(str, VERSIONS[1]))}"
    try:
        installed = version("flwr")
    except PackageNotFoundError as error:
        raise no_flower(
            "flwr is not installed", help=f'pip install "effc[fed]", which brings {requirement}'
        ).rejection() from error
    if not VERSIONS[0] <= tuple(int(n) for n in installed.split(".")[:2]) < VERSIONS[1]:
        raise no_flower(
            f"flwr {installed} is installed, and this effc works with {requirement}",
            help=f'pip install "{requirement}"',
        ).rejection()
    folder = Path(sys.executable).parent
    missing = [name for name in COMMANDS if not (folder / name).exists()]
    if missing:
        raise no_flower(f"{folder} has no `{missing[0]}`", help="install flwr into the environment of effc").rejection()
    return folder


def start_deployment(
    app_folder: Path,
    declaration: Declaration,
    deployment_folder: Path,
    default_data_folder: Path,
    data_folders: Sequence[Path],
    cache_folder: Path,
    port: int = 0,
    threads: int | None = None,
) -> Deployment:
    """Start everything and submit the run. What was started is ended again where a part of it does not come up.

    default_data_folder  what the data's paths start from, of nodes without a folder of their own
    data_folders    data folders of the nodes, one for each client; none: all have `default_data_folder`, as declared
    threads         of the server and of each node; None: as many as torch takes by itself
    """
    commands = flower_command_folder()
    _refuse_impossible_deployment(deployment_folder, declaration, data_folders, port)
    deployment_folder.mkdir(parents=True, exist_ok=True)
    _remove_deployment_files(deployment_folder)
    write_keys_and_certificates(deployment_folder / "keys", declaration.clients)
    check_certificates(deployment_folder / "keys")
    ports = free_ports(declaration.clients + 1)
    deployment = Deployment(deployment_folder, port or ports[-1], ())
    env = {**os.environ, **QUIET, "FLWR_HOME": str(deployment_folder / "flower"), "EFFC_CACHE_DIR": str(cache_folder)}
    env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    env["PATH"] = f"{commands}{os.pathsep}{env.get('PATH', '')}"
    _write_flwr_config(deployment_folder / "flower", deployment.port)
    try:
        deployment = _start_processes(deployment, commands, declaration, app_folder, ports, data_folders, env)
        run_config = {
            "clients": declaration.clients,
            "data": str(default_data_folder),
            "model": str(app_folder / declaration.folder),
        }
        run_config |= {"work": str(deployment_folder / "checkpoints"), "output": str(deployment_folder / "result")}
        config = " ".join(f"{name}={json.dumps(value)}" for name, value in run_config.items())
        run = _run_flwr(commands, env, "run", str(app_folder), ENTRY, "--run-config", config)
        return replace(deployment, run=str(run["run-id"])).save()
    except BaseException:
        terminate_live_processes(
            read_deployment(deployment_folder).processes
            if (deployment_folder / NAME).is_file()
            else deployment.processes
        )
        _remove_deployment_files(deployment_folder)
        raise


def _refuse_impossible_deployment(
    folder: Path, declaration: Declaration, data_folders: Sequence[Path], port: int
) -> None:
    if (folder / NAME).is_file():
        raise deployed_already(f"{folder} holds a deployment", help="end it first: `effc federate down`").rejection()
    if data_folders and len(data_folders) != declaration.clients:
        raise not_deployed(
            f"{len(data_folders)} data folders for {declaration.clients} clients", help="give one for each, or none"
        ).rejection()
    missing = next((path for path in data_folders if not path.is_dir()), None)
    if missing is not None:
        raise not_deployed(f"{missing} is no folder", help="name the folder that a client's data lie in").rejection()
    if port and is_port_in_use(port):
        raise port_taken(
            f"port {port} of 127.0.0.1 is in use", help="take another `--port`, or leave it out"
        ).rejection()


def _start_processes(
    deployment: Deployment,
    command_folder: Path,
    declaration: Declaration,
    app_folder: Path,
    ports: Sequence[int],
    data_folders: Sequence[Path],
    env: Mapping[str, str],
) -> Deployment:
    """SuperLink, the process that runs the server, and the nodes, each registered by its key."""
    keys, address = deployment.folder / "keys", f"127.0.0.1:{deployment.port}"
    secret = ("--superexec-auth-secret-file", str(keys / "secret"))
    link: tuple[str, ...] = (
        str(command_folder / "flower-superlink"),
        "--host",
        "127.0.0.1",
        "--port",
        str(deployment.port),
        "--isolation",
        "process",
    )
    link += ("--database", str(deployment.folder / "state.db"), *secret, "--enable-supernode-auth")
    link += ("--ssl-ca-certfile", str(keys / "ca.crt"), "--ssl-certfile", str(keys / "server.crt"))
    link += ("--ssl-keyfile", str(keys / "server.key"), "--disable-runtime-dependency-installation")
    deployment = _saved_with_process(deployment, start_process("superlink", link, env, deployment.folder))
    _wait_for_superlink(deployment)
    trust = ("--root-certificates", str(keys / "ca.crt"))
    executor = (str(command_folder / "flower-superexec"), "--runtime-api-address", address, *trust, *secret)
    deployment = _saved_with_process(deployment, start_process("server", executor, env, deployment.folder))
    for number in range(declaration.clients):
        _run_flwr(command_folder, env, "supernode", "register", str(keys / f"node{number}.pub"), ENTRY)
        model = json.dumps(str(app_folder / declaration.folder))
        config = f"partition-id={number} num-partitions={declaration.clients} model={model}"
        if data_folders:
            config += f" data={json.dumps(str(data_folders[number].resolve()))}"
        node: tuple[str, ...] = (
            str(command_folder / "flower-supernode"),
            "--superlink",
            address,
            *trust,
            "--max-retries",
            "5",
        )
        node += ("--auth-supernode-private-key", str(keys / f"node{number}"), "--host", "127.0.0.1")
        node += ("--port", str(ports[number]), "--node-config", config)
        deployment = _saved_with_process(deployment, start_process(f"node{number}", node, env, deployment.folder))
    return deployment


def _saved_with_process(deployment: Deployment, process: Process) -> Deployment:
    return replace(deployment, processes=(*deployment.processes, process)).save()


def _wait_for_superlink(deployment: Deployment) -> None:
    """Wait until the SuperLink listens."""
    until = time.monotonic() + 60
    while not accepts_connections(deployment.port):
        if deployment.stopped_processes or time.monotonic() > until:
            reason = last_log_line(deployment.processes[0].log)
            raise deployment_failed(
                f"the SuperLink did not come up: {reason}", help=f"see {deployment.processes[0].log}"
            ).rejection()
        time.sleep(0.2)


def _write_flwr_config(flwr_home: Path, port: int) -> None:
    from ...core.cache import write_atomic

    ca = json.dumps(str(flwr_home.parent / "keys" / "ca.crt"))
    text = f'[superlink]\ndefault = "{ENTRY}"\n\n[superlink.{ENTRY}]\n'
    text += f'address = "127.0.0.1:{port}"\nroot-certificates = {ca}\n'
    write_atomic(flwr_home / "config.toml", text.encode())


def _run_flwr(command_folder: Path, env: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """Run `flwr` and parse the JSON that it prints."""
    call = [str(command_folder / "flwr"), *arguments, "--format", "json"]
    completed = subprocess.run(call, env=dict(env), capture_output=True, text=True, check=False, timeout=120)
    try:
        answer = parse_strict_json(completed.stdout)
    except ValueError:
        answer = {}
    if completed.returncode or not answer.get("success", False):
        lines = (str(answer.get("error-message", "")) or completed.stderr).strip().splitlines()
        raise deployment_failed(
            f"`flwr {arguments[0]}` said: {lines[-1].strip() if lines else 'nothing'}",
            help=f"`{call[0]} {' '.join(arguments)}`",
        ).rejection()
    return answer


class RunStatus(NamedTuple):
    """
    status     Flower's word for the run, `finished:completed` where all is well
    seconds    since the server began
    bytes_up   of all nodes, as Flower counts: messages with their framing, no polls, HTTP or TLS
    """

    status: str
    details: str
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def is_over(self) -> bool:
        return self.status.startswith("finished")


def run_status(deployment: Deployment) -> RunStatus:
    run = _run_flwr(*_command_folder_and_env(deployment), "ls", ENTRY, "--run-id", deployment.run)["runs"][0]
    traffic = run.get("network-traffic", {})
    return RunStatus(
        str(run["status"]),
        str(run.get("status-details", "")),
        float(run.get("elapsed", 0.0)),
        int(traffic.get("inbound-bytes", 0)),
        int(traffic.get("outbound-bytes", 0)),
    )


def wait_for_run_or_dead_process(deployment: Deployment) -> RunStatus | None:
    """The status of the run when it is over; None where a process ended that no run goes on without.

    The stream of its log ends when the run does: one process for a wait, where each look by `flwr ls` would be one.
    """
    while not deployment.broken:
        _wait_for_log_end(deployment)
        if not deployment.broken and (status := run_status(deployment)).is_over:
            return status
        time.sleep(POLL_SECONDS)
    return None


def _wait_for_log_end(deployment: Deployment) -> None:
    """Wait until the stream of the log ends, a vital process has ended, or LONGEST_STREAM is over."""
    commands, env = _command_folder_and_env(deployment)
    call = [str(commands / "flwr"), "log", deployment.run, ENTRY, "--stream"]
    until = time.monotonic() + LONGEST_STREAM
    with subprocess.Popen(
        call, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as stream:
        try:
            while stream.poll() is None and time.monotonic() < until and not deployment.broken:
                with suppress(subprocess.TimeoutExpired):
                    stream.wait(POLL_SECONDS)
        finally:
            stream.kill()


def _command_folder_and_env(deployment: Deployment) -> tuple[Path, dict[str, str]]:
    """The folder of Flower's commands, and an environment in which they ask this deployment."""
    commands = flower_command_folder()
    check_certificates(deployment.folder / "keys")
    home = deployment.folder / "flower"
    _write_flwr_config(home, deployment.port)  # whatever the folder says, it is this machine that is asked
    return commands, {**os.environ, **QUIET, "FLWR_HOME": str(home)}


def stop_deployment(deployment: Deployment) -> list[str]:
    """End its processes, and take keys, database and deployment.json away; logs, checkpoints and results stay."""
    names = terminate_live_processes(tuple(reversed(deployment.processes)))
    _remove_deployment_files(deployment.folder)
    return names


def _remove_deployment_files(folder: Path) -> None:
    """Remove keys, database, deployment.json and Flower's home. What lies there before a deployment starts is of one
    that was killed, or came with the artifact: Flower runs apps that its home or its database has.

    Raises Reject (odd-file) where something of it stays.
    """
    for name in ("keys", "flower", "state.db", "state.db-wal", "state.db-shm", NAME):
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()
        if os.path.lexists(path):
            raise irregular_file(
                f"{path} can't be removed", help="remove it: Flower runs apps that lie there"
            ).rejection()
