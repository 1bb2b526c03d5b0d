"""Print what a client's state takes on the wire, method by method: as arrays, and as Flower's protocol buffers.

    python -m bench.wire

Shapes are those of all-MiniLM-L6-v2 with a head of two classes and of SmolLM2-135M, every layer, tied interventions;
a message has the settings that a reply has. TLS and gRPC add to it; nothing is compressed.
"""

from math import prod

import numpy as np

MODELS = {
    "MiniLM": (6, 384, 384, {"classifier.weight": (2, 384), "classifier.bias": (2,)}),
    "SmolLM2-135M": (30, 576, 192, {}),
}
METHODS = {
    "LoReFT, rank 1 (FedReFT)": ("reft", 1),
    "LoReFT, rank 4 (FedReFT)": ("reft", 4),
    "LoRA on q and v, rank 1 (FedIT)": ("AB", 1),
    "LoRA on q and v, rank 8 (FedIT)": ("AB", 8),
    "LoRA on q and v, rank 8 (FFA)": ("B", 8),
}
REPLY = dict.fromkeys(("examples", "loss", "before", "mix", "accuracy", "seconds"), 0.5) | {"number": 1}


def protobuf_bytes(arrays, config) -> int:
    """Bytes of the content of a message as a protocol buffer."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
    from flwr.common.serde import recorddict_to_proto

    content = RecordDict({"config": ConfigRecord(dict(config))})
    for name, state in arrays.items():
        content[name] = ArrayRecord.from_array_dict({n: Array(np.ascontiguousarray(a)) for n, a in state.items()})
    return recorddict_to_proto(content).ByteSize()


def state_shapes(model: str, method: str) -> dict[str, tuple[int, ...]]:
    """Of a whole state."""
    layers, width, values, made = MODELS[model]
    parts, rank = METHODS[method]
    made = dict(made)
    for layer in range(layers):
        path = f"model.layers.{layer}"
        if parts == "reft":
            inner = f"{path}.reft.functions.both"
            made |= {f"{inner}.R": (rank, width), f"{inner}.W": (rank, width), f"{inner}.b": (rank,)}
            continue
        for name, out in (("q_proj", width), ("v_proj", values)):
            both = {"A": (rank, width), "B": (out, rank)}
            made |= {f"{path}.self_attn.{name}.{side}": both[side] for side in parts}
    return made


def main() -> None:
    print("| model | what is sent | numbers | KiB as arrays | KiB on the wire |\n|---|---|---|---|---|")
    for model in MODELS:
        for method in METHODS:
            full = state_shapes(model, method)
            count = sum(map(prod, full.values()))
            bytes_ = protobuf_bytes({"own": {n: np.zeros(s, np.float32) for n, s in full.items()}}, REPLY)
            print(f"| {model} | {method} | {count:,} | {4 * count / 1024:.1f} | {bytes_ / 1024:.1f} |")


if __name__ == "__main__":
    main()
