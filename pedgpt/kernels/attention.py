"""Causal attention over a layout: who sees whom in one batch, made once per forward pass and shared by all layers.

Letters: B batch, H heads, G key-value heads, T queries, S keys, K head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pedgpt.kernels import blocked_attention


@dataclass(eq=False)
class Layout:
    """Who sees whom. A query sees the keys up to its own, within its document, and on a tree within its branch."""

    positions: Tensor  # [B, T] of the queries
    key_positions: Tensor  # [B, S]; the same tensor as positions where there is no cache
    documents: Tensor | None = None  # [B, T]
    key_documents: Tensor | None = None  # [B, S]
    branches: Tensor | None = None  # [B, T], only where S == T
    slopes: Tensor | None = None  # [H] float32, ALiBi
    first: int | Tensor = 0  # keys before the first query; a 0-d tensor on the device for a static cache
    _masks: dict[torch.dtype, Tensor | None] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What attention adds or forbids, [B or 1, H or 1, T, S]; None where plain causality suffices."""
        if dtype not in self._masks:
            self._masks[dtype] = self._make_mask(dtype)
        return self._masks[dtype]

    def _make_mask(self, dtype: torch.dtype) -> Tensor | None:
        queries, keys = self.positions.shape[1], self.key_positions.shape[1]
        plain = self.key_documents is None and self.branches is None and self.slopes is None
        if plain and not isinstance(self.first, Tensor) and (queries == keys or queries == 1):
            return None
        index = torch.arange(keys, device=self.positions.device)
        allowed = (index <= index[:queries, None] + self.first)[None]
        if self.key_documents is not None:
            assert self.documents is not None
            allowed = allowed & (self.documents[:, :, None] == self.key_documents[:, None, :])
        if self.branches is not None:
            seen = self.branches[:, :, None] == self.branches[:, None, :]
            seen |= self.branches[:, None, :] == 0
            allowed = seen.logical_and_(allowed)  # in place: [B, T, T] is large
        if self.slopes is None:
            return blocked_attention.layers_mask(allowed[:, None], dtype)
        distance = (self.key_positions[:, None, :] - self.positions[:, :, None]).float()
        bias = self.slopes[:, None, None] * distance[:, None]
        return bias.masked_fill(~allowed[:, None], -torch.inf).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """softmax(q kᵀ / √K + ALiBi) v [B, H, T, K] for q [B, H, T, K] and k, v [B, G, S, K].

    Without a layout a query sees the keys up to its own, if T = S, or all of them, if T = 1.
    """
    mask = None if layout is None else layout.mask(q.dtype)
    (rows, heads, tokens, size), groups = q.shape, k.shape[1]
    if tokens > 1 or heads == groups or torch.is_autocast_enabled(q.device.type):
        return blocked_attention.attention(q, k, v, mask)
    # With one query a row, the heads that share keys are queries beside each other.
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(len(mask), groups, heads // groups, -1)
    return F.scaled_dot_product_attention(q.reshape(rows, groups, -1, size), k, v, attn_mask=mask).view(q.shape)
