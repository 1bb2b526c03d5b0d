"""Tasks for test-time compute: questions with answers, split into a knowledge base, dev and test questions.

`sst2`, `arc`, `openbookqa` and `gsm8k` read DATA (`sst2/{train,test}.tsv`, `commonsense/{ARC-Easy,openbookqa}/
{train,test}.json`, `gsm8k/{train,test}.jsonl`); `codes` (made-up numbers that the base knows) and `capitals` (which it
does not) are written here; any other name is a generator of `reasoning-gym`. `speech` has verses for the tiny-llama.
"""

import csv
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effc.compiler.apps.rttc.reward import Verifier
from effc.compiler.apps.rttc.sample import Sample

ZOO = Path(__file__).parents[1] / "recipes/zoo/tiny-llama"
SENTIMENTS, SEED = ("negative", "positive"), 1
LENGTHS = {"sst2": 6, "arc": 16, "openbookqa": 16, "gsm8k": 100, "word_sorting": 40, "number_filtering": 40}
LENGTH = 12  # tokens of an answer, of all others
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
FIRST = "Ann Bert Clara David Emma Felix Grace Hugo Iris Jonas Karen Leo Maria Nils Olga Paul Rosa Simon Tina Uwe"
LAST = "Adler Brandt Cole Dorn Ebert Fuchs Graf Hahn Iversen Jung Keller Lang Moser Neumann Olsen"


@dataclass(frozen=True)
class Asked:
    """A question, and how its answers are judged; `truth` is what `check` of a Verifier compares with.

    wrong   answers of the same form, for a scorer to learn from
    """

    sample: Sample
    check: str
    truth: str
    options: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    def right(self, text: str) -> bool:
        question = self.sample.question
        return Verifier(self.check, {question: self.truth}, self.options).score(question, [text])[0] > 0.5


@dataclass(frozen=True)
class Task:
    name: str
    base: list[Asked]
    dev: list[Asked]
    test: list[Asked]

    @property
    def length(self) -> int:
        """Most tokens of an answer."""
        return LENGTHS.get(self.name, LENGTH)


def task_of(name: str, data: Path | None, base: int, dev: int, test: int) -> Task:
    """With so many questions of each kind; the same each time. The base and the dev questions are of the training part."""
    own = {"codes": _code_questions, "capitals": _capitals, "speech": _speech_questions}
    if name in own:
        return Task(name, *own[name](base, dev, test))
    if name in READERS:
        assert data is not None, f"{name} reads --data"
        learned, held = (READERS[name](data, part) for part in ("train", "test"))
        for rows in (learned, held):
            random.Random(0).shuffle(rows)
        return Task(name, learned[:base], learned[base : base + dev], held[:test])
    every = _generated_questions(name, base + dev + test)
    return Task(name, every[:base], every[base : base + dev], every[base + dev :])


# -- of files ------------------------------------------------------------------------------------------------


def _sst2(data: Path, split: str) -> list[Asked]:
    with (data / "sst2" / f"{split}.tsv").open(encoding="utf-8") as lines:
        rows = [r for r in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if len(r["sentence"]) > 30]
    ask = "Is this review positive or negative? "
    return [_choice(ask + row["sentence"].strip(), SENTIMENTS[int(row["label"])], SENTIMENTS) for row in rows]


def _arc(data: Path, split: str) -> list[Asked]:
    return _multiple_choice(data / "commonsense" / "ARC-Easy" / f"{split}.json")


def _openbookqa(data: Path, split: str) -> list[Asked]:
    return _multiple_choice(data / "commonsense" / "openbookqa" / f"{split}.json")


def _multiple_choice(file: Path) -> list[Asked]:
    """Questions with their options as words, which a small model says sooner than their numbers."""
    found = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        stem, _, rest = row["instruction"].partition("\n\n")
        stem = stem.partition("question: ")[2].strip()
        options = [o.strip() for o in re.split(r"Answer\d: ", rest.partition("\n\n")[0]) if o.strip()]
        at = int(row["answer"].removeprefix("answer")) - 1
        if len(options) == 4 and len(set(options)) == 4:
            others = tuple(o for o in options if o != options[at])
            # What is said first counts; of two options of which one begins with the other, the longer is tried first.
            before = "|".join(re.escape(o) for o in others if o not in options[at])
            truth = f"(?is)^(?:(?!{before}).)*?{re.escape(options[at])}" if before else re.escape(options[at])
            question = f"{stem}\nChoose one: " + "; ".join(options) + "."
            found.append(Asked(Sample(question, options[at]), "pattern", truth, wrong=others))
    return found


def _gsm8k(data: Path, split: str) -> list[Asked]:
    rows = [json.loads(line) for line in (data / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    found = []
    for row in rows:
        worked = re.sub(r"<<.*?>>", "", row["answer"]).replace("#### ", "The answer is ")
        found.append(Asked(Sample(row["question"], worked), "number", worked.rpartition(" ")[2]))
    return found


READERS = {"sst2": _sst2, "arc": _arc, "openbookqa": _openbookqa, "gsm8k": _gsm8k}


# -- made ----------------------------------------------------------------------------------------------------


def _choice(question: str, answer: str, options: tuple[str, ...]) -> Asked:
    return Asked(Sample(question, answer), "choice", answer, options, tuple(o for o in options if o != answer))


def _code_questions(base: int, dev: int, test: int) -> tuple[list[Asked], list[Asked], list[Asked]]:
    """Of the base's people, asked for in other words."""
    draw = random.Random(SEED)
    people = draw.sample([f"{a} {b}" for a in FIRST.split() for b in LAST.split()], min(base, 300))
    codes = {name: str(draw.randrange(1000, 9999)) for name in people}

    def asked(words: str, name: str) -> Asked:
        return Asked(Sample(words.format(name), codes[name]), "number", codes[name])

    known = [asked("What is the door code of the office of {}?", name) for name in people]
    wanted = [asked("Which number opens {}'s office?", name) for name in people]
    return known, wanted[:dev], wanted[dev : dev + test]


def _capitals(base: int, dev: int, test: int) -> tuple[list[Asked], list[Asked], list[Asked]]:
    cities = [pair.split(" ") for pair in CAPITALS.split("|")]
    random.Random(SEED).shuffle(cities)
    found = [Asked(Sample(f"What is the capital of {country}?", city), "pattern", city) for country, city in cities]
    return [], found[:dev], found[dev : dev + test]


def _speech_questions(base: int, dev: int, test: int) -> tuple[list[Asked], list[Asked], list[Asked]]:
    """Does a verse tell speech or a deed?"""
    parts = []
    for part in ("train", "dev"):
        rows = [json.loads(line) for line in (ZOO / f"speech-{part}.jsonl").read_text().splitlines()]
        parts.append([_choice(row["prompt"], row["answer"], ("speech", "deed")) for row in rows])
    learned, held = parts
    return learned[: len(learned) - dev][:base], learned[len(learned) - dev :], held[:test]


def _generated_questions(name: str, count: int) -> list[Asked]:
    import reasoning_gym

    made = reasoning_gym.create_dataset(name, size=2 * count, seed=SEED)
    every = {item["question"].strip(): str(item["answer"]) for item in made}
    assert len(every) >= count, f"{name} has {len(every)} different questions"
    answers = list(every.values())
    if all(re.fullmatch(r"-?\d+(\.\d+)?", answer) for answer in answers):
        return [Asked(Sample(q, a), "number", a) for q, a in list(every.items())[:count]]
    if len(set(answers)) <= 2:
        options = tuple(sorted(set(answers)))
        return [_choice(q, a, options) for q, a in list(every.items())[:count]]
    whole = r"(?i)(?<![\w-]){}(?![\w-])"  # "mother" is not in "mother-in-law"
    return [Asked(Sample(q, a), "pattern", whole.format(re.escape(a))) for q, a in list(every.items())[:count]]


def sample_wrong_answer(question: Asked, other_questions: Sequence[Asked], rng: random.Random) -> str | None:
    """An answer of the same form that is wrong; None where none is found."""
    candidates = list(question.wrong) or [
        other.sample.answer for other in rng.sample(list(other_questions), min(8, len(other_questions)))
    ]
    rng.shuffle(candidates)
    return next((text for text in candidates if not question.right(text)), None)
