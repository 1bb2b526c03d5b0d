"""A client: takes in what the server sent, trains, and answers; its data stay with it.

What it learned itself lies in the memory of its node. Where the server sends a state of its own ("own"), that wins: the
node may have been away. Nothing that a client raises or answers holds rows, prompts or their losses one by one.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ...core.safe_read import parse_strict_json
from ...transforms.training.schedule import seed_of
from .bounds import Bounds, client_refuses
from .grid import Answer, Message
from .low_rank import lora_module_paths
from .masks import Keys, mean_of_others, to_fixed_point
from .mixing import best_mix, mix
from .rotations import with_orthonormal_rotations
from .secure import LEAST
from .state import State, shapes, state_fault


class Evaluation(NamedTuple):
    loss: float
    accuracy: float


class Learner(ABC):
    """Local training of a client on its rows.

    base        sha256 of the model that it holds
    examples    how many rows it learns from; 0 where it has no data
    task        of several that come one after another, the one whose rows it learns from
    anchor      what the state was when the task began; asked for where `anchors`
    """

    base: str
    examples: int
    task: int = 0
    anchors: bool = False
    anchor: State = MappingProxyType({})

    def begin(self, round_number: int, rounds: int) -> None:  # noqa: B027 (most learn from the same rows in all of them)
        """A round of so many begins, both from 1."""

    def by_task(self) -> tuple[float, ...]:
        """Last evaluation, task by task; empty where there is one."""
        return ()

    @abstractmethod
    def initial_state(self, seed: int, rank: int | None = None) -> State:
        """A state to start from; every client draws the same."""

    @abstractmethod
    def train(self, state: State, names: frozenset[str], delta: State, seed: int, deadline: float) -> State:
        """The state after training these of its arrays.

        Raises Reject (client-refuses) where time.monotonic() passes `deadline`.

        delta    what was merged into the base, [out, in] by module
        """

    @abstractmethod
    def loss(self, state: State, delta: State) -> float:
        """On its own held-out rows; NaN where it has none."""

    def evaluate(self, state: State, delta: State) -> Evaluation:
        """The loss, and the share of held-out rows that it gets right; NaN where that is no question."""
        return Evaluation(self.loss(state, delta), math.nan)


class Participant:
    """The client of a partition.

    sizes    number of a sub-network -> what trains it; empty where all rounds are of `learner`
    bounds   of what a server may ask; None trusts it
    """

    def __init__(
        self,
        client: int,
        learner: Learner,
        sizes: Mapping[int, Learner] = MappingProxyType({}),
        bounds: Bounds | None = None,
    ):
        self.client, self.learner, self.sizes, self.bounds = client, learner, sizes, bounds
        self.learner = learner

    def __call__(self, message: Message, memory: dict[str, Any]) -> Answer:
        if self.bounds:
            self.bounds.refuse_unbounded_message(message.config, message.arrays)
        self.learner = self._learner_for(message)
        if message.kind == "join":
            answer: dict[str, str | int | float | bool] = {
                "client": self.client,
                "examples": self.learner.examples,
                "base": self.learner.base,
            }
            if message.config.get("secure"):
                answer["public"] = get_or_create_mask_keys(memory).public.hex()
            return Answer(config=answer)
        if message.kind == "masked":
            return self._answer_masked_update(message, memory)
        if message.kind == "initial":
            return Answer({"own": self.learner.initial_state(int(message.config.get("seed", 0)))})
        if message.kind != "train":
            raise client_refuses(f"a message of the kind `{message.kind}` means nothing here").rejection()
        return self._answer_training(message, memory)

    def _learner_for(self, message: Message) -> Learner:
        """Learner of the size that a message names, the client's where it names none."""
        size = int(message.config.get("size", -1))
        if not self.sizes:
            return self.learner
        if size < 0:
            return self.learner
        if size not in self.sizes:
            raise client_refuses(f"sub-network {size} is more than this client affords").rejection()
        return self.sizes[size]

    def _answer_training(self, message: Message, memory: dict[str, Any]) -> Answer:
        config, started = message.config, time.monotonic()
        self._refuse_other_base(message)
        self.learner.begin(message.number, int(config["rounds"]))
        if not self.learner.examples:
            raise client_refuses(f"it has no rows of the task of round {message.number}").rejection()
        added = self._merge_new_stacks(message, memory)
        state, mixed = self._starting_state_and_mix_share(message, memory, added)
        if self.learner.anchors:
            self._anchor(state, memory)
        before = self.learner.loss(state, added)
        names = frozenset(message.arrays["global"] if "fixed" in memory else state)
        seed = seed_of(int(config["seed"]), message.number, self.client)
        until = started + float(config["deadline"])
        state = self.learner.train(state, names, added, seed, until)
        if problem := state_fault(state, shapes(state)):
            raise client_refuses(
                f"training left a state that can't be used: {problem}", help="lower the learning rate"
            ).rejection()
        if "global" not in message.arrays or config.get("secure"):  # else nothing reads it again
            memory["own"] = state
        loss, accuracy = self.learner.evaluate(state, added)
        memory["number"] = {"number": np.array([message.number])}
        sent = {} if config.get("secure") else {"own": {n: array for n, array in state.items() if n in names}}
        return Answer(
            sent,
            {
                "number": message.number,
                "examples": self.learner.examples,
                "before": before,
                "mix": mixed,
                "loss": loss,
                "accuracy": accuracy,
                "seconds": time.monotonic() - started,
                **({"by_task": list(task_losses)} if (task_losses := self.learner.by_task()) else {}),
            },
        )

    def _anchor(self, state: State, memory: dict[str, Any]) -> None:
        """Remember what a task began with. A node that lost its memory takes what it has now."""
        task = self.learner.task
        if int(memory.get("task", {"number": [-1]})["number"][0]) != task:
            memory["task"], memory["anchor"] = {"number": np.array([task])}, state
        self.learner.anchor = memory["anchor"]

    def _answer_masked_update(self, message: Message, memory: dict[str, Any]) -> Answer:
        """Update of this round, masked against the clients that the server names."""
        if int(memory.get("number", {"number": [-1]})["number"][0]) != message.number:
            raise client_refuses(f"there is no state of round {message.number} here").rejection()
        publics = {int(k): bytes.fromhex(key) for k, key in parse_strict_json(str(message.config["publics"])).items()}
        keys, client = get_or_create_mask_keys(memory), int(message.config["client"])
        if len(set(publics.values())) < max(LEAST, len(publics)) or publics.get(client) != keys.public:
            raise client_refuses(f"a sum of {len(publics)} states would tell whose they are").rejection()
        values = to_fixed_point(memory["own"], len(publics))
        return Answer({"masked": {"sum": values + keys.mask_for_client(client, publics, message.number, len(values))}})

    def _refuse_other_base(self, message: Message) -> None:
        if message.config["base"] != self.learner.base:
            raise client_refuses(
                f"the base model here is {self.learner.base[:12]}, the server's {str(message.config['base'])[:12]}",
                help="bring the folder of the model that the server has",
            ).rejection()

    def _merge_new_stacks(self, message: Message, memory: dict[str, Any]) -> State:
        """State merged into the base: the stacks of all rounds so far, each added once, in their order."""
        added, done = memory.setdefault("added", {}), memory.setdefault("done", set())
        stacks = {
            int(name.removeprefix("merge.")): stack
            for name, stack in message.arrays.items()
            if name.startswith("merge.")
        }
        for number in sorted(stacks.keys() - done):
            for path in lora_module_paths(stacks[number]):
                product = stacks[number][f"{path}.B"] @ stacks[number][f"{path}.A"]  # [out, in]
                added[path] = added[path] + product if path in added else product
            done.add(number)
        return added

    def _starting_state_and_mix_share(
        self, message: Message, memory: dict[str, Any], merged_delta: State
    ) -> tuple[State, float]:
        """The state to train from, and the share of the others in it; NaN where states are not mixed."""
        arrays, config = message.arrays, message.config
        if "fixed" in arrays:
            memory["fixed"] = arrays["fixed"]
        if "global" in arrays:
            return with_orthonormal_rotations({**memory.get("fixed", {}), **arrays["global"]}), math.nan
        if "mean" in arrays:
            return self._mix_leave_one_out(arrays["mean"], memory.get("own"), config, merged_delta)
        if "mix" not in config:
            seed = seed_of(int(config["seed"]), message.number)
            return {**self.learner.initial_state(seed, int(config["rank"])), **arrays.get("head", {})}, math.nan
        local = arrays.get("own") or memory.get("own")
        if not local:
            raise client_refuses(
                "there is no state here, and none was sent", help="the server sends a whole one in the next round"
            ).rejection()
        return self._mix_peer_state(local, arrays.get("others"), config, merged_delta)

    def _mix_leave_one_out(
        self, mean_of_all: State, local_state: State | None, config: Mapping[str, Any], delta: State
    ) -> tuple[State, float]:
        """The mean of the others, out of the mean of all that this client is one of; without a state, the mean."""
        among = int(config["among"])
        if not local_state:
            return with_orthonormal_rotations(mean_of_all), math.nan
        peer_state = (
            mean_of_others({name: array * among for name, array in mean_of_all.items()}, local_state, among)
            if among
            else mean_of_all
        )
        return self._mix_peer_state(local_state, peer_state, config, delta)

    def _mix_peer_state(
        self, local_state: State, peer_mean: State | None, config: Mapping[str, Any], delta: State
    ) -> tuple[State, float]:
        if not peer_mean:
            return local_state, 0.0
        if config["mix"] == "adaptive":
            share, state = best_mix(
                local_state, peer_mean, lambda s: _loss_or_infinity(self.learner.loss(s, delta)), config["way"]
            )
            return state, share
        return mix(local_state, peer_mean, float(config["mix"]), config["way"]), float(config["mix"])


def get_or_create_mask_keys(memory: dict[str, Any]) -> Keys:
    """A node's keys for masks, made at the first call; they lie in its memory and leave it never."""
    if "keys" not in memory:
        memory["keys"] = {"private": np.frombuffer(Keys().private, np.uint8).copy()}
    return Keys(memory["keys"]["private"].tobytes())


def _loss_or_infinity(loss: float) -> float:
    """A loss that can be compared: a client without held-out rows stays as it is."""
    return np.inf if math.isnan(loss) else loss
