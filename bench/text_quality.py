"""Perplexity and divergence of an engine's logits on rows of tokens. Nothing of effc is imported: other engines use it, too."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

EVERY = 16  # positions of a row between two whose distributions are compared
Z_95 = 1.96
Logits = Callable[[list[int]], torch.Tensor]  # ids -> (len(ids), vocabulary)


def reference_file(folder: Path, text: str) -> Path:
    return folder / f"reference-{text}.pt"


def write_references(folder: Path, logits_of: Logits) -> None:
    """Log-probabilities of the original for every text of `rows.json`: (rows, positions, vocabulary) in float32."""
    for text, rows in json.loads((folder / "rows.json").read_text()).items():
        if text != "calib" and not reference_file(folder, text).exists():
            compared = [logits_of(ids)[EVERY - 1 : -1 : EVERY].float().log_softmax(-1) for ids in rows]
            torch.save(torch.stack(compared), reference_file(folder, text))


def score(folder: Path, text: str, logits_of: Logits) -> dict[str, list[float]]:
    """By row of that text: nats of a token, and divergence (Kullback-Leibler, of the original from these) in nats."""
    reference = torch.load(reference_file(folder, text), mmap=True, weights_only=True)
    nats, divergences = [], []
    for ids, original in zip(json.loads((folder / "rows.json").read_text())[text], reference, strict=True):
        known = logits_of(ids).float().log_softmax(-1)
        nats.append(-known[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).mean().item())
        compared = known[EVERY - 1 : -1 : EVERY]
        divergences.append((original.exp() * (original - compared)).sum(-1).mean().item())
    return {"nats": nats, "divergence": divergences}


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of independent rows."""
    return Z_95 * torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(len(values))


def summary(
    scores: dict[str, dict[str, list[float]]], original: dict[str, dict[str, list[float]]]
) -> dict[str, object]:
    """Figures of an engine over all texts, each with half of its 95 % interval; rows are compared one by one.

    `loss` is how much higher the geometric mean of the texts' perplexities is than the original's, as a share of it.
    """
    mean = {text: sum(score["nats"]) / len(score["nats"]) for text, score in scores.items()}
    pairs = {
        text: [a - b for a, b in zip(scores[text]["nats"], original[text]["nats"], strict=True)] for text in scores
    }
    more = [sum(column) / len(pairs) for column in zip(*pairs.values(), strict=True)]  # rows of texts are independent
    loss = math.expm1(sum(more) / len(more))
    width = (1 + loss) * math.sqrt(sum(half_width(pair) ** 2 for pair in pairs.values())) / len(pairs)
    divergence = {text: sum(score["divergence"]) / len(score["divergence"]) for text, score in scores.items()}
    return {
        **{text: round(math.exp(nats), 3) for text, nats in mean.items()},
        "perplexity": round(math.exp(sum(mean.values()) / len(mean)), 3),
        "loss": [round(loss, 5), round(width, 5)],
        "divergence": {text: round(value, 5) for text, value in divergence.items()},
    }
