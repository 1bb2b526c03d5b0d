"""Print what drafts of a text's own n-grams save: the same answers with and without them, taking turns.

    python -m bench.speculation [--threads 1] [--rounds 7] [--new 160] [--chat FILE] [--models tiny,135m] [--tasks NAME,...]
        [--contenders plain,batch_invariant,drafts,transformers] [--json FILE]

`tiny` is `zoo:tiny-llama` in bfloat16: "own" is what it says by itself, greedily, behind passages of its held-out text. `135m`
has the shape of SmolLM2-135M in int8 and random weights, which say nothing of worth; its answers, and the other ones of
`tiny`, are therefore scripted: a logits processor lets the model choose the next token of a text, so that the clock is the
engine's and what is accepted is the text's. Words and punctuation are its tokens. Texts are of Python's own sources and manual:

    edit         a function is asked for again with two names changed
    retrieval    of five passages the third is quoted
    summary      of a passage every other sentence is said again
    continuation a passage of the manual goes on
    chat         answers to questions, of --chat: JSON lines with `question` and `answer`, or a file in which AlpacaEval
                 keeps a model's answers (results/MODEL/model_outputs.json), of which it takes twelve, evenly spread

A time is that of `generate` behind a prompt that has been read before. `plain` is an engine that is not `batch_invariant`, as
`effc run --no-speculation` has it; `batch_invariant` and `drafts` are the engine of `effc run` and `effc serve`; `transformers` is the
assisted loop of transformers over the same engine. Ratios are medians over rounds of ratios within a round, of all texts of a task.
"""

import argparse
import inspect
import json
import pydoc_data.topics
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.model import DecoderModel
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.speculation import DRAFT_TOKENS
from effc.kernels import levels
from effc.kernels.engine import Engine
from transformers import AutoTokenizer, GenerationMixin, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from bench.engine import Shape

Text = tuple[list[int], list[int]]  # prompt, answer; an empty one is the model's own
CONTENDERS = ("plain", "batch_invariant", "drafts", "transformers")


class Script(LogitsProcessor):
    """Lets the model choose the tokens of a text."""

    def __init__(self, prompt: int, answer: Sequence[int]):
        self.prompt, self.answer = prompt, answer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.prompt
        if position >= len(self.answer):  # transformers' loop looks beyond the last token
            return scores
        scores = scores.clone()
        scores[:, self.answer[position]] = 1e9
        return scores


class Words:
    """Words and punctuation with the spaces before them, numbered as they come."""

    def __init__(self, vocabulary: int):
        self.numbers: dict[str, int] = {}
        self.vocabulary = vocabulary

    def __call__(self, text: str) -> list[int]:
        tokens = re.findall(r"\n+[ ]*|[ ]?\w+|[ ]?[^\w\s]", text)
        return [self.numbers.setdefault(token, len(self.numbers)) % self.vocabulary for token in tokens]


def passages(words: int, skip: int = 0) -> list[str]:
    """Prose of the manual, so many words at a time."""
    paragraphs = [
        " ".join(part.split())
        for topic in pydoc_data.topics.topics.values()
        for part in topic.split("\n\n")
        if len(part.split()) > 40 and "::" not in part and "|" not in part
    ]
    found, current = [], ""
    for paragraph in paragraphs[skip:]:
        current += paragraph + "\n"
        if len(current.split()) >= words:
            found.append(current)
            current = ""
    return found


def chat_pairs(file: Path, count: int) -> list[tuple[str, str]]:
    text = file.read_text("utf-8")
    if text.startswith("["):
        rows = json.loads(text)
        return [(row["instruction"], row["output"]) for row in rows[:: len(rows) // count][:count]]
    lines = (json.loads(line) for line in text.splitlines()[:count])
    return [(row["question"], row["answer"]) for row in lines]


def tasks(encode: Callable[[str], list[int]], new: int, chat: Path | None, count: int = 4) -> dict[str, list[Text]]:
    functions = [
        textwrap.TextWrapper._split_chunks,
        textwrap.TextWrapper._wrap_chunks,
        textwrap.dedent,
        inspect.cleandoc,
    ]
    sources = [inspect.getsource(function) for function in functions]
    edits = [
        (
            f"Rename `self` to `wrapper` and `text` to `content`.\n{source}\n",
            re.sub(r"\btext\b", "content", re.sub(r"\bself\b", "wrapper", source)),
        )
        for source in sources
    ]
    short, long = passages(60), passages(300, skip=40)
    retrievals = [
        ("\n".join(short[5 * i : 5 * i + 5]) + "\nQuote the third passage.\n", short[5 * i + 2]) for i in range(count)
    ]
    summaries = [(f"{text}\nSummarise this.\n", " ".join(re.split(r"(?<=\.) ", text)[::2])) for text in long[:count]]
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in long[count : 2 * count]]
    texts = {"edit": edits, "retrieval": retrievals, "summary": summaries, "continuation": halves}
    if chat:
        texts["chat"] = [(f"{question}\n", answer) for question, answer in chat_pairs(chat, 3 * count)]
    return {name: [(encode(prompt), encode(answer)[:new]) for prompt, answer in pairs] for name, pairs in texts.items()}


def engines(plan: dict, weights: dict[str, torch.Tensor], threads: int) -> dict[str, DecoderModel]:
    models = {
        batch_invariant: DecoderModel(
            Engine(plan, weights, threads, max_sequences=1, batch_invariant=batch_invariant),
            plan,
            weights,
            {},
            max_sequences=1,
            prefix_tokens=1 << 16,
        )
        for batch_invariant in (False, True)
    }
    return {
        "plain": models[False],
        "batch_invariant": models[True],
        "drafts": models[True],
        "transformers": models[True],
    }


class Counted:
    """Calls of an engine, and the tokens of each."""

    def __init__(self, model: DecoderModel):
        self.run, self.counts = model.engine.run, []
        model.engine.run = self

    def __call__(self, ids, sequences, outputs=None) -> bool:
        self.counts.append(len(ids))
        return self.run(ids, sequences, outputs)


def answer_seconds_and_ids(
    model: DecoderModel, contender: str, prompt: list[int], answer: list[int], max_new_tokens: int
) -> tuple[float, list[int]]:
    row = torch.tensor([prompt])
    options = {
        "max_new_tokens": len(answer) or max_new_tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
        "do_sample": False,
    }
    if answer:
        options["logits_processor"] = LogitsProcessorList([Script(len(prompt), answer)])
    if contender == "drafts":
        options["prompt_lookup_num_tokens"] = DRAFT_TOKENS
    if contender == "transformers":
        options |= {"prompt_lookup_num_tokens": 10, "custom_generate": GenerationMixin._assisted_decoding}
    model.generate(row, **{**options, "max_new_tokens": 1, "prompt_lookup_num_tokens": None, "custom_generate": None})
    engine: Any = model.engine
    clock = time.process_time if engine.threads == 1 else time.perf_counter
    start = clock()
    ids = model.generate(row, **options)
    return clock() - start, ids[0, len(prompt) :].tolist()


def measure(models: dict[str, DecoderModel], texts: list[Text], rounds: int, max_new_tokens: int) -> dict:
    contenders = [name for name in CONTENDERS if name in models]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    tokens, same = 0, True
    for turn in range(rounds + 1):
        sums, said = dict.fromkeys(contenders, 0.0), {}
        for number, (prompt, answer) in enumerate(texts):
            for name in contenders if turn % 2 else contenders[::-1]:
                took, said[name, number] = answer_seconds_and_ids(models[name], name, prompt, answer, max_new_tokens)
                sums[name] += took
        same &= all(said["drafts", n] == said["batch_invariant", n] for n in range(len(texts)))
        tokens = sum(len(said["batch_invariant", n]) for n in range(len(texts)))
        if turn:  # the first round warms up
            for name in contenders:
                seconds[name].append(sums[name])
    ratio = {
        f"{base}/{name}": median(b / a for a, b in zip(seconds[name], seconds[base], strict=True))
        for base, name in (
            ("batch_invariant", "drafts"),
            ("plain", "drafts"),
            ("plain", "batch_invariant"),
            ("batch_invariant", "transformers"),
        )
        if base in seconds and name in seconds
    }
    return {
        "tokens": tokens,
        "tokens_per_second": {name: tokens / median(values) for name, values in seconds.items()},
        "ratio": ratio,
        "same_tokens": same,
    }


def tiny(threads: int, max_new_tokens: int, chat: Path | None) -> tuple[dict[str, DecoderModel], dict[str, list[Text]]]:
    folder = zoo_folders_by_name()["tiny-llama"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = Reader(capture(LlamaForCausalLM.from_pretrained(folder).eval()), "bf16").build_plan()
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    paragraphs = (folder / "heldout.txt").read_text().splitlines()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in paragraphs]
    rows = [row for row in rows if len(row) > 160 + max_new_tokens // 2][:8]
    texts: dict[str, list[Text]] = {
        "own": [(row[:100], []) for row in rows],
        "continuation": [(row[:160], row[160 : 160 + max_new_tokens]) for row in rows],
        "retrieval": [(row[:160], row[20:140]) for row in rows],
    }
    return engines(plan.to_json(), weights, threads), texts


def shape_135m(
    threads: int, max_new_tokens: int, chat: Path | None
) -> tuple[dict[str, DecoderModel], dict[str, list[Text]]]:
    shape = Shape("dense_linear_int8", 1.0).whole()
    plan = {**shape.plan, "vocabulary": 49152}
    return engines(plan, shape.weights, threads), tasks(Words(49152), max_new_tokens, chat)


MODELS = {"tiny": tiny, "135m": shape_135m}


def main() -> None:
    options = argparse.ArgumentParser()
    for name, kind, default in (
        ("threads", int, 1),
        ("rounds", int, 7),
        ("new", int, 160),
        ("chat", Path, None),
        ("json", Path, None),
    ):
        options.add_argument(f"--{name}", type=kind, default=default)
    options.add_argument("--models", default="tiny,135m")
    options.add_argument("--tasks", default="")
    options.add_argument("--contenders", default=",".join(CONTENDERS))
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    result: dict = {"level": levels.active_level(), "threads": chosen.threads, "rounds": chosen.rounds, "models": {}}
    print(f"{levels.active_level_and_reason()}; {chosen.threads} threads, {chosen.rounds} rounds")
    for name in chosen.models.split(","):
        models, texts = MODELS[name](chosen.threads, chosen.new, chosen.chat)
        models = {contender: models[contender] for contender in chosen.contenders.split(",")}
        rows = result["models"][name] = {}
        for task, pairs in texts.items():
            if chosen.tasks and task not in chosen.tasks.split(","):
                continue
            counted = Counted(models["drafts"])
            for prompt, answer in pairs:
                answer_seconds_and_ids(models["drafts"], "drafts", prompt, answer, chosen.new)
            models["drafts"].engine.run = counted.run
            row = rows[task] = measure(models, pairs, chosen.rounds, chosen.new)
            row["tokens_per_call"] = row["tokens"] / max(1, len(counted.counts) - len(pairs))
            speeds = "  ".join(f"{key} {value:7.1f}" for key, value in row["tokens_per_second"].items())
            ratios = "  ".join(f"{key} {value:.3f}" for key, value in row["ratio"].items())
            print(
                f"{name:<5} {task:<13} {speeds} tokens/s   {ratios}   {row['tokens_per_call']:.2f} tokens a call   same {row['same_tokens']}",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
