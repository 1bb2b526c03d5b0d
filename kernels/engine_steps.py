"""The steps of the native engine: their fields in a plan, and the structures in which C++ reads them."""

import ctypes

import torch

VERSION = 1
MAX_HEAD = 512  # dimensions of a head
MAX_STATES = 4096  # of a channel
MAX_EXPERTS = 4096  # of a router
MAX_BIDIRECTIONAL = 8192  # tokens of a text that attention sees whole: all of its rows are in memory at once
# Fields of every op: "r" a register that it reads, "r?" one or null, "R" some of them, "w" a weight, "w?" one or null,
# "W" several, "+" an int > 0, "0" an int >= 0, "+?" one > 0 or null, "f" a number, "f?" one > 0 or null,
# "b" true or false.
STEPS: dict[str, dict[str, str]] = {
    "embedding": {"table": "w"},
    "positions": {"table": "w"},
    "norm": {"x": "r", "kind": "rms layer", "weight": "w?", "bias": "w?", "eps": "f", "group": "+"},
    "linear": {"x": "r", "weight": "w", "bias": "w?"},
    "columns": {"x": "r", "start": "0", "block": "+", "stride": "0", "count": "+"},
    "join": {"from": "R"},
    "rotary": {
        "x": "r",
        "heads": "+",
        "head_dim": "+",
        "rotary_dim": "+",
        "start": "0",
        "inverse_frequencies": "w",
        "scale": "f",
        "interleaved": "b",
    },
    "attention": {
        "q": "r",
        "k": "r",
        "v": "r",
        "slot": "0",
        "heads": "+",
        "kv_heads": "+",
        "head_dim": "+",
        "value_dim": "+",
        "scale": "f",
        "softcap": "f?",
        "window": "+?",
        "sinks": "w?",
        "slopes": "w?",
        "whole": "b",
        "distances": "w?",
    },
    # An encoder keeps keys and values of a source in a slot of its own, and writes no register; the decoder behind it
    # reads them: of all tokens of the source, whatever the position.
    "remember": {"k": "r", "v": "r", "slot": "0", "kv_heads": "+", "head_dim": "+", "value_dim": "+"},
    "recall": {
        "q": "r",
        "slot": "0",
        "heads": "+",
        "kv_heads": "+",
        "head_dim": "+",
        "value_dim": "+",
        "scale": "f",
        "softcap": "f?",
    },
    "act": {
        "x": "r",
        "kind": "silu gelu gelu_tanh relu relu2 sigmoid tanh quick_gelu softplus square sqrt reciprocal exp",
    },
    "add": {"x": "r", "y": "r"},
    "mul": {"x": "r", "y": "r"},
    "scale": {"x": "r", "by": "f"},
    "shift": {"x": "r", "by": "f"},
    "softcap": {"x": "r", "at": "f"},
    "clip": {"x": "r", "least": "f", "most": "f"},
    # square * x**2 above zero, exponential * (exp(x) - 1 - x) below, and linear * x everywhere
    "xielu": {"x": "r", "square": "f", "exponential": "f", "linear": "f"},
    "mean": {"x": "r", "group": "+"},
    "add_vector": {"x": "r", "vector": "w"},
    "mul_vector": {"x": "r", "vector": "w"},
    # Mixtures of experts: `route` gives the weights of `count` experts, then their numbers; `experts` what those
    # make of x, side by side or as their weighted sum. A router of kind "near" takes one expert after another, by its
    # share among those whose scores are less than `eps` of their size below it; one of kind "logits" chooses by scores
    # themselves, and weighs by their logistic function.
    "scores": {"x": "r", "weight": "w", "bias": "w?"},
    "route": {
        "x": "r",
        "kind": "softmax sigmoid near logits",
        "bias": "w?",
        "count": "+",
        "groups": "+",
        "kept": "+",
        "judges": "+",
        "normal": "b",
        "eps": "f",
        "scale": "f",
    },
    "experts": {"x": "r", "chosen": "r", "weights": "W", "biases": "w?", "summed": "b"},
    # These keep a state of each sequence.
    "convolve": {"x": "r", "filters": "w", "bias": "w?", "silu": "b"},
    "ssd": {
        "x": "r",
        "dt": "r",
        "b": "r",
        "c": "r",
        "heads": "+",
        "head_dim": "+",
        "groups": "+",
        "states": "+",
        "rates": "w",
        "skip": "w?",
        "bias": "w?",
        "softplus": "b",
        "least": "f",
        "most": "f?",
    },
    "selective": {
        "x": "r",
        "dt": "r",
        "b": "r",
        "c": "r",
        "gate": "r?",
        "states": "+",
        "rates": "w",
        "skip": "w?",
        "bias": "w?",
        "softplus": "b",
    },
    # The gated delta rule: x the values, `decay` logarithms for each head or (`by_channel`) each number of its keys.
    "delta": {
        "x": "r",
        "decay": "r",
        "k": "r",
        "q": "r",
        "beta": "r",
        "heads": "+",
        "groups": "+",
        "head_dim": "+",
        "value_dim": "+",
        "by_channel": "b",
    },
}
LATER = {
    "slopes": None,
    "whole": False,
    "distances": None,
}  # fields that plans of earlier versions do not have, and what they mean by that
SILENT = ("remember",)  # write no register
STATEFUL = ("convolve", "ssd", "selective", "delta")
# As plan.h numbers them; `angles` and `place` are made here.
OPS = (
    "embedding",
    "positions",
    "angles",
    "norm",
    "linear",
    "columns",
    "place",
    "rotary",
    "attention",
    "remember",
    "recall",
    "act",
    "add",
    "mul",
    "scale",
    "shift",
    "softcap",
    "clip",
    "xielu",
    "mean",
    "add_vector",
    "mul_vector",
    "scores",
    "route",
    "experts",
    *STATEFUL,
)
FORMS = {torch.float32: 16, torch.bfloat16: 17}
KV_NUMBERS = ("bf16", "int8")  # of keys and values in a slot; slots without `numbers` have the first


class Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "op",
                "kind",
                "to",
                "x",
                "y",
                "z",
                "c",
                "gate",
                "weight",
                "bias",
                "skip",
                "slot",
                "heads",
                "kv_heads",
                "head_dim",
                "value_dim",
                "window",
                "start",
                "block",
                "stride",
                "count",
                "group",
                "rotary_dim",
                "interleaved",
                "state",
                "states",
            )
        ),
        *((name, ctypes.c_float) for name in ("number", "scale", "softcap", "most")),
    ]


class Weight(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("form", ctypes.c_int32),
        ("zero", ctypes.c_int32),
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
        for name in (
            "step_count",
            "register_count",
            "weight_count",
            "slot_count",
            "logits",
            "level",
            "threads",
            "sequences",
            "steady",
        )
    ),
    ("zero", ctypes.c_int32),
    ("context", ctypes.c_int64),
    ("encoder", ctypes.POINTER(Plan)),
]
