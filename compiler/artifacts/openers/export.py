"""A program of torch.export by torch alone."""

import json
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

STEP, STEP_FACTS = "step.pt2", "step.json"  # beside an exported program: one that continues text, and what it takes


class Exported(nn.Module):
    """A program of torch: takes its inputs by name or in order, as the module that it was made of.

    One of tokens needs no mask where all are seen, and no positions where they count what is seen. It only evaluates.

    params   numbers of all its weights, where packed ones (uint8) are among them; None where the file states none
    """

    def __init__(self, program: nn.Module, names: tuple[str, ...], params: int | None = None):
        super().__init__()
        self.program, self.names, self.params = program, names, params
        self.training, self.stored_bytes = False, None

    @property
    def n_params(self) -> int | None:
        packed = any(b.dtype == torch.uint8 for b in self.buffers())
        return self.params if packed else sum(p.numel() for p in self.parameters())

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if "input_ids" in kwargs:
            kwargs.setdefault("attention_mask", torch.ones_like(kwargs["input_ids"]))
            kwargs.setdefault("position_ids", (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0))
            kwargs = {name: kwargs[name] for name in self.names if name in kwargs}
        return self.program(**kwargs)

    def train(self, mode: bool = True) -> "Exported":
        assert not mode, "an exported program has no training mode"
        return self


class Stepped(nn.Module):
    """A program that continues text, with keys and values of a stated number of tokens; by torch alone.

    step     given, before, past -> logits, past
    facts    what `step.json` says
    plain    of whole prompts
    """

    def __init__(self, step: nn.Module, facts: dict, prefill: nn.Module):
        super().__init__()
        self.step, self.facts, self.plain = step, facts, prefill

    def can_generate(self) -> bool:
        return True

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.plain(input_ids=input_ids, attention_mask=mask)

    def _empty(self, rows: int) -> list[Tensor]:
        kind, context = getattr(torch, self.facts["dtype"]), self.facts["context"]
        return [torch.zeros(rows, heads, context, d, dtype=kind) for heads, d in self.facts["past"]]

    def _pad_with_ones(self, mask: Tensor) -> Tensor:
        ones = torch.ones(len(mask), self.facts["context"] - mask.shape[1], dtype=mask.dtype)
        return torch.cat([mask, ones], 1)

    def _call(self, ids: Tensor, mask: Tensor, past_length: int, past: list[Tensor]) -> Any:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past_length : past_length + ids.shape[1]]
        available = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: available[name] for name in self.facts["inputs"]}
        return self.step(given=inputs, before=torch.tensor(past_length), past=past)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config) -> SimpleNamespace:
        """Greedy: logits step by step, and rows of prompt and new tokens."""
        mask, past, outputs = self._pad_with_ones(attention_mask), self._empty(len(input_ids)), []
        ids, rows, before = input_ids, input_ids, 0
        for _ in range(generation_config.max_new_tokens):
            logits, past = self._call(ids, mask, before, past)
            before += ids.shape[1]
            outputs.append(logits[:, -1])
            ids = logits[:, -1:].argmax(-1)
            rows = torch.cat([rows, ids], 1)
        return SimpleNamespace(logits=tuple(outputs), sequences=rows)


def load(folder: str, attention: str) -> nn.Module:
    if os.path.exists(f"{folder}/kernels.json"):  # it calls effc's kernels, and is loaded as its note says
        import effc.kernels.ops  # noqa: F401 (torch knows effc's ops from here on)
    names = {"inputs.json": ""}
    program = torch.export.load(f"{folder}/model.pt2", extra_files=names)
    plain = Exported(program.module(), tuple(json.loads(names["inputs.json"])))
    if not os.path.exists(f"{folder}/{STEP}"):
        return plain
    with open(f"{folder}/{STEP_FACTS}", encoding="utf-8") as file:
        return Stepped(torch.export.load(f"{folder}/{STEP}").module(), json.load(file), plain)
