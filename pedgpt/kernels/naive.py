"""Every operator as its equation in plain torch. Read this file first: all other forms are judged by it.

Autograd differentiates these forms, so a compiler and torch.func can follow them. None is fast, and none saves memory.

Letters: B batch, T query tokens, S key tokens, H heads, G key-value heads, K head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pedgpt.kernels.attention import Layout


# Attention


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Σ_j softmax_j(q_i·k_j / √K + bias_ij) v_j over the keys that query i sees; q [B, H, T, K], k, v [B, G, S, K]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias(layout)
    return scores.masked_fill(~visible(layout)[:, None], -torch.inf).softmax(-1).to(v.dtype) @ v


def visible(layout: Layout) -> Tensor:
    """Whether query i sees key j, [B or 1, T, S]: j is not ahead, in its document, and in the trunk or its branch."""
    keys = torch.arange(layout.key_positions.shape[1], device=layout.positions.device)
    last = layout.first + keys[: layout.positions.shape[1], None]  # the key of the query itself
    seen = (keys <= last)[None]
    if layout.documents is not None and layout.key_documents is not None:
        seen = seen & (layout.documents[:, :, None] == layout.key_documents[:, None, :])
    if layout.branches is not None:
        trunk, own = layout.branches[:, None, :] == 0, layout.branches[:, :, None] == layout.branches[:, None, :]
        seen = seen & (trunk | own)
    return seen


def bias(layout: Layout) -> Tensor:
    """ALiBi (Press et al. 2022): slope · (position of key − position of query), [B, H, T, S] float32; else 0."""
    if layout.slopes is None:
        return layout.positions.new_zeros((), dtype=torch.float32)
    distance = layout.key_positions[:, None, :] - layout.positions[:, :, None]
    return layout.slopes[:, None, None] * distance[:, None]
