"""Flower's messages as ours: the same server and the same clients in its simulation and in its deployment.

Works with flwr 1.42. All that touches Flower's own objects is in this file.
"""

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....dsl.syntax.diagnostics import Fault
from .bounds import require_deadline_s
from .checkpoint import Checkpoint
from .client_host import ClientHost
from .declaration import make_federation, read_declaration
from .grid import SENTENCE, Answer, Client, Message, Reply
from .noise import privacy_sentence
from .results import write_results
from .rounds import fault_lines
from .state import State
from .table import HEAD, round_line

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.app import Message as FlowerMessage
    from flwr.serverapp import Grid

unsupported_adapter = Fault(
    "no-place", "A client of a Flower federation was not told where its model or its data are.", exit="usage"
)

GRACE = 1.0  # seconds after the deadline, at which a client should have stopped by itself
LONGEST = 1e8  # seconds that a timer of the system takes
_PREFIX = "effc."  # before the names of our records
_lock = threading.Lock()  # clients of one process share a model


class FlowerGrid:
    """A grid of Flower under our three methods. What a reply answers is told by its message, not by its sender: the
    SuperLink answers for a node that is gone."""

    def __init__(self, grid: "Grid"):
        self.grid = grid
        self.nodes: dict[str, int] = {}  # by message id

    def get_node_ids(self) -> list[int]:
        return sorted(self.grid.get_node_ids())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = list(self.grid.push_messages([_to_flower_message(m) for m in messages]))
        self.nodes |= {name: m.node for name, m in zip(ids, messages, strict=True) if name}
        return [name for name in ids if name]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Reply]:
        replies = list(self.grid.pull_messages(list(message_ids)))
        return [self._parse_reply(reply) for reply in replies if reply.metadata.reply_to_message_id in self.nodes]

    def _parse_reply(self, flower_message: "FlowerMessage") -> Reply:
        """A message that can't be read is its client's mistake, whatever reading it raised."""
        to = flower_message.metadata.reply_to_message_id
        node = self.nodes.pop(to)
        try:
            if flower_message.has_error():
                return Reply(to, node, error=_last_line_of_traceback(str(flower_message.error.reason)))
            return Reply(to, node, _parse_states(flower_message.content), _config_of_record(flower_message.content))
        except Exception as error:
            return Reply(
                to,
                node,
                error=f"its reply can't be read: {_last_line_of_traceback(f'{type(error).__name__}: {error}')}",
            )


def _last_line_of_traceback(reason: str) -> str:
    """Message of a client's error, out of the traceback that the engine sends."""
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    return lines[-1][:SENTENCE] if lines else "the client failed and said nothing"


def _to_flower_message(message: Message) -> "FlowerMessage":
    from flwr.app import ConfigRecord, MessageType, RecordDict
    from flwr.app import Message as FlowerMessage

    content = RecordDict(
        {f"{_PREFIX}config": ConfigRecord({"kind": message.kind, "round": message.number, **message.config})}
    )
    for name, state in message.arrays.items():
        content[f"{_PREFIX}arrays.{name}"] = _to_array_record(state)
    return FlowerMessage(
        content, dst_node_id=message.node, message_type=MessageType.TRAIN, group_id=str(message.number)
    )


def _to_array_record(state: State) -> Any:
    from flwr.app import Array, ArrayRecord

    return ArrayRecord.from_array_dict({name: Array(np.ascontiguousarray(a)) for name, a in state.items()})


def _config_of_record(content: Any) -> dict[str, Any]:
    return dict(content[f"{_PREFIX}config"])


def _parse_states(content: Any) -> dict[str, State]:
    front = f"{_PREFIX}arrays."
    return {
        name.removeprefix(front): {key: array.numpy() for key, array in record.items()}
        for name, record in content.items()
        if name.startswith(front)
    }


# -- the server ------------------------------------------------------------------------------------------------


def serve(grid: "Grid", context: "Context", declaration_path: Path) -> None:
    """Run all rounds of a declaration, with what `--run-config` says. Raises where it can't be finished."""
    config = context.run_config
    declared = read_declaration(declaration_path).with_changes(
        rounds=int(config["rounds"]), clients=int(config["clients"]), deadline=float(config["deadline"])
    )
    work = Path(str(config["work"])) if config["work"] else None
    folder = work / declared.identity if work else None
    checkpoint = Checkpoint(folder, declared.identity) if folder else None
    _log_line(HEAD)
    run = make_federation(declared, FlowerGrid(grid), checkpoint, lambda round_: _log_line(round_line(round_)))
    run.run()
    for text in fault_lines(run.course.rounds):
        _log_line(text)
    if declared.clip:
        _log_line(privacy_sentence(run.course.rounds, declared))
    if config["output"]:
        source = declaration_path.parents[1] if declared.trains == "reft" else None
        write_results(run.strategy.results(), run.course, declared, Path(str(config["output"])), source)


def _log_line(text: str) -> None:
    """A line for Flower's log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# -- a client --------------------------------------------------------------------------------------------------


def respond(flower_message: "FlowerMessage", context: "Context", declaration_path: Path) -> "FlowerMessage":
    """A client's answer to one message; its memory is the context's state."""
    from flwr.app import ConfigRecord, RecordDict
    from flwr.app import Message as FlowerMessage

    config = _config_of_record(flower_message.content)
    kind, number = str(config.pop("kind")), int(config.pop("round"))
    message = Message(0, kind, number, _parse_states(flower_message.content), config)
    declared = read_declaration(declaration_path).with_changes(clients=int(context.run_config["clients"]))
    node = context.node_config
    local_data = "data" in node
    model, data = (str(node.get(name) or context.run_config[name]) for name in ("model", "data"))
    if not model or not data:
        raise unsupported_adapter(
            f"nobody said where the {'data' if model else 'model'} of this client are",
            help='--run-config or --node-config: \'model="..." data="..."\'',
        ).rejection()
    with _lock, time_limit(require_deadline_s(config, declared.deadline) + GRACE):
        participant = _cached_client(
            declared.identity, declaration_path, model, data, local_data, int(node["partition-id"]), declared.clients
        )
        memory = _load_memory(context)
        answer: Answer = participant(message, memory)
        _save_memory(memory, context)
    content = RecordDict({f"{_PREFIX}config": ConfigRecord(dict(answer.config))})
    for name, state in answer.arrays.items():
        content[f"{_PREFIX}arrays.{name}"] = _to_array_record(state)
    return FlowerMessage(content, reply_to=flower_message)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the body takes longer: a client that never answers blocks its node for all runs.

    A timer's signal comes between two steps of Python, in the main thread, where Flower runs a client; in others there
    is no such bound.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"it was stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_open = ExitStack()  # adapters stay on their model as long as the process lives


@cache
def _cached_client(
    identity: str,
    declaration_path: Path,
    model_folder: str,
    data_folder: str,
    local_data: bool,
    client: int,
    clients: int,
) -> Client:
    """The client of a partition in this process, which may answer many messages."""
    from ...core.cache import default_cache_folder
    from ...core.settings import Settings

    declared = read_declaration(declaration_path).with_changes(clients=clients)
    host = ClientHost(declared, Path(model_folder), Path(data_folder), Settings(default_cache_folder()), local_data)
    (participant,) = _open.enter_context(host.participants([client]))
    return participant


def _load_memory(context: "Context") -> dict[str, Any]:
    """The memory of a node: states, and the rounds whose stacks are merged."""
    memory: dict[str, Any] = {name: dict(state) for name, state in _parse_states(context.state).items()}
    if f"{_PREFIX}done" in context.state:
        memory["done"] = {int(n) for n in context.state[f"{_PREFIX}done"]["rounds"]}
    return memory


def _save_memory(memory: dict[str, Any], context: "Context") -> None:
    from flwr.app import ConfigRecord

    for name, value in memory.items():
        if name == "done":
            context.state[f"{_PREFIX}done"] = ConfigRecord({"rounds": sorted(value)})
        elif value:
            context.state[f"{_PREFIX}arrays.{name}"] = _to_array_record(value)
