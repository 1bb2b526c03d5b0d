"""Small plans for the engine, and what a plan comes to by plain torch operations: no cache, no chunks."""

import torch
from effc.kernels.ops import KERNELS
from effc.kernels.packed import kernel_of
from torch.nn import functional as F

ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Built:
    """A plan under construction; `weights` are random, packed for `kernel` where a linear layer has them."""

    def __init__(self, kernel: str = "dense_linear", seed: int = 0, context: int = 128):
        self.kernel, self.generator = kernel, torch.Generator().manual_seed(seed)
        self.weights: dict[str, torch.Tensor] = {}
        self.plan = {"version": 1, "context": context, "registers": [], "slots": [], "steps": []}

    def step(self, op: str, width: int, **fields) -> int:
        self.plan["registers"].append(width)
        to = len(self.plan["registers"]) - 1
        self.plan["steps"].append({"op": op, "to": to, **fields})
        self.plan["logits"] = to
        return to

    def random(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = torch.randn(*shape, generator=self.generator) * scale + offset
        return name

    def packed(self, n: int, k: int, kernel: str = "") -> str:
        name = self.random(n, k, scale=k**-0.5)
        whole, kernel = self.weights[name], kernel or self.kernel
        if "sparse" in kernel:
            whole = whole * (torch.rand(n, k, generator=self.generator) < 0.6) * 1.3
        self.weights[name] = KERNELS[kernel].pack(whole)
        return name

    def linear(self, x: int, n: int, bias: bool = False) -> int:
        k = self.plan["registers"][x]
        return self.step("linear", n, x=x, weight=self.packed(n, k), bias=self.random(n, scale=0.1) if bias else None)

    def norm(self, x: int, kind: str = "rms", bias: bool = False, group: int = 0) -> int:
        width = self.plan["registers"][x]
        group = group or width
        return self.step(
            "norm",
            width,
            x=x,
            kind=kind,
            weight=self.random(group, scale=0.2, offset=1.0),
            eps=1e-5,
            bias=self.random(group, scale=0.1) if bias else None,
            group=group,
        )

    def attention(self, q: int, k: int, v: int, heads: int, kv: int, d: int, value_dim: int = 0, **other) -> int:
        fields = {"softcap": None, "window": None, "sinks": None, "scale": d**-0.5, **other}
        value_dim = value_dim or d
        self.plan["slots"].append({"kv_heads": kv, "head_dim": d, "value_dim": value_dim})
        return self.step(
            "attention",
            heads * value_dim,
            q=q,
            k=k,
            v=v,
            slot=len(self.plan["slots"]) - 1,
            heads=heads,
            kv_heads=kv,
            head_dim=d,
            value_dim=value_dim,
            **fields,
        )


def llama(
    kernel: str = "dense_linear",
    layers: int = 2,
    hidden: int = 48,
    heads: int = 6,
    kv: int = 2,
    d: int = 16,
    vocabulary: int = 70,
    context: int = 128,
    seed: int = 0,
    softcap: float | None = None,
    **attention,
) -> Built:
    b = Built(kernel, seed, context)
    head = b.packed(vocabulary, hidden)
    x = b.step("embedding", hidden, table=head)
    frequencies = b.random(d // 2)
    b.weights[frequencies] = 1 / 100 ** (torch.arange(d // 2) * 2 / d)
    for _ in range(layers):
        inner = b.norm(x)
        q, k, v = (b.linear(inner, n * d) for n in (heads, kv, kv))
        q, k = (
            b.step(
                "rotary",
                n * d,
                x=r,
                heads=n,
                head_dim=d,
                rotary_dim=d,
                start=0,
                scale=1.0,
                interleaved=False,
                inverse_frequencies=frequencies,
            )
            for r, n in ((q, heads), (k, kv))
        )
        x = b.step("add", hidden, x=x, y=b.linear(b.attention(q, k, v, heads, kv, d, **attention), hidden))
        inner = b.norm(x)
        gate = b.step("act", 2 * hidden, x=b.linear(inner, 2 * hidden), kind="silu")
        both = b.step("mul", 2 * hidden, x=gate, y=b.linear(inner, 2 * hidden))
        x = b.step("add", hidden, x=x, y=b.linear(both, hidden))
    logits = b.step("linear", vocabulary, x=b.norm(x), weight=head, bias=None)
    if softcap:
        b.step("softcap", vocabulary, x=logits, at=softcap)
    return b


def gpt2(
    kernel: str = "dense_linear", layers: int = 2, hidden: int = 40, heads: int = 5, vocabulary: int = 60
) -> Built:
    b = Built(kernel, 1, 64)
    d = hidden // heads
    tokens = b.step("embedding", hidden, table=b.random(vocabulary, hidden))
    x = b.step("add", hidden, x=tokens, y=b.step("positions", hidden, table=b.random(64, hidden, scale=0.3)))
    for _ in range(layers):
        fused = b.linear(b.norm(x, "layer", bias=True), 3 * hidden, bias=True)
        q, k, v = (
            b.step("columns", hidden, x=fused, start=i * hidden, block=hidden, stride=0, count=1) for i in range(3)
        )
        x = b.step("add", hidden, x=x, y=b.linear(b.attention(q, k, v, heads, heads, d), hidden, bias=True))
        inner = b.step(
            "act", 4 * hidden, x=b.linear(b.norm(x, "layer", bias=True), 4 * hidden, bias=True), kind="gelu_tanh"
        )
        x = b.step("add", hidden, x=x, y=b.linear(inner, hidden, bias=True))
    b.linear(b.norm(x, "layer", bias=True), vocabulary)
    return b


def mamba2(
    hidden: int = 40,
    heads: int = 6,
    p: int = 18,
    groups: int = 2,
    n: int = 21,
    vocabulary: int = 60,
    layers: int = 2,
    k: int = 4,
    seed: int = 2,
) -> Built:
    """Mamba-2 mixers with heads, channels and states that fill no vector."""
    b = Built("dense_linear", seed)
    inner, bc = heads * p, groups * n
    x = b.step("embedding", hidden, table=b.random(vocabulary, hidden))
    for _ in range(layers):
        both = b.linear(b.norm(x), 2 * inner + 2 * bc + heads)
        at, parts = 0, []
        for width in (inner, inner + 2 * bc, heads):
            parts.append(b.step("columns", width, x=both, start=at, block=width, stride=0, count=1))
            at += width
        mixed = b.step(
            "convolve",
            inner + 2 * bc,
            x=parts[1],
            filters=b.random(k, inner + 2 * bc, scale=0.5),
            bias=b.random(inner + 2 * bc, scale=0.1),
            silu=True,
        )
        own, left, right = (
            b.step("columns", width, x=mixed, start=start, block=width, stride=0, count=1)
            for start, width in ((0, inner), (inner, bc), (inner + bc, bc))
        )
        rates = b.random(heads)
        b.weights[rates] = -b.weights[rates].exp()
        y = b.step(
            "ssd",
            inner,
            x=own,
            dt=parts[2],
            b=left,
            c=right,
            heads=heads,
            head_dim=p,
            groups=groups,
            states=n,
            rates=rates,
            skip=b.random(heads),
            bias=b.random(heads),
            softplus=True,
            least=0.001,
            most=1.5,
        )
        gate = b.step("act", inner, x=parts[0], kind="silu")
        x = b.step("add", hidden, x=x, y=b.linear(b.norm(b.step("mul", inner, x=y, y=gate)), hidden))
    b.linear(b.norm(x), vocabulary)
    return b


def mamba(
    hidden: int = 40, channels: int = 70, n: int = 5, vocabulary: int = 60, layers: int = 2, k: int = 3, seed: int = 3
) -> Built:
    b = Built("dense_linear", seed)
    x = b.step("embedding", hidden, table=b.random(vocabulary, hidden))
    for _ in range(layers):
        inner = b.norm(x)
        mixed = b.step(
            "convolve", channels, x=b.linear(inner, channels), filters=b.random(k, channels), bias=None, silu=False
        )
        rates = b.random(channels, n)
        b.weights[rates] = -b.weights[rates].exp()
        y = b.step(
            "selective",
            channels,
            x=mixed,
            dt=b.linear(mixed, channels),
            b=b.linear(mixed, n),
            c=b.linear(mixed, n),
            gate=b.linear(inner, channels),
            states=n,
            rates=rates,
            skip=b.random(channels),
            bias=b.random(channels),
            softplus=True,
        )
        x = b.step("add", hidden, x=x, y=b.linear(y, hidden))
    b.linear(b.norm(x), vocabulary)
    return b


def mixture(
    kernel: str = "dense_linear",
    experts: int = 6,
    count: int = 2,
    hidden: int = 40,
    inner: int = 24,
    vocabulary: int = 60,
    layers: int = 2,
    seed: int = 4,
    biases: bool = True,
    slopes: bool = False,
    **route,
) -> Built:
    """Attention, then experts with a gate that is clipped, as a router of each layer chooses them."""
    b = Built(kernel, seed)
    fields = {"kind": "softmax", "groups": 1, "kept": 1, "judges": 1, "normal": True, "eps": 1e-20, "scale": 1.0}
    x = b.step("embedding", hidden, table=b.random(vocabulary, hidden))
    for _ in range(layers):
        q, k, v = (b.linear(b.norm(x), hidden) for _ in range(3))
        far = {"slopes": b.random(2, scale=0.1)} if slopes else {}
        x = b.step("add", hidden, x=x, y=b.linear(b.attention(q, k, v, 2, 2, hidden // 2, **far), hidden))
        y = b.norm(x)
        scores = b.step("scores", experts, x=y, weight=b.random(experts, hidden), bias=b.random(experts))
        chosen = b.step("route", 2 * count, x=scores, count=count, bias=b.random(experts), **{**fields, **route})
        up = [b.packed(2 * inner, hidden) for _ in range(experts)]
        down = [b.packed(hidden, inner) for _ in range(experts)]
        both = b.step(
            "experts",
            count * 2 * inner,
            x=y,
            chosen=chosen,
            weights=up,
            biases=b.random(experts, 2 * inner) if biases else None,
            summed=False,
        )
        cut = {"block": inner, "stride": 2 * inner, "count": count}
        gate, value = (b.step("columns", count * inner, x=both, start=at, **cut) for at in (0, inner))
        gate = b.step("act", count * inner, x=b.step("clip", count * inner, x=gate, least=-3.0, most=1.5), kind="silu")
        both = b.step("mul", count * inner, x=gate, y=value)
        y = b.step(
            "experts",
            hidden,
            x=both,
            chosen=chosen,
            weights=down,
            biases=b.random(experts, hidden) if biases else None,
            summed=True,
        )
        x = b.step("add", hidden, x=x, y=y)
    b.linear(b.norm(x), vocabulary)
    return b


def wanted_logits(built: Built, ids: list[int]) -> torch.Tensor:
    """The logits [tokens, vocabulary] of one sequence, all tokens at once."""
    found: dict[int, torch.Tensor] = {}
    for step in built.plan["steps"]:
        found[step["to"]] = _BY_OP[step["op"]](step, found, built.weights, torch.tensor(ids))
    return found[built.plan["logits"]]


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


def _attention(step, found, weights, ids):
    group = step["heads"] // step["kv_heads"]
    q, k, v = (
        found[step[name]].bfloat16().float().unflatten(-1, (n, -1)).transpose(0, 1)
        for name, n in (("q", step["heads"]), ("k", step["kv_heads"]), ("v", step["kv_heads"]))
    )
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT * step["scale"]  # [heads, tokens, tokens]
    if step["softcap"]:
        scores = step["softcap"] * (scores / step["softcap"]).tanh()
    back = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    if step.get("slopes"):
        scores = scores - weights[step["slopes"]][:, None, None] * back
    seen = (back >= 0) & (back < (step["window"] or len(ids)))
    scores = scores.masked_fill(~seen, float("-inf"))
    most = scores.amax(-1, keepdim=True)
    shares = (scores - most).exp()
    total = shares.sum(-1, keepdim=True)
    if step["sinks"]:
        total = total + (weights[step["sinks"]][:, None, None] - most).exp()
    weighted = shares.bfloat16().float() @ v / total  # the values meet rounded weights
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


def _scores(step, found, weights, ids):
    return F.linear(found[step["x"]], weights[step["weight"]], None if step["bias"] is None else weights[step["bias"]])


def _route(step, found, weights, ids):
    x = found[step["x"]]
    shares = x.softmax(-1) if step["kind"] == "softmax" else x.sigmoid()
    choice = shares if step["bias"] is None else shares + weights[step["bias"]]
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
    kernel, (n, k) = KERNELS[kernel_of(packed[0])], KERNELS[kernel_of(packed[0])].unpack(packed[0]).shape
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
    "convolve": _convolve,
    "ssd": _ssd,
    "selective": _selective,
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
