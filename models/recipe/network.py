"""The model: Qwen2's architecture over a flat sequence of documents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ROPE_BASE = 1e6
NORM_EPSILON = 1e-6
Z_LOSS = 1e-5
MASK_BLOCK = 128


@dataclass
class Geometry:
    vocabulary: int
    layers: int = 10
    width: int = 512
    feed_forward: int = 1408
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 128
    context: int = 16384


def _weight(rows: int, columns: int, deviation: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * deviation)


class Block(nn.Module):
    """Parameter names are those that export.py maps to GGUF: n1 and n2 are norms, g, u and d the gate, up and down matrices."""

    def __init__(self, g: Geometry, dtype: torch.dtype) -> None:
        super().__init__()
        self.g, self.dtype = g, dtype
        q_width, kv_width = g.heads * g.head_size, g.kv_heads * g.head_size
        residual = 0.03 / math.sqrt(2 * g.layers)
        self.n1, self.n2 = nn.Parameter(torch.ones(g.width)), nn.Parameter(torch.ones(g.width))
        self.wq, self.wk, self.wv = (_weight(rows, g.width, 0.03) for rows in (q_width, kv_width, kv_width))
        self.bq = nn.Parameter(torch.randn(q_width) * 0.05)
        self.bk = nn.Parameter(torch.randn(kv_width) * 0.05)
        self.bv = nn.Parameter(torch.zeros(kv_width))
        self.wo = _weight(g.width, q_width, residual)
        self.wg, self.wu = _weight(g.feed_forward, g.width, 0.03), _weight(g.feed_forward, g.width, 0.03)
        self.wd = _weight(g.width, g.feed_forward, residual)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | None, row_length: int) -> Tensor:
        """`mask` selects FlexAttention with document masking; without it (None) rows of `row_length` are plain causal sequences."""
        g = self.g
        h = rms_norm(x, self.n1, self.dtype)

        def project(weight: Tensor, bias: Tensor, heads: int) -> Tensor:
            return F.linear(h, weight.to(self.dtype), bias.to(self.dtype)).view(len(x), heads, g.head_size)

        q = rotate(project(self.wq, self.bq, g.heads), cos, sin, self.dtype)
        k = rotate(project(self.wk, self.bk, g.kv_heads), cos, sin, self.dtype)
        v = project(self.wv, self.bv, g.kv_heads)
        if mask is not None:
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            attended = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        else:
            q, k, v = (t.view(-1, row_length, t.shape[1], g.head_size).transpose(1, 2) for t in (q, k, v))
            k, v = (t.repeat_interleave(g.heads // g.kv_heads, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + F.linear(attended.reshape(len(x), -1), self.wo.to(self.dtype))
        h = rms_norm(x, self.n2, self.dtype)
        gate, up = F.linear(h, self.wg.to(self.dtype)), F.linear(h, self.wu.to(self.dtype))
        return x + F.linear(F.silu(gate) * up, self.wd.to(self.dtype))


class Network(nn.Module):
    def __init__(self, g: Geometry, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.emb = _weight(g.vocabulary, g.width, 0.02)  # also the output matrix
        self.nf = nn.Parameter(torch.ones(g.width))
        self.blocks = nn.ModuleList(Block(g, dtype) for _ in range(g.layers))
        frequency = ROPE_BASE ** (-torch.arange(0, g.head_size, 2, dtype=torch.float64) / g.head_size)
        angle = torch.outer(torch.arange(g.context + 1, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def hidden(self, tokens: Tensor, position: Tensor, mask: BlockMask | None, row_length: int) -> Tensor:
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        h = F.embedding(tokens, self.emb).to(self.dtype)
        for block in self.blocks:
            h = block(h, cos, sin, mask, row_length)
        return h

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(rms_norm(h, self.nf, self.dtype), self.emb.to(self.dtype))

    def loss(self, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised (cross entropy and z-loss), and the cross entropy alone."""
        logits = self.logits(h).float()
        normaliser = torch.logsumexp(logits, -1)
        trained = targets >= 0
        n = trained.sum().clamp_min(1)
        target_logits = logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
        cross_entropy = ((normaliser - target_logits) * trained).sum() / n
        return cross_entropy + Z_LOSS * (normaliser * normaliser * trained).sum() / n, cross_entropy


def rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPSILON) * weight).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary embedding, halves paired (NEOX)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(dtype)


class DocumentMask:
    """Causal attention within documents, for FlexAttention.  Document numbers never fall along the sequence."""

    def __init__(self, n_tokens: int, device: str) -> None:
        if n_tokens % MASK_BLOCK:
            raise ValueError(f"{n_tokens} tokens are not a multiple of {MASK_BLOCK}")
        self._document = torch.zeros(n_tokens, dtype=torch.int32, device=device)
        n_blocks = n_tokens // MASK_BLOCK
        ones = torch.ones(n_blocks, n_blocks, dtype=torch.bool, device=device)
        self._lower, self._strictly_lower = ones.tril(), ones.tril(-1)

    def __call__(self, document: Tensor) -> BlockMask:
        self._document.copy_(document)
        blocks = document.view(-1, MASK_BLOCK)
        first, last = blocks[:, 0], blocks[:, -1]
        needed = self._lower & (last[None, :] >= first[:, None])
        uniform = first == last
        full = self._strictly_lower & uniform[:, None] & uniform[None, :] & (first[:, None] == first[None, :])
        return BlockMask.from_kv_blocks(
            *_block_list(needed & ~full), *_block_list(full), BLOCK_SIZE=MASK_BLOCK, mask_mod=self._visible
        )

    def _visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (self._document[query] == self._document[key])


def _block_list(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks: how many are wanted, and their numbers first in the list."""
    order = wanted.int().argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(-1).int()[None, None], order.int()[None, None]
