"""How long it takes to read a prompt, at the slow end (percentile 95)."""

from ...wait_times import Prefill


class P95(Prefill):
    """How long it takes to read a prompt, at the slow end (percentile 95).

    One forward over a prompt of random tokens that fills the KV cache, batch 1, after warm-up runs, repeated;
    in milliseconds. It is the wait before the first token.

    Source: own.
    Example: prefill.p95 <= 0.75 * base
    """

    percent = 95
