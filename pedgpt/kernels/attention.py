"""Causal attention within documents and branches, with ALiBi; whole rows on a GPU without a [T, T] tensor.

A `Layout` says who sees whom, and keeps what the layers derive from it. FlexAttention computes whole rows on a GPU:
torch compiles the rules into its kernel, and a block mask names the blocks of queries and keys to visit. The CPU takes
one document after another. The rest goes to torch's fused kernels, with a dense mask where they need one.

Letters: B batch, H heads, G key-value heads, T queries, S keys, K head_dim, I and J blocks of queries and keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import naive
from pedgpt.kernels._dispatch import autocast_dtype, transformed, without_numbers
from pedgpt.kernels.cpu import attention as on_cpu

BLOCK = 128  # queries, and keys, of a block of FlexAttention's kernel


class Layout:
    """Which keys each query of a batch sees: `naive.visible` and `naive.bias` are its definition.

    Query i sees key j if j ≤ first + i, if both have the same document, and if j is in the trunk (branch 0) or in the
    branch of i. Every query must see a key.

    NOTE: it is no dataclass, because FSDP2 takes those apart and casts the tensors in them.
    """

    def __init__(
        self,
        positions: Tensor,  # [B, T], of the queries
        *,
        documents: Tensor | None = None,  # [B, T], without a cache
        branches: Tensor | None = None,  # [B, T], without a cache
        slopes: Tensor | None = None,  # [H] float32, for ALiBi
        first: int | Tensor = 0,  # keys before the first query, which a cache holds; int64 [B, 1, 1] where rows differ
        key_positions: Tensor | None = None,  # [1, S], of a cache; without one the keys are those of the queries
    ) -> None:
        self.positions = positions
        self.documents = documents
        self.branches = branches
        self.slopes = slopes
        self.first = first
        self.key_positions = positions if key_positions is None else key_positions
        self.queries = positions.shape[1]
        self.keys = self.key_positions.shape[1]
        self.kept: dict[tuple, Any] = {}
        # Whether causality says it all, or a single query sees all keys, so that no mask is needed.
        ends = isinstance(first, int) and first + self.queries == self.keys and self.queries in (1, self.keys)
        self.plain = ends and documents is None and branches is None and slopes is None

    def once(self, make: Callable[..., Any], *arguments: Hashable) -> Any:
        """make(self, *arguments), computed at the first call and kept for the other layers."""
        if (make, *arguments) not in self.kept:
            self.kept[make, *arguments] = make(self, *arguments)
        return self.kept[make, *arguments]

    def mask(self, dtype: torch.dtype, shared: int = 1) -> Tensor:
        """What is added to scores, [B or 1, 1 or H, T, S]; with heads as queries [B or 1, 1 or G, shared · T, S]."""
        return self.once(_mask, dtype, shared)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """softmax(q kᵀ / √K + bias) v [B, H, T, K] over what each query sees, for q [B, H, T, K] and k, v [B, G, S, K].

    Without a layout a query sees the keys up to its own, if T = S, or all of them, if T = 1.
    """
    q, k, v = (tensor.to(autocast_dtype(tensor, tensor.dtype)) for tensor in (q, k, v))
    (rows, heads, queries, size), groups = q.shape, k.shape[1]
    # Where only sizes count, a causal kernel keeps the same tensors as FlexAttention.
    if layout is None or layout.plain or (without_numbers() and q.is_cuda and queries == k.shape[2]):
        layout = None
    if q.device.type == "cpu" and queries == k.shape[2] and not transformed():
        if (found := on_cpu.attention(q, k, v, layout)) is not None:
            return found
    if layout is not None and queries == layout.keys and _suits_flex(q):
        score_mod, block_mask = layout.once(_flex_arguments)
        # One for each dtype, head size, one row or several, one length or any, with gradients or without.
        with torch._dynamo.config.patch(recompile_limit=64):
            return _flex_attention()(q, k, v, score_mod, block_mask, enable_gqa=heads != groups)
    causal = layout is None and queries > 1
    assert not causal or queries == k.shape[2]
    # Few queries: heads that share a key-value head become queries beside each other, so that nothing is expanded.
    shared = 1 if causal or queries >= BLOCK or heads % groups else heads // groups
    mask = None if layout is None else layout.mask(q.dtype, shared)
    if shared > 1:
        q = q.reshape(rows, groups, shared * queries, size)
    found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != groups)
    return found if shared == 1 else found.reshape(rows, heads, queries, size)


def _mask(layout: Layout, dtype: torch.dtype, shared: int) -> Tensor:
    mask = torch.where(naive.visible(layout)[:, None], naive.bias(layout), -torch.inf).to(dtype)
    rows, heads, queries, keys = mask.shape
    mask = mask.expand(rows, max(heads, shared), queries, keys)
    mask = mask.reshape(rows, max(heads // shared, 1), shared * queries, keys)
    # NOTE: the width is a multiple of 8, because CUDA's kernels copy rows that do not begin at 16 bytes.
    return F.pad(mask, (0, -keys % 8))[..., :keys] if mask.is_cuda and keys % 8 else mask


def _suits_flex(q: Tensor) -> bool:
    """Whether FlexAttention's kernel takes these queries, and they are enough for it."""
    fits = q.shape[2] >= BLOCK and q.shape[3] >= 16 and q.dtype != torch.float64
    return q.is_cuda and fits and not without_numbers() and not transformed()


@functools.cache
def _flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention  # Its import and that of the compiler take seconds.

    return torch.compile(flex_attention)


def _flex_arguments(layout: Layout) -> tuple[Callable | None, Any]:
    """FlexAttention's `score_mod` and `block_mask`: `naive.bias` and `naive.visible` for a query i and a key j.

    The mask lists the blocks that may hold a pair seen, by the ends of their documents and branches. Blocks that are
    seen whole have a list of their own, because there the kernel need not ask `mask_mod`.
    NOTE: both functions read tensors of one form only, because for a number or another stride torch compiles anew.
    """
    from torch.nn.attention.flex_attention import BlockMask

    at = layout.positions
    slopes = layout.slopes
    tokens = layout.queries
    given = (at * 0 if tensor is None else tensor for tensor in (layout.documents, layout.branches))
    ids = torch.stack([at, *given])  # [3, B, T]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same, branch = ids[1, b, i] == ids[1, b, j], ids[2, b, j]
        return (j <= i) & same & ((branch == 0) | (branch == ids[2, b, i]))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + slopes[h] * (ids[0, b, j] - ids[0, b, i])  # type: ignore[index]

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        chosen = chosen[:, None].int()  # [B, 1, I, J]
        return chosen.sum(-1, dtype=torch.int32), torch.argsort(chosen, dim=-1, descending=True, stable=True).int()

    index = torch.arange(tokens + -tokens % BLOCK, device=at.device).clamp(max=tokens - 1)
    blocks = ids[1:, :, index].unflatten(-1, (-1, BLOCK))
    low = blocks.amin(-1)[..., None]  # [2, B, I, 1] of queries; of keys it is [2, B, 1, J]
    high = blocks.amax(-1)[..., None]
    overlap = (low <= high.mT) & (low.mT <= high)
    equal = (low == high.mT) & (low.mT == high)
    trunk = (low.mT[1] <= 0) & (high.mT[1] >= 0)
    all_trunk = (low.mT[1] == 0) & (high.mT[1] == 0)
    start = torch.arange(0, tokens, BLOCK, device=at.device)
    some = (start <= start[:, None]) & overlap[0] & (trunk | overlap[1])
    # The last block may hold padding queries, which see nothing, so that there the kernel must call `mask_mod`.
    full = (start < start[:, None]) & (start[:, None] + BLOCK <= tokens) & equal[0] & (all_trunk | equal[1])
    lists = (*listed(some & ~full), *listed(full))
    lengths = (tokens, tokens)
    block_mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=lengths)
    return None if slopes is None else score_mod, block_mask
