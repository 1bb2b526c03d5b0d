"""Federations that bench/foundation_tasks.py compares, and a run of one of them: losses and right answers on test rows."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from effc.compiler.apps.federation.client import Participant
from effc.compiler.apps.federation.client_host import ClientHost
from effc.compiler.apps.federation.declaration import Declaration, make_federation
from effc.compiler.apps.federation.grid import LocalGrid
from effc.compiler.apps.federation.language import CausalLmLearner
from effc.compiler.apps.federation.stream import forgetting_by_task
from effc.compiler.core.settings import Settings
from effc.compiler.models.rows.forward import row_nll

from bench.clients import read_rows
from bench.foundation_data import CLIENTS, SUBJECTS
from bench.reviews import compile_recipe
from bench.row_store import RowStore

if TYPE_CHECKING:
    from effc.compiler.apps.federation.rows import Rows
    from effc.compiler.apps.federation.state import State

CHOICE_SEED = 100  # of the runs that choose rates
TEST_ROWS = 40  # of 64 tokens, of each text
RECIPE = """effspec 1
model base = zoo("tiny-llama")
{data}
pipeline p(base) {{}}
emit p {{ flower("{name}", data: [{names}], batch: 8, hold: 10%, {more}) }}
"""
TEXT_DATA = 'data {0} = text("{0}.txt", samples: 160, length: 64)'
VERSE_DATA = 'data {0} = pairs("{0}.jsonl", join: " ", length: 48)'
STREAM = ("docs", "sums")


class App(NamedTuple):
    """Data sets of a federation, the line of a recipe that reads one, and arguments of `flower`."""

    names: tuple[str, ...]
    line: str
    arguments: str


class Arm(NamedTuple):
    """An app, changes to its declaration, learning rates to choose from, and the arm whose choice it shares."""

    app: str
    changes: dict[str, Any]
    rates: tuple[float, ...] = ()
    rate_of: str = ""


PRETRAINING = "clients: 4, split: distinct, rounds: 5, steps: 6"
PROMPTS = "clients: 4, split: distinct, rounds: 6, steps: 6"
APPS = {
    "texts": App(SUBJECTS, TEXT_DATA, f"trains: full, {PRETRAINING}"),
    "texts-lora": App(SUBJECTS, TEXT_DATA, f"trains: lora, rank: 8, {PRETRAINING}"),
    "verses": App(CLIENTS, VERSE_DATA, f"trains: prompt, tokens: 8, {PROMPTS}"),
    "verses-lora": App(CLIENTS, VERSE_DATA, f"trains: lora, rank: 8, {PROMPTS}"),
    "stream": App(STREAM, TEXT_DATA, "trains: lora, rank: 8, clients: 3, rounds: 8, steps: 6, stream: true"),
}
CENTRAL = {"clients": 1, "split": "even", "steps": 24}
FULL_RATES, LORA_RATES, PROMPT_RATES = (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2), (3e-2, 1e-1, 3e-1)
ANCHORS = (10.0, 30.0, 100.0)
ARMS = {
    "pretraining": {
        "untouched": Arm("texts", {}),
        "alone": Arm("texts", {"strategy": "alone"}, FULL_RATES),
        "FedAvg": Arm("texts", {}, FULL_RATES),
        "FedAvg of LoRA": Arm("texts-lora", {}, LORA_RATES),
        "central": Arm("texts", CENTRAL, FULL_RATES),
        "central LoRA": Arm("texts-lora", CENTRAL, LORA_RATES),
    },
    "prompts": {
        "untouched": Arm("verses-lora", {}),
        "alone": Arm("verses", {"strategy": "alone"}, PROMPT_RATES),
        "FedAvg": Arm("verses", {}, PROMPT_RATES),
        "FedAvg, secure": Arm("verses", {"secure": True}, rate_of="FedAvg"),
        "central": Arm("verses", CENTRAL, PROMPT_RATES),
        "FedAvg of LoRA": Arm("verses-lora", {}, LORA_RATES),
    },
    "streams": {
        "untouched": Arm("stream", {}),
        "joint": Arm("stream", {"stream": False}, LORA_RATES),
        "no anchor": Arm("stream", {}, rate_of="joint"),
        **{f"anchor {anchor:g}": Arm("stream", {"anchor": anchor}, rate_of="joint") for anchor in ANCHORS},
    },
}
TESTS = {
    "pretraining": tuple(f"{name}-test.txt" for name in (*SUBJECTS, "bible")),
    "prompts": ("verses-test.jsonl", "verses-wrong.jsonl"),
    "streams": tuple(f"{name}-test.txt" for name in (*STREAM, "bible")),
}


class Runs:
    """Runs of arms in a folder with their data; rows of those that are done."""

    def __init__(self, folder: Path, store: RowStore):
        self.folder, self.store = folder, store
        self.apps: dict[str, tuple[Path, Declaration]] = {}

    def app(self, name: str) -> tuple[Path, Declaration]:
        if name not in self.apps:
            names, line, arguments = APPS[name]
            data = "\n".join(map(line.format, names))
            recipe = RECIPE.format(data=data, name=name, names=", ".join(names), more=arguments)
            self.apps[name] = compile_recipe(self.folder, name, recipe, 0)
        return self.apps[name]

    def row(self, task: str, arm: str, seed: int, rate: float) -> dict[str, Any] | None:
        key = {"task": task, "arm": arm, "seed": seed, "rate": rate}
        return next((row for row in self.store.rows if row.items() >= key.items()), None)

    def chosen_rate(self, task: str, arm: str) -> float:
        """Rate with the least loss on rows that clients hold back; 0 of an arm that trains nothing."""
        chooser = ARMS[task][arm].rate_of or arm
        losses = {rate: self.run(task, chooser, CHOICE_SEED, rate)["held_out"] for rate in ARMS[task][chooser].rates}
        return min(losses, key=lambda rate: losses[rate], default=0.0)

    def run(self, task: str, arm: str, seed: int, rate: float) -> dict[str, Any]:
        """Row of a run, which is done now unless it was before; `seconds` are of the processor."""
        if row := self.row(task, arm, seed, rate):
            return row
        key = {"task": task, "arm": arm, "seed": seed, "rate": rate}
        began = time.process_time()
        with self._clients(ARMS[task][arm], seed, rate) as (host, clients):
            values = self._measured_values(key, host, clients)
        self.store.add(key | values | {"seconds": time.process_time() - began})
        print(", ".join(f"{name} {value}" for name, value in key.items()), flush=True)
        return self.store.rows[-1]

    @contextmanager
    def _clients(self, arm: Arm, seed: int, rate: float) -> Iterator[tuple[ClientHost, Sequence[Participant]]]:
        path, declared = self.app(arm.app)
        declared = declared.with_changes(seed=seed, lr=rate or declared.lr, **arm.changes)
        settings = Settings(self.folder / "cache", seed=seed, threads=1)
        host = ClientHost(declared, path / declared.folder, self.folder, settings)
        with host.participants(list(range(declared.clients))) as clients:
            yield host, clients

    def _measured_values(self, key: dict[str, Any], host: ClientHost, clients) -> dict[str, Any]:
        declared, learner = host.declared, clients[0].learner
        is_choice, is_secured = key["seed"] == CHOICE_SEED, key["arm"] in ("FedAvg", "FedAvg, secure")
        tests = [] if is_choice else [self._test_rows(host, file) for file in TESTS[key["task"]]]
        if not key["rate"]:
            return {"scores": [[state_scores(learner, learner.initial_state(0), tests)]]}
        scores, prompts = [], []
        evaluated = {declared.rounds // len(declared.data) if declared.stream else declared.rounds, declared.rounds}
        run = make_federation(declared, LocalGrid(clients), None, lambda round_: None)

        def evaluate(round_) -> None:
            states = run.strategy.results()
            if not is_choice and round_.number in evaluated:
                scores.append([state_scores(learner, state, tests) for state in states.values()])
            if is_secured and declared.trains == "prompt":
                prompts.append(states["global"]["prompt"])

        run.on_round = evaluate
        run.run()
        return {
            "held_out": held_out_loss(clients, run.strategy.results()),
            "bytes_up": run.course.rounds[-1].bytes_up // declared.clients,
            "faults": [fault for round_ in run.course.rounds for fault in round_.faults.values()],
            "forgetting": forgetting_by_task(run.course.rounds),
            "scores": scores,
            "secure_differences": self._differences_from_plain(key, prompts),
        }

    def _test_rows(self, host: ClientHost, file: str) -> "Rows":
        data = host.declared.data[0]
        choice = {"samples": TEST_ROWS, "seed": 1} if data.word == "text" else {}
        return read_rows(host, self.folder, replace(data, args={**data.args, "path": file, **choice}))

    def _differences_from_plain(self, key: dict[str, Any], prompts: list[np.ndarray]) -> list[float]:
        """Largest difference of a secure federation's soft prompt from the plain one's, after each round."""
        file = self.folder / f"prompt-{key['seed']}.npy"
        if prompts and key["arm"] == "FedAvg":
            np.save(file, np.stack(prompts))
        is_secure = key["arm"] == "FedAvg, secure"
        return np.abs(np.load(file) - np.stack(prompts)).max((1, 2)).tolist() if is_secure else []


def held_out_loss(clients, states: dict[str, "State"]) -> float:
    """Mean loss of the clients' states, on rows that each holds back."""
    losses = [
        state_scores(c.learner, states.get("global") or states[f"client-{c.client}"], [c.learner.held_out])["losses"]
        for c in clients
    ]
    return fmean(loss for (loss,) in losses)


def state_scores(learner: CausalLmLearner, state: "State", tests: Sequence["Rows"]) -> dict[str, Any]:
    """Nats a predicted token of each test, and of two tests the share of rows that are likelier in the first."""
    learner.slots.load_state(state, {})
    nlls = [row_nll(learner.slots.model, rows.ids, rows.speech, rows.prompts) for rows in tests]
    losses = [math.fsum(nll.nats) / sum(nll.n_predictions) for nll in nlls]
    if len(nlls) != 2:
        return {"losses": losses}
    right = [a < b for a, b in zip(nlls[0].nats, nlls[1].nats, strict=True)]
    return {"losses": losses, "accuracy": sum(right) / len(right)}
