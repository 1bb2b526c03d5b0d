"""The steps of the native engine: their fields in a plan, and the structures in which C++ reads them."""

import ctypes

import torch

VERSION = 1
MAX_HEAD = 512  # dimensions of a head
MAX_STATES = 4096  # of a channel
MAX_EXPERTS = 4096  # of a router
MAX_BIDIRECTIONAL = 8192  # tokens of a text that attention sees whole: all of its rows are in memory at once


def _fields(text: str) -> dict[str, str]:
    """Fields of an op, written `name:kind`; where a field is one of some words, they stand between bars."""
    return {name: kind.replace("|", " ") for name, kind in (field.split(":") for field in text.split())}


# Fields of every op: "r" a register that it reads, "r?" one or null, "R" some of them, "w" a weight, "w?" one or null,
# "W" several, "+" an int > 0, "0" an int >= 0, "+?" one > 0 or null, "f" a number, "f?" one > 0 or null,
# "b" true or false.
STEPS: dict[str, dict[str, str]] = {
    "embedding": _fields("table:w"),
    "positions": _fields("table:w"),
    "norm": _fields("x:r kind:rms|layer weight:w? bias:w? eps:f group:+"),
    "linear": _fields("x:r weight:w bias:w?"),
    "columns": _fields("x:r start:0 block:+ stride:0 count:+"),
    "join": _fields("from:R"),
    "rotary": _fields("x:r heads:+ head_dim:+ rotary_dim:+ start:0 inverse_frequencies:w scale:f interleaved:b"),
    "attention": _fields(
        "q:r k:r v:r slot:0 heads:+ kv_heads:+ head_dim:+ value_dim:+ scale:f softcap:f? window:+? sinks:w? "
        "slopes:w? whole:b distances:w?"
    ),
    # An encoder keeps keys and values of a source in a slot of its own, and writes no register; the decoder behind it
    # reads them: of all tokens of the source, whatever the position.
    "remember": _fields("k:r v:r slot:0 kv_heads:+ head_dim:+ value_dim:+"),
    "recall": _fields("q:r slot:0 heads:+ kv_heads:+ head_dim:+ value_dim:+ scale:f softcap:f?"),
    "act": _fields(
        "x:r kind:silu|gelu|gelu_tanh|relu|relu2|sigmoid|tanh|quick_gelu|softplus|square|sqrt|reciprocal|exp"
    ),
    "add": _fields("x:r y:r"),
    "mul": _fields("x:r y:r"),
    "scale": _fields("x:r by:f"),
    "shift": _fields("x:r by:f"),
    "softcap": _fields("x:r at:f"),
    "clip": _fields("x:r least:f most:f"),
    # square * x**2 above zero, exponential * (exp(x) - 1 - x) below, and linear * x everywhere
    "xielu": _fields("x:r square:f exponential:f linear:f"),
    "mean": _fields("x:r group:+"),
    "add_vector": _fields("x:r vector:w"),
    "mul_vector": _fields("x:r vector:w"),
    # Mixtures of experts: `route` gives the weights of `count` experts, then their numbers; `experts` what those
    # make of x, side by side or as their weighted sum. A router of kind "near" takes one expert after another, by its
    # share among those whose scores are less than `eps` of their size below it; one of kind "logits" chooses by scores
    # themselves, and weighs by their logistic function.
    "scores": _fields("x:r weight:w bias:w?"),
    "route": _fields(
        "x:r kind:softmax|sigmoid|near|logits bias:w? count:+ groups:+ kept:+ judges:+ normal:b eps:f scale:f"
    ),
    "experts": _fields("x:r chosen:r weights:W biases:w? summed:b"),
    # These keep a state of each sequence.
    "convolve": _fields("x:r filters:w bias:w? silu:b"),
    "ssd": _fields(
        "x:r dt:r b:r c:r heads:+ head_dim:+ groups:+ states:+ rates:w skip:w? bias:w? softplus:b least:f most:f?"
    ),
    "selective": _fields("x:r dt:r b:r c:r gate:r? states:+ rates:w skip:w? bias:w? softplus:b"),
    # The gated delta rule: x the values, `decay` logarithms for each head or (`by_channel`) each number of its keys.
    "delta": _fields("x:r decay:r k:r q:r beta:r heads:+ groups:+ head_dim:+ value_dim:+ by_channel:b"),
}
# Fields that plans of earlier versions do not have, and what they mean by that.
LATER = {"slopes": None, "whole": False, "distances": None}
SILENT = ("remember",)  # write no register
STATEFUL = ("convolve", "ssd", "selective", "delta")
# As plan.h numbers them; `angles` and `place` are made here.
OPS = (
    *"""
    embedding positions angles norm linear columns place rotary attention remember recall act add mul scale
    shift softcap clip xielu mean add_vector mul_vector scores route experts
    """.split(),
    *STATEFUL,
)
FORMS = {torch.float32: 16, torch.bfloat16: 17}
KV_NUMBERS = ("bf16", "int8")  # of keys and values in a slot; slots without `numbers` have the first


class Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in """
                op kind to x y z c gate weight bias skip slot heads kv_heads head_dim value_dim window
                start block stride count group rotary_dim interleaved state states
                """.split()
        ),
        *((name, ctypes.c_float) for name in ("number", "scale", "softcap", "most")),
    ]


class Weight(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "n", "k")),
        *((name, ctypes.c_int32) for name in ("form", "zero")),
    ]


class Slot(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kv_heads", "head_dim", "value_dim", "numbers")]


class Plan(ctypes.Structure):
    """Of a decoder `encoder` points to the plan whose keys and values it recalls; that one's `logits` are -1."""


Plan._fields_ = [
    ("steps", ctypes.POINTER(Step)),
    ("widths", ctypes.POINTER(ctypes.c_int32)),
    ("weights", ctypes.POINTER(Weight)),
    ("slots", ctypes.POINTER(Slot)),
    *(
        (name, ctypes.c_int32)
        for name in """
            step_count register_count weight_count slot_count logits level threads sequences batch_invariant
            """.split()
    ),
    ("zero", ctypes.c_int32),
    ("context", ctypes.c_int64),
    ("encoder", ctypes.POINTER(Plan)),
]
