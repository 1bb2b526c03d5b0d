"""Train the embedded zoo model `tiny-llama`: tokenizer, weights, calibration and held-out text, model card.

The text is the King James Bible (1611, public domain), as the Debian packages `bible-kjv` and `bible-kjv-text` print it:

    apt-get download bible-kjv bible-kjv-text
    for package in bible-kjv*.deb; do dpkg-deb -x "$package" kjv; done
    kjv/usr/bin/bible -p kjv/usr/lib gen1:1-rev22:21 > kjv.txt
    python recipes/zoo/train_tiny_llama.py --text kjv.txt

Whole books are held out (`HELD_OUT`): neither the tokenizer nor the weights see them. The same text, seed, steps, threads and library
versions on the same kind of CPU give the same weights. `--minutes` stops early and is then recorded in the card.
"""
import argparse
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

HELD_OUT = ("Ruth", "Esther", "Ecclesiastes", "Jonah", "James", "1 Peter")   # few parallel passages elsewhere
CALIBRATION_STRIDE = 27         # every 27th training chapter: about 150 kB from all over the text
WINDOW = 256                    # tokens; of training rows and of held-out windows
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
    """Split the printed text at its headings (`Genesis 1`, between blank lines); join verses and wrapped lines with one space."""
    chapters, book, lines = [], "", []
    previous = ""
    for line in dump.splitlines() + ["", "End 0"]:
        heading = HEADING.match(line) if not previous else None
        if heading:
            if lines:
                chapters.append(Chapter(book, " ".join(lines)))
            book, lines = heading[1], []
        elif line:
            lines.append(VERSE.sub("", line).strip())
        previous = line
    assert len(chapters) == 1189, f"{len(chapters)} chapters; the King James Bible has 1189"
    return chapters


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<s>` is put in front, as Llama does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS, EOS, PAD], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, begin)])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512,
                                   clean_up_tokenization_spaces=False)


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.04,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)


def token_stream(chapters: list[Chapter], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All tokens in one row: chapters joined by a blank line, `</s>` at the end of each book.  return [tokens] int64"""
    ids: list[int] = []
    for book in dict.fromkeys(chapter.book for chapter in chapters):
        text = "\n\n".join(chapter.text for chapter in chapters if chapter.book == book)
        ids += tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def batches(stream: Tensor, rows: int, seed: int, bos: int) -> Iterator[Tensor]:
    """Endless [rows, WINDOW] batches: each epoch cuts the stream at a new offset and shuffles the windows.

    Half of the rows start with `<s>`, so the model neither needs it nor stumbles over it.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(WINDOW, (), generator=generator))
        windows = stream[offset: offset + (len(stream) - offset) // WINDOW * WINDOW].view(-1, WINDOW)
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - rows + 1, rows):
            batch = windows[order[start: start + rows]].clone()
            batch[: rows // 2, 0] = bos
            yield batch


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warmup, then a cosine down to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor, bos: int) -> float:
    """Mean nats per token over all whole windows, each `<s>` plus WINDOW - 1 tokens, so that every token is predicted once."""
    step = WINDOW - 1
    windows = ids[: len(ids) // step * step].view(-1, step)
    windows = torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)       # [windows, WINDOW]
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def replace(source: Path, target: Path) -> None:
    """Move the files of `source` into `target`, each whole or not at all."""
    for path in sorted(source.iterdir()):
        os.replace(path, target / path.name)


def save(part, folder: Path) -> None:
    """`save_pretrained`, so that a reader never sees a half-written file."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        part.save_pretrained(temporary)
        replace(Path(temporary), folder)


@dataclass
class Run:
    """What one training run did, for the card."""
    model: LlamaForCausalLM
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan        # nats per token, mean of the last 100 steps


def train(model: LlamaForCausalLM, stream: Tensor, held_out: Tensor, args: argparse.Namespace) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run, losses, bos = Run(model), [], model.config.bos_token_id
    start = saved = time.monotonic()
    for step, batch in enumerate(batches(stream, args.rows, args.seed, bos)):
        if step == args.steps or (args.minutes and time.monotonic() - start > 60 * args.minutes):
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        run.steps, run.tokens = step + 1, run.tokens + batch.numel()
        if run.steps % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"step {run.steps}/{args.steps}  train {recent:.3f} nats  {time.monotonic() - start:.0f} s", flush=True)
        if time.monotonic() - saved > args.checkpoint_seconds:
            save(model, args.out)
            print(f"step {run.steps}  held-out {held_out_loss(model, held_out, bos):.3f} nats  saved", flush=True)
            saved = time.monotonic()
    run.seconds, run.train_loss = time.monotonic() - start, sum(losses[-100:]) / len(losses[-100:])
    return run


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    out = model.eval().generate(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), max_new_tokens=80,
                                do_sample=True, temperature=0.7, top_k=50)
    return tokenizer.decode(out[0], skip_special_tokens=True)


