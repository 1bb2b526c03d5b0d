"""What the engine would refuse, from a config alone: a model's graph is read over numbers that stand in for weights.

Large weights are one row, repeated without taking memory; what decides a refusal (norms, tables of positions, sinks)
is small, and has numbers of its own. The graph is captured on the meta device, as skeletons are.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ...dsl.diagnostics import Reject
from ...kernels.codes import GROUPS
from ..capture.capture import capture
from ..checkpoints.blank import nothing_stored, parameters_on_meta
from ..checkpoints.origin import Origin
from ..planning.keys import versions
from ..store.cache import Cache
from ..store.closure import fingerprint
from ..words.context import Context
from .linears import Numbers
from .reader import Reader
from .refusal import cannot_run_natively

_OWN = 1 << 16  # numbers of a tensor that gets its own; a larger one gets a row


def foresee(ctx: Context, numbers: Numbers) -> None:
    """Raise Reject where the engine would refuse the recipe's model; what was found is kept by its config."""
    if numbers.group not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        raise Reject(
            cannot_run_natively(
                f"no kernel has groups of {numbers.group} inputs", help=f"`group:` may be one of {groups}"
            )
        )
    weights = numbers.weights
    store = Cache(ctx.settings.cache_dir)
    parts = {
        "foreseen": "native",
        "model": ctx.origin.fingerprint,
        "dtype": ctx.origin.dtype,
        "weights": weights,
        "source": fingerprint(Path(__file__)),
        "libraries": versions(),
    }
    known = store.value(parts)
    if known is None:
        refused = foreseen(ctx.origin, weights)
        known = [[d.message, d.help] for d in refused.diagnostics] if refused else []
        store.keep(parts, known)
    if known:
        raise Reject(*(cannot_run_natively(message, help=help) for message, help in known))


def foreseen(origin: Origin, weights: str) -> Reject | None:
    """Why the engine would refuse a model whatever its weights are; None where nothing says that it would."""
    with nothing_stored():
        program = capture(origin.build())
    try:
        Reader(program, weights, stand_in(origin)).read()
    except Reject as refused:
        return refused
    return None


def stand_in(origin: Origin) -> nn.Module:
    """The model with random numbers on the CPU that take no room; tensors that are one stay one."""
    with parameters_on_meta():
        model = origin.build().eval()
    generator, known = torch.Generator().manual_seed(0), dict[int, nn.Parameter]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(_numbers(parameter, generator), requires_grad=False)
                module._parameters[name] = known[id(parameter)]
    return model


def _numbers(bare: Tensor, generator: torch.Generator) -> Tensor:
    own = bare.numel() <= _OWN
    found = torch.rand(bare.shape if own else bare.shape[-1:], generator=generator).add(0.5).to(bare.dtype)
    return found if own else found.expand(bare.shape)
