"""Architectures as llama.cpp computes them: what no key of a file says, and what is settled by the name alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp, of which effc writes files.

    interleaved   rotary pairs lie beside each other, not half of what turns apart
    centred       norms subtract the mean, and their epsilon has another key
    scaled        embeddings are multiplied by the root of their size
    before        what a branch reads is normed
    after         what a branch gives is normed
    parallel      both branches read the same: always, never, or where a layer has no `ffn_norm`
    gate          beside `ffn_up`, in front of it in one matrix, or nowhere
    fused         queries, keys and values are one matrix
    norms         of queries and keys: of each head, of all heads together, or none
    biases        of which tensors of a layer there may be some
    headed        the head has a bias
    tied          the head is the table of tokens
    square        heads times their size is the size of the residual stream
    period        of that many layers the last sees all, the others a window; 0: all see all
    factors       of frequencies may be there, one for each
    rotates       which layers rotate, of their number and of whether they see a window
    """

    interleaved: bool = False
    centred: bool = False
    scaled: bool = False
    before: bool = True
    after: bool = False
    parallel: Literal["never", "always", "some"] = "never"
    activation: Literal["silu", "gelu"] = "silu"
    gate: Literal["beside", "fused", "none"] = "beside"
    fused: bool = False
    norms: Literal["", "head", "row"] = ""
    biases: tuple[str, ...] = _QKV
    headed: bool = False
    tied: bool = False
    square: bool = False
    period: int = 0
    factors: bool = False
    rotates: Callable[[int, bool], bool] = lambda number, window: True


_ALL_WEIGHTS = (*_QKV, "attn_output", "attn_norm", "ffn_norm", "ffn_up", "ffn_down")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")

KINDS = {
    "llama": Architecture(interleaved=True, biases=(*_QKV, "attn_output", *_MLP), factors=True),
    "deci": Architecture(interleaved=True, biases=(), factors=True),
    "qwen2": Architecture(square=True),
    "qwen3": Architecture(norms="head"),
    "gemma": Architecture(scaled=True, activation="gelu", biases=(), tied=True),
    "gemma2": Architecture(scaled=True, activation="gelu", biases=(), tied=True, after=True, period=2),
    "gemma3": Architecture(scaled=True, activation="gelu", biases=(), after=True, norms="head", period=6),
    "phi2": Architecture(
        centred=True, parallel="always", activation="gelu", gate="none", biases=_ALL_WEIGHTS, headed=True, square=True
    ),
    "phi3": Architecture(gate="fused", fused=True, biases=(), square=True),
    "stablelm": Architecture(centred=True, parallel="some", biases=(*_QKV, "attn_norm", "ffn_norm"), square=True),
    "glm4": Architecture(interleaved=True, after=True, gate="fused"),
    "granite": Architecture(interleaved=True, biases=(*_QKV, "attn_output", *_MLP), factors=True),
    "olmo2": Architecture(before=False, after=True, norms="row", biases=(), square=True),
    "smollm3": Architecture(interleaved=True, rotates=lambda number, window: (number + 1) % 4 != 0),
    "command-r": Architecture(interleaved=True, centred=True, parallel="always", biases=(), tied=True, square=True),
    "cohere2": Architecture(
        interleaved=True,
        centred=True,
        parallel="always",
        biases=(),
        tied=True,
        square=True,
        period=4,
        rotates=lambda number, window: window,
    ),
    "starcoder2": Architecture(centred=True, activation="gelu", gate="none", biases=_ALL_WEIGHTS, square=True),
}


def default_window_pattern(architecture: Architecture, num_layers: int) -> tuple[bool, ...]:
    """Default pattern of layers with a window, where a file does not state one."""
    return tuple(
        bool(architecture.period) and number % architecture.period < architecture.period - 1
        for number in range(num_layers)
    )
