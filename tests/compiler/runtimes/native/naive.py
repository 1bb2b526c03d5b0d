"""A plan run by plain torch, step by step as the plan's description reads: slow, and obviously right.

It shares no line with the engine, and only the unpacking of weights with anything of effc.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from effc.kernels.packed_linear import unpack_packed_weight
from torch import Tensor

ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "softplus": F.softplus,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "exp": torch.exp,
}


class Naive:
    """Sequences of tokens, each with keys and values of its own; `run` takes a flat batch of tokens.

    rounded   linear layers see their input as bfloat16, as the packed kernels do
    """

    backward = True

    def __init__(self, plan: Mapping[str, Any], weights: Mapping[str, Tensor], rounded: bool = False):
        self.plan, self.rounded = plan, rounded
        self.weights = {n: unpack_packed_weight(w) if w.dtype == torch.uint8 else w.float() for n, w in weights.items()}
        self.caches: dict[int, dict[int, list[tuple[Tensor, Tensor]]]] = {}
        self.lengths: dict[int, int] = {}
        self.states: dict[tuple[int, int], Tensor] = {}

    def run(self, ids: Sequence[int], sequences: Sequence[int], outputs: Sequence[bool]) -> Tensor:
        """Logits [wanted, vocabulary]; each token extends its sequence by one position."""
        found = [self._token(id, sequence) for id, sequence in zip(ids, sequences, strict=True)]
        return torch.stack([row for row, asked in zip(found, outputs, strict=True) if asked])

    def length(self, sequence: int) -> int:
        return self.lengths.get(sequence, 0)

    def forget(self, sequence: int, length: int) -> None:
        assert length in (0, self.length(sequence)) or not self.states, "a state can't be cut back"
        for slot in self.caches.get(sequence, {}).values():
            del slot[length:]
        self.lengths[sequence] = length
        self.states = {key: state for key, state in self.states.items() if length or key[0] != sequence}

    def _token(self, token: int, sequence: int) -> Tensor:
        position = self.length(sequence)
        registers: dict[int, Tensor] = {}
        for step in self.plan["steps"]:
            x = registers.get(step.get("x", step.get("q")))
            out = getattr(self, f"_{step['op']}")(step, x, registers, token, position, sequence)
            assert out.shape == (self.plan["registers"][step["to"]],), f"{step} made {tuple(out.shape)}"
            registers[step["to"]] = out
        self.lengths[sequence] = position + 1
        return registers[self.plan["logits"]]

    def _embedding(self, step, x, registers, token, position, sequence):
        return self.weights[step["table"]][token]

    def _positions(self, step, x, registers, token, position, sequence):
        return self.weights[step["table"]][position]

    def _norm(self, step, x, registers, token, position, sequence):
        pieces = x.view(-1, step["group"])
        if step["kind"] == "layer":
            pieces = pieces - pieces.mean(-1, keepdim=True)
        pieces = pieces / (pieces.square().mean(-1, keepdim=True) + step["eps"]).sqrt()
        gain, shift = (self._spread(step[key], x.numel()) for key in ("weight", "bias"))
        out = pieces.reshape(-1)
        return (out if gain is None else out * gain) + (0 if shift is None else shift)

    def _spread(self, name, width):
        return None if name is None else self.weights[name].repeat(width // len(self.weights[name]))

    def _linear(self, step, x, registers, token, position, sequence):
        x = x.bfloat16().float() if self.rounded else x
        return F.linear(x, self.weights[step["weight"]], None if step["bias"] is None else self.weights[step["bias"]])

    def _columns(self, step, x, registers, token, position, sequence):
        starts = (step["start"] + i * step["stride"] for i in range(step["count"]))
        return torch.cat([x[s : s + step["block"]] for s in starts])

    def _join(self, step, x, registers, token, position, sequence):
        return torch.cat([registers[part] for part in step["from"]])

    def _rotary(self, step, x, registers, token, position, sequence):
        heads = x.view(step["heads"], step["head_dim"]).clone()
        part = heads[:, step["start"] : step["start"] + step["rotary_dim"]]
        angle = torch.tensor(float(position)) * self.weights[step["inverse_frequencies"]]
        cos, sin = angle.cos() * step["scale"], angle.sin() * step["scale"]
        if step["interleaved"]:
            a, b = part[:, 0::2].clone(), part[:, 1::2].clone()
            part[:, 0::2], part[:, 1::2] = a * cos - b * sin, b * cos + a * sin
        else:
            a, b = (half.clone() for half in part.chunk(2, -1))
            part.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
        return heads.reshape(-1)

    def _attention(self, step, q, registers, token, position, sequence):
        kept = self.caches.setdefault(sequence, {}).setdefault(step["slot"], [])
        kept.append((registers[step["k"]].view(step["kv_heads"], -1), registers[step["v"]].view(step["kv_heads"], -1)))
        k, v = (torch.stack(parts) for parts in zip(*kept[-step["window"] if step["window"] else 0 :], strict=True))
        q, group = q.view(step["heads"], -1), step["heads"] // step["kv_heads"]
        out = []
        for head in range(step["heads"]):
            scores = k[:, head // group] @ q[head] * step["scale"]
            if step["softcap"] is not None:
                scores = step["softcap"] * torch.tanh(scores / step["softcap"])
            if step.get("slopes"):
                back = torch.arange(1 - len(scores), 1)
                scores = scores + self.weights[step["slopes"]][head] * back
            sink = torch.tensor([]) if step["sinks"] is None else self.weights[step["sinks"]][head : head + 1]
            out.append(torch.cat([scores, sink]).softmax(0)[: len(scores)] @ v[:, head // group])
        return torch.cat(out)

    def _convolve(self, step, x, registers, token, position, sequence):
        filters = self.weights[step["filters"]]
        seen = torch.cat([self._state(step, sequence, len(filters) - 1, len(x)), x[None]])
        self.states[sequence, step["to"]] = seen[1:]
        y = (seen * filters).sum(0) + (0 if step["bias"] is None else self.weights[step["bias"]])
        return F.silu(y) if step["silu"] else y

    def _ssd(self, step, x, registers, token, position, sequence):
        heads, groups = step["heads"], step["groups"]
        dt = self._time_steps(step, registers).clamp(step["least"], step["most"])
        x = x.view(heads, -1)
        b, c = (registers[step[key]].view(groups, -1).repeat_interleave(heads // groups, 0) for key in "bc")
        h = self._state(step, sequence, *x.shape, step["states"])
        h = (dt * self.weights[step["rates"]]).exp()[:, None, None] * h + (dt[:, None] * x)[..., None] * b[:, None]
        self.states[sequence, step["to"]] = h
        y = (h * c[:, None]).sum(-1)
        return (y if step["skip"] is None else y + self.weights[step["skip"]][:, None] * x).reshape(-1)

    def _selective(self, step, x, registers, token, position, sequence):
        dt, b, c = self._time_steps(step, registers), registers[step["b"]], registers[step["c"]]
        h = self._state(step, sequence, len(x), step["states"])
        h = (dt[:, None] * self.weights[step["rates"]]).exp() * h + (dt * x)[:, None] * b
        self.states[sequence, step["to"]] = h
        y = h @ c + (0 if step["skip"] is None else self.weights[step["skip"]] * x)
        return y if step["gate"] is None else y * F.silu(registers[step["gate"]])

    def _delta(self, step, v, registers, token, position, sequence):
        heads, groups = step["heads"], step["groups"]
        q, k = (registers[step[key]].view(groups, -1).repeat_interleave(heads // groups, 0) for key in "qk")
        s = self._state(step, sequence, heads, step["head_dim"], step["value_dim"])
        s = s * registers[step["decay"]].view(heads, -1, 1).exp()
        wrong = v.view(heads, -1) - torch.einsum("hn,hnp->hp", k, s)
        s = s + torch.einsum("hn,hp->hnp", k, wrong * registers[step["beta"]][:, None])
        self.states[sequence, step["to"]] = s
        return torch.einsum("hn,hnp->hp", q, s).reshape(-1)

    def _state(self, step, sequence, *shape):
        return self.states.get((sequence, step["to"]), torch.zeros(shape))

    def _time_steps(self, step, registers):
        dt = registers[step["dt"]] + (0 if step["bias"] is None else self.weights[step["bias"]])
        return F.softplus(dt) if step["softplus"] else dt

    def _act(self, step, x, registers, token, position, sequence):
        return ACTS[step["kind"]](x)

    def _add(self, step, x, registers, token, position, sequence):
        return x + registers[step["y"]]

    def _mul(self, step, x, registers, token, position, sequence):
        return x * registers[step["y"]]

    def _scale(self, step, x, registers, token, position, sequence):
        return x * step["by"]

    def _shift(self, step, x, registers, token, position, sequence):
        return x + step["by"]

    def _softcap(self, step, x, registers, token, position, sequence):
        return step["at"] * torch.tanh(x / step["at"])

    def _clip(self, step, x, registers, token, position, sequence):
        return x.clamp(step["least"], step["most"])

    def _xielu(self, step, x, registers, token, position, sequence):
        bent = torch.where(x > 0, step["square"] * x**2, step["exponential"] * (x.exp() - 1 - x))
        return bent + step["linear"] * x

    def _scores(self, step, x, registers, token, position, sequence):
        return F.linear(x, self.weights[step["weight"]], None if step["bias"] is None else self.weights[step["bias"]])

    def _mean(self, step, x, registers, token, position, sequence):
        return x.view(-1, step["group"]).mean(-1)

    def _near(self, step, x):
        left, weights, numbers = x.clone(), [], []
        for _ in range(step["count"]):
            most, number = left.max(0)
            far = (most - x) / x.abs().clamp(min=float(most)) > step["eps"]
            weights.append(left.masked_fill(far, -torch.inf).softmax(0)[number] * step["scale"])
            numbers.append(number.float())
            left[number] = -torch.inf
        return torch.stack([*weights, *numbers])

    def _route(self, step, x, registers, token, position, sequence):
        if step["kind"] == "near":
            return self._near(step, x)
        shares = x.softmax(0) if step["kind"] == "softmax" else x.sigmoid()
        scores = (x if step["kind"] == "logits" else shares) + (
            0 if step["bias"] is None else self.weights[step["bias"]]
        )
        groups = scores.view(step["groups"], -1)
        best = groups.topk(step["judges"], 1).values.sum(1).topk(step["kept"]).indices
        kept = torch.full_like(groups, -torch.inf)
        kept[best] = groups[best]
        numbers = kept.view(-1).topk(step["count"]).indices
        weights = shares[numbers]
        if step["normal"]:
            weights = weights / (weights.sum() + step["eps"])
        return torch.cat([weights * step["scale"], numbers.float()])

    def _experts(self, step, x, registers, token, position, sequence):
        weights, numbers = registers[step["chosen"]].chunk(2)
        out = []
        for place, expert in enumerate(numbers.int().tolist()):
            own = self.weights[step["weights"][expert]]
            given = x if len(x) == own.shape[1] else x.chunk(len(numbers))[place]
            given = given.bfloat16().float() if self.rounded else given
            out.append(own @ given + (0 if step["biases"] is None else self.weights[step["biases"]][expert]))
        return (weights[:, None] * torch.stack(out)).sum(0) if step["summed"] else torch.cat(out)

    def _add_vector(self, step, x, registers, token, position, sequence):
        return x + self.weights[step["vector"]]

    def _mul_vector(self, step, x, registers, token, position, sequence):
        return x * self.weights[step["vector"]]
