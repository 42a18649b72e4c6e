"""Causal attention: torch's fused kernels, and for bfloat16 on the CPU matrix products over blocks of queries.

torch's own CPU kernel converts bfloat16 on the way and multiplies in small pieces; whole products by oneDNN take half
of its time (`python benchmarks/bench_attention.py`) and keep nothing but q, k, v for the backward pass.

Letters: B batch, H heads, G key-value heads, T tokens, S keys, K head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √K + mask) v [B, H, T, K] for q [B, H, T, K] and k, v [B, G, S, K].

    `mask` [B or 1, H or 1, T, S] forbids where it is False, or is added in the dtype of q; either way it forbids what
    lies ahead. Without it a query sees the keys up to its own, if T = S, or all of them, if T = 1.
    """
    tokens = q.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and tokens == k.shape[2] >= 64:
        return _BlockedAttention.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and tokens > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for row, (q_row, k_row, v_row) in enumerate(zip(q, k, v, strict=True)):
            for block, q_block, p in _probabilities(q_row, k_row, None if mask is None else mask[row % len(mask)]):
                out_block = torch.bmm(p.to(q.dtype), v_row[:, : block.stop])
                out[row, :, block] = out_block.view(len(q_row), -1, q.shape[-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scale = q.shape[-1] ** -0.5
        for row, (q_row, k_row, v_row) in enumerate(zip(q, k, v, strict=True)):
            dk_row = torch.zeros(k_row.shape, dtype=torch.float32)
            dv_row = torch.zeros_like(dk_row)
            for block, q_block, p in _probabilities(q_row, k_row, None if mask is None else mask[row % len(mask)]):
                keys, values = k_row[:, : block.stop], v_row[:, : block.stop]
                dout_block = dout[row, :, block].reshape(q_block.shape)
                dv_row[:, : block.stop] += torch.bmm(p.to(q.dtype).transpose(1, 2), dout_block)
                dp = torch.bmm(dout_block, values.transpose(1, 2)).float()
                ds = torch._softmax_backward_data(dp, p, -1, torch.float32).mul_(scale).to(q.dtype)
                dq[row, :, block] = torch.bmm(ds, keys).view(len(q_row), -1, q.shape[-1])
                dk_row[:, : block.stop] += torch.bmm(ds.transpose(1, 2), q_block)
            dk[row], dv[row] = dk_row, dv_row
        return dq, dk, dv, None


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of one batch row, (block of queries, its q [G, H/G · t, K], probabilities [G, H/G · t, block.stop] in float32)."""
    heads, tokens, size = q.shape
    groups = len(k)
    width = max(32, min(128, 2**20 // (heads * tokens)))
    ahead = None
    if mask is None:
        ahead = torch.full((width, width), -torch.inf).triu_(1)
    for start in range(0, tokens, width):
        block = slice(start, min(start + width, tokens))
        q_block = q[:, block].reshape(groups, -1, size)
        keys = k[:, : block.stop].transpose(1, 2)
        # The scores in two bfloat16 parts, as precise as float32 products of bfloat16 need to be.
        high = torch.bmm(q_block, keys)
        scores = high.float().add_(torch.baddbmm(high, q_block, keys, beta=-1)).mul_(size**-0.5)
        by_head = scores.view(heads, block.stop - start, block.stop)
        if ahead is not None:
            by_head[..., start:] += ahead[: block.stop - start, : block.stop - start]
        elif mask is not None and mask.dtype == torch.bool:
            by_head.masked_fill_(~mask[:, block, : block.stop], -torch.inf)
        elif mask is not None:
            by_head += mask[:, block, : block.stop]
        yield block, q_block, torch.softmax(scores, dim=-1)
