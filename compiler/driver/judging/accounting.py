"""Losses on a few tokens: the original, the program in memory and every written form.

How far the program is from the original is what compression cost; how far a form is from the program is what its file
format and its runtime changed. Verification computes the forms' logits anyway, in processes of their own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....dsl.checker.values import DataRef, references_in
from ...analysis.planning.cost import CACHE_BYTES, LENGTH, ROWS
from ...artifacts.form_losses import Account
from ...artifacts.verify_child import logits_of_rows
from ...ir.weights import distinct_tensors
from ...models.rows.forward import evaluating
from ...models.rows.inputs import device_of
from ...plugin.context import Context
from ...plugin.target import Form

if TYPE_CHECKING:
    from ...analysis.planning.plan import Plan

ORIGINAL, PROGRAM = "original", "in memory"


@dataclass
class Accounting:
    """The tokens of one pipeline, and what the original says of them; `text` is None where it says nothing.

    of   the data that they are from, "" of random ones
    """

    text: Tensor | None
    of: str = ""
    base: Tensor | None = None  # logits [tokens, vocabulary]
    bytes: int = 0

    @staticmethod
    def for_plan(plan: "Plan", ctx: Context) -> "Accounting":
        """Tokens that a bound reads, else what a step reads, else random ones; none of what is no language model."""
        words = ctx.origin.token_id_count or 256
        if not plan.skeleton.facts.get("causal_lm"):
            return Accounting(None)
        candidates = [
            call for bound in plan.pipeline.expects for call in references_in(dict(bound.metric.args), DataRef)
        ]
        candidates += [ref for step in plan.pipeline.steps for ref in references_in(step.call.args, DataRef)]
        for ref in candidates:
            rows = ctx.rows(ref)
            if rows.dim() == 2 and not rows.is_floating_point():
                return Accounting(_row_count(rows, words), ref.name)
        generator = torch.Generator().manual_seed(ctx.seed)
        length = min(LENGTH, ctx.origin.positions or LENGTH)
        first = min(3, words - 1)  # special tokens come first, and some models count without them
        return Accounting(_row_count(torch.randint(first, words, (ROWS, length), generator=generator), words))

    def on_original(self, original: nn.Module) -> None:
        """Hear the original, the first time that it is there."""
        if self.text is not None and self.base is None:
            self.base, self.bytes = _logits(original, self.text), _bytes(original)

    def make_account(
        self, label: str, logits: Tensor, stored_bytes: int, program_logits: Tensor | None = None
    ) -> Account:
        """A row of the table. `program_logits` are the logits of the program in memory that a form holds."""
        assert self.base is not None and self.text is not None, "the original was not heard"
        divergences, drift, token_log_probs = [], [], []
        for row, ids in enumerate(self.text.cpu()):  # one by one: a vocabulary's probabilities are large
            part = slice(row * len(ids), (row + 1) * len(ids))
            log_probs = logits[part].log_softmax(-1)
            divergences.append(_divergence(self.base[part].log_softmax(-1), log_probs))
            if program_logits is not None:
                drift.append(_divergence(program_logits[part].log_softmax(-1), log_probs))
            if self.of:
                token_log_probs.append(log_probs[:-1].gather(-1, ids[1:, None]))
        return Account(
            label,
            divergence=_mean(divergences),
            drift=_mean(drift) if drift else None,
            agreement=float((self.base.argmax(-1) == logits.argmax(-1)).double().mean()),
            perplexity=math.exp(min(-torch.cat(token_log_probs).double().mean().item(), 700.0))
            if token_log_probs
            else None,
            bytes=stored_bytes,
            tokens=self.text.numel(),
            data=self.of,
        )


@dataclass
class RecordedLogits:
    """Logits that verification recorded for one artifact: of each member's program and of its forms."""

    accounting: Accounting
    folder: Path
    programs: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    forms: list[tuple[Form, Tensor]] = field(default_factory=list)

    @property
    def text(self) -> Tensor | None:
        return self.accounting.text

    def program(self, member: str, model: nn.Module) -> Callable[[Form, Tensor], None]:
        """Hear the program that a member is, and make what hears its forms."""
        if self.text is not None:
            self.programs[member] = _logits(model, self.text), _bytes(model)
        return lambda form, logits: self.forms.append((form, logits.flatten(0, 1)))

    def make_accounts(self) -> tuple[Account, ...]:
        if self.accounting.base is None or not self.forms:
            return ()
        rows = [self.accounting.make_account(ORIGINAL, self.accounting.base, self.accounting.bytes)]
        for member, (program, bytes_) in self.programs.items():
            suffix = f" of {member}" if member else ""
            rows.append(self.accounting.make_account(f"{PROGRAM}{suffix}", program, bytes_))
            for form, logits in self.forms:
                if form.member == member:
                    rows.append(
                        self.accounting.make_account(
                            _form_label(form), logits, _folder_bytes(self.folder / form.folder), program
                        )
                    )
        return tuple(rows)


def _row_count(rows: Tensor, words: int) -> Tensor:
    """As many rows as leave the logits small."""
    sample = rows[:ROWS, :LENGTH]
    return sample[: max(1, CACHE_BYTES // (4 * sample.shape[1] * words))].clone()


def _logits(model: nn.Module, text: Tensor) -> Tensor:
    with evaluating(model):
        return logits_of_rows(model, text.to(device_of(model))).flatten(0, 1).cpu()


def _divergence(truth: Tensor, log_probs: Tensor) -> Tensor:
    """KL in nats of each token, which rounding may leave below 0."""
    terms = (truth.exp() * (truth - log_probs)).nan_to_num(0.0)  # 0 * inf: a token that has no probability at all
    return terms.sum(-1)


def _mean(divergences: list[Tensor]) -> float:
    return max(0.0, torch.cat(divergences).double().mean().item())


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for _, t in distinct_tensors(model) if isinstance(t, Tensor))


def _form_label(form: Form) -> str:
    return f"{form.folder} in llama.cpp" if form.opens == "llama" else form.folder


def _folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
