"""Texts to unit vectors: a sentence encoder in a folder, or the hidden states of the model that answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ...core.cache import canonical_json_sha256
from ...models.checkpoints.pretrained import pretrained
from ...models.rows.forward import evaluating

no_embedder = Fault("no-embedder", "A folder that was to embed texts holds no encoder that can.", exit="environment")

_BATCH = 16
_LENGTH = 256  # tokens of a text that count; MiniLM was trained with as many


class Embedder(Protocol):
    """`identity` tells vectors apart that must not be compared."""

    identity: str
    width: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, width] float32."""


class MeanPooledEncoder:
    """Mean of the last hidden states over the tokens of a text, scaled to length 1, as MiniLM's authors do it.

    encoder   its forward gives hidden states [b, t, width], padding behind does not change them
    Source: Reimers and Gurevych 2019 (arXiv 1908.10084), section 3, mean pooling.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, identity: str):
        self.encoder, self._tokenizer = encoder, tokenizer
        self.identity = canonical_json_sha256([identity, "mean", _LENGTH])
        config = pretrained(encoder).config
        self.width = int(config.hidden_size)
        max_positions = getattr(config, "max_position_embeddings", None) or _LENGTH
        self._length = min(_LENGTH, max_positions)

    def embed(self, texts: Sequence[str]) -> Tensor:
        vectors = torch.empty(len(texts), self.width)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            vectors[chosen] = self._embed_batch([texts[i] for i in chosen])
        return vectors

    def pairs(self, questions: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """Tokens of each question with its answer behind it, as the tokenizer writes a pair."""
        cut = {"truncation": True, "max_length": self._length}
        return [self._tokenizer(q, a, **cut)["input_ids"] for q, a in zip(questions, answers, strict=True)]

    def mean_pooled_states(self, rows: Sequence[list[int]]) -> Tensor:
        """Means [b, width] of the hidden states over the tokens of each row, float32."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])  # [b, t]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        hidden = self.encoder(input_ids=ids, attention_mask=mask)[0].float()  # [b, t, width]
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def _embed_batch(self, texts: Sequence[str]) -> Tensor:
        rows = [self._tokenizer(text, truncation=True, max_length=self._length)["input_ids"] or [0] for text in texts]
        with evaluating(self.encoder):
            return nn.functional.normalize(self.mean_pooled_states(rows), dim=-1)


def model_embedder(model: Any, tokenizer: Any, identity: str) -> MeanPooledEncoder:
    """The causal model's own states: coarser than an encoder's, and nothing more to load."""
    return MeanPooledEncoder(model.get_decoder(), tokenizer, f"own {identity}")


def open_folder_embedder(folder: Path, cache_dir: Path) -> MeanPooledEncoder:
    """A sentence encoder (MiniLM and its kin) as `save_pretrained` wrote it. Its vectors are those of its weights and
    tokenizer, wherever the folder lies."""
    from transformers import MODEL_MAPPING

    from ...core.hashes import names_and_contents_hash
    from ...models.checkpoints.auxiliary_models import open_model_with_head
    from ...models.checkpoints.model_folder import load_tokenizer, read_model_config, tokenizer_files_if_complete
    from ...models.checkpoints.weights import read_weight_headers

    config, words = read_model_config(folder / "config.json", str(folder)), tokenizer_files_if_complete(folder)
    if not words or "auto_map" in config:
        reason = "brings its own code" if words else "has no tokenizer"
        raise no_embedder(f"{folder} {reason}", help="take a MiniLM-class encoder with its tokenizer files").rejection()
    files = {"config.json": folder / "config.json", **read_weight_headers(folder, str(folder)).files, **words}
    encoder: Any = open_model_with_head(folder, MODEL_MAPPING, str(folder))
    if not getattr(encoder.config, "hidden_size", None):
        raise no_embedder(f"{folder} is a {config['model_type']}, whose states have no one width").rejection()
    return MeanPooledEncoder(encoder, load_tokenizer(folder, str(folder)), names_and_contents_hash(files, cache_dir))
