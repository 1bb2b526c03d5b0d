"""Run the scans and convolutions of state-space mixers on effc's kernels."""

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.ir.layers import fast_mixers
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Close, Pass
from ...compiler.transforms.editing.rewrite import Rewriter
from ...dsl.checker.skeleton import Skeleton
from ...dsl.syntax.diagnostics import Diagnostic, Fault
from ...kernels import levels

no_scan = Fault(
    "no-scan",
    "`lower.cpu_scan` found no scan that its kernels know.\n\n"
    "They know those of Mamba and Mamba-2, in whatever model of transformers they occur. Models that only attend "
    "have none, and mixers written elsewhere, or of other kinds, stay as they are.",
)
no_cpu = Fault(
    "no-scan-kernels", "Scans can't be lowered where effc's kernels for the CPU don't run.", exit="environment"
)
already = Fault("scans-are-lowered", "All scans of a model run on effc's kernels already.")


class CpuScan(Pass):
    """Run the scans and convolutions of state-space mixers on effc's kernels.

    On a CPU transformers computes a scan by operations on whole sequences of states, which takes a multiple of
    the time of a mixer's projections. The kernels keep the state in registers and read each input once: cost grows
    with the length and memory does not. While decoding, a whole mixer takes some six calls, and its projections
    read their weights at the speed of memory; norms beside it are one pass. Weights stay as they are, outputs
    within 1e-4, and the checkpoint is the one that it would be without this step: a stock one where shapes allow.
    Gradients go through.

    `effc.load` chooses the kernels by itself for whatever artifact it opens, also one without this step. So this
    step is for what is measured on the way, bounds on latency for instance, and for what later steps run. Plain
    transformers runs the same checkpoint as it always does.

    Source: own; the scans as defined by Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3) and Mamba-2 (Dao and
    Gu 2024, arXiv 2405.21060, section 5).
    Example: fast = lower.cpu_scan()
    """

    keeps = Close(atol=1e-4)
    after = {"changes: branches": "a layer that loses a part gets a graph of its own, which this step has to know"}
    determinism = "deterministic"

    def run(self, program: Program, ctx: Context) -> None:
        if ctx.settings.device != "cpu":
            raise no_cpu(
                f"the kernels run on the CPU, and this compile computes on {ctx.settings.device}",
                help="compile with --device cpu; `effc.load` chooses the kernels wherever it loads",
            ).rejection()
        if levels.load_library() is None:
            raise no_cpu(
                "effc is here without its compiled kernels", help="install a wheel for this platform"
            ).rejection()
        model = program.model
        if not fast_mixers.scan_paths(model):
            raise _none_in(skeleton_of(program)).rejection()
        paths = [
            path for path in fast_mixers.kernel_mixer_paths(model) if not fast_mixers.is_marked_for_kernels(model, path)
        ]
        if not paths:
            raise already("all scans run on the kernels already", help="leave the step out").rejection()
        with Rewriter(program) as rewrite:
            for path in paths:
                rewrite.set_attr(f"{path}.{fast_mixers.MARK}", True)
        fast_mixers.use_mixer_kernels(model, only_marked=True)
        program.note(lowered_scans=paths, level=levels.active_level())

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        if not skeleton.scans and not any(branch.role == "ssm" for branch in skeleton.branches):
            raise _none_in(skeleton).rejection()
        return skeleton


def _none_in(skeleton: Skeleton) -> Diagnostic:
    return no_scan(
        f"{skeleton.model_type} has no scan of Mamba or Mamba-2",
        help="leave the step out; `effc plan` lists what a model has",
    )
