"""Print how far ExecuTorch's XNNPACK delegate is from torch on the programs of a `pt2` artifact with a `context`.

    PYTHON -m bench.xnnpack PROGRAM OUT [--tokens 64] [--new 32]

PYTHON is of an environment of its own with `executorch` and the torch that it is built for (1.4.1 for torch 2.13);
nothing of effc is imported. PROGRAM is the artifact's folder `program`; `model.pte` and `step.pte` are written to the new
folder OUT, for one row of up to --tokens tokens a call. The differences are of logits: of `model.pte` for random prompts of
three lengths, of `step.pte` for --new greedy tokens behind a random prompt, each side with its own keys and values.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch.export import Dim

Inputs = dict[str, Any]


def model_inputs(tokens: int, largest_id: int) -> Inputs:
    ids = torch.randint(0, largest_id, (1, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(tokens)[None]}


def step_inputs(ids: torch.Tensor, before: int, past: list[torch.Tensor], facts: dict[str, Any]) -> Inputs:
    tensors = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, facts["context"], dtype=torch.int64),
        "position_ids": torch.arange(before, before + ids.shape[1])[None],
    }
    return {"given": {name: tensors[name] for name in facts["inputs"]}, "before": torch.tensor(before), "past": past}


def lower(program: Any, inputs: Inputs, shapes: Any, file: Path) -> Any:
    """Method of a program in ExecuTorch, whose memory is planned for the largest `shapes`."""
    started = time.perf_counter()
    exported = torch.export.export(program, (), inputs, dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    nodes = [str(node.target) for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    with file.open("wb") as stream:
        lowered.to_executorch().write_to_file(stream)
    size, seconds = file.stat().st_size / 2**20, time.perf_counter() - started
    print(f"{file.name}: {size:.1f} MiB, {nodes.count('executorch_call_delegate')} delegated parts, {seconds:.0f} s")
    return Runtime.get().load_program(file).load_method("forward")


def compare_model(folder: Path, out: Path, tokens: int, largest_id: int) -> None:
    program = torch.export.load(folder / "model.pt2").module()
    inputs = model_inputs(tokens // 2, largest_id)
    free = {1: Dim("tokens", min=2, max=tokens)}
    shapes = dict.fromkeys(inputs, free)
    method = lower(program, inputs, shapes, out / "model.pte")
    for length in (2, tokens // 2, tokens):
        inputs = model_inputs(length, largest_id)
        expected, actual = program(**inputs), method.execute(list(inputs.values()))[0]
        print_difference(f"{length} tokens", [(expected, actual)])


def compare_steps(folder: Path, out: Path, tokens: int, new: int, largest_id: int) -> None:
    program, facts = torch.export.load(folder / "step.pt2").module(), json.loads((folder / "step.json").read_text())
    dtype, positions = getattr(torch, facts["dtype"]), facts["context"]
    empty = [torch.zeros(1, heads, positions, width, dtype=dtype) for heads, width in facts["past"]]
    ids = torch.randint(0, largest_id, (1, tokens // 2))
    free = {1: Dim("tokens", min=1, max=tokens)}
    named = {name: None if name == "attention_mask" else free for name in facts["inputs"]}
    shapes = {"given": named, "before": None, "past": [None] * len(empty)}
    method = lower(program, step_inputs(ids, 0, empty, facts), shapes, out / "step.pte")
    pairs, sides, before = [], [(ids, empty), (ids, empty)], 0
    for _ in range(new):
        inputs = [step_inputs(row, before, past, facts) for row, past in sides]
        expected, past = program(**inputs[0])
        actual, *other_past = method.execute([*inputs[1]["given"].values(), inputs[1]["before"], *inputs[1]["past"]])
        before += inputs[0]["given"]["input_ids"].shape[1]
        sides = [(expected[:, -1:].argmax(-1), past), (actual[:, -1:].argmax(-1), other_past)]
        pairs.append((expected[:, -1], actual[:, -1]))
    print_difference(f"{new} greedy tokens", pairs)


def print_difference(title: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    largest = max((a - b).abs().max().item() for a, b in pairs)
    same = [(a.argmax(-1) == b.argmax(-1)).float().mean().item() for a, b in pairs]
    print(f"  {title}: logits differ by {largest:.1e} at most, {sum(same) / len(same):.1%} of top tokens equal")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    torch.manual_seed(0)
    largest_id = 256  # every tokenizer has as many
    compare_model(args.program, args.out, args.tokens, largest_id)
    compare_steps(args.program, args.out, args.tokens, args.new, largest_id)


if __name__ == "__main__":
    main()
