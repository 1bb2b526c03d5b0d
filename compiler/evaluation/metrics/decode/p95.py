"""95th percentile of the time to decode one token."""

from ...wait_times import Decode


class P95(Decode):
    """95th percentile of the time to decode one token.

    Greedy decoding with the KV cache after a prompt of random tokens, batch 1, after warm-up steps; one time
    per token, in milliseconds. It is the wait between two tokens.

    The original is timed as transformers runs it, an artifact as `effc.load` opens it: with effc's kernels.

    Source: own.
    Example: decode.p95 <= 0.75 * base
    """

    percent = 95
