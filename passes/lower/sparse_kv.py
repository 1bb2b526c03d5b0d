"""Decode over a cache of keys and values that forgets what is small."""

import math
from functools import partial
from typing import NoReturn

from torch import fx

from ...compiler.core.quantity import significant_digits
from ...compiler.ir.layers import leaves
from ...compiler.ir.layers.linear import cpu_only
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Lossy, Pass, param
from ...compiler.transforms.lowering import decoding_error
from ...compiler.transforms.lowering.attentions import (
    attention_calls,
    exclusive_cache_update,
    query_and_key_heads,
    replace_attention_call,
    rewrite_attentions_and_list_refusals,
    unsupported_option_reason,
)
from ...compiler.transforms.lowering.choice import lowering_inaccurate
from ...compiler.transforms.lowering.prediction_error import Accuracy, load_or_generate_rows
from ...dsl.checker.values import DataRef, Ratio, Selector
from ...dsl.syntax.diagnostics import Fault
from ...kernels.cache import TOKENS
from ...kernels.ops import KERNELS

incompatible_window = Fault("unfit-window", "A pruned cache is asked for a window that its blocks can't make.")


class SparseKv(Pass):
    """Decode over a cache of keys and values that forgets what is small.

    A prompt attends to itself whole. After that the newest `window` tokens and the first `sinks` are kept
    as they came; every 32 tokens that leave the window keep, of each head, only the share of keys and of
    values that is largest in magnitude, packed for our attention kernel, and the cache goes on growing.
    Works in `generate`, with sequences padded on the left, with beams; training and forwards without a
    cache are as before. A cache of fixed size, and generation with an assistant model, are refused when
    they run.

    What it costs shows only while decoding, so that is where it is measured: rows of `data` are read to the
    middle, and the rest is fed token by token. Pays for long contexts; keys suffer sooner than values.

    Source: sparse attention of SparAMX (AbouElhamayed et al. 2025, arXiv 2502.12444), there over
    a frozen cache; blocks, window, sinks and growing: own; sinks after Xiao et al. 2023 (arXiv 2309.17453).
    Example: kv = lower.sparse_kv(keep: 50%, window: 64)
    """

    keeps = Lossy()
    acts_on = "branches"
    makes = ("pruned caches",)
    determinism = "deterministic"
    after = {"lower.group_queries": "it exchanges the attention that a pruned cache has replaced"}

    keep: Ratio = param("Share of the numbers of a block that stays.", gt=0, le=1)
    keys: Ratio | None = param("The same of keys, where they are to keep another share.", default=None)
    values: Ratio | None = param("The same of values.", default=None)
    window: int = param(
        "Newest tokens that stay whole, a multiple of 32.", default=64, ge=32, multiple=32, unit="tokens"
    )
    sinks: int = param("First tokens that stay whole, rounded up to 32.", default=32, ge=0, unit="tokens")
    on: Selector | None = param("Which attention modules; all where it is left out.", default=None)
    data: DataRef | None = param(
        "Rows that accuracy is measured on; unless given, 32 that the model itself writes.", default=None
    )
    divergence: float = param("Nats by which predictions may move on average while decoding.", default=0.1, ge=0)

    def run(self, program: Program, ctx: Context) -> None:
        if self.window % TOKENS:
            multiple = max(TOKENS, round(self.window / TOKENS) * TOKENS)
            raise incompatible_window(
                f"`window: {self.window}` is no multiple of {TOKENS}", help=f"`window: {multiple}`"
            ).rejection()
        if ctx.settings.device != "cpu":
            raise cpu_only(
                f"the kernel runs on the CPU, this compile is on {ctx.settings.device}",
                help="compile with --device cpu",
            ).rejection()
        rows = load_or_generate_rows(program, ctx, self.data)
        before = (
            None
            if rows is None
            else decoding_error.OutputsBefore.record_by_decoding(program.model, rows, ctx, self.window)
        )
        chosen = attention_calls(program, self.on)
        left = rewrite_attentions_and_list_refusals(
            program,
            chosen,
            _unsupported_reason_or_empty,
            partial(_replace_by_packed_attention, cache_settings=self._cache_settings()),
        )
        cost = None if before is None else before.compare_to(program.model, ctx)
        if cost is not None and not cost.divergence <= self.divergence:
            self._raise_inaccurate(cost, len(chosen) - len(left))
        program.note(
            pruned=[a.site for a in chosen if a.site not in left],
            unchanged=left,
            **self._cache_settings(),
            accuracy=None if cost is None else cost.to_json(),
        )

    def _raise_inaccurate(self, accuracy: Accuracy, pruned_count: int) -> NoReturn:
        facts, (before, after) = self._cache_settings(), accuracy.perplexity or (math.nan, math.nan)
        raise lowering_inaccurate(
            f"predictions moved by {significant_digits(accuracy.divergence)} nats while decoding, at most "
            f"{significant_digits(self.divergence)} are allowed, perplexity {significant_digits(before)} became "
            f"{significant_digits(after)}",
            help="keep more, of keys first, or make the window longer",
            note=f"the caches of {pruned_count} attention modules keep {facts['keep_keys']:.0%} of keys and "
            f"{facts['keep_values']:.0%} of values",
        ).rejection()

    def _cache_settings(self) -> dict[str, float | int]:
        keep = {
            name: float((override or self.keep).value)
            for name, override in (("keep_keys", self.keys), ("keep_values", self.values))
        }
        return {**keep, "window": self.window, "sinks": self.sinks}


def _unsupported_reason_or_empty(attention_node: fx.Node) -> str:
    (queries, keys), d = query_and_key_heads(attention_node), attention_node.args[1].meta["shape"][-1]
    if unsupported_option_reason(attention_node):
        return unsupported_option_reason(attention_node)
    if attention_node.kwargs.get("sliding_window"):
        return f"it sees the newest {attention_node.kwargs['sliding_window']} tokens only"
    if exclusive_cache_update(attention_node) is None:
        return "it attends to something else than its cache"
    if attention_node.args[3].meta["shape"][-1] != d:
        return f"its keys have {d} dimensions and its values {attention_node.args[3].meta['shape'][-1]}"
    return KERNELS["sparse_attention"].unsupported_reason(queries, keys, d)


def _replace_by_packed_attention(
    graph: fx.Graph, attention_node: fx.Node, cache_settings: dict[str, float | int]
) -> None:
    update = exclusive_cache_update(attention_node)
    assert update is not None, f"{attention_node.name} was refused"
    cache, k, v, slot = update.args
    module, q, _, _, mask = attention_node.args
    replace_attention_call(
        graph, attention_node, leaves.packed_attention, (module, q, k, v, mask, cache, slot), dict(cache_settings)
    )
    for user in list(update.users):
        graph.erase_node(user)
    graph.erase_node(update)
