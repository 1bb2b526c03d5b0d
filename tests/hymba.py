"""A small model of the Hymba kind, written from its published description, as a plain PyTorch module.

Each layer has attention heads and state-space heads that read the same input side by side; the output of each side is
normed and weighed, their mean goes through one output projection, and an MLP follows. Learned meta tokens come first.
Source: Hymba (Dong et al. 2024, arXiv 2411.13676), section 2.1 and figure 1.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn, mamba2_chunk_scan

WIDTH, HEADS, KV_HEADS, HEAD_DIM, STATES, VOCABULARY = 32, 4, 2, 8, 8, 64
INNER = HEADS * HEAD_DIM


class Mixer(nn.Module):
    """`fused`: both sides hang on one projection; else each has its own."""

    def __init__(self, fused: bool):
        super().__init__()
        self.heads, self.kv_heads, self.inner, self.states = HEADS, KV_HEADS, INNER, STATES
        self.attention_width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.convolved = INNER + 2 * STATES
        self.fused = fused
        ssm_width = INNER + self.convolved + HEADS
        if fused:
            self.in_proj = nn.Linear(WIDTH, self.attention_width + ssm_width)
        else:
            self.qkv_proj, self.ssm_proj = nn.Linear(WIDTH, self.attention_width), nn.Linear(WIDTH, ssm_width)
        self.conv = nn.Conv1d(self.convolved, self.convolved, 4, groups=self.convolved, padding=3)
        self.decay, self.skip = nn.Parameter(torch.zeros(HEADS)), nn.Parameter(torch.ones(HEADS))
        self.step_bias = nn.Parameter(torch.zeros(HEADS))
        self.attention_norm, self.ssm_norm = nn.RMSNorm(INNER), nn.RMSNorm(INNER)
        self.attention_weight, self.ssm_weight = nn.Parameter(torch.ones(INNER)), nn.Parameter(torch.ones(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        if self.fused:
            qkv, fed = self.in_proj(x).split([self.attention_width, 2 * self.inner + 2 * self.states + self.heads], -1)
        else:
            qkv, fed = self.qkv_proj(x), self.ssm_proj(x)
        attended = self.attention_norm(self.attend(qkv)) * self.attention_weight
        scanned = self.ssm_norm(self.scan(fed)) * self.ssm_weight
        return self.out_proj((attended + scanned) / 2)

    def attend(self, qkv):
        b, t, _ = qkv.shape
        q, k, v = qkv.view(b, t, -1, HEAD_DIM).transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(b, t, -1)

    def scan(self, fed):
        b, t, _ = fed.shape
        gate, fed, step = fed.split([self.inner, self.convolved, self.heads], -1)
        fed = causal_conv1d_fn(fed.transpose(1, 2), self.conv.weight.squeeze(1), self.conv.bias, activation="silu")
        fed, b_states, c_states = fed.transpose(1, 2).split([self.inner, self.states, self.states], -1)
        y = mamba2_chunk_scan(
            fed.view(b, t, -1, HEAD_DIM),
            step,
            -self.decay.exp(),
            b_states.view(b, t, 1, -1),
            c_states.view(b, t, 1, -1),
            chunk_size=8,
            D=self.skip,
            dt_bias=self.step_bias,
            dt_softplus=True,
        )
        return y.reshape(b, t, -1) * F.silu(gate)


class Layer(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.first, self.second, self.mixer = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), Mixer(fused)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x):
        x = x + self.mixer(self.first(x))
        return x + self.down(F.silu(self.up(self.second(x))))


class Hymba(nn.Module):
    def __init__(self, fused: bool = True):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.meta = nn.Parameter(torch.randn(3, WIDTH))
        self.layers = nn.ModuleList([Layer(fused) for _ in range(3)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.dummy_inputs = {"ids": torch.arange(14).view(2, 7)}

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.cat([self.meta.expand(x.shape[0], -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 3:]))
