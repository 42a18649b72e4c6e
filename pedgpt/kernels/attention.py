"""Causal attention within documents and branches, with ALiBi, and without a [T, T] tensor on a GPU.

- `Layout` says who sees whom. It is made once a batch and keeps what the layers derive from it.
- On a GPU FlexAttention computes whole rows: torch compiles the rules of `pair_rules` into its kernel, forward and
  backward, and a block mask names the blocks of 128 queries and 128 keys that the kernel visits.
- The CPU has forms of its own in `kernels/cpu/attention.py`.
- Few queries, and whatever remains, go to torch's fused kernels with a dense mask.

Letters: B batch, H heads, G key-value heads, T queries, S keys, K head_dim, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pedgpt.kernels import naive
from pedgpt.kernels._transforms import transformed
from pedgpt.kernels.cpu import attention as on_cpu

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries, and keys, of a block of FlexAttention's kernel
COMPILATIONS = 64  # per process: of dtypes, head sizes, one row or more, one length or any, with gradients or without
Made = TypeVar("Made")


@dataclass(eq=False)
class Layout:
    """Which keys each query of a batch sees: `naive.visible` and `naive.bias` are its definition.

    Query i sees key j if j ≤ first + i, if both have the same document, and if j is in the trunk (branch 0) or in the
    branch of i. Every query must see a key. `first` is a tensor [] (int64, on the device) for a static cache, in which
    S may exceed first + T.
    """

    positions: Tensor  # [B, T], of the queries
    key_positions: Tensor  # [B, S]; `positions` itself where there is no cache
    documents: Tensor | None = None  # [B, T]
    key_documents: Tensor | None = None  # [B, S]
    branches: Tensor | None = None  # [B, T], only where S = T
    slopes: Tensor | None = None  # [H] float32, for ALiBi
    first: int | Tensor = 0  # how many keys stand before the first query
    kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Find out whether plain causality says it all, or a single query sees all keys: then no mask is needed."""
        queries, keys = self.positions.shape[1], self.key_positions.shape[1]
        last = isinstance(self.first, int) and self.first + queries == keys
        rules = (self.documents, self.branches, self.slopes)
        self.plain = last and (queries == 1 or queries == keys) and all(rule is None for rule in rules)

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, computed at the first call and kept for the other layers."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def mask(self, dtype: torch.dtype, shared: int = 1) -> Tensor:
        """What attention adds to the scores, [B or 1, 1 or H/shared, shared · T, S], for q as `beside` makes it."""
        return self.once((dtype, shared), lambda: self._mask(dtype, shared))

    def _mask(self, dtype: torch.dtype, shared: int) -> Tensor:
        mask = torch.where(naive.visible(self)[:, None], naive.bias(self), -torch.inf).to(dtype)
        rows, heads, queries, keys = mask.shape
        if shared > 1:
            mask = mask.expand(rows, max(heads, shared), queries, keys).reshape(rows, -1, shared * queries, keys)
        # NOTE: the width is a multiple of 8, because CUDA's kernels copy rows that do not begin at 16 bytes.
        return F.pad(mask, (0, -keys % 8))[..., :keys] if mask.is_cuda and keys % 8 else mask

    def square(self, row: int, start: int, stop: int) -> Layout:
        """That of the tokens from `start` to `stop` of one row, where there is no cache; documents only if several."""
        part = slice(row, row + 1), slice(start, stop)
        positions, documents, branches = (
            None if x is None else x[part] for x in (self.positions, self.documents, self.branches)
        )
        assert positions is not None
        if documents is not None and bool((documents == documents[:, :1]).all()):
            documents = None
        return Layout(positions, positions, documents, documents, branches, self.slopes)

    def flex(self) -> tuple[Callable | None, BlockMask]:
        """FlexAttention's `score_mod` and `block_mask`."""
        return self.once("flex", lambda: _flex_arguments(self))


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """softmax(q kᵀ / √K + bias) v [B, H, T, K] over what each query sees, for q [B, H, T, K] and k, v [B, G, S, K].

    Without a layout a query sees the keys up to its own, if T = S, or all of them, if T = 1. In bfloat16 on the CPU
    differentiable once.
    """
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (tensor.to(torch.get_autocast_dtype(q.device.type)) for tensor in (q, k, v))
    if layout is not None and isinstance(q, FakeTensor):  # Only its sizes count: take them as one document's.
        layout = dataclasses.replace(layout, documents=None, key_documents=None, branches=None)
    if layout is not None and layout.plain:
        layout = None
    if q.device.type == "cpu" and not transformed():
        if (found := on_cpu.attention(q, k, v, layout)) is not None:
            return found
    (rows, heads, queries, size), groups = q.shape, k.shape[1]
    if layout is not None and _suits_flex(q):
        if isinstance(q, FakeTensor):  # A causal kernel keeps the same tensors.
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
        score_mod, block_mask = layout.flex()
        with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
            return _flex_attention()(q, k, v, score_mod, block_mask, enable_gqa=heads != groups)
    if layout is None and queries > 1:
        assert queries == k.shape[2]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
    if queries >= BLOCK or heads == groups or heads % groups:
        mask = None if layout is None else layout.mask(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads != groups)
    # Few queries: heads that share a key-value head become queries beside each other, so that nothing is expanded.
    shared = heads // groups
    mask = None if layout is None else layout.mask(q.dtype, shared)
    found = F.scaled_dot_product_attention(q.reshape(rows, groups, shared * queries, size), k, v, mask)
    return found.reshape(rows, heads, queries, size)


def _suits_flex(q: Tensor) -> bool:
    """Whether FlexAttention's kernel takes these queries and pays for them."""
    _, _, queries, size = q.shape
    return q.is_cuda and queries >= BLOCK and size >= 16 and q.dtype != torch.float64 and not transformed()


@functools.cache
def _flex_attention() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention  # Its import and that of the compiler take seconds.

    return torch.compile(flex_attention)


def _flex_arguments(layout: Layout) -> tuple[Callable | None, BlockMask]:
    """`naive.bias` and `naive.visible` for a pair of query i and key j, and the blocks to visit.

    NOTE: the functions read nothing but tensors that are made here in one form, because a number or another memory
    layout would make torch compile anew for each batch.
    """

    def stack(positions: Tensor, *ids: Tensor | None) -> Tensor:
        return torch.stack([positions, *(torch.zeros_like(positions) if each is None else each for each in ids)])

    queries = stack(layout.positions, layout.documents, layout.branches)  # [3, B, T]
    keys = stack(layout.key_positions, layout.key_documents, layout.branches)  # [3, B, S]
    last = layout.first + torch.arange(queries.shape[-1], device=queries.device)  # the key of a query itself
    slopes = layout.slopes

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = queries[1, b, i] == keys[1, b, j]
        branch = keys[2, b, j]
        return (j <= last[i]) & same & ((branch == 0) | (branch == queries[2, b, i]))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert slopes is not None
        return score + slopes[h] * (keys[0, b, j] - queries[0, b, i])

    return None if slopes is None else score_mod, _block_mask(queries, keys, last, mask_mod)


def _block_mask(queries: Tensor, keys: Tensor, last: Tensor, mask_mod: Callable) -> BlockMask:
    """The blocks that may hold a pair seen, found from the least and the largest number of each block.

    Blocks seen whole are listed apart, because there the kernel need not ask `mask_mod`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def ends(numbers: Tensor) -> tuple[Tensor, Tensor]:
        size = numbers.shape[-1]
        blocks = numbers[..., torch.arange(-(-size // BLOCK) * BLOCK, device=numbers.device).clamp(max=size - 1)]
        blocks = blocks.unflatten(-1, (-1, BLOCK))
        return blocks.amin(-1), blocks.amax(-1)

    def in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks each block of queries visits [B, 1, I], and the blocks, those first [B, 1, I, J]."""
        chosen = chosen[:, None].int()
        return chosen.sum(-1, dtype=torch.int32), torch.argsort(chosen, dim=-1, descending=True, stable=True).int()

    index = torch.arange(keys.shape[-1], device=keys.device)
    (low, high), (key_low, key_high) = ((x[..., :, None] for x in ends(queries)), (x[..., None, :] for x in ends(keys)))
    (first, final), (key_first, key_final) = ((x[:, None] for x in ends(last)), ends(index))
    overlap, equal = (low <= key_high) & (key_low <= high), (low == key_high) & (key_low == high)
    trunk, all_trunk = (key_low[2] <= 0) & (key_high[2] >= 0), (key_low[2] == 0) & (key_high[2] == 0)
    some = (key_first <= final) & overlap[1] & (trunk | overlap[2])
    full = (key_final <= first) & equal[1] & (all_trunk | equal[2])
    for axis, size in ((1, queries.shape[-1]), (2, keys.shape[-1])):
        if size % BLOCK:  # In the last block the kernel must ask, because it is not whole.
            full.select(axis, -1).fill_(False)
    lengths = queries.shape[-1], keys.shape[-1]
    blocks = (*in_order(some & ~full), *in_order(full))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=lengths)
