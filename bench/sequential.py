"""Print how often the paired sequential test is wrong, and how many rows it reads, on rows of the embedded model.

    python -m bench.sequential [--resamples 1000] [--rows 1000] [--seed 0]

Rows are windows of `text.heldout` of 64, 16 and 6 tokens (the shorter, the heavier the tails); models are the original
in int4 (rounded to nearest, a scale for each row of a matrix) and without its third layer. Each resample draws rows with
replacement, so that the mean of all is the truth.

Wrong: the limit is the truth, and the test says that it holds, or that it is missed. With the truth a hair to the other
side one of both is a mistake, so each has to stay below 5 %.
Rows: the limit is some standard deviations away from the truth. Beside them, rows of two t-tests of a fixed size:
`planned` has the power of the sequential test at the smallest difference that this decides 80 times in 100, as somebody
chooses who doesn't know the truth; `oracle` has its power (at most 0.999) at this very difference, which nobody knows.
"""

import argparse
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
DISTANCES = (0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)  # standard deviations of a row
NORMAL = NormalDist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    print(f"{args.resamples} resamples of at most {args.rows} rows")
    print(f"\n{'rows':36}{'skew':>6}{'kurtosis':>10}{'wrong holds':>13}{'wrong misses':>14}")
    rows_of = row_differences_by_change()
    for name, pool in rows_of.items():
        z = (pool - pool.mean()) / pool.std()
        outcomes = [outcome for outcome, _ in resampled_outcomes(pool, 0.0, args.rows, args.resamples, rng)]
        wrong = [f"{outcomes.count(outcome) / args.resamples:.3f}" for outcome in ("holds", "missed")]
        print(f"{name:36}{(z**3).mean():6.1f}{(z**4).mean():10.1f}{wrong[0]:>13}{wrong[1]:>14}")
    pool = rows_of["int4, 64 tokens, nats"]
    print_rows_read(pool, args.rows, args.resamples, rng)
    print("\ndecided of 100, by this test and by a confidence sequence (normal mixture, a look at every row)")
    for rows, distance in ((100, 0.3), (100, 0.5), (args.rows, 0.1), (args.rows, 0.2)):
        runs = [o for o, _ in resampled_outcomes(pool, distance, rows, args.resamples, rng)]
        mixture = mixture_power(pool, distance, rows, args.resamples, rng)
        shares = f"{100 * runs.count('holds') / len(runs):4.0f}{100 * mixture:5.0f}"
        print(f"at most {rows:5} rows, {distance} standard deviations: {shares}")


def mixture_power(pool: np.ndarray, distance: float, rows: int, resamples: int, rng: np.random.Generator) -> float:
    """Share of tests that hold, by the asymptotic confidence sequence of Waudby-Smith et al. 2021, theorem 2.2.

    It is tightest after 100 rows (their equation 14), and its normal quantile is made Student's, as this test's is.
    """
    from effc.compiler.evaluation.confidence import student_quantile

    size, level = np.arange(1, rows + 1), 0.05
    rho = (-2 * math.log(level) + math.log(1 - 2 * math.log(level))) / 100  # rho squared
    quantiles = np.sqrt(2 * (size * rho + 1) / (size * rho) * np.log(np.sqrt(size * rho + 1) / level))
    drawn = rng.choice(pool, (resamples, rows)) - pool.mean() - distance * pool.std()
    means = drawn.cumsum(1) / size
    errors = np.sqrt(((drawn**2).cumsum(1) / size - means**2) / np.maximum(size - 1, 1))
    return float((means + student_quantile(quantiles, size - 1 + (size == 1)) * errors < 0)[:, 23:].any(1).mean())


def print_rows_read(pool: np.ndarray, rows: int, resamples: int, rng: np.random.Generator) -> None:
    results = {d: resampled_outcomes(pool, d, rows, resamples, rng) for d in DISTANCES}
    power = {d: sum(outcome == "holds" for outcome, _ in runs) / len(runs) for d, runs in results.items()}
    nearest = min(d for d in DISTANCES if power[d] >= 0.8)
    planned = fixed_rows(nearest, power[nearest])
    print(f"\nplanned: {planned} rows, for a power of {power[nearest]:.2f} at {nearest} standard deviations")
    print(f"{'distance':>8}{'power':>8}{'wrong':>8}{'rows':>8}{'planned':>9}{'times':>7}{'oracle':>8}{'times':>7}")
    for d, runs in results.items():
        mean = sum(read for _, read in runs) / len(runs)
        wrong = sum(outcome == "missed" for outcome, _ in runs) / len(runs)
        oracle = fixed_rows(d, power[d])
        print(
            f"{d:8}{power[d]:8.2f}{wrong:8.3f}{mean:8.0f}{planned:9}{planned / mean:7.1f}{oracle:8}{oracle / mean:7.1f}"
        )


def resampled_outcomes(
    pool: np.ndarray, distance: float, rows: int, resamples: int, rng: np.random.Generator
) -> list[tuple[str, int]]:
    """Outcome and rows read of each test whose limit lies so many standard deviations above the truth."""
    from effc.compiler.evaluation.sequential import PairedBound

    runs = []
    for _ in range(resamples):
        test = PairedBound(rows, limit=float(pool.mean() + distance * pool.std()))
        while test.verdict is None:
            test.add(rng.choice(pool, test.next_rows))
        runs.append((test.verdict.outcome, test.verdict.rows))
    return runs


def fixed_rows(distance: float, power: float) -> int:
    """Rows of a two-sided t-test at 5 % with a power at a distance."""
    z = NORMAL.inv_cdf(0.975) + NORMAL.inv_cdf(min(max(power, 0.001), 0.999))
    return max(math.ceil((z / distance) ** 2), 3)


def row_differences_by_change() -> dict[str, np.ndarray]:
    """Differences of rows, in nats a token: what a token costs more, and the divergence."""
    original = load()
    result = {}
    for name, model in (("int4", with_rounded_weights(load())), ("one layer less", without_some_layers(load()))):
        for length in (64, 16, 6):
            nats, divergence = nats_and_divergence_differences(model, original, token_windows(length))
            result[f"{name}, {length} tokens, nats"] = nats
            result[f"{name}, {length} tokens, divergence"] = divergence
    return result


def load() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ROOT / "recipes/zoo/tiny-llama", dtype=torch.float32).eval()


def token_windows(length: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    folder = ROOT / "recipes/zoo/tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer((folder / "heldout.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def with_rounded_weights(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / 7
            module.weight.copy_((module.weight / scale).round() * scale)
    return model


def without_some_layers(model: torch.nn.Module) -> torch.nn.Module:
    del model.model.layers[2]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers -= 1
    return model


@torch.no_grad()
def nats_and_divergence_differences(
    model: torch.nn.Module, original: torch.nn.Module, rows: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    nats, divergence = [], []
    for batch in rows.split(max(1, 1024 // rows.shape[1])):
        p, q = (m(input_ids=batch).logits[:, :-1].log_softmax(-1) for m in (original, model))
        nats.append((p - q).gather(-1, batch[:, 1:, None]).double().mean((1, 2)))
        divergence.append((p.exp() * (p - q)).sum(-1).double().mean(1))
    return torch.cat(nats).numpy(), torch.cat(divergence).numpy()


if __name__ == "__main__":
    main()
