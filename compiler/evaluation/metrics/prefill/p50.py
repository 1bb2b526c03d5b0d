"""How long it takes to read a prompt, in the median."""

from ...wait_times import Prefill


class P50(Prefill):
    """How long it takes to read a prompt, in the median.

    One forward over a prompt of random tokens that fills the KV cache, batch 1, after warm-up runs, repeated;
    in milliseconds. It is the wait before the first token.

    Source: own.
    Example: prefill.p50 <= 0.75 * base
    """

    percent = 50
