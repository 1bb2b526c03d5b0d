"""Give every linear module the number format, and the zeros, that lose least under one budget."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import ClassVar

import torch

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning import shrink
from ...compiler.analysis.planning.cost import token_or_image_count
from ...compiler.analysis.planning.selection import inner_parts
from ...compiler.core.device import memory_budget_bytes_on
from ...compiler.core.events import Said
from ...compiler.core.journal import Journal
from ...compiler.core.quantity import count_text, significant_digits
from ...compiler.evaluation import reference
from ...compiler.ir.layers.linear import weight_of
from ...compiler.ir.layers.number_formats import BY_NAME, MixedFormat
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, Pass, param
from ...compiler.transforms.editing.rewrite import Rewriter
from ...compiler.transforms.lowering import choice, mixed, prediction_error
from ...compiler.transforms.lowering.contenders import EAGER
from ...compiler.transforms.lowering.mixed import Allocation, Allocator, Option, Packer
from ...compiler.transforms.lowering.speed import race_kernels_and_torch
from ...compiler.transforms.search.layerwise import stages
from ...compiler.transforms.search.prefix import Prefix
from ...compiler.transforms.search.solving import estimate_layerwise_effort
from ...dsl.checker.skeleton import Part, Skeleton
from ...dsl.checker.values import DataRef, Ratio, Selector
from ...dsl.syntax.diagnostics import Fault

over_budget = Fault("over-budget", "The cheapest format of every module costs more than a recipe allows.", exit="gate")
ROWS = 8  # that losses are measured on
GROUPS = (32, 64)  # of four bits


class Mixed(Pass):
    """Give every linear module the number format, and the zeros, that lose least under one budget.

    For each module and each of `formats`, sparse ones with each share of `zeros`, two things are measured: how far the
    model's predictions on `data` move if this module alone changes, and what it costs, in bytes exactly or in seconds
    by a race of kernels on this machine. A knapsack over all modules takes the least sum of losses within `keep`. As
    modules interact, losses are measured again around the solution, all else as it has it, and the knapsack is solved
    again, until predictions move no less. Four bits are GPTQ's, in groups of 32 and 64, zeros Wanda's; nothing is
    trained. Losses are measured on the first eight rows of `data`; a killed run goes on at the module where it was.

    Source: own. Single effects as in AutoScheme (Intel, 2025) and ModelOpt's `auto_quantize`, which choose bits alone;
    sensitivity by divergence (Dong et al. 2019, HAWQ, arXiv 1905.03696); zeros: Wanda (Sun et al. 2023, arXiv
    2306.11695); four bits: GPTQ (Frantar et al. 2022, arXiv 2210.17323).
    Example: cpu = lower.mixed(keep: 20% of bytes, data: calib)
    """

    keeps = Lossy()
    acts_on = "linear"
    everywhere = True
    extra: ClassVar[str] = "search"
    requires: ClassVar[tuple[str, ...]] = ("scipy",)
    determinism = "deterministic"
    foreseeable = False
    makes = ("packed weights",)
    after = {"changes: weights": "packed weights can't be changed, cut or trained"}

    keep: Ratio = param(
        "Share of the modules' bytes, or of the time that torch takes for them, that is left.",
        of=("bytes", "latency"),
        gt=0,
        lt=1,
    )
    data: DataRef = param("Rows that losses are measured on.")
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    formats: list[MixedFormat] = param(
        "Formats to choose from.",
        default=("dense_bf16", "dense_int8_int16", "dense_int8", "dense_int4", "sparse_int8"),
        least=1,
        distinct=True,
    )
    zeros: list[Ratio] = param(
        "Shares of zeros to try with each sparse format.",
        least=1,
        of=("weights",),
        default=(Ratio(0.5), Ratio(0.65)),
        gt=0,
        lt=1,
    )

    def run(self, program: Program, ctx: Context) -> None:
        sites, rows = self.kernel_sites_by_path_or_reject(program), ctx.rows(self.data)
        options = {path: self.options_of_site(site) for path, site in sites.items()}
        packer = Packer({path: program.model.get_submodule(path) for path in sites})
        chosen_parts = [part for part in self._parts(skeleton_of(program)) if part.path in sites]
        packer.observe_inputs_and_quantize(program, stages(program, chosen_parts), rows, options)
        rows = rows[:ROWS]
        costs, budget = self.measure_costs_and_budget(packer, options, ctx)
        if sum(min(costs[path]) for path in sites) > budget:
            share = sum(min(costs[path]) for path in sites) / budget * self.keep.value
            raise over_budget(f"the cheapest formats keep {share:.1%} of {self.keep.of}", help="keep more").rejection()
        before = prediction_error.OutputsBefore.record_on_disk(program, ctx, rows)

        def loss() -> float:
            return reference.mean_kl_divergence(program.model, rows, before.reference, "divergence")

        journal = Journal(ctx.workdir / "losses.jsonl")
        chosen, history = Allocator(
            program.model,
            *(options, costs, budget, packer.pack, loss, journal.get_or_compute),
            lambda: Prefix(program, memory_budget_bytes_on(ctx.settings.device, ctx.settings.max_memory)),
        ).allocate_and_list_round_losses()
        with Rewriter(program) as rewrite:
            for path, option in ctx.each(list(chosen.items()), "packing", len(chosen)):
                rewrite.swap_module(path, packer.pack(path, option))
        prediction_error.delete_original_outputs(ctx.workdir)
        self._report_and_note(program, ctx, chosen, history)

    def _parts(self, skeleton: Skeleton) -> tuple[Part, ...]:
        return inner_parts(skeleton, self.on)

    def kernel_sites_by_path_or_reject(self, program: Program) -> dict[str, choice.Site]:
        """Modules that can run a kernel."""
        paths = [part.path for part in self._parts(skeleton_of(program))]
        unsuitable = choice.no_kernel_reasons_from_run(program, paths)
        sites = {
            p: choice.linear_site_or_reject_non_finite(p, program.model.get_submodule(p))
            for p in paths
            if p not in unsuitable
        }
        if not sites:
            raise choice.nothing_lowered("no linear module can run a kernel", help="select others by `on:`").rejection()
        return sites

    def options_of_site(self, site: choice.Site) -> list[Option]:
        """Options of a module: the kernels that take its shape."""
        options = []
        for name in self.formats:
            kernel = BY_NAME[name].kernel
            if not choice.usable_kernels(site, name)[0]:
                continue
            if BY_NAME[name].skips:
                options += [Option(kernel, ratio.value) for ratio in self.zeros]
            elif BY_NAME[name].grouped:
                groups = [group for group in GROUPS if site.case.k % group == 0] or [0]
                options += [Option(kernel, group=group) for group in groups]
            else:
                options.append(Option(kernel))
        return options

    def measure_costs_and_budget(
        self, packer: Packer, options_by_path: Mapping[str, list[Option]], ctx: Context
    ) -> tuple[dict[str, list[float]], float]:
        """Cost of every option of every module, and the budget, in bytes or seconds."""
        costs: dict[str, list[float]] = {}
        total, seconds = 0.0, {}
        for path in ctx.each(list(options_by_path), "costs", len(options_by_path)):
            weight = weight_of(packer.modules[path])
            if self.keep.of == "bytes":
                total += weight.nbytes
                costs[path] = [float(packer.pack(path, option).packed.numel()) for option in options_by_path[path]]
                continue
            shape = (*weight.shape, weight.dtype, tuple(options_by_path[path]))
            if shape not in seconds:
                seconds[shape] = _race_options_and_torch(weight, options_by_path[path], packer.norms[path])
            costs[path], eager = seconds[shape]
            total += eager
        return costs, total * self.keep.value

    def _report_and_note(
        self, program: Program, ctx: Context, chosen_options: Allocation, divergence_history: list[float]
    ) -> None:
        """Say and note what each module got."""
        counts: dict[Option, int] = {}
        for option in chosen_options.values():
            counts[option] = counts.get(option, 0) + 1
        for option, number in sorted(counts.items(), key=lambda entry: -entry[1]):
            detail = (
                f", {option.zeros:.0%} zeros" if option.zeros else f", group {option.group}" if option.group else ""
            )
            ctx.emit_event(Said(f"{count_text(number, 'module')} on {choice.FORMAT_OF[option.kernel]}{detail}"))
        ctx.emit_event(
            Said("predictions moved by " + ", then ".join(map(significant_digits, divergence_history)) + " nats")
        )
        program.note(
            allocated={
                p: {"format": choice.FORMAT_OF[o.kernel], "zeros": o.zeros, "group": o.group}
                for p, o in chosen_options.items()
            },
            divergence=divergence_history,
        )

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes, of packed weights; of a budget of time those of int8."""
        width = 2 if skeleton.facts.get("dtype") in ("bfloat16", "float16") else 4
        share = self.keep.value * width if self.keep.of == "bytes" else 1.0
        chosen = self._parts(skeleton)
        numbers = {p.path: prod(shape) for p in chosen for name, shape in p.tensors if name == "weight"}
        return shrink.with_packed_modules(skeleton, {path: round(share * count) for path, count in numbers.items()})

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """A forward for each option of each module, twice: around the model and around the solution; and all rows once,
        for norms and GPTQ."""
        chosen, rows = self._parts(skeleton), ctx.rows(self.data)
        observed = estimate_layerwise_effort(skeleton, chosen, rows, "uniform")
        formats = [BY_NAME[name] for name in self.formats]
        options = sum(len(self.zeros) if f.skips else len(GROUPS) if f.grouped else 1 for f in formats)
        numbers = sum(prod(shape) for part in chosen for name, shape in part.tensors if name == "weight")
        tokens = observed.tokens + 2 * options * len(chosen) * token_or_image_count(rows[:ROWS])
        return replace(observed, tokens=tokens, work={"pack": 3.0 * options * numbers})

    def reads_clock(self) -> bool:
        return self.keep.of == "latency"


def _race_options_and_torch(
    weight: torch.Tensor, options: list[Option], input_norms: torch.Tensor
) -> tuple[list[float], float]:
    """Seconds of each option, and of torch, on one row."""
    dense = [option for option in options if not option.zeros]
    times = race_kernels_and_torch(weight, list(dict.fromkeys(option.kernel for option in dense)), 1, "native")
    seconds = {option: times[option.kernel] for option in dense}
    for option in (o for o in options if o.zeros):
        sparse = race_kernels_and_torch(
            mixed.wanda_pruned_weight(weight, option.zeros, input_norms), [option.kernel], 1, "native"
        )
        seconds[option] = sparse[option.kernel] / sparse[EAGER] * times[EAGER]  # seconds of two races can't be compared
    return [seconds[option] for option in options], times[EAGER]
