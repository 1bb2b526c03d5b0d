"""Distilling each layer of a pruned model alone before it is healed: does it help, and does it order shapes better?

    python -m bench.local_distillation FOLDER --text kjv.txt [--local 200] [--heal 300] [--seed 0] [--json FILE]

FOLDER   keeps the caches of the searches
--text   as of bench.recovery, whose texts these are

The embedded tiny-llama loses a fifth of its parameters in several ways. "pruned" is perplexity of held-out books then.
"distilled": each layer that lost some has learned for --local steps, given the original's inputs of it, to give the
original's outputs (mean squared error), and no other layer. "healed": the whole pruned model has learned for --heal
steps, half of the loss the next token, half the original's predictions; "both": distilled, then healed for the steps
that are left to it, so that both have read as much. Steps are of 8 rows of 128 tokens, AdamW at 1e-3 with a cosine.
Ranks say whether what is known before healing, with or without distillation, orders shapes as healing does.
"""

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.models.rows.forward import logits
from effc.dsl.checker.values import DataRef
from scipy.stats import spearmanr
from torch import Tensor, nn

from bench.json_table import add_json_option, write_table
from bench.recovery import perplexities, program_after, write_texts
from bench.row_store import RowStore
from bench.tables import markdown

BATCH, LR, WARMUP = 8, 1e-3, 10
CUT = "  cut = prune.multi(remove: 20% of params, group: 32, score: perplexity(score){})\n"
SHAPES = {
    "default": "",
    "ranked by weights": ", reorder: l1",
    "ranked by weights and inputs": ", reorder: wanda",
    "whole branches": ", order: [blocks]",
    "channels": ", order: [channels]",
    "published search": ", search: exact, split: {blocks: 44, channels: 52, heads: 4}",
}
COLUMNS = ("pruned", "distilled", "healed", "both")


class Trainer:
    """AdamW over some parameters, whose rate rises for ten steps and falls along a cosine."""

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int):
        self.optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
        self.steps, self.done = steps, 0

    def step(self, loss: Tensor) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = LR * cosine * min(1, (self.done + 1) / WARMUP)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.done += 1


def first_tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def distill_layers(original: nn.Module, pruned: nn.Module, layers: list[str], batches: list[Tensor]) -> None:
    """Trains each layer that is smaller than the original's on the original's inputs and outputs of it."""
    pairs = {path: (original.get_submodule(path), pruned.get_submodule(path)) for path in layers}
    sizes = {path: [sum(p.numel() for p in m.parameters()) for m in pair] for path, pair in pairs.items()}
    trainers = {p: Trainer(pairs[p][1].parameters(), len(batches)) for p in layers if sizes[p][0] != sizes[p][1]}
    calls: dict[str, tuple[Any, Any, Any]] = {}

    def keep_call(path: str) -> Any:
        return lambda _, args, kwargs, output: calls.update({path: (args, kwargs, first_tensor(output))})

    hooks = [pairs[path][0].register_forward_hook(keep_call(path), with_kwargs=True) for path in trainers]
    for rows in batches:
        with torch.no_grad():
            logits(original, rows)
        for path, trainer in trainers.items():
            args, kwargs, target = calls[path]
            trainer.step((first_tensor(pairs[path][1](*args, **kwargs)) - target).square().mean())
    for hook in hooks:
        hook.remove()


def heal(original: nn.Module, pruned: nn.Module, batches: list[Tensor]) -> None:
    trainer = Trainer(pruned.parameters(), len(batches))
    for rows in batches:
        with torch.no_grad():
            expected = logits(original, rows)[:, :-1].float().log_softmax(-1)
        predicted = logits(pruned, rows)[:, :-1].float().log_softmax(-1)
        next_token = -predicted.gather(-1, rows[:, 1:, None]).mean()
        trainer.step(0.5 * next_token + 0.5 * (expected.exp() * (expected - predicted)).sum(-1).mean())


def measured_shape(original: Any, settings: str, options: argparse.Namespace) -> dict[str, float]:
    """Perplexities of one shape, and the seconds of a processor that both trainings took."""
    program, ctx, _ = program_after(options.folder, CUT.format(settings), options.seed)
    rows, teacher, student = ctx.rows(DataRef("book")), original.model.eval(), program.model
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed))
    batches = [rows[order[i * BATCH :][:BATCH]] for i in range(options.heal)]
    start = {name: value.clone() for name, value in student.state_dict().items()}
    values, seconds = {"pruned": perplexities(program, ctx)["like"]}, {}
    for parameter in student.parameters():
        parameter.requires_grad_(True)

    def timed(name: str, train: Any, *arguments: Any) -> None:
        began = time.process_time()
        train(teacher, student, *arguments)
        seconds[name] = time.process_time() - began
        values[name] = perplexities(program, ctx)["like"]

    timed("healed", heal, batches)
    student.load_state_dict(start)
    timed("distilled", distill_layers, list(original.units), batches[: options.local])
    timed("both", heal, batches[options.local :])
    return values | {f"{name} seconds": spent for name, spent in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--local", type=int, default=200)
    parser.add_argument("--heal", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    add_json_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    options.folder = options.folder.resolve()
    write_texts(options.folder, options.text)
    store = RowStore(options.folder / "local.json", {n: getattr(options, n) for n in ("local", "heal", "seed")})
    original, _, _ = program_after(options.folder, "", options.seed)
    for shape, settings in SHAPES.items():
        if all(row["shape"] != shape for row in store.rows):
            store.add({"shape": shape} | measured_shape(original, settings, options))
            print(shape, *(f"{name} {store.rows[-1][name]:.2f}" for name in COLUMNS), flush=True)
    columns = ("a fifth less", *COLUMNS)
    rows = [row for row in store.rows if row["shape"] in SHAPES]
    lines = [(row["shape"], *(f"{row[name]:.2f}" for name in COLUMNS)) for row in rows]
    healed = [row["healed"] for row in rows]
    ranks = [f"{spearmanr([row[name] for row in rows], healed).statistic:.2f}" for name in COLUMNS]
    lines.append(("rank correlation with healed", *ranks))
    print(markdown([columns, *lines]))
    write_table(options.json, columns, lines)


if __name__ == "__main__":
    main()
