"""Grammars that answers keep to: JSON objects, JSON Schemas and calls of tools, as masks over the next token.

Schemas come from clients: llguidance bounds the work for one, `_MAX_SCHEMA` its text.
Source: Geng et al. 2025, JSONSchemaBench (arXiv 2501.10868), for what the library covers of JSON Schema.
"""

import json
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .error_response import ErrorResponse

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_SCHEMA = 1 << 18  # characters
_COMPACT = {"whitespace_flexible": False}  # small models write spaces without end where they may
_MISSING = (
    "answers that keep to a schema and calls of tools need the package llguidance, which the server lacks: "
    'pip install "effc[serve]"'
)


class GrammarError(Exception):
    """A grammar that no answer keeps to, or that is too much work."""


class Matcher:
    """A grammar at one place of a text: what may follow, and whether the text may end."""

    def __init__(self, matcher: "LLMatcher"):
        self._matcher = matcher

    def copy(self) -> "Matcher":
        return Matcher(self._matcher.deep_copy())

    def mask(self, logits: Tensor) -> Tensor:
        """logits [vocabulary], -inf for tokens that the grammar does not allow next; those that end a text are allowed
        where it may end."""
        allowed = self.allowed()[: len(logits)]
        masked = torch.full_like(logits, float("-inf"))
        return masked.index_copy_(0, allowed, logits[allowed])

    def allowed(self) -> Tensor:
        """Ids of the tokens that may follow [n]."""
        flags = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._raise_on_error()
        return flags.nonzero()[:, 0]

    def push(self, token: int) -> bool:
        """Go on behind a token; whether the text is complete, so that nothing may follow. Raises GrammarError."""
        self._matcher.consume_token(token)
        self._raise_on_error()
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            raise GrammarError("no text keeps to the schema")
        return self._matcher.is_stopped()

    def _raise_on_error(self) -> None:
        if not self._matcher.is_error():
            return
        reason = f"{self._matcher.stop_reason()}: {_one_line(self._matcher.get_error())}"
        if "NoExtension" in reason:
            raise GrammarError("no text keeps to the schema")
        if "TooComplex" in reason or "Too many" in reason:
            raise GrammarError("the schema is too complex: fewer properties, choices or repetitions at one place work")
        raise GrammarError(f"the schema can't be kept to: {reason}")


class GrammarCompiler:
    """Grammars over a tokenizer's tokens. Its table of them is made at the first request, once; from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Sequence[int]):
        self._tokenizer, self._vocabulary, self._eos_ids = tokenizer, vocabulary, list(eos_ids)
        self._table: LLTokenizer | None = None
        self._lock = Lock()

    def of_schema(self, schema: Any, field: str, label: str = "the schema") -> Matcher:
        """Matcher of a JSON Schema. Raises ErrorResponse (400) that names the request's `field`; `label` begins it."""
        text = json.dumps(schema)
        if number := next(_huge_numbers(schema), None):
            raise ErrorResponse(400, f"{label} has the number {number:.3g}, and numbers have 64 bits here", field)
        if len(text) > _MAX_SCHEMA:
            raise ErrorResponse(
                400, f"the schema has {len(text)} characters, and at most {_MAX_SCHEMA} are read", field
            )
        library = _llguidance()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT)
        except ValueError as error:
            raise ErrorResponse(400, f"{label} can't be used: {_one_line(str(error))}", field) from error
        return self._compiled(grammar, field, label)

    def of_tags(self, tags: Sequence[tuple[str, str, Any, str]], field: str) -> Matcher:
        """Matcher of free text with tagged JSON in it: (trigger, begin, schema, end) of each kind of tag."""
        tag_class = _llguidance().StructTag
        special = set(getattr(self._tokenizer, "all_special_tokens", ()))
        grammar = tag_class.to_grammar(
            [tag_class(trigger=t, begin=b, grammar=schema, end=e) for t, b, schema, e in tags],
            assume_special=all(trigger in special for trigger, *_ in tags),
        )
        return self._compiled(grammar, field, "the schemas of the tools together")

    def _compiled(self, grammar: str, field: str, label: str) -> Matcher:
        library = _llguidance()
        limits = library.LLParserLimits(initial_lexer_fuel=500_000, max_grammar_size=100_000, verbose_errors=False)
        compiled = library.LLMatcher(self._token_table(), grammar, log_level=0, limits=limits)
        if compiled.is_error():
            raise ErrorResponse(400, f"{label} can't be used: {_one_line(compiled.get_error())}", field)
        matcher = Matcher(compiled)
        try:
            count = len(matcher.copy().allowed())
        except GrammarError as error:
            raise ErrorResponse(400, str(error), field) from error
        if not count:
            raise ErrorResponse(400, f"{label} lets no token of the model begin a text", field)
        return matcher

    def _token_table(self) -> "LLTokenizer":
        with self._lock:
            if self._table is None:
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise ErrorResponse(400, "the model's tokenizer has no `tokenizer.json`, and a schema needs it")
                self._table = _llguidance().LLTokenizer(
                    backend.to_str(), n_vocab=self._vocabulary, eos_token=self._eos_ids or None
                )
            return self._table


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ErrorResponse(501, _MISSING, code="not_installed") from error
    return llguidance


def _huge_numbers(schema: Any) -> Iterator[int | float]:
    """Numbers of a schema that 64 bits don't hold exactly as integers."""
    if isinstance(schema, dict):
        schema = list(schema.values())
    if isinstance(schema, list):
        for entry in schema:
            yield from _huge_numbers(entry)
    elif isinstance(schema, int | float) and abs(schema) >= 2**63:
        yield schema


def _one_line(text: str) -> str:
    """A message of the library, short, and without advice that a client can't follow."""
    if "coerce_one_of" in text:
        return "its `oneOf` has choices that may hold at once: write `anyOf`"
    return " ".join(text.split())[:300]
