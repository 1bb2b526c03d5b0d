"""Make widths and depth of a model elastic, and train it so that every choice of them is a model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning import shrink
from ...compiler.analysis.planning.selection import linear_parts
from ...compiler.core.environment import check_modules
from ...compiler.core.journal import Journal
from ...compiler.ir.outcome import Model, Outcome
from ...compiler.ir.program import Program
from ...compiler.models.rows.classifier import classification_loss_and_accuracy
from ...compiler.models.rows.forward import total_nll
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, param
from ...compiler.transforms.search.importance import l1_importance, obs_importance, wanda_importance
from ...compiler.transforms.search.reconstruct import has_moments, module_of, readers
from ...compiler.transforms.search.routing import sum_router_weights
from ...compiler.transforms.search.stream import collect_moments
from ...compiler.transforms.supernet.choices import ChoiceSampler, ElasticDim, Space, rank_dims
from ...compiler.transforms.supernet.elastic_dims import (
    depth_dims,
    items_least_important_first,
    kernel_dims,
    maskable_groups,
    narrowable_groups,
    refuse_no_depth,
    refuse_single_choice,
    require_enough_experts,
    require_larger_kernels,
    width_dims,
)
from ...compiler.transforms.supernet.family import Family, refuse_too_large_ranks
from ...compiler.transforms.supernet.kernels import identity_crop_matrices
from ...compiler.transforms.supernet.norms import batch_norms, recalibrate_batch_norms
from ...compiler.transforms.supernet.objectives import (
    ClassificationObjective,
    SubnetObjective,
    Tokens,
    refuse_unlabelled_images,
)
from ...compiler.transforms.supernet.subnet_masks import SubnetMasks
from ...compiler.transforms.training.acceptance import refuse_validation_on_training_rows
from ...compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
from ...compiler.transforms.training.effort import adapter_param_count, estimate_run_effort
from ...compiler.transforms.training.masks import nonzero_masks
from ...compiler.transforms.training.schedule import seed_of
from ...compiler.transforms.training.trained_pass import Learner
from ...compiler.transforms.training.training_run import run_training
from ...dsl.checker.rules import Conflict, Problem
from ...dsl.checker.skeleton import Group, Skeleton
from ...dsl.checker.values import DataRef, Ratio, Selector

KINDS = {  # of groups, in words
    "channels": "channels",
    "heads": "heads",
    "ssm_heads": "scan heads",
    "ssm_channels": "scan channels",
    "ssm_state": "states",
    "experts": "experts",
}


class Elastic(Learner):
    """Make widths and depth of a model elastic, and train it so that every choice of them is a model.

    What may be chosen comes from discovery: so many channels of each MLP, KV heads of each attention with the query
    heads that they serve, heads, channels and states of each state-space mixer's scan, experts of each layer of them,
    sizes of convolutions' kernels, and which layers or residual branches run. A narrower choice does without the items
    that `reorder` puts last, or the experts that the router trusts least over some of the rows, and chooses among the
    others as if they were all. Every smaller choice is a part of every larger one; a smaller kernel is the middle of a
    larger one, times a matrix that is learned, at first the identity. `per: model` gives all layers of a size one
    width, so that a choice has a config that plain transformers reads.

    `train: adapters` leaves the weights and trains low-rank adapters beside them, of elastic rank where `ranks` has
    more than one; `train: weights` trains all parameters. A step learns on `draws` choices drawn for it, with
    `sandwich` on the largest and the smallest as well. `distill` is the share of a smaller choice's loss that is how
    far it is from the largest one on the same rows; over `opening` of the steps the smaller values come in. `steps: 0`
    trains nothing: the family is the model's own parts.

    Rows with `labels` and `images` train a head over whole rows; other rows the next token. Of a model with BatchNorm
    every choice has statistics of its own, measured over some of the rows when it runs and when it is cut out.

    Source: LoNAS (Munoz et al. 2024, arXiv 2404.10934 and LREC-COLING 2024), BootstrapNAS (Munoz et al. 2021,
    arXiv 2112.10878); sandwich rule and in-place distillation, Yu and Huang 2019 (arXiv 1903.05134).
    Example: net = supernet.elastic(channels: [100%, 75%, 50%], depth: layers, data: calib, steps: 200)
    """

    keeps = Lossy()
    acts_on = "branches"
    changes = ("weights",)
    determinism = "seeded"
    disjoint = {"held_out": "data"}
    results = ("family",)
    extra: ClassVar[str] = "tune"

    data: DataRef = param("Rows to learn from.")
    channels: list[Ratio] = param(
        "Shares of an MLP's channels that may stay, from 100% down.", default=(), gt=0, least=2, starts_full=True
    )
    heads: list[Ratio] = param(
        "Shares of an attention's heads that may stay, from 100% down.", default=(), gt=0, least=2, starts_full=True
    )
    scan_heads: list[Ratio] = param(
        "Shares of the heads of a scan that may stay, from 100% down.", default=(), gt=0, least=2, starts_full=True
    )
    scan_channels: list[Ratio] = param(
        "Shares of the channels of a scan without heads that may stay, from 100% down.",
        default=(),
        gt=0,
        least=2,
        starts_full=True,
    )
    states: list[Ratio] = param(
        "Shares of a scan's states that may stay, from 100% down.", default=(), gt=0, least=2, starts_full=True
    )
    experts: list[Ratio] = param(
        "Shares of a layer's experts that may stay, from 100% down.", default=(), gt=0, least=2, starts_full=True
    )
    kernels: list[int] = param(
        "Sizes that larger kernels of convolutions may shrink to, the largest first.",
        default=(),
        ge=1,
        parity="odd",
        least=1,
        falling=True,
    )
    depth: Literal["none", "layers", "blocks"] = param(
        "What may be left out as a whole: nothing, layers, or residual branches.", default="none"
    )
    per: Literal["layer", "model"] = param("Whether each layer has widths of its own.", default="layer")
    align: int = param("Widths of MLPs are multiples of this.", default=8, ge=1, unit="channels")
    on: Selector | None = param("Which branches or layers may be smaller.", default=None)
    reorder: Literal["l1", "wanda", "obs"] = param(
        "Which items stay: by weights, by readers' weights times what is read, or by what others can't make up for.",
        default="l1",
    )
    adapt: int = param(
        "Rows that statistics of BatchNorm, the trust of routers, and `reorder` other than `l1` are measured over.",
        default=64,
        ge=2,
        unit="rows",
    )
    train: Literal["adapters", "weights"] = param("What is trained.", default="adapters")
    ranks: list[int] = param(
        "What the rank of a layer's adapters may be, the largest first.", default=(16,), ge=1, falling=True
    )
    alpha: float = param("What the products are multiplied with, divided by the largest rank.", default=32.0, gt=0)
    dropout: float = param("Probability that an input of an adapter is dropped.", default=0.0, ge=0, lt=1)
    draws: int = param("Choices that are drawn for a step.", default=1, ge=1, unit="choices")
    sandwich: bool = param("Whether a step learns on the largest and the smallest choice, too.", default=False)
    distill: Ratio = param(
        "Share of a smaller choice's loss that the largest makes up.", default=Ratio(0.0), ge=0, le=1
    )
    opening: Ratio = param("Share of the steps over which smaller values come in.", default=Ratio(0.0), ge=0, le=1)
    steps: int = param("Updates of what is trained, at most.", default=200, ge=0, unit="steps")
    held_out: DataRef | None = param("Rows to judge the middle choice by; never learned from.", default=None)

    def problems(self) -> Iterator[Problem]:
        widths = (self.channels, self.heads, self.scan_heads, self.scan_channels, self.states, self.experts)
        if any((*widths, self.kernels)) or self.depth != "none":
            return
        if self.train == "weights":
            yield Conflict(("train",), "nothing is elastic", "ask for `channels`, `heads`, or `depth`")
        elif len(self.ranks) < 2:
            yield Conflict(("ranks",), "nothing is elastic", "ask for `channels`, `heads`, `depth`, or `ranks`")

    def result_of(self, outcome: Outcome, ctx: Context) -> Family:
        assert isinstance(outcome, Model), f"a family of {outcome.kind}"
        program = outcome.program
        self.forecast(skeleton_of(program))
        refuse_validation_on_training_rows(self.data, self.held_out, ctx)
        adapts = self.train == "adapters" and self.steps > 0
        paths = require_adaptable_modules(program, None) if adapts else ()
        space, orders = self._make_space_and_item_orders(program, paths, ctx)
        family = Family(program, None, space, AdapterShape(self.ranks[0], self.alpha, self.dropout) if adapts else None)
        family.orders = orders
        if batch_norms(program.model):
            family.norms = ctx.rows(self.data)[: self.adapt].clone()
        if self.steps:
            self._train_family(family, paths, ctx)
        program.note(dims=len(space.dims), choices=float(space.size))
        return family

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes. Impossible shares and ranks are reported here, before any weight is read."""
        if self.train == "adapters" and self.steps:
            check_modules(("peft",), self.extra, "`supernet.elastic` with `train: adapters`")
            inside = tuple(f"{unit}." for unit in skeleton.units)
            refuse_too_large_ranks(self.ranks, [p for p in linear_parts(skeleton, None) if p.path.startswith(inside)])
        widths = [
            d
            for kind, shares in self._kinds_and_shares()
            for d in self._width_dims(narrowable_groups(skeleton, self.on, kind), kind, shares)
        ]
        require_enough_experts(self.experts, skeleton, self.on)
        require_larger_kernels(self.kernels, skeleton, self.on)
        ranked = self.train == "adapters" and self.steps > 0 and len(self.ranks) > 1
        if not (self.kernels or self.depth != "none" or ranked):
            is_selected = any(narrowable_groups(skeleton, self.on, kind) for kind, _ in self._kinds_and_shares())
            names = " or ".join(KINDS[kind] for kind, _ in self._kinds_and_shares())
            refuse_single_choice(
                widths, "no group has two widths of these shares" if is_selected else f"no {names} are selected"
            )
        return skeleton

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        adapters = adapter_param_count(linear_parts(skeleton, None), self.ranks[0])
        trained = adapters if self.train == "adapters" else shrink.param_count(skeleton)
        forwards = self.draws + 2 * self.sandwich
        return estimate_run_effort(
            self, self.data, skeleton, ctx, trained if self.steps else 0, forwards_per_batch=forwards
        )

    # -- what may be chosen ----------------------------------------------------------------------------------

    def _kinds_and_shares(self) -> list[tuple[str, list[Ratio]]]:
        return [(kind, shares) for kind, name in KINDS.items() if (shares := getattr(self, name.replace(" ", "_")))]

    def _width_dims(self, groups, kind: str, shares: list[Ratio]) -> list[ElasticDim]:
        return width_dims(groups, shares, self.per, self.align if kind == "channels" else 1)

    def _make_space_and_item_orders(
        self, program: Program, adapter_paths: tuple[str, ...], ctx: Context
    ) -> tuple[Space, dict[str, list[int]]]:
        skeleton = skeleton_of(program)
        dims: list[ElasticDim] = []
        elastic: list[Group] = []
        for kind, shares in self._kinds_and_shares():
            selected = narrowable_groups(skeleton, self.on, kind)
            groups = maskable_groups(program, selected, self._width_dims(selected, kind, shares))
            elastic += groups
            dims += self._width_dims(groups, kind, shares)
        dims += kernel_dims(program, self.on, self.kernels, self.per)
        if self.depth != "none":
            deep = depth_dims(program, self.on, self.depth)
            refuse_no_depth(deep, self.depth)
            dims += deep
        if len(self.ranks) > 1 and adapter_paths:
            dims += rank_dims(adapter_paths, "layer", skeleton, self.ranks)
        refuse_single_choice(dims, "the model does not run without what would go")
        routed = [group for group in elastic if group.kind == "experts"]
        trust = sum_router_weights(program, ctx, self.data, routed, self.adapt) if routed else {}
        importance = self._make_importance_function(
            program, ctx, [group for group in elastic if group.kind != "experts"]
        )
        return Space(tuple(dims)), items_least_important_first(program, elastic, trust, importance)

    def _make_importance_function(
        self, program: Program, ctx: Context, groups: Sequence[Group]
    ) -> Callable[[Program, Group], Tensor]:
        if self.reorder == "l1":
            return l1_importance
        modules = [module_of(m) for g in groups for m in readers(g) if has_moments(program.model, m)]
        moments = collect_moments(program, ctx, modules, self.data, self.adapt)
        return partial(obs_importance if self.reorder == "obs" else wanda_importance, moments=moments)

    # -- training --------------------------------------------------------------------------------------------

    def _train_family(self, family: Family, adapter_paths: tuple[str, ...], ctx: Context) -> None:
        program, crops = family.program, identity_crop_matrices(family.space)
        switches = SubnetMasks(program, family.space, family.orders, crops)
        sampler = ChoiceSampler(
            family.space,
            ctx.seed,
            self.draws,
            self.sandwich,
            round(self.opening.value * self.steps),
            switches.set_active_subnet,
        )
        with ExitStack() as stack:
            if adapter_paths:
                shape, seed = family.shape, seed_of("adapters", ctx.seed)
                assert shape is not None, "adapters without a shape"
                adapters = stack.enter_context(with_adapters(program.model, adapter_paths, shape, seed, zeros="keep"))
                sampler.ranks.update(dict.fromkeys(adapter_paths, shape.rank))
                adapters.follow_ranks(sampler.ranks)
                weights, weight_masks, family.masked = adapters.parameters(), None, True
            else:
                weights = dict(program.model.named_parameters())
                weight_masks = nonzero_masks(weights)
            stack.enter_context(switches.hooks_installed())
            lesson = SubnetObjective(
                self._make_objective(program.model, ctx),
                sampler,
                Journal(ctx.workdir / "losses.jsonl"),
                self.distill.value,
            )
            course = run_training(
                self,
                program,
                ctx,
                {**weights, **crops},
                len(lesson.objective.rows),
                lesson.accumulate_gradients,
                lambda: self._activate_middle_and_measure_validation_loss(family, sampler, ctx),
                trainable_masks=weight_masks,
                before_step=sampler.draw_and_activate_first,
            )
            tensors = {name: p.detach().clone() for name, p in weights.items()}
            family.crops = {name: p.detach().clone() for name, p in crops.items()}
        family.tensors, family.weights = (tensors, {}) if adapter_paths else ({}, tensors)
        family.losses = tuple(lesson.mean_losses_of_sampled_choices(course.step))
        program.note(steps=course.step, best=course.best, loss=course.curve, held_out=course.held_out)

    def _make_objective(self, model: nn.Module, ctx: Context) -> Tokens | ClassificationObjective:
        rows, labels = ctx.rows(self.data), ctx.labels(self.data)
        if labels is None:
            refuse_unlabelled_images(rows, self.data.name)
            return Tokens(model, rows, learned=ctx.loss_mask(self.data))
        return ClassificationObjective(model, rows, ctx.prompts(self.data), labels, self.data.name)

    def _activate_middle_and_measure_validation_loss(
        self, family: Family, sampler: ChoiceSampler, ctx: Context
    ) -> float:
        model = family.program.model
        sampler.activate(sampler.space.choice("middle"))
        if family.norms is not None:
            recalibrate_batch_norms(model, family.norms)
        validation = self.held_out
        assert validation is not None, "judged by no rows"
        rows, labels = ctx.rows(validation), ctx.labels(validation)
        if labels is None:
            nats, tokens = total_nll(model, rows, ctx.loss_mask(validation))
            return nats / tokens
        return classification_loss_and_accuracy(model, rows, ctx.prompts(validation), labels, validation.name)[0]
