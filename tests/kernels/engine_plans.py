"""Small plans for the engine."""

import torch
from effc.kernels.ops import KERNELS


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
    parallel: str = "",
    **attention,
) -> Built:
    """`parallel`: attention and MLP read one norm, and their sum is taken as GPT-NeoX or as Cohere takes it."""
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
        attended = b.linear(b.attention(q, k, v, heads, kv, d, **attention), hidden)
        if parallel != "neox":
            x = b.step("add", hidden, x=x, y=attended)
        inner = inner if parallel else b.norm(x)
        gate = b.step("act", 2 * hidden, x=b.linear(inner, 2 * hidden), kind="silu")
        both = b.step("mul", 2 * hidden, x=gate, y=b.linear(inner, 2 * hidden))
        down = b.linear(both, hidden)
        if parallel == "neox":
            down = b.step("add", hidden, x=down, y=attended)
        x = b.step("add", hidden, x=x, y=down)
    logits = b.step("linear", vocabulary, x=b.norm(x), weight=head, bias=None)
    if softcap:
        b.step("softcap", vocabulary, x=logits, at=softcap)
    return b


def gpt2(
    kernel: str = "dense_linear",
    layers: int = 2,
    hidden: int = 40,
    heads: int = 5,
    vocabulary: int = 60,
    context: int = 64,
) -> Built:
    b = Built(kernel, 1, context)
    d = hidden // heads
    tokens = b.step("embedding", hidden, table=b.random(vocabulary, hidden))
    x = b.step("add", hidden, x=tokens, y=b.step("positions", hidden, table=b.random(context, hidden, scale=0.3)))
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


def delta(
    hidden: int = 40,
    heads: int = 4,
    groups: int = 2,
    n: int = 18,
    p: int = 21,
    by_channel: bool = False,
    vocabulary: int = 60,
    layers: int = 2,
    seed: int = 5,
) -> Built:
    """Gated delta rules with heads and keys that fill no vector, and an activation bent on both sides."""
    b = Built("dense_linear", seed)
    x = b.step("embedding", hidden, table=b.random(vocabulary, hidden))
    for _ in range(layers):
        inner = b.norm(x)
        q, k = (b.norm(b.linear(inner, groups * n), group=n) for _ in range(2))
        small = b.step("scale", groups * n, x=k, by=n**-0.5)
        decays = heads * n if by_channel else heads
        decay = b.step("act", decays, x=b.linear(inner, decays), kind="softplus")
        y = b.step(
            "delta",
            heads * p,
            x=b.linear(inner, heads * p),
            decay=b.step("scale", decays, x=decay, by=-0.7),
            k=small,
            q=q,
            beta=b.step("act", heads, x=b.linear(inner, heads), kind="sigmoid"),
            heads=heads,
            groups=groups,
            head_dim=n,
            value_dim=p,
            by_channel=by_channel,
        )
        bent = b.step("xielu", heads * p, x=y, square=0.7, exponential=0.4, linear=0.5)
        x = b.step("add", hidden, x=x, y=b.linear(bent, hidden))
    b.linear(b.norm(x), vocabulary)
    return b


def translator(
    kernel: str = "dense_linear",
    layers: int = 1,
    hidden: int = 48,
    heads: int = 4,
    kv: int = 2,
    d: int = 18,
    value_dim: int = 12,
    vocabulary: int = 70,
    sources: int = 90,
    context: int = 64,
    distances: int = 9,
    seed: int = 6,
    **recall,
) -> Built:
    """An encoder and the decoder behind it; scores gain by distance, of a row of `distances` columns for a head."""
    e, b = Built(kernel, seed, sources), Built(kernel, seed + 1, context)
    b.weights = e.weights
    sizes = {"kv_heads": kv, "head_dim": d, "value_dim": value_dim}
    recall = {"heads": heads, **sizes, "scale": d**-0.5, "softcap": None, **recall}

    def attended(own: Built, x: int, whole: bool) -> int:
        inner = own.norm(x)
        q, k, v = (own.linear(inner, n) for n in (heads * d, kv * d, kv * value_dim))
        near = {"distances": own.random(heads, distances), "whole": whole}
        made = own.attention(q, k, v, heads, kv, d, value_dim, **near)
        return own.step("add", hidden, x=x, y=own.linear(made, hidden))

    def fed(own: Built, x: int) -> int:
        inner = own.step("act", 2 * hidden, x=own.linear(own.norm(x), 2 * hidden), kind="relu")
        return own.step("add", hidden, x=x, y=own.linear(inner, hidden))

    x = e.step("embedding", hidden, table=e.random(vocabulary - 3, hidden))
    for _ in range(layers):
        x = fed(e, attended(e, x, True))
    states, first = e.norm(x, "layer", bias=True), len(e.plan["slots"])
    for _ in range(layers):
        k, v = e.linear(states, kv * d), e.linear(states, kv * value_dim)
        e.plan["slots"].append(sizes)
        e.plan["steps"].append({"op": "remember", "k": k, "v": v, "slot": len(e.plan["slots"]) - 1, **sizes})
    x = b.step("embedding", hidden, table=b.random(vocabulary, hidden))
    for layer in range(layers):
        x = attended(b, x, False)
        q = b.linear(b.norm(x), heads * d)
        made = b.step("recall", heads * value_dim, q=q, slot=first + layer, **recall)
        x = fed(b, b.step("add", hidden, x=x, y=b.linear(made, hidden)))
    b.linear(b.norm(x), vocabulary)
    b.plan["encoder"] = {key: value for key, value in e.plan.items() if key not in ("version", "logits")}
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
        chosen = b.step("route", 2 * count, x=scores, count=count, **{"bias": b.random(experts), **fields, **route})
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
