"""The round loop: who takes part, what each gets, what is made of the replies in time, and going on after a kill.

A client that fails, is late, sends NaN or other shapes, holds another base model or has no data is left out of the
round with a sentence; the run goes on with the others, or stops with a sentence where fewer than `least` are left.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ....dsl.syntax.diagnostics import Fault
from .bounds import finite_or_nan
from .checkpoint import Checkpoint
from .grid import SENTENCE, Grid, Message, Reply, send_and_receive
from .history import ClientUpdate, History, Round
from .masks import Keys
from .secure import LEAST, make_masked_update_request, sum_of_masked_states
from .state import State, state_fault, value_count
from .strategy import Strategy, TrainedState

too_few_clients = Fault(
    "too-few-clients", "Fewer clients came to a federation, or answered in a round, than it needs.", exit="failure"
)

NUMBERS = ("loss", "before", "examples", "seconds", "mix", "accuracy")  # of a reply
_POLL_SECONDS = 1.0  # seconds between two counts of the nodes


@dataclass(frozen=True)
class Terms:
    """
    rounds      in all
    clients     that must come before the first round
    least       usable replies without which a round is a failure
    share       of the clients that take part in a round, drawn by `seed`
    deadline    seconds that a round may take
    patience    seconds to wait for `clients`
    base        sha256 of the model that all must hold
    every       seconds between two looks for replies, of the first ones of a round
    partitions  client numbers are below it; 0 for no bound
    examples    rows that a client counts with at most; 0 for no bound
    """

    rounds: int
    clients: int
    base: str
    least: int = 1
    share: float = 1.0
    deadline: float = 600.0
    patience: float = 120.0
    seed: int = 0
    every: float = 0.1
    partitions: int = 0
    examples: int = 0


@dataclass(frozen=True)
class Member:
    """A node that joined, as the client of a partition. `examples` are what it counts with at most in any round."""

    client: int
    node: int
    examples: int
    public: str = ""  # its key for masks, hex


@dataclass(frozen=True)
class Sum:
    """Of the states of some clients."""

    total: State
    clients: tuple[int, ...]


@dataclass
class Federation:
    """One run. `on_round` hears every round when it is over."""

    grid: Grid
    strategy: Strategy
    terms: Terms
    checkpoint: Checkpoint | None = None
    on_round: Callable[[Round], None] = lambda round_: None
    members: dict[int, Member] = field(default_factory=dict)  # by client
    known: dict[int, int | None] = field(default_factory=dict)  # node -> client, None where it can't take part
    holding: dict[int, int] = field(default_factory=dict)  # client -> last round whose state its node has
    faults: dict[int, str] = field(default_factory=dict)  # of nodes that can't take part
    course: History = field(default_factory=History)

    def run(self) -> History:
        """All rounds that are left; Reject where too few clients are."""
        self._restore_checkpoint()
        self._wait_for_clients()
        if not self.course.rounds and self.strategy.starts:
            self.strategy.begin(self._initial_state())
        for number in range(len(self.course.rounds) + 1, self.terms.rounds + 1):
            round_ = self._run_round(number)
            self.course.rounds.append(round_)
            if self.checkpoint:
                body = {"rounds": [r.to_json() for r in self.course.rounds]}
                self.checkpoint.write_round(number, self.strategy.saved(), body)
            self.on_round(round_)
        return self.course

    def _restore_checkpoint(self) -> None:
        stored = self.checkpoint.read_last_round() if self.checkpoint else None
        if stored is not None:
            states, body = stored
            self.strategy.restore(states)
            self.course = History([Round.from_json(r) for r in body["rounds"]])

    # -- who is there ----------------------------------------------------------------------------------------

    def _wait_for_clients(self) -> None:
        """Wait until as many clients have joined as the terms ask for."""
        end = time.monotonic() + self.terms.patience
        while True:
            self._register_new_nodes()
            if len(self.members) >= self.terms.clients:
                return
            all_known = len(self.known) >= self.terms.clients
            if time.monotonic() >= end or (all_known and self.faults):
                raise too_few_clients(
                    f"{len(self.members)} of {self.terms.clients} clients can take part",
                    note=self._faults_text(self.faults),
                    help="start the others, or ask for fewer with `wait`",
                ).rejection()
            time.sleep(min(self.terms.every, _POLL_SECONDS))

    def _register_new_nodes(self) -> None:
        """Ask nodes that are new who they are; forget those that are gone."""
        present = set(self.grid.get_node_ids())
        for client in [c for c, m in self.members.items() if m.node not in present]:
            self.known.pop(self.members.pop(client).node)
            self.holding.pop(client, None)
        fresh = sorted(present - self.known.keys())
        messages = [Message(node, "join", 0, {}, {"secure": True} if self.strategy.secure else {}) for node in fresh]
        replies = send_and_receive(self.grid, messages, self.terms.deadline, self.terms.every)
        for reply in sorted(replies, key=lambda r: (_client_id_or_minus_one(r), r.node)):
            member = self._member_or_record_fault(reply)
            self.known[reply.node] = None if member is None else member.client
            if member is not None:
                self.members[member.client] = member
                self.faults.pop(member.client, None)

    def _member_or_record_fault(self, reply: Reply) -> Member | None:
        """The client that a node is, or None, with the reason in `faults`."""
        client = _client_id_or_minus_one(reply)
        try:
            return self._checked_member(client, reply)
        except Exception as error:  # of what a stranger sent: it is left out, whatever that was
            self.faults[client if client >= 0 else -1 - len(self.faults)] = _error_sentence(error)
            return None

    def _checked_member(self, client: int, reply: Reply) -> Member:
        """Raises ValueError with the reason where the node can't take part."""
        base, examples = reply.config.get("base"), finite_or_nan(reply.config.get("examples"))
        public = str(reply.config.get("public", ""))
        if reply.error:
            raise ValueError(reply.error)
        if base != self.terms.base:
            raise ValueError(f"its base model is {str(base)[:12]}, that of the federation {self.terms.base[:12]}")
        if not examples >= 1:
            raise ValueError("it has no data")
        if client < 0:
            raise ValueError("it does not say which client it is")
        if client in self.members:
            raise ValueError(f"another node is client {client} already")
        if self.terms.partitions and client >= self.terms.partitions:
            raise ValueError(f"it is client {str(client)[:12]}, and there are {self.terms.partitions}")
        if self.strategy.secure:
            self._check_mask_key(public)
        return Member(client, reply.node, int(min(examples, self.terms.examples or examples)), public)

    def _check_mask_key(self, public_key: str) -> None:
        """Raises ValueError: a key that others can't use, or that is another's, would break every round's sum."""
        try:
            Keys().check_public_key(public_key)
        except ValueError as error:
            raise ValueError("its key for masks is none") from error
        if any(member.public == public_key for member in self.members.values()):
            raise ValueError("its key for masks is another client's")

    def _initial_state(self) -> State:
        """The state that all start from, from the first client that can tell it."""
        for client, member in sorted(self.members.items()):
            if not self.strategy.can_provide_initial_state(client):
                continue
            message = Message(member.node, "initial", 0)
            for reply in send_and_receive(self.grid, [message], self.terms.deadline, self.terms.every):
                try:
                    state = reply.arrays.get("own", {})
                    reason = reply.error or state_fault(state, self.strategy.full)
                    if not reason:
                        return state
                except Exception as error:
                    reason = _error_sentence(error)
                self.faults[client] = reason
        raise too_few_clients(
            "no client could tell the state to start from", note=self._faults_text(self.faults)
        ).rejection()

    # -- a round ---------------------------------------------------------------------------------------------

    def _run_round(self, round_number: int) -> Round:
        started = time.monotonic()
        self._register_new_nodes()
        chosen = self._sample_clients(round_number)
        self.strategy.prepare(round_number, chosen)
        messages = {c: self._make_train_message(c, round_number) for c in chosen}
        replies = send_and_receive(self.grid, list(messages.values()), self.terms.deadline, self.terms.every)
        by_node = {reply.node: reply for reply in replies}
        results, faults, sent = {}, dict(self.faults), {}
        for client in chosen:
            try:
                reply = self._check_reply(client, round_number, by_node.get(self.members[client].node))
                examples = min(finite_or_nan(reply.config.get("examples")), self.members[client].examples)
                update = _client_update_of(reply, messages[client], self.terms.rounds)
            except Exception as error:  # of what a client sent: it costs that client its round, whatever it was
                faults[client] = _error_sentence(error)
                self.holding.pop(client, None)  # its node's memory is not what we think
                continue
            sent[client], results[client] = TrainedState(reply.arrays.get("own", {}), examples), update
            self.holding[client] = round_number
        summed = self._secure_sum(round_number, sorted(sent), faults) if self.strategy.secure else None
        if summed is not None:
            sent = {client: one for client, one in sent.items() if client in summed.clients}
            size = 4 * value_count(self.strategy.full)  # of the masked half
            results = {c: replace(t, bytes_up=t.bytes_up + size) for c, t in results.items() if c in sent}
        if len(sent) < max(1, self.terms.least):
            raise too_few_clients(
                f"round {round_number}: {len(sent)} of {len(chosen)} clients sent a usable state, "
                f"{self.terms.least} are "
                "needed",
                note=self._faults_text(faults),
                help="run again: it goes on from the last round that was kept",
            ).rejection()
        if summed is not None:
            self.strategy.aggregate_from_sum(summed.total, summed.clients)
        else:
            self.strategy.aggregate(round_number, sent)
        return Round(round_number, results, faults, time.monotonic() - started)

    def _sample_clients(self, round_number: int) -> list[int]:
        """The clients of a round; who takes part follows from the seed and the round."""
        present = sorted(self.members)
        if self.terms.share >= 1:
            return present
        count = max(1, round(self.terms.share * len(present)))
        draw = np.random.default_rng([self.terms.seed, round_number])
        return sorted(draw.choice(present, size=count, replace=False).tolist())

    def _make_train_message(self, client: int, round_number: int) -> Message:
        payload = self.strategy.payload(client, round_number, self.holding.get(client))
        terms = self.terms
        config: dict[str, str | int | float | bool] = {
            "base": terms.base,
            "deadline": terms.deadline,
            "seed": terms.seed,
            "rounds": terms.rounds,
        }
        config |= payload.config
        return Message(self.members[client].node, "train", round_number, payload.arrays, config)

    def _check_reply(self, client: int, round_number: int, reply: Reply | None) -> Reply:
        """The reply. Raises ValueError with the reason where it can't be used."""
        if reply is None:
            raise ValueError(f"no reply within {self.terms.deadline:g} s")
        if reply.error:
            raise ValueError(reply.error)
        if finite_or_nan(reply.config.get("number")) != round_number:
            raise ValueError(f"its reply is of round {str(reply.config.get('number'))[:12]}")
        if not finite_or_nan(reply.config.get("examples")) > 0:
            raise ValueError("it has no data")
        if not self.strategy.secure and (
            reason := state_fault(reply.arrays.get("own", {}), self.strategy.required_shapes(client))
        ):
            raise ValueError(reason)
        return reply

    def _secure_sum(self, round_number: int, clients: list[int], faults: dict[int, str]) -> Sum:
        """The sum of what these clients learned, or of those of them that still answer; none of fewer than three."""
        while len(clients) >= LEAST:
            publics = {c: self.members[c].public for c in clients}
            messages = [make_masked_update_request(self.members[c].node, c, round_number, publics) for c in clients]
            by_node = {r.node: r for r in send_and_receive(self.grid, messages, self.terms.deadline, self.terms.every)}
            replies = {c: by_node.get(self.members[c].node) for c in clients}
            count, vectors = value_count(self.strategy.full), {}
            for client, reply in replies.items():
                try:
                    vectors[client] = self._checked_masked_state(reply, count)
                except Exception as error:
                    faults[client] = _error_sentence(error)
                    self.holding.pop(client, None)
            if len(vectors) == len(clients):
                return Sum(sum_of_masked_states([vectors[c] for c in clients], self.strategy.full), tuple(clients))
            clients = sorted(vectors)
        raise too_few_clients(
            f"round {round_number}: {len(clients)} clients are left, and a sum hides the states of {LEAST} or more",
            note=self._faults_text(faults),
            help="run again when more of them are there",
        ).rejection()

    def _checked_masked_state(self, reply: Reply | None, n_numbers: int) -> np.ndarray:
        """A state under masks, uint32 [count]. Raises ValueError with the reason where it can't be used."""
        if reply is None:
            raise ValueError(f"no masked state within {self.terms.deadline:g} s")
        if reply.error:
            raise ValueError(reply.error)
        state = reply.arrays.get("masked", {}).get("sum")
        if not isinstance(state, np.ndarray) or state.shape != (n_numbers,) or state.dtype != np.uint32:
            raise ValueError(f"its masked state is not {n_numbers} numbers of 32 bits")
        return state

    @staticmethod
    def _faults_text(faults: Mapping[int, str]) -> str:
        lines = [f"client {client}: {text}" if client >= 0 else text for client, text in sorted(faults.items())]
        return "; ".join(_first_line(text) for text in lines[:8])


def _error_sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:SENTENCE]


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else text


def _client_id_or_minus_one(reply: Reply) -> int:
    """Number of the client that a node runs; -1 if it is none."""
    value = finite_or_nan(reply.config.get("client"))
    return int(value) if value >= 0 else -1


def _client_update_of(reply: Reply, message: Message, rounds: int) -> ClientUpdate:
    """Metrics that a client reports of its update; there are at most as many tasks as rounds."""
    values = {name: finite_or_nan(reply.config.get(name)) for name in NUMBERS}
    by_task = reply.config.get("by_task")
    tasks = tuple(finite_or_nan(x) for x in by_task[:rounds]) if isinstance(by_task, list) else ()
    return ClientUpdate(**values, by_task=tasks, bytes_up=reply.bytes, bytes_down=message.bytes)


def fault_lines(rounds: Sequence[Round]) -> list[str]:
    """A line for every fault that clients had, with its round."""
    return [
        f"round {r.number}, client {client}: {_first_line(text)}" if client >= 0 else f"round {r.number}: {text}"
        for r in rounds
        for client, text in sorted(r.faults.items())
    ]
