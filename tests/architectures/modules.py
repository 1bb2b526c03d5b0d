"""Plain PyTorch modules, as people write them: no config, no hub, inputs of their own."""

import torch
from torch import nn
from torch.nn import functional as F


class TwoTowers(nn.Module):
    """Two inputs, each with an MLP of its own, compared by a third one."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU())
        self.right = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 24), nn.GELU())
        self.score = nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3))
        self.dummy_inputs = {"left": torch.randn(2, 12), "right": torch.randn(2, 10)}

    def forward(self, left, right):
        return self.score(torch.cat([self.left(left), self.right(right)], dim=1))


class SkipConcat(nn.Module):
    """A convolutional net with a sum over a skip connection, a concatenation, depthwise and grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Sequential(
            nn.Conv2d(16, 24, 1),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 16, 1),
        )
        self.side = nn.Conv2d(16, 8, 3, padding=1)
        self.mixed = nn.Conv2d(24, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(32 * 4, 5)
        self.dummy_inputs = {"image": torch.randn(2, 3, 16, 16)}

    def forward(self, image):
        x = F.relu(self.norm(self.stem(image)))
        x = x + self.block(x)
        x = torch.cat([x, self.side(x)], dim=1)
        x = F.silu(self.grouped(F.silu(self.mixed(x))))
        return self.head(torch.flatten(self.pool(x), 1))


class FusedBlock(nn.Module):
    """Attention with four query and two KV heads out of one projection, and an MLP."""

    def __init__(self, width=32, heads=4, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * 48), nn.Linear(48, width)

    def forward(self, x):
        b, t, _ = x.shape
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = self.qkv(self.first(x)).split(sizes, dim=-1)
        q = q.view(b, t, self.heads, self.head_dim).transpose(1, 2)  # [b, h, t, d]
        k = k.view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.up(self.second(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class FusedDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([FusedBlock() for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 64, bias=False)
        self.dummy_inputs = {"ids": torch.arange(14).view(2, 7)}

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class SharedBlock(nn.Module):
    """One block that runs three times, between layers of its own."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(10, 32)
        self.norm = nn.LayerNorm(32)
        self.block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.leave = nn.Sequential(nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 4))
        self.dummy_inputs = {"x": torch.randn(2, 5, 10)}

    def forward(self, x):
        x = self.enter(x)
        for _ in range(3):
            x = x + self.block(self.norm(x))
        return self.leave(x.mean(dim=1))


PLAIN = {"two towers": TwoTowers, "skip and concat": SkipConcat, "fused qkv": FusedDecoder, "shared block": SharedBlock}
