"""Check of the engine's support, from a config alone: a model's graph is read over numbers that stand in for
weights."""

from pathlib import Path

from ....dsl.syntax.diagnostics import Reject
from ....kernels.codes import GROUPS
from ...analysis.planning.keys import library_versions
from ...core.cache import Cache
from ...core.source_closure import import_closure_sha256
from ...ir.capture.meta_capture import capture_on_meta
from ...models.checkpoints.fake_weights import build_with_random_weights
from ...models.checkpoints.origin import Origin
from ...plugin.context import Context
from .linears import NumberFormats
from .reader import Reader
from .refusal import cannot_run_natively


def refuse_unsupported_model(ctx: Context, formats: NumberFormats) -> None:
    """Raise Reject where the engine would refuse the recipe's model; what was found is kept by its config."""
    if formats.group not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        raise cannot_run_natively(
            f"no kernel has groups of {formats.group} inputs", help=f"`group:` may be one of {groups}"
        ).rejection()
    store = Cache(ctx.settings.cache_dir)
    parts = {
        "foreseen": "native",
        "model": ctx.origin.fingerprint,
        "dtype": ctx.origin.dtype,
        "weights": formats.weights,
        "kv_cache": formats.kv_cache,
        "source": import_closure_sha256(Path(__file__)),
        "libraries": library_versions(),
    }
    known = store.read_value(parts)
    if known is None:
        rejection = engine_rejection(ctx.origin, NumberFormats(formats.weights, kv_cache=formats.kv_cache))
        known = [[d.message, d.help] for d in rejection.diagnostics] if rejection else []
        store.store_value(parts, known)
    if known:
        raise Reject(*(cannot_run_natively(message, help=help) for message, help in known))


def engine_rejection(origin: Origin, formats: NumberFormats) -> Reject | None:
    """Why the engine would refuse a model whatever its weights are; None where nothing says that it would."""
    program = capture_on_meta(origin)
    try:
        Reader(program, formats, build_with_random_weights(origin.build)).build_plan()
    except Reject as rejection:
        return rejection
    return None
