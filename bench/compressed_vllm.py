"""Print how far vLLM's log-probabilities of a folder of `hf(format: compressed)` are from transformers', and why.

    VLLM=PATH python -m bench.compressed_vllm FOLDER DENSE [--rows 4] [--length 128] [--seed 0]

FOLDER is `model/` of such an artifact with codes of 4 bits, DENSE the model that it was quantised from. vLLM for CPUs
serves FOLDER at its defaults, which round what a linear layer reads to 8 bits where the processor has AMX, and once more
with VLLM_CPU_INT4_W4A8=0, which doesn't; then DENSE in bfloat16. Each time it logprobs the same rows of tokens (`echo`), parts of
Python's language reference, and so does transformers, in bfloat16 and in float32. A line has the root mean square and the
largest of the differences, in nats, and the mean of the log-probabilities.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import httpx
import torch

from bench.serve import prompts_of_python_docs
from bench.servers import start_other_server


def token_rows(folder: Path, rows: int, length: int, seed: int) -> torch.Tensor:
    """int64 tokens [rows, length] of texts, none of which is filled up."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor([tokenizer(text).input_ids[:length] for text in prompts_of_python_docs(rows, length, seed)])


@torch.no_grad()
def transformers_token_logprobs(folder: Path, input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities [rows, length - 1] of all tokens but the first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).to(dtype).eval()
    logits = torch.stack([model(row[None]).logits[0, :-1].float() for row in input_ids])
    return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]


def vllm_token_logprobs(folder: Path, input_ids: torch.Tensor, environment: Mapping[str, str]) -> torch.Tensor:
    length = input_ids.shape[1]
    limits = ["--dtype", "bfloat16", "--max-model-len", str(2 * length), "--max-num-seqs", "2", "--enforce-eager"]
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), os.environ["VLLM"]]
    logprobs = []
    with start_other_server([*command, "serve", str(folder), "--served-model-name", "model", *limits]) as url:
        for row in input_ids.tolist():
            body = {"model": "model", "prompt": row, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
            answer = httpx.post(f"{url}/completions", json=body, timeout=600).raise_for_status().json()
            logprobs.append(answer["choices"][0]["logprobs"]["token_logprobs"][1:length])
    return torch.tensor(logprobs)


def print_difference(label: str, logprobs: torch.Tensor, reference: torch.Tensor) -> None:
    difference = logprobs - reference
    root, largest = difference.square().mean().sqrt(), difference.abs().max()
    print(f"{label}: root mean square {root:.3f}, largest {largest:.2f}; mean {logprobs.mean():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ids = token_rows(args.dense, args.rows, args.length, args.seed)
    for folder, choices in ((args.folder, ("1", "0")), (args.dense, ("1",))):
        reference = transformers_token_logprobs(folder, ids, torch.float32)
        print(f"{folder}: transformers, float32: mean {reference.mean():.4f}")
        print_difference("transformers, bfloat16", transformers_token_logprobs(folder, ids, torch.bfloat16), reference)
        for w4a8 in choices:
            logprobs = vllm_token_logprobs(folder, ids, {"VLLM_CPU_INT4_W4A8": w4a8})
            print_difference(f"vLLM, VLLM_CPU_INT4_W4A8={w4a8}", logprobs, reference)


if __name__ == "__main__":
    main()
