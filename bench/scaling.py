"""Print what elastic adapters give whose products are multiplied by alpha / largest rank, or by alpha / the rank drawn.

    python -m bench.scaling [--steps 120] [--seeds 0 1 2] [--lr 1e-3 3e-3 1e-2]

The embedded model loses 40% of its MLP channels; adapters of ranks 32, 16 and 8 on all linear modules then learn
calib.txt, one draw a step for every layer, and perplexity is measured on heldout.txt with the same rank everywhere. The
first rule is the published one and `supernet.lora`'s. Seeds draw the adapters' start, the rows and the ranks; each rule
has the learning rate that suits it best.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from torch import Tensor, nn

from bench.heal import build_of

if TYPE_CHECKING:
    from effc.compiler.driver.pipeline import Build
    from effc.compiler.ir.program import Program
    from effc.compiler.transforms.supernet.choices import ChoiceSampler
    from effc.compiler.transforms.training.adapters import Adapters

RANKS, ALPHA, BATCH = [32, 16, 8], 64.0, 8
RULES = {"alpha / largest rank": lambda rank: ALPHA / RANKS[0], "alpha / rank": lambda rank: ALPHA / rank}


def train(
    program: "Program",
    adapters: "Adapters",
    drawn: "ChoiceSampler",
    rows: Tensor,
    rule,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """AdamW with a rise over a twentieth and a cosine down."""
    from effc.compiler.transforms.training.objective import Objective

    weights = list(adapters.parameters().values())
    lesson, optimizer = Objective(program.model, rows), torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    chance = torch.Generator().manual_seed(seed)
    for step in range(steps):
        drawn.draw_and_activate_first(step + 1)
        scale(adapters, drawn.ranks, rule)
        share = min(1.0, (step + 1) / max(1, steps // 20)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        lesson.accumulate_gradients(torch.randint(len(rows), (BATCH,), generator=chance), 1.0)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def scale(adapters: "Adapters", ranks, rule) -> None:
    for path, layer in adapters.layers.items():
        layer.scaling = dict.fromkeys(layer.scaling, rule(ranks[path]))


def train_and_measure_three_ranks(
    build: "Build", program: "Program", scaling_rule, steps: int, lr: float, seed: int
) -> list[float]:
    """Perplexities on held-out text with the largest, middle and smallest rank everywhere, after training by a rule."""
    from effc.compiler.models.rows.forward import total_nll
    from effc.compiler.transforms.supernet.choices import ChoiceSampler, Space
    from effc.compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
    from effc.dsl.checker.values import DataRef

    paths, found = require_adaptable_modules(program, None), []
    drawn = ChoiceSampler(Space.of_ranks(paths, "layer", skeleton_of(program), RANKS), seed)
    with with_adapters(program.model, paths, AdapterShape(RANKS[0], ALPHA, 0.0), seed) as adapters:
        adapters.follow_ranks(drawn.ranks)
        train(program, adapters, drawn, build.ctx.rows(DataRef("calib")), scaling_rule, steps, lr, seed)
        for name in ("largest", "middle", "smallest"):
            drawn.activate(drawn.space.choice(name))
            scale(adapters, drawn.ranks, scaling_rule)
            nats, tokens = total_nll(program.model, build.ctx.rows(DataRef("heldout")))
            found.append(math.exp(nats / tokens))
    return found


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()))
    print(f"\n| | learning rate | {' | '.join(f'rank {r}' for r in RANKS)} |\n|---|---|{'---|' * len(RANKS)}")
    with tempfile.TemporaryDirectory() as folder:
        build = build_of(Path(folder), "60% of MLP channels", "lora", 1, 0)
        build.run_step_unless_cached(build.plan.stages[0])
        program = build.load_outcome(build.plan.stages[0].key).program
        for name, rule in RULES.items():
            for lr in options.lr:
                every = [
                    train_and_measure_three_ranks(build, program, rule, options.steps, lr, seed)
                    for seed in options.seeds
                ]
                each = zip(*every, strict=True)
                told = [f"{statistics.mean(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in each]
                print(f"| {name} | {lr:g} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
