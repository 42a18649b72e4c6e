"""Causal attention: torch's fused kernels, and for bfloat16 on the CPU matrix products over blocks of queries.

torch's own CPU kernel multiplies bfloat16 in small pieces; whole products by oneDNN are 1.4 to 1.75 times as fast
(`python benchmarks/bench_attention.py`, two cores), and nothing but q, k, v is kept for the backward pass.

Letters: B batch, H heads, G key-value heads, T tokens, S keys, K head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels._transforms import blocks_to_count, transformed, without_numbers
from pedgpt.kernels.onednn import refuse_create_graph

# Queries of a block, and numbers that the scores of a block may have: 2 MiB in float32 stay in a processor's cache.
BLOCK, SCORES = 128, 2**19


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √K + mask) v [B, H, T, K] for q [B, H, T, K] and k, v [B, G, S, K].

    `mask` [B or 1, H or 1, T, S] forbids where it is False, or is added in the dtype of q; either way it forbids what
    lies ahead, and leaves each query a key. Without it a query sees the keys up to its own, if T = S, or all of them,
    if T = 1. In bfloat16 on the CPU differentiable once.
    """
    tokens = q.shape[2]
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (tensor.to(torch.get_autocast_dtype(q.device.type)) for tensor in (q, k, v))
    if _by_blocks(q, k, v, mask):
        return _BlockedAttention.apply(q, k, v, mask)
    assert mask is not None or tokens in (1, k.shape[2])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and tokens > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def layers_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask in the form in which every layer's `attention` of q, k, v in `dtype` takes it as it is.

    Products over blocks take it boolean; torch's kernels would each make it additive, and keep that a layer.
    """
    device, on_gpu = allowed.device.type, allowed.is_cuda
    if not allowed.is_meta and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    queries, keys = allowed.shape[-2:]
    if device == "cpu" and not on_gpu and dtype == torch.bfloat16 and BLOCK <= queries == keys and not transformed():
        return allowed
    # CUDA's kernels would copy rows that do not begin at multiples of 16 bytes.
    width = -(-keys // 8) * 8 if on_gpu else keys
    mask = torch.zeros(*allowed.shape[:-1], width, dtype=dtype, device=allowed.device)[..., :keys]
    return mask.masked_fill_(~allowed, -torch.inf)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    if transformed():
        return False
    plain = without_numbers() or all(type(t) is Tensor for t in (q, k, v))
    if not plain or any(t.is_cuda or t.is_meta or t.dtype != torch.bfloat16 for t in (q, k, v)):
        return False
    (rows, heads, tokens, size), groups = q.shape, k.shape[1]
    if tokens < BLOCK or not q.numel() or not groups or heads % groups:
        return False
    if k.shape != (rows, groups, tokens, size) or v.shape != k.shape:
        return False
    if mask is None:
        return True
    if mask.requires_grad or mask.device != q.device or mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return False
    return mask.shape in [(b, h, tokens, tokens) for b in (1, rows) for h in (1, heads)]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        out = torch.empty_like(q)
        scratch = _Scratch(q, k)
        for row, heads, groups in scratch.parts:
            keys, values = k[row, groups].contiguous(), v[row, groups].contiguous()
            for block in scratch.blocks:
                seen = keys[:, : block.stop].contiguous()
                _, p = _probabilities(scratch, q[row, heads, block], seen, mask, row, heads, block)
                found = torch.bmm(scratch.half(p), values[:, : block.stop])
                out[row, heads, block] = found.view(out[row, heads, block].shape)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("attention in bfloat16 on the CPU")
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scratch = _Scratch(q, k)
        for row, heads, groups in scratch.parts:
            keys, values = k[row, groups].contiguous(), v[row, groups].contiguous()
            dkeys = torch.zeros(keys.shape, dtype=torch.float32)
            dvalues = torch.zeros_like(dkeys)
            for block in scratch.blocks:
                seen = keys[:, : block.stop].contiguous()  # oneDNN would copy a slice for each product
                q_block, p = _probabilities(scratch, q[row, heads, block], seen, mask, row, heads, block)
                dout_block = dout[row, heads, block].reshape(q_block.shape)
                dvalues[:, : block.stop] += torch.bmm(scratch.half(p).transpose(1, 2), dout_block)
                dp = torch.bmm(dout_block, values[:, : block.stop].transpose(1, 2), out=scratch.get("half", p.shape))
                dp = scratch.get("scores", p.shape).copy_(dp)
                # ds = p ⊙ (dp − Σ p ⊙ dp) / √K
                ds = torch._softmax_backward_data(dp, p, -1, torch.float32, grad_input=dp)
                ds = scratch.half(ds.mul_(q.shape[-1] ** -0.5))
                dq[row, heads, block] = torch.bmm(ds, seen).view(q[row, heads, block].shape)
                dkeys[:, : block.stop] += torch.bmm(ds.transpose(1, 2), q_block)
            dk[row, groups], dv[row, groups] = dkeys, dvalues
        return dq, dk, dv, None


class _Scratch:
    """The order of work, and memory for one block, taken once: fresh pages cost more than the arithmetic on them."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        (rows, heads, tokens, _), groups = q.shape, k.shape[1]
        shared = heads // groups  # queries' heads over one key-value head
        at_once = max(1, SCORES // (BLOCK * tokens * shared))
        parts = [
            (row, slice(group * shared, min(group + at_once, groups) * shared), slice(group, group + at_once))
            for row in range(rows)
            for group in range(0, groups, at_once)
        ]
        blocks = [slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
        self.parts, self.blocks = blocks_to_count(parts), blocks_to_count(blocks)
        self.size = min(at_once, groups) * shared * BLOCK * tokens
        self.ahead = torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: torch.Size) -> Tensor:
        """A buffer of this shape; bfloat16 for "half" and "low", float32 for "scores" and "p"."""
        if name not in self.buffers:
            dtype = torch.bfloat16 if name in ("half", "low") else torch.float32
            self.buffers[name] = torch.empty(self.size, dtype=dtype)
        return self.buffers[name][: math.prod(shape)].view(shape)

    def half(self, values: Tensor) -> Tensor:
        return self.get("half", values.shape).copy_(values)


def _probabilities(
    scratch: _Scratch, q: Tensor, keys: Tensor, mask: Tensor | None, row: int, heads: slice, block: slice
) -> tuple[Tensor, Tensor]:
    """q [H, T, K] of one block as [G, H/G · T, K], and its probabilities [G, H/G · T, S] in float32, keys [G, S, K]."""
    (count, tokens, size), seen = q.shape, block.stop
    q = q.reshape(len(keys), -1, size)
    shape = torch.Size((*q.shape[:2], seen))
    transposed = keys.transpose(1, 2)
    # The scores as a sum of two bfloat16 numbers: rounded once, they would be too coarse for the exponential.
    high = torch.bmm(q, transposed, out=scratch.get("half", shape))
    low = torch.baddbmm(high, q, transposed, beta=-1, out=scratch.get("low", shape))
    scores = scratch.get("scores", shape).copy_(high).add_(low).mul_(size**-0.5)
    by_head = scores.view(count, tokens, seen)
    if mask is None:
        by_head[..., block] += scratch.ahead[:tokens, :tokens]
    else:
        mask = mask[row % len(mask), heads if mask.shape[1] > 1 else slice(None), block, :seen]
        by_head.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else by_head.add_(mask)
    return q, torch.softmax(scores, dim=-1, out=scratch.get("p", shape))
