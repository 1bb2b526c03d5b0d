"""Let linear modules run the native kernel that is fastest for each, or stay as they are."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import ClassVar, Literal

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning import shrink
from ...compiler.analysis.planning.cost import token_or_image_count
from ...compiler.analysis.planning.machine_profile import missing_isa_reason
from ...compiler.analysis.planning.selection import is_inside_layers, linear_parts
from ...compiler.core.events import Said
from ...compiler.core.fingerprint import usable_cpu_count
from ...compiler.core.journal import Journal
from ...compiler.core.quantity import count_text, significant_digits
from ...compiler.inputs.data.generated import Generated
from ...compiler.ir.layers.linear import cpu_only
from ...compiler.ir.layers.number_formats import BY_KERNEL, BY_NAME, FormatName
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, Pass, param
from ...compiler.transforms.editing.rewrite import Rewriter
from ...compiler.transforms.lowering import choice, prediction_error
from ...compiler.transforms.lowering.choice import KernelChoice, Site
from ...compiler.transforms.lowering.racing import bytes_of_cold_copies
from ...compiler.transforms.lowering.speed import (
    ROUNDED,
    SECONDS,
    KernelCase,
    estimate_seconds_by_contender,
    race_kernels_and_torch,
    read_seconds_of_all_cases,
)
from ...compiler.transforms.search.sparsity import no_linear
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef, ProfileRef, Selector
from ...kernels import levels
from ...kernels.packed_sizes import packed_weight_bytes


class SparseCpu(Pass):
    """Let linear modules run the native kernel that is fastest for each, or stay as they are.

    For every shape and sparsity that the modules have, the kernels that may take them race on this machine
    against torch: plain, pre-packed and dynamically quantised, in turn and with weights that no cache
    holds. The fastest kernel wins; where none beats torch the module stays as it is, and the manifest says
    why. Of equals the more exact one wins, and int8 or int4 only where a module's
    outputs stay within `error`. What
    was measured is kept: a build that goes on after a kill decides the same. Two compiles may decide
    differently.

    For another machine, give `timings` measured there, or name its `isa` or profile: then times are
    estimated from bytes and instructions, which tells kernels apart, not their milliseconds. Of ARM (`neon`)
    nothing was measured, so it takes `timings` or a `format`.

    What it costs in accuracy is measured on `data`, the model before against the model after. Where predictions
    move by more than `divergence`, the modules that are furthest off take the fastest kernel of a finer grid,
    as many as it needs. A missed expectation is what that can't mend, and a format asked for by name.

    Zeros come from `sparsify.*`; without any, packing alone is several times as fast as what torch does with
    one row of bfloat16.

    Source: own; the formats as SparAMX has them (AbouElhamayed et al. 2025, arXiv 2502.12444), other kernels.
    Example: cpu = lower.sparse_cpu(on: "*_proj")
    """

    keeps = Lossy()
    acts_on = "linear"
    everywhere = True
    reads = {"timings": ("file",)}
    determinism = "deterministic"
    foreseeable = False
    makes = ("packed weights",)
    after = {"changes: weights": "packed weights can't be changed, cut or trained"}
    elsewhere: ClassVar[bool] = True

    on: Selector | None = param("Linear modules; all where it is left out.", default=None)
    format: Literal["auto"] | FormatName = param("What wins, or one format for all, unmeasured.", default="auto")
    isa: Literal["native", "portable", "avx2", "avx512", "avx512_bf16", "amx", "neon"] = param(
        "Level of instruction sets that the kernels will run at.", default="native"
    )
    machine: ProfileRef | None = param(
        "The machine that it will run on, by its instruction set and threads.", default=None
    )
    timings: str | None = param("File with timings of another machine: a manifest.json written there.", default=None)
    rows: int = param("Rows that the kernels race with: sequences that are decoded together.", default=1, ge=1, le=64)
    error: float = param("Share of its size by which a module's output may be off on int8 or int4.", default=0.03, ge=0)
    data: DataRef | None = param(
        "Rows that accuracy is measured on; unless given, 32 that the model itself writes.", default=None
    )
    divergence: float = param("Nats by which predictions may move on average.", default=0.05, ge=0)

    def run(self, program: Program, ctx: Context) -> None:
        if ctx.settings.device != "cpu":
            raise cpu_only(
                f"kernels run on the CPU, this compile is on {ctx.settings.device}", help="compile with --device cpu"
            ).rejection()
        paths = [part.path for part in linear_parts(skeleton_of(program), self.on)]
        if not paths:
            raise no_linear(
                f"{skeleton_of(program).model_type} has no linear module to lower", help="packed ones stay as they are"
            ).rejection()
        rows = prediction_error.load_or_generate_rows(program, ctx, self.data)
        before = None if rows is None else prediction_error.OutputsBefore.record_on_disk(program, ctx, rows)
        unsuitable = choice.no_kernel_reasons_from_run(program, paths)
        modules = {path: program.model.get_submodule(path) for path in paths}
        sites = [choice.linear_site_or_reject_non_finite(path, module) for path, module in modules.items()]
        samples = choice.sample_inputs_if_rows(program, [p for p in paths if p not in unsuitable], rows)
        able = {s.path: choice.usable_kernels(s, self.format) for s in sites}
        raced_sites = [s for s in sites if s.path not in unsuitable and able[s.path][0]]
        times = self._seconds_by_case_and_contender(
            program, ctx, raced_sites, {s.path: able[s.path][0] for s in raced_sites}
        )
        choices, trials = [], {}
        with Rewriter(program) as rewrite:
            for site in ctx.each(sites, "packing", len(sites)):
                kernels, refusal = able[site.path]
                trial = choice.KernelTrial(site.path, modules.pop(site.path), samples.get(site.path))
                if site.path in unsuitable or not kernels:
                    reason = unsuitable.get(site.path) or refusal or "no kernel is worth a try"
                    choices.append(KernelChoice(site, "", reason, site.bytes, None, {}))
                    continue
                kernel, reason = kernels[0], "as the recipe says"
                if self.format == "auto":
                    kernel, reason = choice.choose_kernel(
                        kernels, times[site.case], trial.relative_output_error, self.error
                    )
                packed = trial.pack_or_reject(kernel) if kernel else None
                size, error = (
                    (packed.packed.numel(), trial.relative_output_error(kernel)) if packed else (site.bytes, None)
                )
                choices.append(KernelChoice(site, kernel, reason, size, error, times.get(site.case, {})))
                if packed:
                    rewrite.swap_module(site.path, packed)
                if kernel in ROUNDED and self.format == "auto":
                    trials[site.path] = trial  # its weight is needed where all together move predictions too far
        cost = None if before is None else self._repack_finer_until_accurate(program, ctx, choices, trials, before)
        self._refuse_or_record_choices(program, ctx, choices, times, cost)

    def _repack_finer_until_accurate(
        self,
        program: Program,
        ctx: Context,
        choices: list[KernelChoice],
        trial_by_path: Mapping[str, choice.KernelTrial],
        outputs_before: prediction_error.OutputsBefore,
    ) -> prediction_error.Accuracy:
        """Accuracy after modules with large errors were given a finer grid, if needed."""
        cost = outputs_before.compare_to(program.model)
        while cost.divergence > self.divergence:
            packed_choices = [c for c in choices if c.site.path in trial_by_path]
            finer = choice.finer_kernels_by_path(packed_choices, 1 - self.divergence / cost.divergence)
            if not finer:
                break
            with Rewriter(program) as rewrite:
                for number, chosen in enumerate(choices):
                    if kernel := finer.get(chosen.site.path):
                        trial = trial_by_path[chosen.site.path]
                        rewrite.swap_module(chosen.site.path, trial.pack_or_reject(kernel))
                        choices[number] = chosen.with_finer_kernel(kernel, trial)
            previous, cost = cost.divergence, outputs_before.compare_to(program.model)
            nats, nats_now = significant_digits(previous), significant_digits(cost.divergence)
            message = f"predictions moved by {nats} nats, now by {nats_now}"
            ctx.emit_event(Said(f"{count_text(len(finer), 'module')} furthest off on finer grids: {message}"))
        return cost

    def _refuse_or_record_choices(
        self,
        program: Program,
        ctx: Context,
        choices: Sequence[KernelChoice],
        seconds_by_case: Mapping[KernelCase, Mapping[str, float]],
        accuracy: prediction_error.Accuracy | None,
    ) -> None:
        """Judge, then say what was decided."""
        if not any(choice.kernel for choice in choices):
            raise choice.nothing_lowered(
                f"all {len(choices)} modules stay as they are: {choices[0].site.path}, {choices[0].reason}",
                help="leave the step out, make zeros first, or ask for a format by name",
            ).rejection()
        if accuracy is not None:
            choice.refuse_inaccurate(accuracy, self.divergence, choices)
        prediction_error.delete_original_outputs(ctx.workdir)
        for sentence in choice.choice_sentences(choices):
            ctx.emit_event(Said(sentence))
        program.note(
            lowered=[c.to_json() for c in choices],
            accuracy=accuracy and accuracy.to_json(),
            times=self._timing_source_text(ctx),
            isa=self._isa(ctx),
            threads=self._threads(ctx),
            timings=[case.to_json() | {"seconds": dict(seconds)} for case, seconds in seconds_by_case.items()],
        )

    # -- times -----------------------------------------------------------------------------------------------

    def _seconds_by_case_and_contender(
        self, program: Program, ctx: Context, sites: Sequence[Site], kernels_by_path: Mapping[str, list[str]]
    ) -> dict[KernelCase, dict[str, float]]:
        """Seconds of each case's contenders, by name."""
        if self.format != "auto":
            return {}
        first = {site.case: site for site in reversed(sites)}
        cases = list(dict.fromkeys(site.case for site in sites))
        if self.timings is not None:
            return read_seconds_of_all_cases(ctx.folder / self.timings, cases)
        isa, threads, times = self._isa(ctx), self._threads(ctx), {}
        journal = Journal(ctx.workdir / "times.jsonl")
        for case in ctx.each(cases, "racing", len(cases)):
            site = first[case]
            weight = choice.weight_of(program.model.get_submodule(site.path))
            if self._can_time_on_this_machine(ctx):
                times[case] = journal.get_or_compute(
                    case.name, partial(race_kernels_and_torch, weight, kernels_by_path[site.path], self.rows, isa)
                )
            else:
                sizes = {kernel: _packed_bytes(kernel, site) for kernel in kernels_by_path[site.path]}
                times[case] = estimate_seconds_by_contender(case, sizes, self.rows, isa, threads)
        return times

    def _isa(self, ctx: Context) -> str:
        declared = ctx.recipe.profiles[self.machine.name].get("isa") if self.machine else None
        if self.isa != "native" or declared is None:
            return self.isa
        return next(n for n in reversed(levels.NAMES) if str(declared).startswith(n))

    def _threads(self, ctx: Context) -> int:
        declared = ctx.recipe.profiles[self.machine.name].get("threads") if self.machine else None
        return int(declared or ctx.settings.threads or 1)

    def _can_time_on_this_machine(self, ctx: Context) -> bool:
        """Whether this machine can tell how fast the kernels will be."""
        isa = self._isa(ctx)
        is_local = (isa == "native" or not levels.level_unavailability_reason(isa)) and self._threads(
            ctx
        ) <= usable_cpu_count()
        return is_local and not missing_isa_reason(self.machine.name if self.machine else None, ctx)

    def _timing_source_text(self, ctx: Context) -> str:
        if self.format != "auto":
            return "none"
        return (
            f"from {self.timings}"
            if self.timings
            else "raced here"
            if self._can_time_on_this_machine(ctx)
            else "estimated"
        )

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes, of packed weights."""
        return shrink.with_packed_modules(skeleton, self._forecast_packed_bytes(skeleton))

    def _forecast_packed_bytes(self, skeleton: Skeleton) -> dict[str, int]:
        """Bytes of each module; where kernels race, those of int8."""
        sizes = {}
        for part in linear_parts(skeleton, self.on):
            zeros = (skeleton.facts.get("zeros") or 0.0) if is_inside_layers(skeleton, part.path) else 0.0
            raced = "sparse_int8" if zeros > 1 / 8 else "dense_int8"
            kernel = BY_NAME[raced if self.format == "auto" else self.format].kernel
            for shape in (shape for name, shape in part.tensors if name == "weight"):
                sizes[part.path] = packed_weight_bytes(kernel, shape[0], prod(shape[1:]), zeros)
        return sizes

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """Predictions before and after, twice each; a race for each shape; weights packed for errors, and once."""
        chosen = linear_parts(skeleton, self.on)
        shapes = [shape for part in chosen for name, shape in part.tensors if name == "weight"]
        races = self.format == "auto" and self.timings is None
        contenders = len(choice.FORMATS) + 3 if races else 0  # and torch's
        race_bytes = contenders * max((bytes_of_cold_copies(4 * prod(s)) for s in shapes), default=0)
        rows = Generated.fitting(ctx.origin)
        read = rows.count * rows.length if self.data is None else token_or_image_count(ctx.rows(self.data))
        tokens = (4 if self.data is not None else 6) * read
        numbers = float(sum(map(prod, shapes)))
        work = {"seconds": SECONDS * contenders * len(set(shapes)), "pack": 2 * numbers}
        if self.format != "auto" and BY_NAME[self.format].grouped:
            work["grid"] = numbers
        return Effort(
            tokens, n_separate=max(race_bytes, sum(self._forecast_packed_bytes(skeleton).values())), work=work
        )

    def reads_clock(self) -> bool:
        return self.format == "auto" and self.timings is None

    def files(self) -> tuple[str, ...]:
        return (self.timings,) if self.timings else ()


def _packed_bytes(kernel: str, site: Site) -> int:
    """Bytes of a packed weight, from its shares of zeros."""
    zeros = site.case.blocks if BY_KERNEL[kernel].skips == "blocks" else site.zeros
    return packed_weight_bytes(kernel, site.case.n, site.case.k, zeros)
