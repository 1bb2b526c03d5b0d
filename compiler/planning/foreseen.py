"""What targets would refuse at the end of a compile, said before it begins."""

from ...dsl.diagnostics import Reject
from ...dsl.recipe import Invocation, Pipeline
from ..report.progress import Warned
from ..words.context import Context
from ..words.kinds import Lossy
from ..words.placing import placed

# What a step acts on that leaves every kind of module in place: no such step makes a model what a target takes.
_STAYING = ("linear", "channels", "heads", "kv_heads", "experts", "ssm_heads", "ssm_channels", "ssm_state")


def refuse_foreseen(pipeline: Pipeline, ctx: Context) -> None:
    """Raise what a target says of the pipeline's model; a warning where a step may take out what it refuses."""
    for emit in pipeline.emits:
        try:
            with placed(emit.call):
                ctx.shelf.make("target", emit.call).foresee(ctx)
        except Reject as refused:
            taking = next((step.name for step in pipeline.steps if _takes_out(step.call, ctx)), None)
            if taking is None:
                raise
            ctx.tell(
                Warned(
                    f"{emit.call.word} would refuse the model as it is: {refused.diagnostics[0].message}; "
                    f"it is refused at the end unless `{taking}` takes that out"
                )
            )


def _takes_out(call: Invocation, ctx: Context) -> bool:
    """Whether a step may remove whole modules."""
    pass_ = ctx.shelf.make("pass", call)
    return isinstance(pass_.keeps, Lossy) and pass_.acts_on not in _STAYING
