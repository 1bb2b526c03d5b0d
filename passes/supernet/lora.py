"""Train adapters of elastic rank: any choice of ranks is then an adapter, without more training."""

from typing import ClassVar, Literal

import torch

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning.selection import linear_parts
from ...compiler.ir.outcome import Model, Outcome
from ...compiler.models.rows.forward import total_nll
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, param
from ...compiler.transforms.search.grid import refuse_indivisible_groups
from ...compiler.transforms.supernet.choices import ChoiceSampler, Space
from ...compiler.transforms.supernet.family import Family, refuse_too_large_ranks
from ...compiler.transforms.training.acceptance import refuse_validation_on_training_rows
from ...compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
from ...compiler.transforms.training.effort import adapter_param_count, estimate_run_effort
from ...compiler.transforms.training.loop import TrainingState
from ...compiler.transforms.training.objective import Objective
from ...compiler.transforms.training.schedule import seed_of
from ...compiler.transforms.training.trained_pass import Learner
from ...compiler.transforms.training.training_run import run_training
from ...dsl.checker.skeleton import Part, Skeleton
from ...dsl.checker.values import DataRef, Selector
from ...kernels.grid import Grid


class Lora(Learner):
    """Train adapters of elastic rank: any choice of ranks is then an adapter, without more training.

    Each step of training uses adapters of ranks that are drawn for it: of every site by itself, one of `ranks`, so
    that the first so many ranks of an adapter learn to do without those behind. `supernet.pick` takes one choice out
    of the family. A draw holds for a whole step, with all its batches and with layers that run again in the backward
    pass. Whatever the rank, an adapter's product is multiplied by alpha / largest rank.

    `zeros: keep` trains adapters that give nothing where a sparse weight is zero, so that merging a choice keeps the
    zeros; `zeros: fill` trains plain ones, which can be exported separately in the format of peft.

    `bits: 4` trains through a quantization grid of 4 bits: weight and adapter are rounded together, on scales that are
    fitted once to each `group` of an output's inputs, and gradients pass straight through. Merging a choice gives the
    rounded weights that were trained, zeros and all: `native(weights: int4)` keeps their codes.

    With `held_out`, the loss of the middle ranks there is measured every so many steps, and the best weights are kept.

    Source: Neural Low-rank adapter Search of Shears (Munoz et al. 2024, arXiv 2404.10934), one draw a step; SparsePEFT
    and QA-SparsePEFT of SQFT (Munoz et al. 2024, arXiv 2410.03750).
    Example: net = supernet.lora(on: "*.{q,k,v,up,down}_proj", ranks: [32, 24, 16], data: calib, steps: 400)
    """

    keeps = Lossy()
    acts_on = "linear"
    changes = ("weights",)
    rank_param = "ranks"
    determinism = "seeded"
    disjoint = {"held_out": "data"}
    results = ("family",)
    extra: ClassVar[str] = "tune"
    requires: ClassVar[tuple[str, ...]] = ("peft",)

    ranks: list[int] = param("What a site's rank may be, the largest first.", ge=1, least=2, falling=True)
    data: DataRef = param("Rows to learn from.")
    per: Literal["layer", "module", "kind"] = param(
        "What has a rank of its own: layers, modules, or all modules of one name.", default="layer"
    )
    on: Selector | None = param(
        "Linear modules that get an adapter; all inside the layers where it is left out.", default=None
    )
    alpha: float = param("What the products are multiplied with, divided by the largest rank.", default=64.0, gt=0)
    dropout: float = param("Probability that an input of an adapter is dropped.", default=0.1, ge=0, lt=1)
    zeros: Literal["keep", "fill"] = param(
        "Whether adapters give nothing where a sparse weight is zero.", default="keep"
    )
    bits: int = param(
        "Bits of the grid that is trained through; 0 for none.", default=0, among=(0, 2, 3, 4, 5, 6, 7, 8)
    )
    group: int = param(
        "Inputs of an output that share a scale of the grid; 0 for all.", default=64, ge=0, unit="inputs"
    )
    zero: Literal["free", "middle"] = param("Whether 0 is any code of the grid, or the middle one.", default="free")

    def result_of(self, outcome: Outcome, ctx: Context) -> Family:
        assert isinstance(outcome, Model), f"a family of {outcome.kind}"
        program = outcome.program
        self.forecast(skeleton_of(program))
        refuse_validation_on_training_rows(self.data, self.held_out, ctx)
        paths = require_adaptable_modules(program, self.on)
        shape = AdapterShape(self.ranks[0], self.alpha, self.dropout)
        sampler = ChoiceSampler(Space.of_ranks(paths, self.per, skeleton_of(program), self.ranks), ctx.seed)
        sampler.activate(sampler.space.choice("largest"))
        seed, grid = seed_of("adapters", ctx.seed), self.grid
        with with_adapters(program.model, paths, shape, seed, zeros=self.zeros, rounding_grid=grid) as adapters:
            adapters.follow_ranks(sampler.ranks)
            weights = adapters.parameters()
            course = self._train_adapters_to_best(outcome, ctx, weights, sampler)
            tensors = {name: p.detach().clone() for name, p in weights.items()}
        program.note(
            trained=sum(t.numel() for t in tensors.values()),
            steps=course.step,
            best=course.best,
            loss=course.curve,
            held_out=course.held_out,
            sites=len(sampler.space.dims),
            ranks=list(self.ranks),
        )
        return Family(program, None, sampler.space, shape, tensors, masked=self.zeros == "keep", grid=grid)

    @property
    def grid(self) -> Grid | None:
        return Grid(self.bits, self.group, self.zero == "middle", search=True) if self.bits else None

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes. Impossible ranks are reported here, before any weight is read."""
        refuse_too_large_ranks(self.ranks, self._chosen(skeleton))
        if self.bits:
            refuse_indivisible_groups(self._chosen(skeleton), self.group)
        return skeleton

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return estimate_run_effort(
            self, self.data, skeleton, ctx, adapter_param_count(self._chosen(skeleton), max(self.ranks))
        )

    def _chosen(self, skeleton: Skeleton) -> tuple[Part, ...]:
        inside = tuple(f"{unit}." for unit in skeleton.units)
        return tuple(p for p in linear_parts(skeleton, self.on) if self.on is not None or p.path.startswith(inside))

    def _train_adapters_to_best(
        self, outcome: Model, ctx: Context, adapter_weights: dict[str, torch.nn.Parameter], sampler: ChoiceSampler
    ) -> TrainingState:
        program = outcome.program
        model, rows = program.model, ctx.rows(self.data)
        lesson = Objective(model, rows, learned=ctx.loss_mask(self.data))

        def judge() -> float:
            sampler.activate(sampler.space.choice("middle"))
            assert self.held_out is not None, "judged by no rows"
            nats, tokens = total_nll(model, ctx.rows(self.held_out), ctx.loss_mask(self.held_out))
            return nats / tokens

        return run_training(
            self,
            program,
            ctx,
            adapter_weights,
            len(rows),
            lesson.accumulate_gradients,
            judge,
            before_step=sampler.draw_and_activate_first,
        )
