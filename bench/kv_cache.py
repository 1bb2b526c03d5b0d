"""Decoding over keys and values in bfloat16 and in int8, on the shape of SmolLM2-135M: milliseconds of a token.

    python -m bench.kv_cache [--threads 2] [--contexts 512,2048,8000] [--weights int8] [--seconds 2]

Contenders take turns, as in engine.py, whose weights these are. `attend` is what the threads together spend on attention
for a token.
"""

import argparse

from effc.compiler.transforms.lowering.racing import Contender
from effc.kernels import levels
from effc.kernels.engine import Engine
from effc.kernels.engine_steps import KV_NUMBERS
from effc.kernels.packed_sizes import kv_bytes_per_token

from bench.engine import FORMATS, Shape, decode_step, run_burst


def attend_seconds(engine: Engine, call, calls: int = 20) -> float:
    engine.thread_seconds_by_work()
    for _ in range(calls):
        call()
    return engine.thread_seconds_by_work(False)["attend"] / calls


def main() -> None:
    options = argparse.ArgumentParser()
    for name, kind, default in (("threads", int, 2), ("contexts", str, "512,2048,8000"), ("seconds", float, 2.0)):
        options.add_argument(f"--{name}", type=kind, default=default)
    options.add_argument("--weights", choices=FORMATS, default="int8")
    chosen = options.parse_args()
    print(f"{levels.active_level_and_reason()}; {chosen.threads} threads; weights {chosen.weights}")
    shape = Shape(*FORMATS[chosen.weights]).whole()
    engines, calls = {}, {}
    for numbers in KV_NUMBERS:
        slots = [{**slot, "numbers": numbers} for slot in shape.plan["slots"]]
        engines[numbers] = Engine({**shape.plan, "slots": slots}, shape.weights, chosen.threads)
        print(f"  {numbers}: {sum(map(kv_bytes_per_token, slots))} bytes of a token")
    for context in map(int, chosen.contexts.split(",")):
        calls = {n: decode_step(engine, context) for n, engine in engines.items()}
        contenders = [Contender(n, [call]) for n, call in calls.items()]
        for turn in range(max(3, round(chosen.seconds / 0.2))):
            for contender in contenders if turn % 2 else contenders[::-1]:
                run_burst(contender, 0.2)
        times = {c.name: c.seconds for c in contenders}
        spent = {n: attend_seconds(engines[n], calls[n]) for n in engines}
        for name in times:
            print(f"  {context:5} tokens, {name}: {times[name] * 1e3:7.2f} ms, attend {spent[name] * 1e3:7.2f} ms")
        print(f"  {context:5} tokens: {times['bf16'] / times['int8']:.2f} times as fast")


if __name__ == "__main__":
    main()
