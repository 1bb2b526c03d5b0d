"""llama.cpp's seconds for prompts and tokens, a JSON line each. Run by path, in a process of its own; imports nothing
of effc, and ends with its stdin.

{"prompt": ids} empties the cache and reads a prompt; {"token": id} decodes one behind it, after the prompt again where
the context is full.
"""

import json
import sys
import time
from typing import Any

import llama_cpp


def main(file: str, context: str, threads: str) -> None:
    counts: dict[str, Any] = {"n_threads": int(threads), "n_threads_batch": int(threads)}
    llama = llama_cpp.Llama(file, n_ctx=int(context), n_batch=int(context), verbose=False, **counts)
    prompt: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request or llama.n_tokens == llama.n_ctx():
            prompt = request.get("prompt", prompt)
            llama.reset()
            if "token" in request:
                llama.eval(prompt)
        ids = [request["token"]] if "token" in request else prompt
        started = time.perf_counter()
        llama.eval(ids)
        llama_cpp.llama_synchronize(llama.ctx)  # logits that nobody reads may not be there yet
        print(json.dumps(time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
