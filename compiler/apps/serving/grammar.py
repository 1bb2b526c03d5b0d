"""Grammars that answers keep to: JSON objects, JSON Schemas and calls of tools, as masks over the next token.

Schemas come from clients: llguidance bounds the work for one, `_MAX_SCHEMA` its text.
Source: Geng et al. 2025, JSONSchemaBench (arXiv 2501.10868), for what the library covers of JSON Schema.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .error_response import ErrorResponse
from .tagged_text import Tag, tag_grammar, tagged_text_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_SCHEMA = 1 << 18  # characters
_COMPACT = {"whitespace_flexible": False}  # small models write spaces without end where they may
_TAGS = "the schemas of the tools together"
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
        allowed = self.allowed()
        allowed = allowed[allowed < len(logits)]  # tokenizers may have more tokens than the model has rows
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
        if any(words in reason for words in ("TooComplex", "Too many", "Current row has")):
            raise GrammarError("the schema is too complex: fewer properties, choices or repetitions at one place work")
        raise GrammarError(f"the schema can't be kept to: {reason}")


class GrammarCompiler:
    """Grammars over a tokenizer's tokens. Its table of them is made at the first request, once; from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Sequence[int]):
        self._tokenizer, self._vocabulary, self._eos_ids = tokenizer, vocabulary, list(eos_ids)
        self._table: LLTokenizer | None = None
        self._rejection = ""  # of the tokenizer, once it was read in vain
        self._lock = Lock()

    def of_schema(self, schema: Any, field: str, label: str = "the schema") -> Matcher:
        """Matcher of a JSON Schema. Raises ErrorResponse (400) that names the request's `field`; `label` begins it."""
        if number := next(_huge_numbers(schema), None):
            raise ErrorResponse(400, f"{label} has {_number_text(number)}, and numbers have 64 bits here", field)
        text = json.dumps(schema)
        if len(text) > _MAX_SCHEMA:
            raise ErrorResponse(400, f"{label} has {len(text)} characters, and at most {_MAX_SCHEMA} are read", field)
        library = _llguidance()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT)
        except ValueError as error:
            raise ErrorResponse(400, f"{label} can't be used: {_one_line(str(error))}", field) from error
        return self._compiled(grammar, field, label)

    def of_tag(self, tags: Sequence[Tag], field: str) -> Matcher:
        """Matcher of one of the tags alone."""
        return self._compiled(tag_grammar(tags), field, _TAGS)

    def of_tagged_text(self, tags: Sequence[Tag], parallel: bool, field: str) -> Matcher:
        """Matcher of free text with tags in it."""
        table, tokens = self._token_table(), self._added_tokens()
        specials = {id for id in tokens.values() if table.is_special_token(id)} - {*self._eos_ids}
        return self._compiled(tagged_text_grammar(tags, tokens, specials, parallel), field, _TAGS)

    def _added_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that are cut from a text before all others, by what they are called."""
        added: dict[str, int] = self._tokenizer.get_added_vocab()
        return {text: id for text, id in added.items() if 0 <= id < self._vocabulary}

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
            if self._rejection:
                raise ErrorResponse(400, self._rejection)
            if self._table is None:
                try:
                    self._table = self._build_token_table()
                except ValueError as error:
                    self._rejection = f"the model's tokenizer can't be used for a schema: {_one_line(str(error))}"
                    raise ErrorResponse(400, self._rejection) from error
            return self._table

    def _build_token_table(self) -> "LLTokenizer":
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("it has no `tokenizer.json`")
        size = backend.get_vocab_size(with_added_tokens=True)
        eos_ids = [id for id in self._eos_ids if id < size]
        if not eos_ids:  # the library would take another token for one
            raise ValueError("it has no token that ends a text")
        return _llguidance().LLTokenizer(backend.to_str(), n_vocab=max(self._vocabulary, size), eos_token=eos_ids)


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


def _number_text(value: int | float) -> str:
    try:
        return f"the number {value:.3g}"
    except OverflowError:
        return f"a number of {int(value).bit_length()} bits"


def _one_line(text: str) -> str:
    """A message of the library, short, and without advice that a client can't follow."""
    if "coerce_one_of" in text:
        return "its `oneOf` has choices that may hold at once: write `anyOf`"
    return " ".join(text.split())[:300]
