"""Train the embedded zoo model `tiny-llama`: tokenizer, weights, calibration and held-out text, model card.

The text is the King James Bible (1611, public domain), as the Debian packages `bible-kjv` and
`bible-kjv-text` print it:

    apt-get download bible-kjv bible-kjv-text
    for package in bible-kjv*.deb; do dpkg-deb -x "$package" kjv; done
    kjv/usr/bin/bible -p kjv/usr/lib gen1:1-rev22:21 > kjv.txt
    python recipes/zoo/train_tiny_llama.py --text kjv.txt

Whole books are held out (`HELD_OUT`): neither the tokenizer nor the weights see them. The same text, steps,
rows, seed, threads and library versions on the same kind of CPU give the same weights; `--minutes` stops early.
"""
import argparse
import contextlib
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("Ruth", "Esther", "Ecclesiastes", "Jonah", "James", "1 Peter")    # few parallels elsewhere
CALIBRATION_STRIDE = 27         # every 27th training chapter: about 140 kB from all over the text
WINDOW = 512                    # tokens in a training row: all positions that the config allows
VOCABULARY = 2048
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
HEADING = re.compile(r"^((?:[1-3] )?[A-Z][A-Za-z ]*) (\d+)$")
VERSE = re.compile(r"^ +\d+ ")


@dataclass(frozen=True)
class Chapter:
    """One chapter as one paragraph of prose, without verse numbers and line wraps."""
    book: str
    text: str


def read_chapters(dump: str) -> list[Chapter]:
    """Split at headings (`Genesis 1` after a blank line); join verses and wrapped lines with one space."""
    chapters, book, lines, previous = [], "", [], ""
    for line in [*dump.splitlines(), "", "End 0"]:
        heading = None if previous else HEADING.match(line)
        if heading:
            if lines:
                chapters.append(Chapter(book, " ".join(lines)))
            book, lines = heading[1], []
        elif line:
            lines.append(VERSE.sub("", line).strip())
        previous = line
    assert len(chapters) == 1189, f"{len(chapters)} chapters; the King James Bible has 1189"
    return chapters


def prose(chapters: list[Chapter]) -> str:
    """Paragraphs with a blank line between them."""
    return "\n\n".join(chapter.text for chapter in chapters)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<s>` is put in front, as Llama does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS, EOS, PAD], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
                                   model_max_length=WINDOW, clean_up_tokenization_spaces=False,
                                   model_input_names=["input_ids", "attention_mask"])


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=16, max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5, initializer_range=0.04, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)


def token_stream(chapters: list[Chapter], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """[tokens] int64: chapters with a blank line between them, `</s>` after each book."""
    ids: list[int] = []
    for book in dict.fromkeys(chapter.book for chapter in chapters):
        ids += encode(prose([chapter for chapter in chapters if chapter.book == book]), tokenizer)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def batches(stream: Tensor, rows: int, seed: int, bos: int) -> Iterator[Tensor]:
    """Endless [rows, WINDOW] batches: each epoch cuts the stream at a new offset and shuffles the windows.

    Half of the rows start with `<s>`, so that the model neither needs it nor stumbles over it.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(WINDOW, (), generator=generator))
        count = (len(stream) - offset) // WINDOW
        windows = stream[offset: offset + count * WINDOW].view(count, WINDOW)
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - rows + 1, rows):
            batch = windows[order[start: start + rows]].clone()
            batch[: rows // 2, 0] = bos
            yield batch


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warmup, then a cosine down to 2% of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor, length: int) -> float:
    """Nats per token over whole windows of `<s>` and `length - 1` tokens, each of which is predicted once."""
    count = len(ids) // (length - 1)
    windows = ids[: count * (length - 1)].view(count, length - 1)
    windows = torch.cat([torch.full((count, 1), model.config.bos_token_id), windows], dim=1)
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in windows.split(8)]
    model.train()
    return sum(losses) / count


def save(part: LlamaForCausalLM | PreTrainedTokenizerFast, folder: Path) -> None:
    """`save_pretrained`; a reader of `folder` never sees half a file."""
    with TemporaryDirectory(dir=folder.parent) as temporary:
        part.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, folder / path.name)


@dataclass
class Run:
    """What one training run did, for the card."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan        # nats per token, mean of the last 200 steps


def train(model: LlamaForCausalLM, stream: Tensor, held_out: Tensor, args: argparse.Namespace) -> Run:
    """AdamW with a cosine schedule; prints the loss curve, saves the weights every `--checkpoint-seconds`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    run, losses, start = Run(), [], time.monotonic()
    saved, limit = start, start + 60 * args.minutes
    for batch in batches(stream, args.rows, args.seed, model.config.bos_token_id):
        if run.steps == args.steps or time.monotonic() > limit:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.steps, args)
        with torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses = [*losses[-199:], loss.item()]
        run.steps, run.tokens, run.seconds = run.steps + 1, run.tokens + batch.numel(), time.monotonic() - start
        run.train_loss = sum(losses) / len(losses)
        if run.steps % 100 == 0:
            print(f"step {run.steps}/{args.steps}  train {run.train_loss:.3f} nats/token  {run.seconds:.0f} s", flush=True)
        if time.monotonic() - saved > args.checkpoint_seconds:
            save(model, args.out)
            print(f"step {run.steps}  held-out {held_out_loss(model, held_out, 256):.3f} nats/token, saved", flush=True)
            saved = time.monotonic()
    return run


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    out = model.eval().generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=70, do_sample=True,
                                temperature=0.7, top_k=50)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def quality(model: LlamaForCausalLM, ids: Tensor, text: str) -> str:
    """Table rows, one per window length."""
    rows = []
    for length in (256, 512):
        loss = held_out_loss(model, ids, length)
        per_byte = loss * len(ids) / len(text.encode())
        rows.append(f"| {length} | {loss:.3f} | {math.exp(loss):.2f} | {per_byte:.3f} | {per_byte / math.log(2):.3f} |")
    return "\n".join(rows)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny-llama

A Llama of {parameters:,} parameters with its own tokenizer, small enough to sit in a repository and trained long enough
that pruning it visibly costs and healing it visibly repairs. It continues King James English; it knows nothing else.

- **Data:** the King James Bible (1611), {train_bytes:,} bytes of training text. Held out whole, from the tokenizer too:
  {held_books} (`heldout.txt`, {held_bytes:,} bytes, {held_tokens:,} tokens). One paragraph per
  chapter, no verse numbers. `calib.txt` is every {stride}th training chapter ({calib_bytes:,} bytes).
- **Licence:** the text is in the public domain; weights, tokenizer and script are Apache-2.0.
- **Tokenizer:** byte-level BPE, {vocabulary:,} entries with `{bos}`, `{eos}` and `{pad}`; puts `{bos}` in front; {ratio:.2f} bytes per token
  on the held-out text.
- **Architecture:** `LlamaForCausalLM`, {layers} layers, hidden {hidden}, {heads} query and {kv_heads} key/value heads of {head_dim}, MLP {mlp}, tied
  embeddings, {positions} positions, float32.
- **Training:** {steps:,} steps of {rows} x {window} tokens, {tokens:,} tokens ({epochs:.1f} epochs), {seconds:,.0f} s; AdamW (0.9, 0.98), weight decay
  0.1, peak learning rate {lr:g}, {warmup} warmup steps, cosine to 2%, clip 1.0, {precision}, seed {seed}.
- **Machine:** {machine} CPU, {cores} cores shared with other work, {threads} thread(s); Python {python}, torch {torch},
  transformers {transformers}, tokenizers {tokenizers}.

## Quality

Final training loss {train_loss:.3f} nats per token (mean of the last 200 steps). Held-out text, float32, token weighted, windows of
`{bos}` and length - 1 tokens (a uniform guess: {uniform:.3f} nats, perplexity {vocabulary:,}):

| window, tokens | nats/token | perplexity | nats/byte | bits/byte |
|---|---|---|---|---|
{quality}

Sampled (temperature 0.7, top-k 50, seed {seed}) after "{prompt}":

> {sample}

## Reproduce

    {command}

The script's docstring says how to get the text.
"""
PROMPT = "And it came to pass, when the king"


def write_card(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, run: Run, facts: dict[str, object],
               args: argparse.Namespace) -> None:
    config, held_out = model.config, (args.out / "heldout.txt").read_text()
    ids = torch.tensor(encode(held_out, tokenizer))
    options = "".join(f" --{name} {getattr(args, name)}" for name in ("steps", "rows", "lr", "warmup", "seed", "threads"))
    (args.out / "README.md").write_text(CARD.format(
        **facts, parameters=model.num_parameters(), held_books=", ".join(HELD_OUT), held_bytes=len(held_out.encode()),
        held_tokens=len(ids), stride=CALIBRATION_STRIDE, calib_bytes=(args.out / "calib.txt").stat().st_size,
        vocabulary=len(tokenizer), bos=BOS, eos=EOS, pad=PAD, ratio=len(held_out.encode()) / len(ids),
        layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, head_dim=config.head_dim, mlp=config.intermediate_size,
        positions=config.max_position_embeddings, steps=run.steps, rows=args.rows, window=WINDOW, tokens=run.tokens,
        seconds=run.seconds, lr=args.lr, warmup=args.warmup, seed=args.seed, threads=args.threads,
        precision="bfloat16 autocast over float32 weights" if args.bf16 else "float32", machine=platform.machine(),
        cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__, tokenizers=tokenizers.__version__, train_loss=run.train_loss,
        uniform=math.log(len(tokenizer)), quality=quality(model, ids, held_out), prompt=PROMPT,
        sample=sample(model, tokenizer, PROMPT, args.seed).replace("\n\n", "\n>\n> "),
        command=f"python recipes/zoo/{Path(__file__).name} --text kjv.txt{options}{'' if args.bf16 else ' --no-bf16'}"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the King James Bible as `bible` prints it")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tiny-llama"))
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--rows", type=int, default=4, help=f"windows of {WINDOW} tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this time")
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    chapters = read_chapters(args.text.read_text())
    training = [chapter for chapter in chapters if chapter.book not in HELD_OUT]
    held_out = [chapter for chapter in chapters if chapter.book in HELD_OUT]
    (args.out / "heldout.txt").write_text(prose(held_out) + "\n")
    (args.out / "calib.txt").write_text(prose(training[::CALIBRATION_STRIDE]) + "\n")
    tokenizer = train_tokenizer([chapter.text for chapter in training])
    save(tokenizer, args.out)
    model = LlamaForCausalLM(configuration(tokenizer))
    stream = token_stream(training, tokenizer)
    run = train(model, stream, torch.tensor(encode(prose(held_out), tokenizer)), args)
    save(model, args.out)
    facts = {"train_bytes": len(prose(training).encode()), "epochs": run.tokens / len(stream)}
    write_card(model, tokenizer, run, facts, args)
    print(quality(model, torch.tensor(encode(prose(held_out), tokenizer)), prose(held_out)))


if __name__ == "__main__":
    main()
