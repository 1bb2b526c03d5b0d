"""llama.cpp's tokens of texts: JSON in, JSON out. Run by path, in a process of its own; imports nothing of effc."""

import json
import sys

import llama_cpp

if __name__ == "__main__":
    model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
    texts = json.load(sys.stdin)
    token_ids = [model.tokenize(text.encode("utf-8"), add_bos=False, special=False) for text in texts]
    print(json.dumps(token_ids), flush=True)
