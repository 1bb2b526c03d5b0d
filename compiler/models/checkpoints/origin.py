"""Origin of a model, before and after its weights are read."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.source import Span
from ...core.device import out_of_device_memory_diagnostic
from ...core.error_location import diagnostics_located_at
from ...core.quantity import size_text
from .source_files import SourceFiles

if TYPE_CHECKING:
    import torch

# What configs call the length of the longest row.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions")
# Whose first position stands behind the one of padding: RoBERTa and its kin number positions so, and the config's
# length counts those that no token ever has.
_BEHIND_PADDING = (
    *("altclip_text_model", "bridgetower_text_model", "camembert", "clap_text_model", "data2vec-text", "ibert"),
    *("layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
CODE_POINTS = 0x110000  # of Unicode: ids of a model that hashes them, as CANINE does, and has no table
# Keys of a config that say nothing of the module that it makes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")


@dataclass(frozen=True)
class Origin:
    """A resolved model source. Making one reads a config, headers and hashes; never weights, never torch.

    label               as a person would call it: `hf("org/name")`, `zoo("tiny-llama")`
    config              the config as plain JSON; with `architectures`, so that the class is known
    folder              where safetensors, config and tokenizer lie (for a GGUF file: once `load` or `tokenizer`
                        has made it); None for random weights and modules
    identity            sha256 over what decides the weights: file hashes or (config, seed), and `dtype`
    build               makes the module; inside a `torch.device("meta")` context it has no weights
    load                makes the module with its weights, in `dtype`, all finite; on the CPU (see
                        `with_span_and_load_device`)
    tokenizer           the tokenizer, the same object every time, or None where the source has none
    dtype               what the weights are held and computed in: "float32", "bfloat16", "float16"
    tokenizer_identity  sha256 over the tokenizer's files; "" where there is none
    weight_bytes        bytes of the weights as `load` holds them, as far as known before reading; else 0
    code                sha256 over user code that makes the module; "" where transformers makes it
    notes               what a person should know, e.g. that float16 is slow on a CPU
    files               what identities were hashed from; None where no file decides the model
    span                where a recipe declares it
    """

    label: str
    config: dict[str, Any]
    folder: Path | None
    identity: str
    build: Callable[[], "torch.nn.Module"] = field(repr=False)
    load: Callable[[], "torch.nn.Module"] = field(repr=False)
    tokenizer: Callable[[], Any] = field(repr=False)
    dtype: str = "float32"
    tokenizer_identity: str = ""
    weight_bytes: int = 0
    code: str = ""
    notes: tuple[str, ...] = ()
    files: SourceFiles | None = field(default=None, repr=False, compare=False)
    span: Span | None = None

    def with_span_and_load_device(self, span: Span | None, load_device: str) -> "Origin":
        """Origin with the `span` of the recipe that names it, for diagnostics; `load` moves the module to a device."""

        def build() -> "torch.nn.Module":
            with diagnostics_located_at(span):
                return self.build()

        def load() -> "torch.nn.Module":
            import torch

            with diagnostics_located_at(span):
                try:
                    return self.load().to(load_device)
                except torch.OutOfMemoryError as error:
                    weights = f", whose weights take {size_text(self.weight_bytes)}," if self.weight_bytes else ""
                    raise out_of_device_memory_diagnostic(load_device, f"the model{weights}").rejection() from error

        def tokenizer() -> Any:
            with diagnostics_located_at(span):
                return self.tokenizer()

        return replace(self, build=build, load=load, tokenizer=tokenizer, span=span)

    def refuse_changed_files(self) -> None:
        """Raises Reject (model-changed) where a file that decides the model was changed since it was hashed.

        To be asked before anything is kept that was computed from the model's weights.
        """
        if self.files is not None:
            with diagnostics_located_at(self.span):
                self.files.refuse_changed_files()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what decides the module's structure: the key of its skeleton, equal for equal configs."""
        config = {k: v for k, v in self.config.items() if k not in _INCIDENTAL}
        body = json.dumps([config, self.code], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def token_id_count(self) -> int | None:
        """Number of token ids of the embedding, where the config states it. BEiT's counts the codes of picture
        patches."""
        if "image_size" in self.config and "text_config" not in self.config:
            return None
        stated = self._config_integer("src_vocab_size") or self._config_integer("vocab_size")
        return stated or (CODE_POINTS if self._config_integer("num_hash_buckets") else None)

    @property
    def target_token_id_count(self) -> int | None:
        """Number of token ids of targets; differs from that of sources where a translator has two tables."""
        named = self._config_integer("decoder_vocab_size") or self._config_integer("tgt_vocab_size")
        return named or _config_integer(self.config.get("decoder"), "vocab_size") or self.token_id_count

    @property
    def positions(self) -> int | None:
        """The longest row that the model was made for, where the config says."""
        return max_row_tokens(self.config)

    def _config_integer(self, name: str) -> int | None:
        return _config_integer(self.config, name)


def max_row_tokens(config: Mapping[str, Any]) -> int | None:
    """Maximum length of a row in tokens; None where the config, as plain JSON, does not state it."""
    parts = config, config.get("decoder")  # of an encoder of images or sounds the decoder alone has some
    longest = next(filter(None, (_config_integer(part, name) for part in parts for name in POSITIONS)), None)
    if longest and config.get("model_type") in _BEHIND_PADDING:
        padding = _config_integer(config, "pad_token_id")
        return max(1, longest - (1 if padding is None else padding) - 1)
    return longest


def _text_encoder(config: Mapping[str, Any]) -> Any:
    """The config of an encoder beside a decoder's; None of one that hears or sees: its vocabulary is another head's."""
    encoder = config.get("encoder")
    return encoder if isinstance(encoder, Mapping) and any(name in encoder for name in POSITIONS) else None


def _config_integer(config: Any, name: str) -> int | None:
    """A top-level number of the config, or of the text part of a multimodal one, or of an encoder that reads text."""
    if not isinstance(config, Mapping):
        return None
    for part in (config, config.get("text_config"), _text_encoder(config)):
        if isinstance(part, Mapping) and type(part.get(name)) is int:
            return part[name]
    return None
