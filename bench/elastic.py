"""Print what `effc serve --elastic` gives under more load than the larger model can take.

    python -m bench.elastic LARGE SMALL [--threads 2] [--parallel 8] [--overload 1.5] [--seconds 60] [--rounds 2]
                                        [--words 60] [--new 32] [--json FILE]

Both are what `effc serve` takes. The capacity is the rate of answers of the larger model while --parallel clients ask
without a pause. Requests then come at --overload times that rate, with exponential pauses, for --seconds, first without
and then with --elastic; all of them are waited for. Divergence is Kullback and Leibler's of the smaller from the larger,
and how often both choose the same next token, over the prompts' own tokens.
"""

import argparse
import asyncio
import json
import os
import random
import time
from pathlib import Path
from statistics import mean, quantiles

import httpx
import torch

from bench.serve import prompts_of_python_docs, start_server


def server_arguments(args: argparse.Namespace) -> list[str]:
    limits = ["--parallel", str(args.parallel), "--queue", "10000", "--connections", "10000"]
    return [f"large={args.large}", f"small={args.small}", "--access-log", "none", *limits]


async def ask(client: httpx.AsyncClient, prompt: str, max_new_tokens: int) -> tuple[int, float, float, str]:
    """Status, seconds to the first text and to the end, and the model that answered."""
    body = {"model": "large", "prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0, "stream": True}
    began, first, model = time.perf_counter(), 0.0, "large"
    async with client.stream("POST", "/completions", json=body) as answer:
        model = answer.headers.get("x-effc-model", model)
        async for line in answer.aiter_lines():
            if not first and '"text": "' in line and '"text": ""' not in line:
                first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    return answer.status_code, first or seconds, seconds, model


async def answers_per_second(url: str, args: argparse.Namespace) -> float:
    """Answers a second of the larger model."""
    texts, count = iter(prompts_of_python_docs(10_000, args.words, 5)), 0
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()

        async def ask_until_the_end() -> None:
            nonlocal count
            while time.perf_counter() - began < args.seconds / 2:
                await ask(client, next(texts), args.new)
                count += 1

        await asyncio.gather(*(ask_until_the_end() for _ in range(args.parallel)))
        return count / (time.perf_counter() - began)


async def measure_overload(url: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Requests at a rate, which do not wait for one another."""
    draw, tasks = random.Random(seed), []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=1200, limits=limits) as client:
        began = time.perf_counter()
        for prompt in prompts_of_python_docs(int(rate * args.seconds), args.words, 100 + seed):
            tasks.append(asyncio.create_task(ask(client, prompt, args.new)))
            await asyncio.sleep(draw.expovariate(rate))
        answers = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
    firsts = quantiles([first for status, first, _, _ in answers if status == 200], n=20)
    return {
        "requests": len(answers),
        "refused": sum(status != 200 for status, *_ in answers),
        "first_p50_s": firsts[9],
        "first_p95_s": firsts[18],
        "whole_mean_s": mean(whole for _, _, whole, _ in answers),
        "small_share": mean(model == "small" for *_, model in answers),
        "drained_s": seconds,
    }


@torch.inference_mode()
def divergence(args: argparse.Namespace) -> tuple[float, float]:
    """Mean divergence in nats, and the share of positions at which both models choose one token."""
    import effc
    from effc.compiler.core.settings import Settings
    from effc.compiler.driver.models import open_model

    opened = open_model(args.large, Settings(Path("unused")), needs_tokenizer=True)
    large, small, divergences, same = opened.model, effc.load(args.small), [], []
    for text in prompts_of_python_docs(8, 150, 300):
        ids = torch.tensor([opened.tokenizer(text)["input_ids"]])
        p, q = (model(input_ids=ids).logits[0].float().log_softmax(-1) for model in (large, small))  # [t, vocabulary]
        divergences.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item())
        same.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    return mean(divergences), mean(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("large")
    parser.add_argument("small")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--overload", type=float, default=1.5)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    nats, same = divergence(args)
    print(f"divergence {nats:.3f} nats, {same:.1%} of next tokens equal", flush=True)
    rows = []
    print("| elastic | rate /s | requests | refused | first p50 s | first p95 s | whole s | by small | all done s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for number in range(args.rounds):
        rate = 0.0
        for flags in ((), ("--elastic", "large:small")):
            with start_server(*server_arguments(args), *flags, threads=args.threads) as url:
                if not rate:
                    rate = args.overload * asyncio.run(answers_per_second(url, args))
                row = asyncio.run(measure_overload(url, rate, number, args))
            rows.append({"elastic": bool(flags), "rate": rate, **row})
            print(
                f"| {'yes' if flags else 'no'} | {rate:.2f} | {row['requests']} | {row['refused']} | "
                f"{row['first_p50_s']:.2f} | {row['first_p95_s']:.2f} | {row['whole_mean_s']:.2f} | "
                f"{row['small_share']:.0%} | {row['drained_s']:.0f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"divergence": nats, "same": same, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
