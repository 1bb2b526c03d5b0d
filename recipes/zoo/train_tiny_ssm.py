"""Train the embedded zoo models `tiny-mamba2` and `tiny-hybrid` (Mamba-2 and attention) on the text of `tiny-llama`.

    python recipes/zoo/train_tiny_ssm.py tiny-mamba2 --text kjv.txt
    python recipes/zoo/train_tiny_ssm.py tiny-hybrid --text kjv.txt

`train_tiny_llama.py` says how to get the text. Tokenizer, held-out books, calibration text, batches and schedule
are its, so that the three models' numbers compare. The same options and library versions on the same kind of CPU
give the same weights; transformers' chunked scan is fast enough at these sizes. `--start` goes on from the weights of
an earlier run, with a schedule of its own; the card tells both.
"""

import argparse
import math
import os
import platform
import shutil
from pathlib import Path

import tokenizers
import torch
from torch import nn
from train_tiny_llama import (
    HELD_OUT,
    PROMPT,
    WINDOW,
    encode,
    prose,
    quality,
    read_chapters,
    sample,
    save,
    token_stream,
    train,
)
from transformers import (
    AutoTokenizer,
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXTS = Path(__file__).with_name("tiny-llama")
ATTENTION = [2, 5]  # layers of tiny-hybrid that attend; the others scan


def made(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    ids = {f"{kind}_id": tokenizer.convert_tokens_to_ids(token) for kind, token in tokenizer.special_tokens_map.items()}
    if name == "tiny-mamba2":
        return Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=len(tokenizer),
                hidden_size=128,
                num_hidden_layers=8,
                num_heads=8,
                head_dim=32,
                state_size=32,
                n_groups=1,
                chunk_size=64,
                initializer_range=0.04,
                tie_word_embeddings=True,
                rescale_prenorm_residual=False,
                **ids,
            )
        )
    return BambaForCausalLM(
        BambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            attn_layer_indices=ATTENTION,
            max_position_embeddings=WINDOW,
            mamba_n_heads=8,
            mamba_d_head=32,
            mamba_d_state=32,
            mamba_n_groups=1,
            mamba_chunk_size=64,
            initializer_range=0.04,
            tie_word_embeddings=True,
            **ids,
        )
    )


def groups(model: nn.Module) -> list[dict]:
    """Matrices shrink by weight decay; what sets a scan's time scale, norms and biases don't."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]


CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# {name}

{what} of {parameters:,} parameters, trained long enough that removing parts visibly costs and healing visibly
repairs. It continues King James English; it knows nothing else.

- **Data, tokenizer, held-out text:** those of `tiny-llama`, whose folder has `calib.txt` and `heldout.txt`;
  the King James Bible (1611), {train_bytes:,} bytes of training text. Held out: {held_books}.
- **Licence:** the text is in the public domain; weights and script are Apache-2.0.
- **Architecture:** `{architectures[0]}`, {num_hidden_layers} layers, hidden {hidden_size}, tied embeddings,
  {parts}, {dtype}.
- **Training:** {before}{steps:,} steps of {rows} x {window} tokens, {tokens:,} tokens, {epochs:.1f} epochs,
  {seconds:,.0f} s of wall time; AdamW (0.9, 0.98), weight decay 0.1 on matrices, peak learning rate {lr:g},
  {warmup} warmup steps, cosine to 2%, clip 1.0, {precision}, seed {seed}.
- **Machine:** {machine}, {threads} thread(s); Python {python}, torch {torch},
  transformers {transformers_version}, tokenizers {tokenizers}.

## Quality

Training loss {train_loss:.3f} nats/token (mean of the last 200 steps). Below: float32, token weighted, over
windows of `<s>` and length - 1 tokens (uniform: {uniform:.3f} nats, perplexity {vocab_size:,}).
`calib.txt` was trained on, many times: judge a change by `heldout.txt`.

| text | window, tokens | nats/token | perplexity | nats/byte |
|---|---|---|---|---|
{quality}

Sampled (temperature 0.7, top-k 50, seed {seed}) after "{prompt}":

> {sample}

## Reproduce (`train_tiny_llama.py` says how to get the text)

    {command}
"""
WHAT = {"tiny-mamba2": "A Mamba-2", "tiny-hybrid": "A hybrid of Mamba-2 and attention layers, each with an MLP,"}


def micro_batches(name: str, config: BambaConfig | Mamba2Config) -> str:
    if name == "tiny-mamba2":
        return (
            f"{config.num_heads} scan heads of {config.head_dim},\n  state {config.state_size}, "
            f"{config.n_groups} group, convolution over {config.conv_kernel}"
        )
    return (
        f"{config.mamba_n_heads} scan heads of {config.mamba_d_head},\n  state {config.mamba_d_state}; layers "
        f"{' and '.join(map(str, config.attn_layer_indices))} attend instead, with {config.num_attention_heads} "
        f"query and {config.num_key_value_heads} key/value heads;\n  MLP {config.intermediate_size}"
    )


def write_card(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: dict[str, float], args: argparse.Namespace
) -> None:
    options = {name: getattr(args, name) for name in ("rows", "lr", "warmup", "seed", "threads")}
    flags = [f"--{name} {value}" for name, value in {"steps": args.steps, **options}.items()]
    flags += [f"--start FIRST --start-steps {args.start_steps}"] if args.start else []
    first = (
        f"a first run of {args.start_steps:,} steps, peak learning rate {args.start_lr:g}, left before its rate\n"
        "  had fallen; then "
        if args.start
        else ""
    )
    (args.out / "README.md").write_text(
        CARD.format(
            **model.config.to_dict(),
            **facts,
            **options,
            name=args.name,
            what=WHAT[args.name],
            before=first,
            parameters=model.num_parameters(),
            parts=micro_batches(args.name, model.config),
            held_books=", ".join(HELD_OUT),
            window=WINDOW,
            uniform=math.log(len(tokenizer)),
            machine=args.machine,
            python=platform.python_version(),
            precision="bfloat16 autocast over float32 weights" if args.bf16 else "float32",
            torch=torch.__version__,
            tokenizers=tokenizers.__version__,
            quality=quality(model, tokenizer, TEXTS),
            prompt=PROMPT,
            sample=sample(model, tokenizer, PROMPT, args.seed).replace("\n\n", "\n>\n> "),
            command=f"python recipes/zoo/{Path(__file__).name} {args.name} --text kjv.txt \\\n        "
            + " ".join(flags)
            + ("" if args.bf16 else " --no-bf16"),
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=list(WHAT))
    parser.add_argument("--text", type=Path, required=True, help="the King James Bible as `bible` prints it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--rows", type=int, default=4, help=f"windows of {WINDOW} tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--start", type=Path, help="folder of an earlier run, whose weights to start from")
    parser.add_argument("--start-steps", type=int, default=0, help="how many steps that run had made")
    parser.add_argument("--start-lr", type=float, default=2e-3, help="its peak learning rate")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this time")
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core {platform.machine()} CPU")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out = args.out or Path(__file__).with_name(args.name)
    args.out.mkdir(parents=True, exist_ok=True)
    chapters = read_chapters(args.text.read_text())
    training = [chapter for chapter in chapters if chapter.book not in HELD_OUT]
    held_out = [chapter for chapter in chapters if chapter.book in HELD_OUT]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TEXTS / file, args.out / file)
    tokenizer = AutoTokenizer.from_pretrained(TEXTS)
    model = made(args.name, tokenizer)
    if args.start:
        model.load_state_dict(type(model).from_pretrained(args.start).state_dict())
    stream = token_stream(training, tokenizer)
    facts = train(model, stream, torch.tensor(encode(prose(held_out), tokenizer)), args, groups(model))
    save(model, args.out)
    write_card(model, tokenizer, facts | {"train_bytes": len(prose(training).encode())}, args)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
