"""A model folder by transformers alone: nothing of effc is imported."""

import json
import sys

from torch import nn


def load(folder: str, attention: str) -> nn.Module:
    import transformers

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        kind = getattr(transformers, json.load(file)["architectures"][0])
    model, info = kind.from_pretrained(
        folder,
        dtype="auto",
        local_files_only=True,
        output_loading_info=True,
        attn_implementation=attention or None,
        use_kernels=False,
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = {name: sorted(map(str, info[name])) for name in kinds if info[name]}
    if problems:
        raise SystemExit(f"transformers reports {json.dumps(problems)[:500]}")
    assert not any(name.split(".")[0] == "effc" for name in sys.modules), "effc was imported"
    return model.eval()
