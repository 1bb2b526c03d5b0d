"""A super-network of convolutions against training each of its sizes alone, at equal total compute; and its searches.

    python -m bench.bootstrap DIGITS [--budget 1200] [--seeds 3] [--evals 24]

DIGITS   digits.csv.gz of scikit-learn (`sklearn/datasets/data` of its wheel): 1,797 images of 8 x 8, 10 classes

A ResNet of random weights (two stages of two bottlenecks), images made 16 x 16. The first 900 images teach, the next 300
are what searches select by, the last 597 are only reported on. `--budget` counts passes of 32 images forwards and
backwards through a choice, whatever its size: the super-network spends them on one drawn choice and the two ends per
step (`supernet.elastic`: sandwich, half of the loss by distillation), the four sizes alone get a quarter each, with the
same optimizer, and the largest alone all of it, too. A size is all widths at 100, 75, 50 or 25 %.
Hypervolume is of accuracy missed and parameters, both as shares (of 1 and of the largest), below (1, 1).
"""

import argparse
import copy
import gzip
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.outcome import Model
from effc.compiler.models.rows.classifier import class_logits
from effc.compiler.plugin.context import Context
from effc.compiler.transforms.supernet.explorer import Explorer, Objective
from effc.compiler.transforms.supernet.family import Family
from effc.compiler.transforms.supernet.norms import recalibrate_batch_norms
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef, MetricRef, Ratio
from safetensors.torch import save_file
from torch import nn

from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults

BATCH, LR, SHARES = 32, 2e-3, (1.0, 0.75, 0.5, 0.25)
PARTS = {"train": slice(0, 900), "valid": slice(900, 1200), "test": slice(1200, 1797)}
METHODS = ("random", "hill", "predict", "nsga2")
AT = (8, 16, 24)


def write_digit_splits(source: Path, folder: Path) -> None:
    with gzip.open(source, "rt") as file:
        table = torch.tensor([[float(x) for x in line.split(",")] for line in file])
    images = table[:, :-1].view(-1, 1, 8, 8).div(8).sub(1)
    images = nn.functional.interpolate(images, scale_factor=2, mode="nearest").expand(-1, 3, -1, -1).contiguous()
    for name, part in PARTS.items():
        tensors = {"images": images[part].clone(), "labels": table[part, -1].long()}
        save_file(tensors, folder / f"{name}.safetensors")


def context(folder: Path, model: nn.Module, word: str, args: dict) -> tuple[Context, Any]:
    """A context whose recipe has the three parts, and the pass."""
    recipe = recipe_of([("net", word, {**defaults("pass", word), **args})])
    for name in PARTS:
        given = {**defaults("data", "images"), "path": f"{name}.safetensors", "classes": "labels"}
        recipe.data[name] = Invocation("images", given)
    ctx = context_of(folder, model, recipe)
    return ctx, ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)


def fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2], layer_type="bottleneck"
    )
    config.num_labels = 10
    return transformers.AutoModelForImageClassification.from_config(config).eval()


def family_of(folder: Path, model: nn.Module, seed: int, steps: int) -> Family:
    args = {
        "channels": [Ratio(s) for s in SHARES],
        "per": "layer",
        "align": 4,
        "data": DataRef("train"),
        "train": "weights",
        "adapt": 256,
        "steps": steps,
        "batch": BATCH,
        "lr": LR,
        "sandwich": True,
        "distill": Ratio(0.5),
        "save": 10**6,
    }
    ctx, step = context(folder / f"{seed}-{steps}", model, "supernet.elastic", args)
    ctx = replace(ctx, settings=replace(ctx.settings, seed=seed))
    return step.result_of(Model(capture(copy.deepcopy(model))), ctx)


def sizes(family: Family) -> list[dict[str, int]]:
    return [{d.name: d.values[min(i, len(d.values) - 1)] for d in family.space.dims} for i in range(len(SHARES))]


def train(
    model: nn.Module, data: dict[str, torch.Tensor], steps: int, seed: int, batch: int = BATCH, lr: float = LR
) -> None:
    """As the pass learns: AdamW, a cosine after a rise over a twentieth, gradients of norm 1 at most."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    rise, chance = max(1, steps // 20), torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        share = min(1.0, (step + 1) / rise) * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps)).item())
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        chosen = torch.randint(len(data["images"]), (batch,), generator=chance)
        accuracies = class_logits(model, data["images"][chosen], None)
        nn.functional.cross_entropy(accuracies, data["labels"][chosen]).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    recalibrate_batch_norms(model, data["images"][:256])


def accuracy(model: nn.Module, ctx, split: str) -> float:
    return ctx.metric(MetricRef("accuracy", (("data", DataRef(split)),))).measure(model, ctx)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def hypervolume(points: list[tuple[float, float]]) -> float:
    """The area that points beat below (1, 1)."""
    total, low = 0.0, 1.0
    for missed, params in sorted(points):
        if params < low:
            total += (1 - missed) * (low - params)
            low = params
    return total


def search_points(family: Family, folder: Path, method: str, seed: int, evals: int) -> list[tuple[float, float]]:
    """(accuracy missed, share of the parameters) of what a method evaluated, in that order."""
    measure = [MetricRef("accuracy", (("data", DataRef("valid")),)), MetricRef("params")]
    args = {"measure": measure, "evals": evals, **({"population": 8} if method == "nsga2" else {})}
    ctx, step = context(folder / f"search-{method}-{seed}", family.program.model, f"search.{method}", args)
    explorer = Explorer(family, ctx, [Objective.of(ref, ctx) for ref in measure], evals)
    with explorer.open():
        step.explore(explorer, random.Random(seed))
    whole = count(family.program.model)
    return [(1 + first, params / whole) for first, params in explorer.known.values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("digits", type=Path)
    for name, value in (("--budget", 1200), ("--seeds", 3), ("--evals", 24)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, one thread")
    accuracies: dict[str, list[float]] = {}
    hypervolumes: dict[tuple[str, int], list[float]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        for seed in range(options.seeds):
            folder = Path(parent) / str(seed)
            folder.mkdir()
            write_digit_splits(options.digits, folder)
            for name, value in measure_sizes_and_searches(folder, seed, options, hypervolumes):
                accuracies.setdefault(name, []).append(value)
                print(f"seed {seed}: {name}: {value:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    print("\n| | accuracy on 597 images, mean and range |\n|---|---|")
    for name, values in accuracies.items():
        print(f"| {name} | {statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f}) |")
    print("\n| hypervolume | " + " | ".join(f"{n} evaluations" for n in AT) + " |\n|---" + "|---" * len(AT) + "|")
    for method in METHODS:
        cells = [hypervolumes[method, n] for n in AT if (method, n) in hypervolumes]
        print(
            f"| `search.{method}` | "
            + " | ".join(f"{statistics.mean(c):.3f} ({min(c):.3f}–{max(c):.3f})" for c in cells)
            + " |"
        )


def measure_sizes_and_searches(
    folder: Path, seed: int, options: argparse.Namespace, hypervolumes: dict
) -> Iterator[tuple[str, float]]:
    """(name, accuracy) of each size and way to train it; `hypervolumes` by (method, evaluations) are added to."""
    model = fresh(seed)
    for name in ("0", *(f"{seed}-{n}" for n in (0, options.budget // 3)), *(f"search-{m}-{seed}" for m in METHODS)):
        (folder / name).mkdir()
        for part in PARTS:
            (folder / name / f"{part}.safetensors").symlink_to(folder / f"{part}.safetensors")
    ctx, _ = context(folder / "0", model, "search.random", {"measure": [MetricRef("params")]})
    data = {"images": ctx.rows(DataRef("train")), "labels": ctx.labels(DataRef("train"))}
    net = family_of(folder, model, seed, options.budget // 3)
    plain = family_of(folder, model, seed, 0)
    for share, choice in zip(SHARES, sizes(net), strict=True):
        with net.with_choice_applied(choice):
            yield f"super-network, {share:.0%}", accuracy(net.program.model, ctx, "test")
        alone = (
            Family(capture(copy.deepcopy(model)), "", plain.space, orders=plain.orders)
            .cut_program_to_choice(choice)
            .model
        )
        if share == 1:
            whole = copy.deepcopy(alone)
            train(whole, data, options.budget, seed)
            yield "alone, 100%, the whole budget", accuracy(whole, ctx, "test")
        train(alone, data, options.budget // len(SHARES), seed)
        yield f"alone, {share:.0%} ({count(alone):,} parameters)", accuracy(alone, ctx, "test")
    for method in METHODS:
        points = search_points(net, folder, method, seed, options.evals)
        for n in AT:
            hypervolumes.setdefault((method, n), []).append(hypervolume(points[:n]))


if __name__ == "__main__":
    main()
