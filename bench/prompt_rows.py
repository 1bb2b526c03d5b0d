"""Print how far logits of a token depend on the call that it comes in: within a long prompt, last of a short one, or alone.

    python -m bench.prompt_rows ARTIFACT TEXT [--tokens 512] [--threads 1]

ARTIFACT is one of `native` whose model is a decoder, TEXT a file, of which the first tokens are read. Differences are the
largest over the vocabulary, and over 64 tokens in all of the row; beside them stands how far logits spread.
"""

import argparse
from pathlib import Path

import effc
import torch
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = effc.load(args.artifact).engine
    tokenizer = AutoTokenizer.from_pretrained(args.artifact / "native")
    ids = tokenizer(args.text.read_text(encoding="utf-8")[: 20 * args.tokens]).input_ids[: args.tokens]

    def prompt(count: int) -> torch.Tensor:
        engine.forget(0)
        return engine.run(ids[:count], [0] * count, list(range(count)))

    within, step = prompt(args.tokens), args.tokens // 64
    print(f"standard deviation of logits: {within.std(-1).mean():.1f}")
    counts = [count + odd for count in range(step, args.tokens, step) for odd in (0, 1)]
    last = torch.stack([prompt(count)[-1] - within[count - 1] for count in counts])
    print(f"last of a prompt: {last.abs().max():.4f}")
    alone = []
    for count in range(step, args.tokens + 1, step):
        prompt(count - 1)
        alone.append(engine.run([ids[count - 1]], [0], [0])[0] - within[count - 1])
    print(f"one token behind a cache: {torch.stack(alone).abs().max():.4f}")


if __name__ == "__main__":
    main()
