"""Train the embedded zoo model `tiny-llama`: tokenizer, weights, calibration and held-out text, model card.

The text is the King James Bible (1611, public domain), as the Debian packages `bible-kjv` and
`bible-kjv-text` print it:

    apt-get download bible-kjv bible-kjv-text
    for package in bible-kjv*.deb; do dpkg-deb -x "$package" kjv; done
    kjv/usr/bin/bible -p kjv/usr/lib gen1:1-rev22:21 > kjv.txt
    python recipes/zoo/train_tiny_llama.py --text kjv.txt

Whole books are held out (`HELD_OUT`): neither the tokenizer nor the weights see them. The same text, options
and library versions on the same kind of CPU give the same weights; `--minutes` stops early.
"""

import argparse
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HELD_OUT = ("Ruth", "Esther", "Ecclesiastes", "Jonah", "James", "1 Peter")  # few parallels elsewhere
CALIBRATION_STRIDE = 27  # about 140 kB from all over the text
WINDOW = 512  # tokens in a training row: all positions that the config allows
VOCABULARY, BOS, EOS, PAD = 2048, "<s>", "</s>", "<pad>"
HEADING = re.compile(r"^((?:[1-3] )?[A-Z][A-Za-z ]*) (\d+)$")
VERSE = re.compile(r"^ +\d+ ")


class Chapter(NamedTuple):
    book: str
    text: str  # one paragraph, without verse numbers and line wraps


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
    return "\n\n".join(chapter.text for chapter in chapters)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<s>` is put in front, as Llama does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        **ids,
    )


def token_stream(chapters: list[Chapter], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """[tokens] int64: chapters with a blank line between them, `</s>` after each book."""
    ids = []
    for book in dict.fromkeys(chapter.book for chapter in chapters):
        ids += encode(prose([chapter for chapter in chapters if chapter.book == book]), tokenizer)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def batches(stream: Tensor, rows: int, seed: int, bos: int) -> Iterator[Tensor]:
    """Endless [rows, WINDOW] batches; each epoch cuts the stream at a new offset and shuffles the windows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        windows = stream[int(torch.randint(WINDOW, (), generator=generator)) :].unfold(0, WINDOW, WINDOW)
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - rows + 1, rows):
            batch = windows[order[start : start + rows]].clone()
            batch[: rows // 2, 0] = bos  # half of the rows: neither needed nor harmful
            yield batch


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warmup, then a cosine down to 2% of the peak."""
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    if progress < 0:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, ids: Tensor, length: int) -> float:
    """Nats per token over whole windows of `<s>` and `length - 1` tokens, each of which is predicted once."""
    count = len(ids) // (length - 1)
    windows = ids[: count * (length - 1)].view(count, length - 1)
    windows = torch.cat([torch.full((count, 1), model.config.bos_token_id), windows], dim=1)
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in windows.split(8)]
    model.train()
    return sum(losses) / count


def save(part: PreTrainedModel | PreTrainedTokenizerFast, folder: Path) -> None:
    """`save_pretrained`; a reader of `folder` never sees half a file."""
    with TemporaryDirectory(dir=folder.parent) as temporary:
        part.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            if path.name == "tokenizer_config.json":  # a name that transformers 4 knows as well as 5
                facts = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
                path.write_text(json.dumps(facts, indent=2) + "\n")
            path.chmod(0o644)  # safetensors writes 0600
            os.replace(path, folder / path.name)


def train(
    model: PreTrainedModel, stream: Tensor, held_out: Tensor, args: argparse.Namespace, parameters: list | None = None
) -> dict[str, float]:
    """Print the loss curve, save the weights every `--checkpoint-seconds`; return facts for the card.

    parameters   groups for the optimizer; by default one of all
    """
    optimizer = torch.optim.AdamW(parameters or model.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    losses, start, saved = [], time.monotonic(), time.monotonic()
    for step, batch in enumerate(batches(stream, args.rows, args.seed, model.config.bos_token_id)):
        now = time.monotonic()
        if step % 100 == 0 and step:
            print(f"step {step}  train {mean(losses[-100:]):.3f} nats  {now - start:.0f} s", flush=True)
        if now - saved > args.checkpoint_seconds:
            save(model, args.out)
            print(f"step {step}  held-out {held_out_loss(model, held_out, 256):.3f} nats, saved", flush=True)
            saved = now
        if step == args.steps or now - start > 60 * args.minutes:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tokens = step * args.rows * WINDOW
    return {
        "steps": step,
        "tokens": tokens,
        "epochs": tokens / len(stream),
        "seconds": now - start,
        "train_loss": mean(losses[-200:]),
    }


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    out = model.eval().generate(
        **tokenizer(prompt, return_tensors="pt"), max_new_tokens=70, do_sample=True, temperature=0.7, top_k=50
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def quality(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    rows = []
    for name, length in (("heldout.txt", 256), ("heldout.txt", 512), ("calib.txt", 256)):
        text = (folder / name).read_text()
        ids = torch.tensor(encode(text, tokenizer))
        loss = held_out_loss(model, ids, length)
        per_byte = loss * len(ids) / len(text.encode())
        rows.append(f"| {name} | {length} | {loss:.3f} | {math.exp(loss):.2f} | {per_byte:.3f} |")
    return "\n".join(rows)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# {name}

{summary} It continues King James English; it knows nothing else.

{data}
- **Architecture:** `{architectures[0]}`, {num_hidden_layers} layers, hidden {hidden_size}, tied embeddings,
  {parts}, {dtype}.
- **Training:** {before}{steps:,} steps of {rows} x {window} tokens, {tokens:,} tokens, {epochs:.1f} epochs,
  {seconds:,.0f} s of wall time; AdamW (0.9, 0.98), weight decay 0.1{decayed}, peak learning rate {lr:g},
  {warmup} warmup steps, cosine to 2%, clip 1.0, {precision}, seed {seed}.
- **Machine:** {machine}, {threads} thread(s); Python {python}, torch {torch},
  transformers {transformers_version}, tokenizers {tokenizers}.

## Quality

Training loss {train_loss:.3f} nats/token (mean of the last 200 steps). Below: float32, token weighted, over
windows of `{bos_token}` and length - 1 tokens (uniform: {uniform:.3f} nats, perplexity {vocab_size:,}).
`calib.txt` was trained on, many times: judge a change by `heldout.txt`.

| text | window, tokens | nats/token | perplexity | nats/byte |
|---|---|---|---|---|
{quality}

Sampled (temperature 0.7, top-k 50, seed {seed}) after "{prompt}":

> {sample}

## Reproduce ({source} says how to get the text)

    {command}
"""
DATA = """- **Data:** the King James Bible (1611), {train_bytes:,} bytes of training text, one paragraph per chapter, no
  verse numbers. `calib.txt` is every {stride}th training chapter ({calib_bytes:,} bytes).
- **Held out**, from the tokenizer too: `heldout.txt`, {held_bytes:,} bytes, {held_tokens:,} tokens:
  {held_books}.
- **Licence:** the text is in the public domain; weights, tokenizer and script are Apache-2.0.
- **Tokenizer:** byte-level BPE, {vocabulary:,} entries with `{bos_token}`, `{eos_token}` and `{pad_token}`;
  puts `{bos_token}` in front; {ratio:.2f} bytes per token on the held-out text."""
PROMPT = "And it came to pass, when the king"


def write_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: dict[str, float],
    args: argparse.Namespace,
    texts: Path,
    words: Sequence[str] = (),
    **parts: str,
) -> None:
    """Write and print the card of a trained model.

    texts   folder of calib.txt and heldout.txt
    words   of the command, before and behind the common options
    parts   sentences that differ from model to model: name, summary, data, parts, before, decayed, source
    """
    options = {name: getattr(args, name) for name in ("rows", "lr", "warmup", "seed", "threads")}
    flags = [f"--{name} {value}" for name, value in {"steps": args.steps, **options}.items()]
    card = CARD.format(
        **model.config.to_dict(),
        **facts,
        **options,
        **parts,
        bos_token=tokenizer.bos_token,
        window=WINDOW,
        uniform=math.log(len(tokenizer)),
        precision="bfloat16 autocast over float32 weights" if args.bf16 else "float32",
        machine=args.machine,
        python=platform.python_version(),
        torch=torch.__version__,
        tokenizers=tokenizers.__version__,
        quality=quality(model, tokenizer, texts),
        prompt=PROMPT,
        sample=sample(model, tokenizer, PROMPT, args.seed).replace("\n\n", "\n>\n> "),
        command=" ".join(["python", *words[:1], "--text kjv.txt \\\n       ", *flags, *words[1:]])
        + ("" if args.bf16 else " --no-bf16"),
    )
    (args.out / "README.md").write_text(card)
    print(card)


def held_out_facts(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, str | float]:
    held_out = (folder / "heldout.txt").read_text()
    tokens, size = len(encode(held_out, tokenizer)), len(held_out.encode())
    return {"held_books": ", ".join(HELD_OUT), "held_bytes": size, "held_tokens": tokens, "ratio": size / tokens}


def common_parser(description: str, steps: int) -> argparse.ArgumentParser:
    """Options of the scripts that train models of the zoo."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the King James Bible as `bible` prints it")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rows", type=int, default=4, help=f"windows of {WINDOW} tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this time")
    parser.add_argument("--checkpoint-seconds", type=float, default=180)
    parser.add_argument("--machine", default=f"{os.cpu_count()}-core {platform.machine()} CPU")
    return parser


def begin(args: argparse.Namespace) -> tuple[list[Chapter], list[Chapter]]:
    """Set torch up and make the folder; chapters to train on, and those that are held out."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    chapters = read_chapters(args.text.read_text())
    return [c for c in chapters if c.book not in HELD_OUT], [c for c in chapters if c.book in HELD_OUT]


def main() -> None:
    parser = common_parser(__doc__, steps=5600)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tiny-llama"))
    args = parser.parse_args()
    training, held_out = begin(args)
    (args.out / "heldout.txt").write_text(prose(held_out) + "\n")
    (args.out / "calib.txt").write_text(prose(training[::CALIBRATION_STRIDE]) + "\n")
    tokenizer = train_tokenizer([chapter.text for chapter in training])
    save(tokenizer, args.out)
    model = LlamaForCausalLM(configuration(tokenizer))
    stream = token_stream(training, tokenizer)
    facts = train(model, stream, torch.tensor(encode(prose(held_out), tokenizer)), args)
    save(model, args.out)
    config = model.config
    write_card(
        model,
        tokenizer,
        facts,
        args,
        args.out,
        [f"recipes/zoo/{Path(__file__).name}"],
        name="tiny-llama",
        summary=f"A Llama of {model.num_parameters():,} parameters with its own tokenizer, trained long enough that "
        "pruning visibly costs\nand healing visibly repairs.",
        data=DATA.format(
            **tokenizer.special_tokens_map,
            **held_out_facts(tokenizer, args.out),
            train_bytes=len(prose(training).encode()),
            stride=CALIBRATION_STRIDE,
            calib_bytes=(args.out / "calib.txt").stat().st_size,
            vocabulary=config.vocab_size,
        ),
        parts=f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of "
        f"{config.head_dim},\n  MLP {config.intermediate_size}, {config.max_position_embeddings} positions",
        before="",
        decayed="",
        source="the script",
    )


if __name__ == "__main__":
    main()
