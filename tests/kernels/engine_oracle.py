"""What a plan comes to by plain torch operations: no cache, no chunks."""

from collections.abc import Sequence

import torch
from effc.kernels.ops import KERNELS
from effc.kernels.packed import kernel_of
from torch.nn import functional as F

from tests.compiler.runtimes.native.naive import ACTS
from tests.kernels.engine_plans import Built


def wanted_logits(
    built: Built, ids: list[int], source: list[int] | None = None, updates: Sequence = (), adapted: Sequence = ()
) -> torch.Tensor:
    """The logits [tokens, vocabulary] of one sequence, all tokens at once; behind an encoder, of what it reads.

    updates   (x, y, down, up, bias): y += up (down x + bias) in the rows that `adapted` says, by [tokens] bool or all
    """
    rows = torch.tensor(adapted or [True] * len(ids))[:, None]
    encoder = built.plan.get("encoder", {})
    found: dict[int, torch.Tensor] = {SLOTS: built.plan["slots"], SOURCE_SLOTS: encoder.get("slots")}
    kept: dict[int, torch.Tensor] = {SLOTS: encoder.get("slots")}
    for step in encoder["steps"] if source else ():
        if step["op"] == "remember":
            found[KEPT, step["slot"]] = kept[step["k"]], kept[step["v"]]
        else:
            kept[step["to"]] = _BY_OP[step["op"]](step, kept, built.weights, torch.tensor(source))
    for step in built.plan["steps"]:
        found[step["to"]] = _BY_OP[step["op"]](step, found, built.weights, torch.tensor(ids))
        for x, y, down, up, bias in updates:
            if y == step["to"]:
                found[y] = found[y] + rows * ((found[x] @ down.T + (0 if bias is None else bias)) @ up.T)
    return found[built.plan["logits"]]


KEPT = "kept"  # begins the names of what an encoder leaves
SLOTS, SOURCE_SLOTS = "slots", "source slots"


def _embedding(step, found, weights, ids):
    table = weights[step["table"]]
    if table.dtype is torch.uint8:
        table = KERNELS[kernel_of(table)].unpack(table)
    return table.float()[ids]


def _norm(step, found, weights, ids):
    x = found[step["x"]]
    pieces = x.unflatten(-1, (-1, step["group"]))
    middle = pieces.mean(-1, keepdim=True) if step["kind"] == "layer" else 0
    spread = ((pieces - middle) ** 2).mean(-1, keepdim=True)
    y = (pieces - middle) / (spread + step["eps"]).sqrt()
    for name, apply in (("weight", torch.mul), ("bias", torch.add)):
        if step[name] is not None:
            vector = weights[step[name]]
            y = apply(y, vector if len(vector) == step["group"] else vector.view(-1, step["group"]))
    return y.flatten(-2)


def _linear(step, found, weights, ids):
    packed = weights[step["weight"]]
    bias = None if step["bias"] is None else weights[step["bias"]]
    x = found[step["x"]]
    return KERNELS[kernel_of(packed)].reference(x, packed, bias, KERNELS[kernel_of(packed)].unpack(packed).shape[0])


def _columns(step, found, weights, ids):
    x, block = found[step["x"]], step["block"]
    return torch.cat([x[:, step["start"] + i * step["stride"] :][:, :block] for i in range(step["count"])], -1)


def _rotary(step, found, weights, ids):
    heads = found[step["x"]].unflatten(-1, (step["heads"], -1)).clone()
    start, turned = step["start"], step["rotary_dim"]
    angle = torch.arange(len(ids)).float()[:, None, None] * weights[step["inverse_frequencies"]]
    cos, sin = angle.cos() * step["scale"], angle.sin() * step["scale"]
    part = heads[..., start : start + turned]
    a, b = (part[..., ::2], part[..., 1::2]) if step["interleaved"] else part.chunk(2, -1)
    new = (a * cos - b * sin, b * cos + a * sin)
    heads[..., start : start + turned] = torch.stack(new, -1).flatten(-2) if step["interleaved"] else torch.cat(new, -1)
    return heads.flatten(-2)


def _recall(step, found, weights, ids):
    k, v = found[KEPT, step["slot"]]
    found = {"q": found[step["q"]], "k": k, "v": v, SLOTS: found[SOURCE_SLOTS]}
    told = {"q": "q", "k": "k", "v": "v", "window": None, "whole": True, "sinks": None}
    return _attention({**step, **told}, found, weights, ids)


def rounded_to_int8(x: torch.Tensor, group: int) -> torch.Tensor:
    """The numbers that codes of 8 bits stand for, `group` of the last axis by one scale, bfloat16 and rounded up."""
    parts = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    exact = parts.abs().amax(-1, keepdim=True) / 127
    scale = ((exact.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    codes = (parts / scale).nan_to_num().round()
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


def _attention(step, found, weights, ids):
    group = step["heads"] // step["kv_heads"]
    q, k, v = (
        found[step[name]].unflatten(-1, (n, -1)).transpose(0, 1)
        for name, n in (("q", step["heads"]), ("k", step["kv_heads"]), ("v", step["kv_heads"]))
    )
    int8 = found[SLOTS][step["slot"]].get("numbers") == "int8"
    if int8:  # queries and shares keep 16 bits
        k, v = rounded_to_int8(k, 32), rounded_to_int8(v, v.shape[-1])
    else:
        q, k, v = (x.bfloat16().float() for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT * step["scale"]  # [heads, tokens, tokens]
    if step["softcap"]:
        scores = step["softcap"] * (scores / step["softcap"]).tanh()
    back = torch.arange(len(ids))[:, None] - torch.arange(k.shape[1])
    if step.get("distances"):
        near = weights[step["distances"]]
        first = (near.shape[1] - 1) // 2 if step.get("whole") else near.shape[1] - 1
        scores = scores + near[:, (first - back).clamp(0, near.shape[1] - 1)]
    if step.get("slopes"):
        scores = scores - weights[step["slopes"]][:, None, None] * back
    near = back.abs() < (step["window"] or len(ids) + k.shape[1])
    seen = near if step.get("whole") else near & (back >= 0)
    scores = scores.masked_fill(~seen, float("-inf"))
    most = scores.amax(-1, keepdim=True)
    shares = (scores - most).exp()
    total = shares.sum(-1, keepdim=True)
    if step["sinks"]:
        total = total + (weights[step["sinks"]][:, None, None] - most).exp()
    weighted = (shares if int8 else shares.bfloat16().float()) @ v / total  # the values meet rounded weights
    return weighted.transpose(0, 1).flatten(-2)


def _convolve(step, found, weights, ids):
    x, filters = found[step["x"]], weights[step["filters"]]
    seen = F.pad(x, (0, 0, len(filters) - 1, 0))
    y = sum(seen[i : i + len(x)] * row for i, row in enumerate(filters))
    y = y if step["bias"] is None else y + weights[step["bias"]]
    return F.silu(y) if step["silu"] else y


def _time_steps(step, found, weights):
    dt = found[step["dt"]] if step["bias"] is None else found[step["dt"]] + weights[step["bias"]]
    return F.softplus(dt) if step["softplus"] else dt


def _ssd(step, found, weights, ids):
    heads, groups = step["heads"], step["groups"]
    dt = _time_steps(step, found, weights).clamp(step["least"], step["most"])[..., None]  # [t, h, 1]
    x = found[step["x"]].unflatten(-1, (heads, -1))
    b, c = (found[step[key]].unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for key in "bc")
    h, out = torch.zeros(*x.shape[1:], step["states"]), []
    for t in range(len(ids)):
        h = (dt[t] * weights[step["rates"]][:, None]).exp()[..., None] * h + (dt[t] * x[t])[..., None] * b[t][:, None]
        out.append((h * c[t][:, None]).sum(-1))
    skipped = 0 if step["skip"] is None else weights[step["skip"]][:, None] * x
    return (torch.stack(out) + skipped).flatten(1)


def _selective(step, found, weights, ids):
    x, b, c = (found[step[key]] for key in ("x", "b", "c"))
    dt, h, out = _time_steps(step, found, weights), torch.zeros(x.shape[1], step["states"]), []
    for t in range(len(ids)):
        h = (dt[t][:, None] * weights[step["rates"]]).exp() * h + (dt[t] * x[t])[:, None] * b[t]
        out.append(h @ c[t])
    y = torch.stack(out) + (0 if step["skip"] is None else weights[step["skip"]] * x)
    return y if step["gate"] is None else y * F.silu(found[step["gate"]])


def _delta(step, found, weights, ids):
    heads, groups = step["heads"], step["groups"]
    q, k = (found[step[key]].unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for key in "qk")
    v, decay = (found[step[key]].unflatten(-1, (heads, -1)) for key in ("x", "decay"))
    s, out = torch.zeros(heads, step["head_dim"], step["value_dim"]), []
    for t in range(len(ids)):
        s = decay[t].exp()[..., None] * s
        wrong = (v[t] - (k[t][..., None] * s).sum(1)) * found[step["beta"]][t][:, None]
        s = s + k[t][..., None] * wrong[:, None]
        out.append((q[t][..., None] * s).sum(1))
    return torch.stack(out).flatten(1)


def _xielu(step, found, weights, ids):
    x = found[step["x"]]
    return torch.where(x > 0, step["square"] * x**2, step["exponential"] * (x.expm1() - x)) + step["linear"] * x


def _scores(step, found, weights, ids):
    return F.linear(found[step["x"]], weights[step["weight"]], None if step["bias"] is None else weights[step["bias"]])


def _near(step, x):
    left, taken, numbers = x.clone(), [], []
    for _ in range(step["count"]):
        most, number = left.max(-1, keepdim=True)
        far = (most - x) / torch.maximum(x.abs(), most) > step["eps"]
        taken.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, number) * step["scale"])
        numbers.append(number.float())
        left = left.scatter(-1, number, -torch.inf)
    return torch.cat([*taken, *numbers], -1)


def _route(step, found, weights, ids):
    x = found[step["x"]]
    if step["kind"] == "near":
        return _near(step, x)
    shares = x.softmax(-1) if step["kind"] == "softmax" else x.sigmoid()
    choice = x if step["kind"] == "logits" else shares
    choice = choice if step["bias"] is None else choice + weights[step["bias"]]
    parts = choice.unflatten(-1, (step["groups"], -1))
    kept = parts.topk(step["judges"]).values.sum(-1).topk(step["kept"]).indices
    open_ = torch.zeros(parts.shape[:2]).scatter(-1, kept, 1.0)[..., None].expand_as(parts).flatten(-2)
    numbers = choice.masked_fill(open_ == 0, -torch.inf).topk(step["count"]).indices
    taken = shares.gather(-1, numbers)
    taken = taken / (taken.sum(-1, keepdim=True) + step["eps"]) if step["normal"] else taken
    return torch.cat([taken * step["scale"], numbers.float()], -1)


def _experts(step, found, weights, ids):
    taken, numbers = found[step["chosen"]].chunk(2, -1)
    packed = [weights[name] for name in step["weights"]]
    kernel, (n, k) = (KERNELS[kernel_of(packed[0])], KERNELS[kernel_of(packed[0])].unpack(packed[0]).shape)
    x = found[step["x"]].unflatten(-1, (-1, k)).expand(-1, numbers.shape[1], k)
    bias = None if step["biases"] is None else weights[step["biases"]]
    y = torch.zeros(*numbers.shape, n)
    for expert, own in enumerate(packed):
        asked = numbers == expert
        if asked.any():
            y[asked] = kernel.reference(x[asked], own, None if bias is None else bias[expert], n)
    return (taken[..., None] * y).sum(1) if step["summed"] else y.flatten(1)


_BY_OP = {
    "scores": _scores,
    "route": _route,
    "experts": _experts,
    "clip": lambda s, f, w, ids: f[s["x"]].clamp(s["least"], s["most"]),
    "embedding": _embedding,
    "norm": _norm,
    "linear": _linear,
    "columns": _columns,
    "rotary": _rotary,
    "attention": _attention,
    "recall": _recall,
    "convolve": _convolve,
    "ssd": _ssd,
    "selective": _selective,
    "delta": _delta,
    "xielu": _xielu,
    "mean": lambda s, f, w, ids: f[s["x"]].unflatten(-1, (-1, s["group"])).mean(-1),
    "positions": lambda s, f, w, ids: w[s["table"]].float()[: len(ids)],
    "join": lambda s, f, w, ids: torch.cat([f[r] for r in s["from"]], -1),
    "act": lambda s, f, w, ids: ACTS[s["kind"]](f[s["x"]]),
    "add": lambda s, f, w, ids: f[s["x"]] + f[s["y"]],
    "mul": lambda s, f, w, ids: f[s["x"]] * f[s["y"]],
    "scale": lambda s, f, w, ids: f[s["x"]] * s["by"],
    "shift": lambda s, f, w, ids: f[s["x"]] + s["by"],
    "softcap": lambda s, f, w, ids: s["at"] * (f[s["x"]] / s["at"]).tanh(),
    "add_vector": lambda s, f, w, ids: f[s["x"]] + w[s["vector"]],
    "mul_vector": lambda s, f, w, ids: f[s["x"]] * w[s["vector"]],
}
