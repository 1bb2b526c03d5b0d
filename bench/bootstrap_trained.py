"""A super-network of a trained network of images (BootstrapNAS) beside its sizes trained alone, at equal compute.

    python -m bench.bootstrap_trained FASHION FOLDER [--seeds 0] [--base 800] [--steps 150] [--evals 60] [--json FILE]

FASHION  the four files of Fashion-MNIST (`dataset-fashion-mnist` of Debian): 70,000 images of clothes, 10 classes
FOLDER   keeps what is done: the trained net, families, evaluated choices, and rows.json with the answer to each image

EfficientNet-lite0 of ImageNet weights is trained for `--base` passes of 64 images: that is the trained net, one for
all seeds. `supernet.elastic` makes widths (100, 75, 50 %), kernels (5, 3) and depth (blocks) of it elastic, and trains
all weights for `--steps` steps, each a pass through the largest, the smallest and a drawn choice, half of the loss of
smaller ones by distillation. `search.nsga2` selects by accuracy on 1,000 validation rows and by operations. Of its
front those choices are compared that have the fewest operations and lose at most 0.01, 0.03 and 0.06 of the trained
net's accuracy on these rows. Each is trained alone, too: cut from the trained net, for `--steps` passes, so that three
sizes cost as many passes as the super-network; and from random weights, for `--base` + `--steps` passes.
Accuracy is that of the 10,000 test rows, which no decision reads; "beside" is paired, with a 95 % interval of images, for
these seeds.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.outcome import Model
from effc.compiler.models.rows.classifier import classification_rows
from effc.compiler.transforms.supernet.explorer import Explorer, Objective
from effc.compiler.transforms.supernet.family import Family
from effc.dsl.checker.values import DataRef, MetricRef, Ratio
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.bootstrap import context, train
from bench.fashion import PARTS, channels_last, imagenet_lite0, write_splits
from bench.json_table import add_json_option, write_table
from bench.paired import bits_text, difference_text
from bench.tables import markdown

BATCH, LR = 64, 1e-3
LOSSES = (0.01, 0.03, 0.06)  # of accuracy on validation rows, beside the trained net
TRAINED, CUT = "the trained net", "cut, trained alone"
ELASTIC = {
    "channels": [Ratio(1.0), Ratio(0.75), Ratio(0.5)],
    "kernels": [3],
    "depth": "blocks",
    "data": DataRef("train"),
    "train": "weights",
    "adapt": 256,
    "batch": BATCH,
    "lr": LR,
    "sandwich": True,
    "distill": Ratio(0.5),
}
MEASURES = [MetricRef("accuracy", (("data", DataRef("valid")),)), MetricRef("flops")]


@dataclass
class Comparison:
    """What one seed compares; `rows` are in a file as soon as they are known, and not measured again."""

    folder: Path
    seed: int
    options: argparse.Namespace
    rows: list[dict[str, Any]]

    def __post_init__(self) -> None:
        self.train, self.valid, self.test = (load_file(self.folder / f"{name}.safetensors") for name in PARTS)
        self.base = trained_net(self.folder, self.train, self.options.base)
        self.macs = shrink.flops_per_token(skeleton_of(capture(copy.deepcopy(self.base))), 0) / 2

    def context(self, name: str, model: nn.Module, word: str, args: dict[str, Any]) -> tuple[Any, Any]:
        """A context with a folder of its own, and the pass."""
        folder = self.folder / f"{name}-{self.options.steps}-{self.options.evals}-{self.seed}"
        folder.mkdir(exist_ok=True)
        for part in PARTS:
            if not (link := folder / f"{part}.safetensors").exists():
                link.symlink_to(self.folder / f"{part}.safetensors")
        ctx, step = context(folder, model, word, args)
        return replace(ctx, settings=replace(ctx.settings, seed=self.seed)), step

    def family(self) -> Family:
        """The trained super-network, kept in a file."""
        file = self.folder / f"family-{self.options.steps}-{self.seed}.safetensors"
        program = capture(copy.deepcopy(self.base))
        if not file.is_file():
            ctx, step = self.context("family", self.base, "supernet.elastic", {**ELASTIC, "steps": self.options.steps})
            family = step.result_of(Model(program), ctx)
            tensors = {name: tensor.contiguous() for name, tensor in family.stored.items()}
            save_file(tensors, file, {"family": json.dumps(family.to_json() | {"base": ""})})
            program = capture(copy.deepcopy(self.base))
        body = json.loads(metadata(file)["family"])
        family = Family.from_json_assigning_weights(body, program, load_file(file))
        channels_last(family.program.model)
        return family

    def search_choices(self, family: Family) -> dict[str, Mapping[str, int]]:
        """The largest choice, and by the accuracy that may be lost on validation rows those with the fewest operations."""
        args = {"measure": MEASURES, "evals": self.options.evals, "population": 20}
        ctx, step = self.context("search", family.program.model, "search.nsga2", args)
        explorer = Explorer(family, ctx, [Objective.of(ref, ctx) for ref in MEASURES], self.options.evals)
        with explorer.open():
            step.explore(explorer, random.Random(self.seed))
        reference = statistics.fmean(right_answers(self.base, self.valid))
        chosen = {"whole": explorer.space.choice("largest")}
        for loss in LOSSES:
            points = [g for g in explorer.pareto_front() if -explorer.known[g][0] >= reference - loss]
            best = explorer.space.decoded(min(points, key=lambda genome: explorer.known[genome][1])) if points else None
            if best is not None and best not in chosen.values():
                chosen[f"at most {loss} less"] = best
        print(f"seed {self.seed}: {len(explorer.known)} evaluated, {len(explorer.pareto_front())} on the front")
        return chosen

    def add_row(self, arm: str, size: str, passes: int, model: nn.Module, macs: float, params: int) -> None:
        right = right_answers(model, self.test)
        row = {"arm": arm, "size": size, "seed": self.seed, "passes": passes, "share": macs / self.macs}
        row |= {
            "params": params,
            "accuracy": statistics.fmean(right),
            "questions": len(right),
            "right": bits_text(right),
            **setting(self.options),
        }
        self.rows.append(row)
        (self.folder / "rows.json").write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n", "utf-8")
        print(f"seed {self.seed}: {arm}, {size}: {row['share']:.1%}, {row['accuracy']:.4f}", flush=True)

    def lacks(self, arm: str, size: str) -> bool:
        row = {"arm": arm, "size": size, "seed": self.seed, **setting(self.options)}
        return not any(row.items() <= known.items() for known in self.rows)

    def run(self) -> None:
        if self.lacks(TRAINED, "whole"):
            self.add_row(TRAINED, "whole", 0, self.base, self.macs, count(self.base))
        family, steps = self.family(), self.options.steps
        choices = self.search_choices(family)
        choices["the smallest"] = family.space.choice("smallest")
        for size, choice in choices.items():
            if self.lacks("super-network", size):
                skeleton = family.smaller_skeleton(choice)
                with family.with_choice_applied(choice):
                    macs = shrink.flops_per_token(skeleton, 0) / 2
                    self.add_row(
                        "super-network", size, 3 * steps, family.program.model, macs, shrink.param_count(skeleton)
                    )
        sizes = [size for size in choices if size not in ("whole", "the smallest")]
        cut, fresh = (CUT, steps), ("random weights, trained alone", self.options.base + steps)
        arms = [(size, *arm) for arm in (cut, fresh) for size in reversed(sizes)] + [("whole", *cut)]
        for size, arm, passes in arms:
            if self.lacks(arm, size):
                self.train_alone(family, arm, size, choices[size], passes)

    def train_alone(self, family: Family, arm: str, size: str, choice: Mapping[str, int], passes: int) -> None:
        parts = {"space": family.space, "orders": family.orders}
        model = Family(capture(copy.deepcopy(self.base)), "", **parts).cut_program_to_choice(choice).model
        if arm.startswith("random"):
            torch.manual_seed(self.seed)
            for module in model.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        train(channels_last(model), self.train, passes, self.seed, BATCH, LR)
        macs = shrink.flops_per_token(family.smaller_skeleton(choice), 0) / 2
        self.add_row(arm, size, passes, model, macs, count(model))


def trained_net(folder: Path, data: dict[str, Tensor], passes: int) -> nn.Module:
    """The net that all begin at, trained once and kept in a file."""
    net, file = imagenet_lite0(0), folder / f"base-{passes}.safetensors"
    if not file.is_file():
        train(net, data, passes, 0, BATCH, LR)
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, file)
    net.load_state_dict(load_file(file))
    return net


def metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def right_answers(model: nn.Module, data: dict[str, Tensor]) -> list[bool]:
    return classification_rows(model, data["images"], None, data["labels"], "rows").is_right


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def setting(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in ("base", "steps", "evals")}


def table_lines(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A line for each arm and size: means of its seeds, and their range where there are several."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["arm"]), []).append(row)
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for (size, arm), group in sorted(groups.items(), key=lambda item: sizes.index(item[0][0])):
        shares, counts, accuracies = ([row[name] for row in group] for name in ("share", "params", "accuracy"))
        beside = "" if arm == TRAINED else difference_text(group, groups["whole", TRAINED], in_points=True)
        alone = difference_text(group, groups.get((size, CUT), []), in_points=True) if arm == "super-network" else ""
        passes = f"{group[0]['passes']:,}" if group[0]["passes"] else ""
        share, params = percent_text(shares, 1), f"{statistics.fmean(counts) / 1e6:.2f} M"
        yield size, arm, str(len(group)), share, params, percent_text(accuracies, 2), beside, alone, passes


def percent_text(shares: Sequence[float], digits: int) -> str:
    """The mean in per cent, and the range where it is wider than nothing."""
    low, high = (f"{100 * share:.{digits}f}" for share in (min(shares), max(shares)))
    return f"{100 * statistics.fmean(shares):.{digits}f}" + ("" if low == high else f" ({low}–{high})")


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fashion", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for name, value in (("base", 800), ("steps", 150), ("evals", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    add_json_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, began = options.folder.resolve(), time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "test.safetensors").is_file():
        write_splits(options.fashion, folder)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    store = folder / "rows.json"
    rows = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else []
    for seed in options.seeds:
        Comparison(folder, seed, options, rows).run()
        print(f"seed {seed}: {time.process_time() - began:.0f} s of one core so far", flush=True)
    columns = ("size", "", "seeds", "operations, %", "parameters", "accuracy, %")
    columns += ("beside the trained net", "beside that size trained alone", "passes")
    lines = list(table_lines([row for row in rows if setting(options).items() <= row.items()]))
    print(markdown([columns, *lines]))
    write_table(options.json, columns, lines)


if __name__ == "__main__":
    main()
