"""Print what capture and discovery cost, in CPU seconds of one thread.

    python -m bench.discovery

SmolLM2's structure on the meta device, and every architecture of tests/architectures/table.py, tiny and random.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.fingerprint import library_versions, machine_facts
from effc.compiler.ir.capture.capture import capture
from effc.dsl.syntax.diagnostics import Reject

from tests.architectures import table


def smollm2() -> torch.nn.Module:
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def capture_and_discovery_seconds(model: torch.nn.Module) -> tuple[float, float, int]:
    """CPU seconds of capture and of discovery, and how many branches and groups were found."""
    start = time.process_time()
    program = capture(model)
    captured = time.process_time()
    found = skeleton_of(program)
    return captured - start, time.process_time() - captured, len(found.branches) + len(found.groups)


def main() -> None:
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in {**machine_facts(), **library_versions()}.items()))
    print(f"{'':20} {'capture s':>10} {'discover s':>11} {'found':>6}")
    makers = {"SmolLM2, meta device": smollm2, **{name: lambda name=name: table.model(name) for name in table.NAMES}}
    for name, make in makers.items():
        try:
            captured, discovered, found = capture_and_discovery_seconds(make().eval())
        except Reject as refused:  # the table has rows that are to be refused
            print(f"{name:20} {refused.diagnostics[0].slug}")
            continue
        print(f"{name:20} {captured:10.2f} {discovered:11.2f} {found:6}")


if __name__ == "__main__":
    main()
