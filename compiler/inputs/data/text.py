"""Windows of tokens from text files."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from ...plugin.context import Context
from ...plugin.interfaces import param
from ..sampled_rows import SampledRows
from ..windows import encode, read_text, require_tokenizer, start_token_id, token_windows, too_short


class Text(SampledRows):
    """Windows of tokens from text files.

    The files are encoded one after the other, each as a whole, and cut into rows of `length` tokens without
    overlap; the tail that fills no row is left out. Where the tokenizer puts a start token in front of a text,
    every row begins with it and holds `length - 1` tokens of text. Without `samples` all rows come in order;
    with it, that many in an order that the seed decides, no row twice, fewer a prefix of more; `skip` leaves out
    the first ones, so that two data sets of one file have no row in common.

    Source: the fixed-window perplexity of Hugging Face's guide "Perplexity of fixed-length models", with a
    stride of one window.
    Example: data calib = text("calib.txt", samples: 64, length: 512, seed: 7)
    """

    path: str | tuple[str, ...] = param("File, glob, or list of them, relative to the recipe.", positional=True)
    length: int = param("Tokens in a row, a start token included.", ge=2, unit="tokens")
    skip: int = param("Rows passed over first, in that order: those of another data set.", default=0, ge=0, unit="rows")
    start: Literal["auto", "always", "never"] = param(
        "Whether rows begin with the start token; `auto` does what the tokenizer does.", default="auto"
    )

    def identity_facts(self, ctx: Context) -> dict[str, Any]:
        facts = super().identity_facts(ctx)
        return facts if self.skip else {name: value for name, value in facts.items() if name != "skip"}

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        tokenizer = require_tokenizer(tokenizer, ctx)
        texts = [read_text(file) for file in self.files(ctx)]
        if any(texts) and not any(map(str.strip, texts)):
            raise too_short("there is nothing but white space to read", help="name a file of text").rejection()
        ids = [i for text in texts for i in encode(text, tokenizer)]
        start = start_token_id(tokenizer, self.start)
        upto = None if self.samples is None else self.skip + self.samples
        return islice(token_windows(ids, self.length, start, upto, self.sampling_seed(ctx)), self.skip, None)
