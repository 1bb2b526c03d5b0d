"""Make those weights of linear modules zero that matter least for what the modules are given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...compiler.ir.edits import is_below
from ...compiler.ir.program import Program
from ...compiler.rows.forward import batches, evaluating, finite, logits
from ...compiler.search.sparsity import chosen_parts, finite_weight, keep_mask, mask, note
from ...compiler.store.journal import Journal
from ...compiler.words.context import Context
from ...compiler.words.kinds import Effort, Lossy, Pass, param
from ...dsl.skeleton import Part, Skeleton
from ...dsl.values import DataRef, Ratio, Selector


class Wanda(Pass):
    """Make those weights of linear modules zero that matter least for what the modules are given.

    A weight matters as much as its magnitude times the norm of its input over `data`, and every output
    loses the same share. Layers are masked from the first to the last, each for what the masked ones before
    it give. Nothing is trained, and nothing gets smaller or faster by itself: `lower.sparse_cpu` packs what
    is left.

    Source: Wanda (Sun et al. 2023, arXiv 2306.11695), section 3; its `blocks` are own, a block's score the
    mean square of its weights' scores.
    Example: sps = sparsify.wanda(on: "*_proj", sparsity: 50% of weights, data: calib)
    """

    keeps = Lossy()
    acts_on = "linear"
    determinism = "deterministic"
    after = {"tune.heal": "training would fill the zeros again"}

    sparsity: Ratio = param("Share of every output's weights that become zero.", of=("weights",), gt=0, lt=1)
    data: DataRef = param("Rows whose inputs of the modules count; some thousand tokens.")
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    pattern: Literal["any", "blocks"] = param(
        "Any weights, or blocks of 16 outputs by 2 inputs, which run faster from 80% on.", default="any")

    def run(self, program: Program, ctx: Context) -> None:
        chosen, found = chosen_parts(program.skeleton, self.on), {}
        journal, rows = Journal(ctx.workdir / "norms.jsonl"), ctx.rows(self.data)
        stages = list(_stages(program, chosen))
        for unit, inside in ctx.each(stages, "masks", len(stages)):
            norms = journal.remember(unit, lambda u=unit, i=inside: _norms(program, u, i, rows))
            for path in inside:
                score = finite_weight(program, path).abs().float()
                if norms[path]:                             # a module that no row reached goes by magnitude
                    score = score * torch.tensor(norms[path], device=score.device)
                keep = keep_mask(score, self.sparsity.value, self.pattern, "row")
                found[path] = mask(program, path, keep)
        note(program, chosen, found, pattern=self.pattern, tokens=rows.numel())

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """Each layer is looked at by a forward that ends behind it: half of the model on average."""
        rows = ctx.rows(self.data)
        return Effort(tokens=rows.numel() * (len(skeleton.units) + 1) // 2)


def _stages(program: Program, chosen: Sequence[Part]) -> Iterator[tuple[str, list[str]]]:
    """Units in the order in which they run, each with its chosen modules; last, under "", those outside."""
    paths = [part.path for part in chosen]
    for unit in program.units:
        inside = [p for p in paths if unit and is_below(p, unit)]
        if inside:
            yield unit, inside
    outside = [p for p in paths if not any(unit and is_below(p, unit) for unit in program.units)]
    if outside:
        yield "", outside


def _norms(program: Program, unit: str, modules: Sequence[str], rows: Tensor) -> dict[str, list[float]]:
    """Root of the summed squares of each input of the modules, over all rows; [] of one that was not run."""
    model, sums = program.model, {}
    hooks = [model.get_submodule(path).register_forward_pre_hook(_adding(sums, path), with_kwargs=True)
             for path in modules]
    try:
        with evaluating(model), _ended_behind(model.get_submodule(unit) if unit else None):
            for batch in batches(model, rows):
                with suppress(_Enough):
                    logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for path, squares in sums.items():
        finite(float(squares.sum()), f"what {path} is given")
    return {path: sums[path].sqrt().tolist() if path in sums else [] for path in modules}


def _adding(sums: dict[str, Tensor], path: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        squares = x.detach().flatten(0, -2).float().square().sum(0).double().cpu()
        sums[path] = sums[path] + squares if path in sums else squares
    return hook


class _Enough(Exception):
    """A forward has passed what it was run for."""


@contextmanager
def _ended_behind(module: nn.Module | None) -> Iterator[None]:
    """Forwards end with `_Enough` once a module has run."""
    def leave(*_: Any) -> None:
        raise _Enough

    hook = module.register_forward_hook(leave) if module is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
