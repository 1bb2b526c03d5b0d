"""MultiPruner's published loop on a Llama, naively: masks on the whole model and whole forwards, nothing of effc."""

import copy

import torch

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))


class Oracle:
    """MultiPruner's loop as its code has it, on a Llama: three stages, strict `<`, sizes without norms."""

    def __init__(self, model, group, remove, split):
        self.model, self.group, self.remove, self.split = copy.deepcopy(model), group, remove, split
        config = model.config
        self.layers = self.model.model.layers
        self.total = sum(p.numel() for p in model.parameters())
        self.kv, self.dim = config.num_key_value_heads, config.head_dim
        self.repeat = config.num_attention_heads // self.kv
        self.gone = {("self_attn", i): False for i in range(len(self.layers))}
        self.gone |= {("mlp", i): False for i in range(len(self.layers))}
        self.width = [config.intermediate_size] * len(self.layers)
        self.left = [self.kv] * len(self.layers)
        self.names = []
        self.sort()

    def sort(self):
        """Order of channels and KV groups, the strongest first, by magnitudes of what makes them.

        Rows of k and v are repeated for every query head of their group before all are added up.
        """
        self.channels, self.groups = [], []
        for layer in self.layers:
            mlp, attn = layer.mlp, layer.self_attn
            strength = mlp.gate_proj.weight.abs().sum(1).double() + mlp.up_proj.weight.abs().sum(1).double()
            self.channels.append(torch.sort(-strength, stable=True).indices)
            q, k, v = (p.weight.abs().sum(1).double() for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            k, v = (rows.reshape(self.kv, 1, self.dim).repeat(1, self.repeat, 1).flatten() for rows in (k, v))
            strength = (q + k + v).reshape(self.kv, -1).mean(1)
            self.groups.append(torch.sort(-strength, stable=True).indices)

    def loss(self):
        """The loss of the model under the present masks."""
        handles = []
        for i, layer in enumerate(self.layers):
            kept = self.channels[i][: self.width[i]]
            mask = torch.zeros(len(self.channels[i])).index_fill(0, kept, 1.0)
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, a, m=mask: (a[0] * m,)))
            heads = torch.zeros(self.kv).index_fill(0, self.groups[i][: self.left[i]], 1.0)
            mask2 = heads.repeat_interleave(self.repeat * self.dim)
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a, m=mask2: (a[0] * m,)))
            if self.gone["mlp", i]:
                handles.append(layer.mlp.register_forward_hook(lambda *a: torch.zeros_like(a[2])))
            if self.gone["self_attn", i]:
                handles.append(layer.self_attn.register_forward_hook(lambda *a: (torch.zeros_like(a[2][0]), *a[2][1:])))
        with torch.no_grad():
            values = self.model(input_ids=IDS).logits[:, :-1].reshape(-1, 128)
        for handle in handles:
            handle.remove()
        return torch.nn.functional.cross_entropy(values, IDS[:, 1:].reshape(-1)).item()

    def removed(self):
        count = 0
        for i, layer in enumerate(self.layers):
            mlp = sum(p.numel() for p in layer.mlp.parameters())
            attn = sum(p.numel() for p in layer.self_attn.parameters())
            count += mlp if self.gone["mlp", i] else mlp * (96 - self.width[i]) // 96
            count += attn if self.gone["self_attn", i] else attn * (self.kv - self.left[i]) // self.kv
        return count

    def run(self):
        parts, done = self.split, 0.0
        stages = (self.blocks, self.narrower, self.fewer)
        for stage, part in zip(stages, parts, strict=True):
            done += part / sum(parts)
            while self.removed() / self.total < self.remove * done:
                options = stage()
                if not options:
                    break
                best, least = None, float("inf")
                for option in options:
                    option.do()
                    loss = self.loss()
                    option.undo()
                    if loss < least:
                        best, least = option, loss
                self.names.append(best.name)
                best.do()
        return self.names

    def blocks(self):
        return [Gone(self, key) for key, gone in self.gone.items() if not gone]

    def narrower(self):
        return [
            Less(self, self.width, i, self.group, "mlp")
            for i in range(len(self.layers))
            if not self.gone["mlp", i] and self.width[i] > self.group
        ]

    def fewer(self):
        return [
            Less(self, self.left, i, 1, "self_attn")
            for i in range(len(self.layers))
            if not self.gone["self_attn", i] and self.left[i] > 1
        ]


class Gone:
    def __init__(self, oracle, key):
        self.oracle, self.key, self.name = oracle, key, f"model.layers.{key[1]}.{key[0]}"

    def do(self):
        self.oracle.gone[self.key] = True

    def undo(self):
        self.oracle.gone[self.key] = False


class Less:
    def __init__(self, oracle, sizes, i, by, part):
        self.sizes, self.i, self.by = sizes, i, by
        self.name = f"model.layers.{i}.{part} {sizes[i]} -> {sizes[i] - by}"

    def do(self):
        self.sizes[self.i] -= self.by

    def undo(self):
        self.sizes[self.i] += self.by
