"""Workers on a cluster of Ray's: each is an actor, which answers lines as a process here does. Ray is imported here
alone, and only when asked for."""

import importlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass, field
from functools import cached_property
from select import select
from typing import Any

from ...dsl.syntax.diagnostics import Fault
from .worker_transport import WORKER, WorkerTransport

no_cluster = Fault(
    "no-cluster",
    "A cluster of Ray's was named with `--workers ray:ADDRESS`, and none answers there.\n\n"
    "The address is the one that `ray start --head` prints, with its port: 6379 unless told otherwise.",
    exit="network",
)
open_cluster = Fault(
    "open-cluster",
    "A cluster of Ray's was named with `--workers ray:ADDRESS` that asks nobody for a token.\n\n"
    "Ray listens on all interfaces of its machines, and whoever reaches them runs code there as the user who started "
    "it. With RAY_AUTH_MODE=token in the environment of `ray start` and of effc, and one RAY_AUTH_TOKEN_PATH for all, "
    "every call needs the token in that file.",
    exit="environment",
)
PATIENCE = 3.0  # seconds to be connected in, again for an answer, and again for one in Ray's words
SETTINGS = 4  # the kind of the first frame of either side, RFC 9113, section 3.4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
HEAD = "give the address that `ray start --head` prints, such as ray:10.0.0.5:6379"
PROBE_SOURCE = """import sys
from ray._raylet import GcsClient
print(flush=True)
GcsClient(address=sys.argv[1])
print("joined", flush=True)
"""  # the client that `ray.init` makes first, and makes twenty times where nobody answers it
OBJECTS = 80 << 20  # bytes of Ray's store: answers are short lines


TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH for `ray start` and for effc"
LOCAL = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the latter has Ray listen at loopback


def require_authenticated_ray_head(address: str) -> None:
    """Raises Reject (no-cluster) within seconds where nobody answers as the head of a cluster does: by HTTP/2, which
    its calls go over, and then to a client of Ray's. Ray's own way to say so takes minutes, under lines of its own.
    Raises Reject (open-cluster) where it answers a client without a token."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE) as head:
            head.sendall(PREFACE)
            answer = head.recv(9)
        speaks = len(answer) == 9 and answer[3] == SETTINGS
    except (OSError, ValueError, OverflowError):
        speaks = False
    if speaks and _can_join(address, "disabled"):
        raise open_cluster(f"the cluster at {address} asks nobody for a token", help=TOKEN).rejection()
    has_token = os.environ.get("RAY_AUTH_MODE") == "token"
    if not speaks or not has_token or not _can_join(address, "token"):
        text = f"nobody answers at {address} as a cluster of Ray's does"
        raise no_cluster(
            text if has_token else f"{text} without a token", help=HEAD if has_token else TOKEN
        ).rejection()


def _can_join(address: str, auth_mode: str) -> bool:
    """Whether a client may join, with the environment's token or none, by RAY_AUTH_MODE. Asked by a process of its
    own: a call of Ray's can't be broken off, nor silenced."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PROBE_SOURCE, address],
        env={**os.environ, "RAY_AUTH_MODE": auth_mode},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as asking:
        assert asking.stdout is not None
        try:
            asking.stdout.readline()  # Ray is imported, which waits for nobody
            return bool(select([asking.stdout], [], [], PATIENCE)[0]) and asking.stdout.readline() == b"joined\n"
        finally:
            asking.kill()


def _require_token_authentication() -> None:
    """Raises Reject (open-cluster) where this process would join without a token: Ray reads its environment once."""
    from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

    if get_authentication_mode() != AuthenticationMode.TOKEN:
        raise open_cluster("Ray was imported here before it was to ask for a token", help=TOKEN).rejection()
    AuthenticationTokenLoader.instance().reset_cache()  # one of an earlier cluster


class Worker:
    """Worker that runs in an actor."""

    def __init__(self, module: str, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.replica = importlib.import_module(f"{module}.replica").Replica()

    def answer_line(self, line: str) -> str:
        return self.replica.answer_line(line)


@dataclass
class RayTransport(WorkerTransport):
    """Actors on the cluster at an address, as many as it has processors for, or on one that is started here for them.

    owed   answers that are awaited -> the places of who owes them
    """

    address: str
    threads: int
    actors: dict[int, Any] = field(default_factory=dict)
    owed: dict[Any, int] = field(default_factory=dict)
    folder: "tempfile.TemporaryDirectory[str] | None" = None
    environment: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.address:
            require_authenticated_ray_head(self.address)

    @cached_property
    def size(self) -> int:
        """Joins the cluster."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Paths of sockets have at most 107 bytes.
        self.folder = tempfile.TemporaryDirectory(prefix="effc-ray-", dir="/tmp", ignore_cleanup_errors=True)
        options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False, "namespace": "effc"}
        if not self.address:
            os.environ.setdefault("RAY_worker_niceness", "0")  # theirs is 15, which starves beside other work
            self._set_environment(LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
            options |= {
                "num_cpus": os.cpu_count(),
                "include_dashboard": False,
                "object_store_memory": OBJECTS,
                "_temp_dir": self.folder.name,
            }
        import ray

        _require_token_authentication()
        try:
            with chdir(self.folder.name):  # which Ray puts before the libraries on its workers' path
                ray.init(address=self.address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:  # something answers there that is no head
            reason = str(error).partition("\n")[0]
            raise no_cluster(
                f"no cluster of Ray's is joined at {self.address or 'this machine'}: {reason}", help=HEAD
            ).rejection() from error
        count = int(ray.cluster_resources().get("CPU", 0)) // self.threads
        if not count:
            raise no_cluster(
                f"the cluster at {self.address} has fewer than {self.threads} processors",
                help="start nodes, or give workers fewer `--threads`",
            ).rejection()
        return count

    def _set_environment(self, values: Mapping[str, str]) -> None:
        self.environment = {name: os.environ.get(name) for name in values}
        os.environ.update(values)

    def start_worker(self, index: int) -> None:
        import ray

        kind = ray.remote(num_cpus=self.threads, max_restarts=0)(Worker)
        self.actors[index] = kind.remote(WORKER, self.threads)

    def send(self, index: int, line: str) -> None:
        self.owed[self.actors[index].answered.remote(line)] = index

    def receive(self, timeout_s: float) -> list[tuple[int, str, bool]]:
        import ray

        if not self.owed:
            time.sleep(min(timeout_s, 0.1))
            return []
        ready, _ = ray.wait(list(self.owed), num_returns=1, timeout=timeout_s)
        replies = []
        for one in ready:
            index = self.owed.pop(one)
            try:
                replies.append((index, ray.get(one), True))
            except ray.exceptions.RayError as error:
                replies.append((index, type(error).__name__, False))
        return replies

    def stop_worker(self, index: int) -> None:
        import ray

        self.owed = {answer: other for answer, other in self.owed.items() if other != index}
        ray.kill(self.actors.pop(index))

    def end(self) -> None:
        import ray

        ray.shutdown()
        if self.folder:
            self.folder.cleanup()
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
