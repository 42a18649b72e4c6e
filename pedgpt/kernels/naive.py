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
    """x·cos + (−x₂, x₁)·sin (Su et al. 2021): x [B, T, H, K] turned, halves paired as HF pairs them."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020)."""
    return F.silu(gate) * up


# The head


def linear_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, normalize: bool, ignore_index: int
) -> tuple[Tensor, ...]:
    """log softmax(z)[label] [N] with z = h Wᵀ, divided by ‖w‖ to `normalize`; the entropy; whether no z is larger.

    In float32 at least, and 0 where there is no label. Rows of zeros give z = 0. Only the first has a gradient.
    """
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if normalize:
        lengths = torch.linalg.vector_norm(weight.to(logits.dtype), dim=-1)
        logits = torch.where(lengths < SHORTEST, 0.0, logits / lengths.clamp(min=SHORTEST))
    log_p = logits.log_softmax(-1)
    supervised = labels != ignore_index
    logps = log_p.gather(-1, labels.where(supervised, 0)[:, None]).squeeze(-1)
    entropy, correct = -(log_p.exp() * log_p).sum(-1), (logps >= log_p.amax(-1)).to(logps.dtype)
    return tuple(torch.where(supervised, value, 0.0) for value in (logps, entropy.detach(), correct.detach()))
