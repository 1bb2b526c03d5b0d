"""Median time to prefill a prompt."""

from ...wait_times import Prefill


class P50(Prefill):
    """Median time to prefill a prompt.

    One forward over a prompt of random tokens that fills the KV cache, batch 1, after warm-up runs, repeated;
    in milliseconds. It is the wait before the first token.

    The original is timed as transformers runs it, an artifact as `effc.load` opens it: with effc's kernels.

    Source: own.
    Example: prefill.p50 <= 0.75 * base
    """

    percent = 50
