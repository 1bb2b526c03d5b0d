"""Whether this machine is the one that a profile describes, and running as it says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ....dsl.checker.recipe import Invocation
from ....dsl.checker.values import ProfileRef, references_in
from ....dsl.syntax.diagnostics import Fault
from ...core.error_location import diagnostics_located_at

if TYPE_CHECKING:
    from ...plugin.context import Context

another_machine = Fault(
    "another-machine",
    "A step decides by what it measures on a machine, and this is another one.\n\n"
    "Compile on a machine with the instruction set that the profile names, or name one that this machine has.",
    exit="environment",
)


def profile_named_by(call: Invocation) -> str | None:
    """The profile that a step's arguments name."""
    refs = references_in(call.args, ProfileRef)
    return refs[0].name if refs else None


def refuse_other_machine_profiles(calls: Sequence[Invocation], ctx: "Context") -> None:
    """Reject steps that name a profile which this machine is not, unless they decide for other machines, too."""
    for call in calls:
        word = ctx.registry.vocabulary.word("pass", call.word)
        if word is not None and word.facts.get("elsewhere"):
            continue
        reason = missing_isa_reason(profile_named_by(call), ctx)
        if reason:
            with diagnostics_located_at(call.span):
                raise another_machine(
                    reason, help="compile on such a machine, or leave the profile out to measure on this one"
                ).rejection()


def missing_isa_reason(profile_name: str | None, ctx: "Context") -> str:
    """Why this machine is not the one that a profile describes; "" where it is."""
    if profile_name is None:
        return ""
    from ....kernels.levels import NAMES, active_level, runs_kernels_of_level
    from ...core.environment import cpu_flags

    isa = str(ctx.recipe.profiles[profile_name].get("isa", "portable"))
    current = active_level()
    if isa not in NAMES:  # finer than the kernels' levels: amx_bf16, avx512_bf16
        has = isa in cpu_flags()
        return "" if has else f"profile {profile_name} asks for {isa}, which this machine lacks"
    if not runs_kernels_of_level(current, isa):
        return f"profile {profile_name} asks for {isa}, this machine has {current}"
    return ""


@contextmanager
def torch_threads_of_profile(profile_name: str | None, ctx: "Context") -> Iterator[None]:
    """Run with the thread count of a profile."""
    threads = ctx.recipe.profiles[profile_name].get("threads") if profile_name else None
    if not threads:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(int(threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)
