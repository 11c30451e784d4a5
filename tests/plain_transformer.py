"""A small Transformer in plain torch, for tests that need no model library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainTransformer(nn.Module):
    """Two layers of self-attention and a feed-forward block, with a linear head on the mean token.

    Args:
        fused: whether one Linear holds query, key and value, as in timm, instead of three.
    """

    def __init__(self, fused: bool = False, width: int = 24, heads: int = 3, layers: int = 2, classes: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads, fused) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of x (batch, tokens, width)."""
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _FusedAttention(width, heads) if fused else _SeparateAttention(width, heads)
        self.mlp = _FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        feed_forward: Tensor = self.mlp(self.norm2(x))
        return x + feed_forward


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.proj = nn.Linear(width, width)

    def attend(self, *query_key_value: Tensor) -> Tensor:
        q, k, v = (torch.unflatten(t, 2, (self.num_heads, -1)).transpose(1, 2) for t in query_key_value)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class _SeparateAttention(_Attention):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.query(x), self.key(x), self.value(x))


class _FusedAttention(_Attention):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, dim=-1))
