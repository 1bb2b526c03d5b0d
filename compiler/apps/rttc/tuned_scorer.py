"""A reward model of one's own that reads question and answer together: adapters on the sentence encoder, and a head.

The head alone (scorer.py) sees two vectors, which say what texts are about and little of whether a sum is right. Here
the encoder itself learns, by LoRA or ReFT; its adapters are on while an answer is scored, and off while it embeds.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...core.cache import write_atomic
from ...core.json_errors import reject_on_error
from ...core.safe_read import CONFIG, read_json, refuse_irregular_file
from ...models.rows.forward import evaluating
from .attachment import KINDS, attach_adapters, default_attachment_paths
from .embedder import MeanPooledEncoder
from .reward import require_finite_scores
from .scorer import FORMAT, NAME, WEIGHTS, LabelledAnswer, auc, broken_scorer, refuse_weak_auc, split_by_question

_BATCH, _CLIP = 8, 1.0


class FineTunedScorer:
    """Log-odds that an answer is right. `auc` is that on questions which it was not trained on."""

    name, scale = "scorer", "log-odds"

    def __init__(self, embedder: MeanPooledEncoder, adapter_kind: str, rank: int, seed: int = 0):
        self._embedder, self._kind, self._rank, self.auc = embedder, adapter_kind, rank, 0.5
        encoder = embedder.encoder
        self._attachment = attach_adapters(
            adapter_kind, encoder, default_attachment_paths(encoder, adapter_kind), rank, 2.0 * rank, seed
        )
        self._head = nn.Linear(embedder.width, 1)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        adapter_ids = {id(p) for p in self._attachment.parameters().values()}
        for parameter in encoder.parameters():
            parameter.requires_grad_(id(parameter) in adapter_ids)
        self._attachment.switch(enabled=False)

    def score(self, question: str, answers: Sequence[str]) -> list[float]:
        return require_finite_scores(self.log_odds([question] * len(answers), answers).tolist(), self.name)

    def log_odds(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Log-odds [n] of answers to questions."""
        rows, parts = self._embedder.pairs(questions, answers), []
        self._attachment.switch(enabled=True)
        try:
            with evaluating(self._embedder.encoder):
                for start in range(0, len(rows), _BATCH):
                    parts.append(self._head(self._embedder.mean_pooled_states(rows[start : start + _BATCH]))[:, 0])
        finally:
            self._attachment.switch(enabled=False)
        return torch.cat(parts) if parts else torch.empty(0)

    def fit(
        self,
        labelled_answers: Sequence[LabelledAnswer],
        *,
        epochs: int = 2,
        lr: float = 1e-3,
        seconds: float = 1800.0,
        seed: int = 0,
        on_progress: Callable[[int, int], None] = lambda at, of: None,
    ) -> None:
        """AdamW over shuffled answers; no step is begun after `seconds`. Both kinds weigh alike, however many."""
        rows = self._embedder.pairs([g.question for g in labelled_answers], [g.answer for g in labelled_answers])
        right = torch.tensor([float(g.right) for g in labelled_answers])
        share = float(right.mean().clamp(0.05, 0.95))
        weights = torch.where(right > 0, 0.5 / share, 0.5 / (1 - share))
        parameters = [*self._attachment.parameters().values(), *self._head.parameters()]
        self._attachment.switch(enabled=True)
        for parameter in parameters:  # the switch of the adapters froze them
            parameter.requires_grad_(True)
        optimizer, draw = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0), torch.Generator().manual_seed(seed)
        steps, until = epochs * -(-len(rows) // _BATCH), time.monotonic() + seconds
        try:
            parts = [p for _ in range(epochs) for p in torch.randperm(len(rows), generator=draw).split(_BATCH)]
            for step, part in enumerate(parts):
                if time.monotonic() > until:
                    break
                odds = self._head(self._embedder.mean_pooled_states([rows[i] for i in part.tolist()]))[:, 0]
                loss = nn.functional.binary_cross_entropy_with_logits(odds, right[part], weights[part])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, _CLIP)
                optimizer.step()
                on_progress(step + 1, steps)
        finally:
            self._attachment.switch(enabled=False)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"adapters.{name}": p.detach().contiguous() for name, p in self._attachment.parameters().items()}
        head = {"head.weight": self._head.weight.detach(), "head.bias": self._head.bias.detach()}
        save_file({**state, **head}, folder / WEIGHTS)
        body = {"format": FORMAT, "kind": self._kind, "rank": self._rank, "auc": self.auc}
        body |= {"embedder": self._embedder.identity}
        write_atomic(folder / NAME, (json.dumps(body, indent=2, sort_keys=True) + "\n").encode())

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError or ValueError on tensors of another scorer."""
        parameters: dict[str, Tensor] = {f"adapters.{name}": p for name, p in self._attachment.parameters().items()}
        parameters |= {"head.weight": self._head.weight, "head.bias": self._head.bias}
        with torch.no_grad():
            for name, parameter in parameters.items():
                if tensors[name].shape != parameter.shape:
                    raise ValueError(f"`{name}` has another shape")
                parameter.copy_(tensors[name])


def train_fine_tuned_scorer(
    labelled_answers: Sequence[LabelledAnswer],
    embedder: MeanPooledEncoder,
    adapter_kind: str,
    *,
    rank: int = 8,
    seed: int = 0,
    force: bool = False,
    **training_options: Any,
) -> FineTunedScorer:
    """Train one; questions are split, so that none is on both sides. Reject (weak-reward) where the AUC on those held
    out is below 0.55, unless `force`."""
    learned, validation = split_by_question(labelled_answers, seed)
    scorer = FineTunedScorer(embedder, adapter_kind, rank, seed)
    scorer.fit(learned, seed=seed, **training_options)
    odds = scorer.log_odds([g.question for g in validation], [g.answer for g in validation])
    scorer.auc = auc(odds.tolist(), [g.right for g in validation])
    refuse_weak_auc(scorer.auc, validation, force)
    return scorer


def open_tuned_scorer(folder: Path, embedder: MeanPooledEncoder) -> FineTunedScorer:
    with reject_on_error(broken_scorer, f"{folder} holds no scorer for this embedder", "train it again"):
        refuse_irregular_file(folder / WEIGHTS)
        body, tensors = read_json(folder / NAME, CONFIG), load_file(folder / WEIGHTS)
        kind, rank = body["kind"], body["rank"]
        if kind not in KINDS or type(rank) is not int or not 1 <= rank <= 256 or body["format"] != FORMAT:
            raise ValueError("it has another form")
        if body["embedder"] != embedder.identity:
            raise ValueError("it was trained over another embedder")
        scorer = FineTunedScorer(embedder, kind, rank)
        scorer.load(tensors)
        scorer.auc = float(body["auc"])
        return scorer
