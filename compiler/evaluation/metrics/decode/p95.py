"""How long it takes to decode one token, at the slow end (percentile 95)."""

from ...wait_times import Decode


class P95(Decode):
    """How long it takes to decode one token, at the slow end (percentile 95).

    Greedy decoding with the KV cache after a prompt of random tokens, batch 1, after warm-up steps; one time
    per token, in milliseconds. It is the wait between two tokens.

    Source: own.
    Example: decode.p95 <= 0.75 * base
    """

    percent = 95
