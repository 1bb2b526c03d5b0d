"""Clients that fit a linear map by gradient steps: small enough to train a federation in milliseconds."""

import time

import numpy as np
from effc.compiler.apps.federation.client import Learner, Participant
from effc.compiler.apps.federation.grid import LocalGrid
from effc.compiler.apps.federation.rounds import Federation, Terms

OUT, IN, RANK, ALPHA = 6, 8, 4, 4.0
FULL = {"m.A": (RANK, IN), "m.B": (OUT, RANK)}


NONSENSE = {  # what a client says where numbers are asked for
    "counts in words": {"examples": "many"},
    "counts in lists": {"number": [2.0]},
    "counts without end": {"examples": float("inf")},
}


class Regression(Learner):
    """y = (B A + added) x with rows of its own; a map that differs a little between clients."""

    base = "a" * 64

    def __init__(self, seed, rows=24, apart=0.1):
        draw = np.random.default_rng(seed)
        common = np.random.default_rng(99).standard_normal((OUT, IN))
        self.x = draw.standard_normal((rows, IN)).astype(np.float32)
        self.y = self.x @ (common + apart * draw.standard_normal((OUT, IN))).astype(np.float32).T
        self.examples = rows

    def initial_state(self, seed, rank=None):
        rank = rank or RANK
        A = np.random.default_rng(seed % 2**32).standard_normal((rank, IN)).astype(np.float32) / 2
        return {"m.A": A, "m.B": np.zeros((OUT, rank), np.float32)}

    def _off(self, state, added):
        scale = ALPHA / len(state["m.A"])
        return self.x @ (scale * state["m.B"] @ state["m.A"] + added.get("m", 0)).T - self.y, scale

    def train(self, state, names, added, seed, until):
        state = {n: a.copy() for n, a in state.items()}
        for _ in range(5):
            off, scale = self._off(state, added)
            slope = off.T @ self.x / len(self.x) * scale
            steps = {"m.B": slope @ state["m.A"].T, "m.A": state["m.B"].T @ slope}
            for name in names:
                state[name] = (state[name] - 0.1 * steps[name]).astype(np.float32)
        return state

    def loss(self, state, added):
        return float((self._off(state, added)[0] ** 2).mean())


class Faulty(Participant):
    """A client that misbehaves in one round."""

    def __init__(self, client, learner, fault="", number=2):
        super().__init__(client, learner)
        self.fault, self.number = fault, number

    def __call__(self, message, memory):
        now = message.kind == "train" and message.number == self.number
        if now and self.fault == "raises":
            raise RuntimeError("out of memory")
        if now and self.fault == "forgets":
            memory.clear()
        if now and self.fault == "stale base":
            self.learner.base = "b" * 64
        if now and self.fault == "slow":
            time.sleep(2.5)
        answer = super().__call__(message, memory)
        if now and self.fault == "NaN":
            answer.arrays["own"]["m.B"][0, 0] = np.nan
        if now and self.fault == "shape":
            answer.arrays["own"]["m.B"] = answer.arrays["own"]["m.B"][:, :2]
        if now and self.fault == "replays":
            answer.config["number"] = 1
        if now and self.fault in NONSENSE:
            answer.config.update(NONSENSE[self.fault])
        if message.kind == "join" and self.fault == "nameless":
            answer.config["client"] = "the first"
        return answer


def federation(strategy, clients=4, rounds=4, fault="", checkpoint=None, rows=24, workers=4, **terms):
    parts = [Faulty(k, Regression(k, rows=rows if k == 1 else 24), fault if k == 1 else "") for k in range(clients)]
    asked = {"clients": clients, "base": "a" * 64, "every": 0.002, "deadline": 20.0, "patience": 0.2} | terms
    return Federation(LocalGrid(parts, workers), strategy, Terms(rounds=rounds, **asked), checkpoint)
