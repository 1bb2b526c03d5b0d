"""Run by path: renders conversations by chat templates and tokenises texts. A request is two lines of JSON, an answer
one, and bytes behind them where they say how many.

Template and tokenizer came with a model, from anybody. transformers runs a template in Jinja's sandbox, which keeps it
from Python, and a tokenizer's steps are of known types, but neither is kept from taking all time and memory, some of
that within a single operation that nothing in Python can stop. So they run here, where the kernel stops them: by a
timer of processor time that ends the process, and a limit of its memory. It confines itself first, as it needs no file
but Python's, and no socket.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
from array import array
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

TEXT = 16 << 20  # characters of a conversation
TOKENIZERS = 4  # open at once
NONE = (1 << 32) - 1  # word or sequence of a token that has none
Answer = tuple[dict[str, Any], bytes]  # of JSON, and what is attached to it


def confine() -> None:
    """Confine this process by effc's sandbox, opened by its path: effc as a package takes long to import."""
    spec = importlib.util.spec_from_file_location("sandbox", Path(__file__).parents[2] / "core" / "sandbox.py")
    assert spec is not None and spec.loader is not None, "a file of Python has a loader"
    sandbox = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sandbox)
    sandbox.confine_process((), ())


def main() -> None:
    confine()
    answers = os.fdopen(os.dup(1), "wb")
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, 1)  # libraries print there, what a file says among it
    tokenizers: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        head, arguments = json.loads(line), json.loads(sys.stdin.buffer.readline())
        attached = sys.stdin.buffer.read(head["attached"])
        work = _request_handler(head["kind"], tokenizers)
        os.dup2(null_device, 2)
        _limit_memory(head["memory"])
        _limit_time(head["seconds"])
        answer, body = _answer_or_error(work, arguments, attached, head["memory"])
        _limit_time(0)
        _limit_memory(None)
        answers.write(json.dumps({**answer, "attached": len(body)}).encode() + b"\n" + body)
        answers.flush()


def _request_handler(kind: str, tokenizers: dict[str, Any]) -> Callable[[dict[str, Any], bytes], Answer]:
    """Function that answers requests of a kind, with its libraries imported."""
    if kind == "render":
        from transformers.utils.chat_template_utils import render_jinja_template

        return lambda arguments, _: _render(render_jinja_template, arguments)
    from tokenizers import Tokenizer

    if kind == "encode":
        return lambda arguments, _: _encode_to_packed_columns(tokenizers, **arguments)
    return lambda arguments, description: _open(Tokenizer, tokenizers, description, **arguments)


def _answer_or_error(
    compute: Callable[[dict[str, Any], bytes], Answer], arguments: dict[str, Any], attachment: bytes, memory_bytes: int
) -> Answer:
    try:
        return compute(arguments, attachment)
    except MemoryError:
        return {"error": f"it takes more than {memory_bytes >> 20} MiB of memory", "type": "MemoryError"}, b""
    except RecursionError:
        return {"error": "it calls itself without end", "type": "RecursionError"}, b""
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return {"error": str(error)[:500] or type(error).__name__, "type": type(error).__name__}, b""


def _render(render_jinja_template: Callable[..., Any], arguments: dict[str, Any]) -> Answer:
    """The text of a conversation."""
    texts = render_jinja_template(conversations=[arguments.pop("messages")], **arguments)[0]
    (text,) = list(texts)
    if len(text) > TEXT:
        return {"error": f"it writes more than {TEXT >> 20} million characters"}, b""
    return {"text": text}, b""


def _open(tokenizer_class: Any, tokenizers: dict[str, Any], description: bytes, tokenizer: str) -> Answer:
    """Keep a tokenizer, by the hash of what describes it."""
    while len(tokenizers) >= TOKENIZERS:
        del tokenizers[next(iter(tokenizers))]
    tokenizers[tokenizer] = tokenizer_class.from_str(description.decode())
    return {}, b""


def _encode_to_packed_columns(
    tokenizers: dict[str, Any],
    tokenizer: str,
    texts: list[Any],
    special: bool,
    words: bool,
    truncation: dict[str, Any] | None,
    padding: dict[str, Any] | None,
    split_special: bool,
) -> Answer:
    """Tokens of texts: for each the number of sequences and of tokens, and of those cut off; their columns behind."""
    library = tokenizers.get(tokenizer)
    if library is None:
        return {"unknown": True}, b""
    library.no_truncation() if truncation is None else library.enable_truncation(**truncation)
    library.no_padding() if padding is None else library.enable_padding(**padding)
    library.encode_special_tokens = split_special
    pairs = [tuple(text) if isinstance(text, list) and not words else text for text in texts]
    lengths, columns = [], array("I")
    for encoding in library.encode_batch(pairs, add_special_tokens=special, is_pretokenized=words):
        parts = [encoding, *encoding.overflowing]
        lengths.append([encoding.n_sequences, *map(len, parts)])
        for part in parts:
            for column in (part.ids, part.type_ids, part.attention_mask, part.special_tokens_mask):
                columns.extend(column)
            for column in (part.word_ids, part.sequence_ids):
                columns.extend(NONE if number is None else number for number in column)
            columns.extend(chain.from_iterable(part.offsets))
    return {"lengths": lengths}, columns.tobytes()


def _limit_time(seconds: float) -> None:
    """End the process after so much of its time: even an operation that never returns to Python; 0: no longer."""
    with contextlib.suppress(AttributeError):  # a system without timers
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory(spare_bytes: int | None) -> None:
    """Let the process take so many bytes beyond what it has; None: any number."""
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):  # a system that counts otherwise
        import resource

        with open("/proc/self/statm") as pages:
            data_bytes = int(pages.read().split()[5]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard if spare_bytes is None else data_bytes + spare_bytes, hard))


if __name__ == "__main__":
    main()
