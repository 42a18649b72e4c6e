"""Every operator as its equation in plain torch. Read this file first: all other forms are judged by it.

Autograd differentiates these forms, so a compiler and torch.func can follow them. None is fast, and none saves memory.

Letters: B batch, T tokens, H heads, K head_dim, D hidden, N tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 1e-12  # the length below which a row of a normalised head counts as zeros


# Pointwise operators


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / √(mean(x²) + ε) over the last axis (Zhang & Sennrich 2019), in float32 up to the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, K] (Su et al. 2021), halves paired as HF pairs them: x·cos + (−x₂, x₁)·sin."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020)."""
    return F.silu(gate) * up
