"""State-space models on a CPU: prefill against projections, decode against transformers, cost by length.

    python -m bench.scan [--only prefill,decode,length] [--rounds 7] [--threads 1] [--clock wall]

Models of width 768 with 6 layers and random weights, without an output head. What a line compares is called
in turn, in alternating order, in one process; medians over the rounds. A round in which this process was
pre-empted still counts: only ratios of one line mean something on a shared machine, there best by `--clock cpu`.
"""

import argparse
import copy
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from effc.compiler.core.environment import cpu_model_name
from effc.compiler.ir.layers.fast_mixers import use_mixer_kernels
from effc.kernels import levels
from torch import nn
from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel

WIDTH, LAYERS, SEED = 768, 6, 0
chosen_clock = ["wall"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LENGTHS = (512, 2048)
LONG = (2048, 4096, 8192, 16384, 32768)


def mamba_models(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Bodies of the two families, at the sizes of mamba-130m and mamba2-130m with 6 of their layers."""
    torch.manual_seed(SEED)
    shared = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": 256}
    one = MambaModel(MambaConfig(state_size=16, **shared))
    two = Mamba2Model(Mamba2Config(num_heads=24, head_dim=64, n_groups=1, state_size=128, chunk_size=256, **shared))
    return {"mamba": one.to(dtype).eval(), "mamba2": two.to(dtype).eval()}


def linear_calls(model: nn.Module, length: int) -> Callable[[], None]:
    """All linear modules of a model, on numbers of that length and nothing else."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    dtype = linear[0].weight.dtype
    given = {k: torch.randn(1, length, k).to(dtype) for k in {m.in_features for m in linear}}

    def run() -> None:
        for module in linear:
            module(given[module.in_features])

    return run


def race_in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn."""
    clock = CLOCKS[chosen_clock[-1]]
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = clock()
            calls[name]()
            took[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def print_seconds_and_ratios(title: str, seconds_by_name: dict[str, float], baseline: str) -> None:
    parts = [f"{name} {seconds * 1e3:.2f} ms" for name, seconds in seconds_by_name.items()]
    ratios = [
        f"{name} / {baseline} {seconds_by_name[name] / seconds_by_name[baseline]:.2f}"
        for name in seconds_by_name
        if name != baseline
    ]
    print(f"{title:<28}{', '.join(parts)}   {', '.join(ratios)}", flush=True)


def race_prefill_with_projections(plain_and_quick: dict[str, tuple[nn.Module, nn.Module]], rounds: int) -> None:
    print("\nprefill: goal effc / projections <= 1.4")
    for name, (plain, quick) in plain_and_quick.items():
        for length in LENGTHS:
            ids = torch.randint(0, 255, (1, length))
            calls = {"projections": linear_calls(plain, length), "effc": lambda m=quick, x=ids: m(x, use_cache=False)}
            if length == LENGTHS[0]:
                calls["transformers"] = lambda m=plain, x=ids: m(x, use_cache=False)
            print_seconds_and_ratios(f"{name}, {length} tokens", race_in_turns(calls, rounds), "projections")


def time_decoding(pairs: dict[str, tuple[nn.Module, nn.Module]], rounds: int) -> None:
    print("\ndecode step: goal transformers / effc >= 2")
    ids = torch.randint(0, 255, (1, 17))
    for name, (plain, quick) in pairs.items():
        caches = {m: m(ids[:, :16], use_cache=True).cache for m in (plain, quick)}
        calls = {
            "effc": lambda m=quick, c=caches: m(ids[:, 16:], cache=c[m], use_cache=True),
            "transformers": lambda m=plain, c=caches: m(ids[:, 16:], cache=c[m], use_cache=True),
            "projections": linear_calls(plain, 1),
        }
        print_seconds_and_ratios(f"{name}, 1 token", race_in_turns(calls, 10 * rounds), "effc")


def time_scans(pairs: dict[str, tuple[nn.Module, nn.Module]], rounds: int) -> None:
    """A mixer, and its convolution and scan over a whole sequence at once, without projections.

    The latter write two results as large as the sequence. Where malloc gets such a one anew from the system, at every
    call above 32 MB, the system clears its pages one by one: the page faults tell. A mixer goes by pieces and has few.
    """
    print("\ncost by length: a mixer, memory besides its input and output; convolution and scan over all at once")
    for name, (_, quick) in pairs.items():
        mixer = quick.layers[0].mixer
        dtype = mixer.in_proj.weight.dtype
        for count in LONG:
            hidden = torch.randn(1, count, WIDTH).to(dtype)
            more = _peak_megabytes_beyond_result(lambda m=mixer, x=hidden: m(x))
            calls = {
                "mixer": lambda m=mixer, x=hidden: m(x),
                "scan": _scan(name, torch.randn(1, count, 2 * WIDTH).to(dtype)),
            }
            (whole, own), faults = race_in_turns(calls, max(1, rounds // 2)).values(), _page_faults(calls["scan"])
            print(
                f"{name}, {count:>6} tokens   mixer {whole / count * 1e6:7.2f} us/token, {max(0.0, more):.0f} MB   "
                f"convolution and scan {own / count * 1e6:6.2f} us/token, {faults} page faults",
                flush=True,
            )


def _page_faults(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _peak_megabytes_beyond_result(call: Callable[[], torch.Tensor]) -> float:
    """MB that a call had at its peak beside what was there before and what it returns; told by Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    result = call()
    return (_peak() - before - result.nbytes) / 2**20


def _peak() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _scan(name: str, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The two kernels of one layer on x [1, t, 2 * width]; time steps and gate are x itself."""
    channels, dtype = x.shape[2], x.dtype
    weight, ops = torch.randn(channels, 4), torch.ops.effc
    if name == "mamba":
        a, states = -torch.rand(channels, 16), torch.randn(1, x.shape[1], 16).to(dtype).mT

        def run() -> torch.Tensor:
            own = ops.causal_conv(x.mT, weight, None, None, None, True)
            return ops.selective_scan(own, x.mT, a, states, states, None, x.mT, None, True, None, None)[0]

        return run
    heads, states = torch.randn(1, x.shape[1], 24).to(dtype), torch.randn(1, x.shape[1], 1, 128).to(dtype)

    def run_heads() -> torch.Tensor:
        own = ops.causal_conv(x.mT, weight, None, None, None, True).mT.unflatten(2, (24, 64))
        return ops.ssd_scan(
            own, heads, -torch.ones(24), states, states, None, None, True, 0.0, float("inf"), None, None
        )[0]

    return run_heads


PARTS = {"prefill": race_prefill_with_projections, "decode": time_decoding, "length": time_scans}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: seconds that this process ran, where other work shares the cores",
    )
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = flags.parse_args()
    torch.set_num_threads(chosen.threads)
    chosen_clock.append(chosen.clock)
    transformers.utils.logging.set_verbosity_error()
    print(
        f"{cpu_model_name()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}; torch "
        f"{torch.__version__}, transformers {transformers.__version__}; kernels {levels.active_level_and_reason()}; {chosen.threads} "
        f"threads; {chosen.clock} clock; {chosen.dtype}; "
        f"width {WIDTH}, {LAYERS} layers, seed {SEED}; load {os.getloadavg()[0]:.1f}"
    )
    with torch.inference_mode():
        plain = mamba_models(getattr(torch, chosen.dtype))
        pairs = {name: (model, copy.deepcopy(model)) for name, model in plain.items()}
        for name, (model, quick) in pairs.items():
            assert use_mixer_kernels(quick), "the kernels are not compiled"
            ids = torch.randint(0, 255, (1, 64))
            one, two = (m(ids, use_cache=False).last_hidden_state.float() for m in (model, quick))
            print(f"{name}: largest difference {float((one - two).abs().max()):.2g} of {float(one.abs().max()):.2g}")
        for part in chosen.only.split(","):
            PARTS[part](pairs, chosen.rounds)


if __name__ == "__main__":
    main()
